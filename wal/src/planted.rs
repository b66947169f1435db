//! Bugs put in on purpose, so that the simulator can show that it catches each by the invariant that
//! it breaks.
//!
//! Without the feature `planted`, which nothing that is released turns on, [`is`] is a constant `false`
//! and the bugs are not compiled. With it one of them is chosen at run time, for the whole process.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A group counts as durable once it is written.
    AckBeforeSync,
    /// A new segment's name is not made durable.
    NoDirectorySync,
    /// A sync that failed is tried again, and believed.
    RetryFailedSync,
    /// A start does not raise the recovery epoch.
    NoRecoveryEpoch,
    /// Recovery cuts good entries that nothing vouches for.
    CutUnvouched,
    /// Recovery believes what the page cache shows.
    TrustPageCache,
    /// Records of the manifest count as durable once they are written.
    ManifestNotSynced,
    /// A snapshot covers segments that have no directory.
    SnapshotWithoutDirectory,
    /// Cleaning leaves a live row behind.
    CleaningDropsLive,
    /// A directory's checksum is not looked at.
    TrustDamagedDirectory,
}

#[cfg(feature = "planted")]
static CHOSEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(u8::MAX);

/// From now on this bug is there, or none.
#[cfg(feature = "planted")]
pub fn choose(bug: Option<Bug>) {
    let bug = bug.map_or(u8::MAX, |bug| bug as u8);
    CHOSEN.store(bug, std::sync::atomic::Ordering::SeqCst);
}

#[cfg(feature = "planted")]
pub(crate) fn is(bug: Bug) -> bool {
    CHOSEN.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

#[cfg(not(feature = "planted"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
