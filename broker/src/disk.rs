//! How much disk is left, what that means, and the reserve that is kept for bad days.
//!
//! ```text
//! spare = free, less what is missing of the reserve
//!
//!     spare >= soft                             Normal
//!     spare <  soft                             Soft         credit shrinks
//!     spare <  hard                             Hard         publishes are refused
//!     free  <  min(hard, reserve)   the reserve is released: settlements and cleaning go on from it
//!     free  <  reserve / 4, reserve released    ReserveGone  nothing is handed out, not ready
//! ```
//!
//! Released space does not count as spare, or publishes would be let in to eat it. The reserve is
//! made again once there is room for it above the hard limit. That it cannot be made is no reason
//! not to start: starting needs no new space.
//!
//! What to refuse at which level is decided by those who ask; nothing is deleted here but the
//! reserve itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::config::DiskConfig;

/// What the free space allows. Each level also forbids what those before it do.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskLevel {
    #[default]
    Normal,
    /// Credit shrinks.
    Soft,
    /// Publishes are refused; deliveries, settlements and cleaning go on.
    Hard,
    /// Nothing is handed out any more, and the broker is not ready.
    ReserveGone,
}

impl DiskLevel {
    /// What an operator should know and do, if anything.
    #[must_use]
    pub fn remark(self) -> Option<String> {
        let text = match self {
            Self::Normal => return None,
            Self::Soft => "the disk is filling up: producers are slowed down",
            Self::Hard => "the disk is nearly full: publishes are refused",
            Self::ReserveGone => "the disk is full, its reserve used up: nothing is handed out",
        };
        Some(format!("{text}; free some space"))
    }
}

/// A file system's space, in bytes.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// What this user may still write.
    pub free_bytes: u64,
}

/// Whether the reserve's bytes are held back.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Reserve {
    Held,
    Released,
}

/// What to do about the reserve.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Step {
    Keep,
    Release,
    Remake,
}

fn level(space: Space, reserve: Reserve, config: &DiskConfig) -> DiskLevel {
    let spare = spare_bytes(space, reserve, config);
    if reserve == Reserve::Released && space.free_bytes < config.reserve_bytes / 4 {
        DiskLevel::ReserveGone
    } else if spare < hard_bytes(space, config) {
        DiskLevel::Hard
    } else if spare < soft_bytes(space, config) {
        DiskLevel::Soft
    } else {
        DiskLevel::Normal
    }
}

fn step(space: Space, reserve: Reserve, config: &DiskConfig) -> Step {
    let hard = hard_bytes(space, config);
    match reserve {
        Reserve::Held if space.free_bytes < hard.min(config.reserve_bytes) => Step::Release,
        // A little above, so that it does not come and go at the limit.
        Reserve::Released
            if spare_bytes(space, reserve, config) >= hard + config.reserve_bytes / 8 =>
        {
            Step::Remake
        }
        _ => Step::Keep,
    }
}

fn spare_bytes(space: Space, reserve: Reserve, config: &DiskConfig) -> u64 {
    match reserve {
        Reserve::Held => space.free_bytes,
        Reserve::Released => space.free_bytes.saturating_sub(config.reserve_bytes),
    }
}

fn soft_bytes(space: Space, config: &DiskConfig) -> u64 {
    config.soft_bytes.min(percent(space, config.soft_percent))
}

fn hard_bytes(space: Space, config: &DiskConfig) -> u64 {
    config.hard_bytes.min(percent(space, config.hard_percent))
}

fn percent(space: Space, percent: u8) -> u64 {
    space.total_bytes / 100 * u64::from(percent)
}

/// Watches the disk of the data folder and keeps its reserve.
#[derive(Debug)]
pub struct DiskMonitor {
    folder: PathBuf,
    config: DiskConfig,
    seen: Mutex<Seen>,
    /// The last attempt to make the reserve failed; said once, tried each time.
    failing: AtomicBool,
}

#[derive(Copy, Clone, Debug)]
struct Seen {
    space: Space,
    reserve: Reserve,
    level: DiskLevel,
}

impl DiskMonitor {
    /// Looks at the disk of `folder` for the first time and makes the reserve if there is room.
    ///
    /// # Errors
    /// The folder's file system cannot be asked. That there is little space is not an error.
    pub fn open(folder: &Path, config: &DiskConfig) -> io::Result<Self> {
        let reserve = reserve_found(&reserve_path(folder), config);
        if reserve == Reserve::Released {
            // One of another size would hold back space that nobody counts.
            remove(&reserve_path(folder))?;
        }
        let space = space_of(folder)?;
        let monitor = Self {
            folder: folder.to_path_buf(),
            config: config.clone(),
            seen: Mutex::new(Seen {
                space,
                reserve,
                level: level(space, reserve, config),
            }),
            failing: AtomicBool::new(false),
        };
        monitor.refresh();
        Ok(monitor)
    }

    /// Looks at the disk again, releases or makes the reserve, and tells the level. Blocks for as
    /// long as the disk takes. If it cannot be asked, what was seen last stands.
    pub fn refresh(&self) -> DiskLevel {
        let mut seen = self.seen.lock();
        match self.look(seen.reserve) {
            Ok(found) => *seen = found,
            Err(error) => tracing::warn!(%error, "cannot tell how much disk is left"),
        }
        seen.level
    }

    /// The level when the disk was last looked at.
    #[must_use]
    pub fn level(&self) -> DiskLevel {
        self.seen.lock().level
    }

    /// The space when the disk was last looked at.
    #[must_use]
    pub fn space(&self) -> Space {
        self.seen.lock().space
    }

    /// Bytes of the reserve that are held back.
    #[must_use]
    pub fn reserve_bytes(&self) -> u64 {
        match self.seen.lock().reserve {
            Reserve::Held => self.config.reserve_bytes,
            Reserve::Released => 0,
        }
    }

    fn look(&self, reserve: Reserve) -> io::Result<Seen> {
        let before = space_of(&self.folder)?;
        let reserve = match step(before, reserve, &self.config) {
            Step::Keep => reserve,
            Step::Release => self.release()?,
            Step::Remake => self.remake(),
        };
        let space = space_of(&self.folder)?;
        Ok(Seen {
            space,
            reserve,
            level: level(space, reserve, &self.config),
        })
    }

    fn release(&self) -> io::Result<Reserve> {
        remove(&reserve_path(&self.folder))?;
        tracing::warn!("the disk is nearly full: its reserve is released for settlements");
        Ok(Reserve::Released)
    }

    fn remake(&self) -> Reserve {
        let path = reserve_path(&self.folder);
        let Err(error) = preallocate(&path, self.config.reserve_bytes) else {
            self.failing.store(false, Ordering::Relaxed);
            return Reserve::Held;
        };
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, path = %path.display(), "the disk reserve cannot be made");
        }
        // Half a reserve would be space that nobody can use.
        if let Err(error) = remove(&path) {
            tracing::warn!(%error, path = %path.display(), "cannot remove half a reserve");
        }
        Reserve::Released
    }
}

fn reserve_path(folder: &Path) -> PathBuf {
    folder.join("reserve")
}

/// A reserve of another size, or one without blocks behind it, does not count.
fn reserve_found(path: &Path, config: &DiskConfig) -> Reserve {
    match path.metadata() {
        Ok(meta)
            if meta.len() == config.reserve_bytes
                && meta.blocks() * BLOCK_BYTES >= config.reserve_bytes =>
        {
            Reserve::Held
        }
        _ => Reserve::Released,
    }
}

fn preallocate(path: &Path, bytes: u64) -> io::Result<()> {
    remove(path)?;
    let file: File = OpenOptions::new().write(true).create_new(true).open(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn space_of(folder: &Path) -> io::Result<Space> {
    let found = statvfs(folder)?;
    Ok(Space {
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
    })
}

/// What `st_blocks` counts in, whatever the file system.
const BLOCK_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn space(total_bytes: u64, free_bytes: u64) -> Space {
        Space {
            total_bytes,
            free_bytes,
        }
    }

    #[test]
    fn on_a_large_disk_the_bytes_rule_and_on_a_small_one_the_percentages() {
        let config = DiskConfig::default();
        for (total, free, expected) in [
            (1_000 * GIB, 10 * GIB, DiskLevel::Normal),
            (1_000 * GIB, 10 * GIB - 1, DiskLevel::Soft),
            (1_000 * GIB, 2 * GIB, DiskLevel::Soft),
            (1_000 * GIB, 2 * GIB - 1, DiskLevel::Hard),
            (20 * GIB, 3 * GIB, DiskLevel::Normal),
            (20 * GIB, 2 * GIB, DiskLevel::Soft),
            (20 * GIB, GIB - MIB, DiskLevel::Hard),
        ] {
            let found = level(space(total, free), Reserve::Held, &config);
            assert_eq!(found, expected, "{free} of {total}");
        }
    }

    #[test]
    fn released_space_does_not_let_publishes_in_again() {
        let config = DiskConfig::default();
        let disk = 4 * GIB;
        let hard = hard_bytes(space(disk, 0), &config);
        let full = space(disk, hard - 1);
        assert_eq!(step(full, Reserve::Held, &config), Step::Release);
        let relieved = space(disk, hard - 1 + config.reserve_bytes);
        assert_eq!(level(relieved, Reserve::Released, &config), DiskLevel::Hard);
        assert_eq!(step(relieved, Reserve::Released, &config), Step::Keep);
    }

    #[test]
    fn a_used_up_reserve_stops_hand_outs_until_space_returns() {
        let config = DiskConfig::default();
        let disk = 1_000 * GIB;
        let at = |free| level(space(disk, free), Reserve::Released, &config);
        assert_eq!(at(80 * MIB - 1), DiskLevel::ReserveGone);
        assert_eq!(at(80 * MIB), DiskLevel::Hard);
        let enough = 2 * GIB + config.reserve_bytes + config.reserve_bytes / 8;
        let step_at = |free| step(space(disk, free), Reserve::Released, &config);
        assert_eq!(step_at(enough - 1), Step::Keep);
        assert_eq!(step_at(enough), Step::Remake);
    }

    proptest! {
        #[test]
        fn less_space_never_allows_more_and_the_reserve_does_not_flap(
            total in MIB..10_000 * GIB,
            free in 0..10_000 * GIB,
            less in 0..10_000 * GIB,
        ) {
            let config = DiskConfig::default();
            let (more, less) = (space(total, free.max(less)), space(total, free.min(less)));
            for reserve in [Reserve::Held, Reserve::Released] {
                prop_assert!(level(more, reserve, &config) <= level(less, reserve, &config));
            }
            if step(more, Reserve::Held, &config) == Step::Release {
                let after = space(total, more.free_bytes + config.reserve_bytes);
                prop_assert_eq!(step(after, Reserve::Released, &config), Step::Keep);
            }
            if step(more, Reserve::Released, &config) == Step::Remake {
                let after = space(total, more.free_bytes - config.reserve_bytes);
                prop_assert_eq!(step(after, Reserve::Held, &config), Step::Keep);
            }
        }
    }

    /// Limits below which no test machine's disk is.
    fn roomy() -> DiskConfig {
        DiskConfig {
            soft_percent: 0,
            hard_percent: 0,
            reserve_bytes: MIB,
            ..DiskConfig::default()
        }
    }

    #[test]
    fn the_reserve_takes_real_space_and_is_found_again() {
        let data = tempfile::tempdir().unwrap();
        let monitor = DiskMonitor::open(data.path(), &roomy()).unwrap();
        assert_eq!(monitor.level(), DiskLevel::Normal);
        assert_eq!(monitor.reserve_bytes(), MIB);
        assert!(monitor.space().free_bytes <= monitor.space().total_bytes);
        let meta = reserve_path(data.path()).metadata().unwrap();
        assert_eq!(meta.len(), MIB);
        assert!(meta.blocks() * BLOCK_BYTES >= MIB);
        assert_eq!(
            reserve_found(&reserve_path(data.path()), &roomy()),
            Reserve::Held
        );
    }

    #[test]
    fn a_sparse_or_short_reserve_is_made_again() {
        let data = tempfile::tempdir().unwrap();
        let path = reserve_path(data.path());
        File::create(&path).unwrap().set_len(MIB).unwrap();
        assert_eq!(reserve_found(&path, &roomy()), Reserve::Released);
        DiskMonitor::open(data.path(), &roomy()).unwrap();
        assert_eq!(reserve_found(&path, &roomy()), Reserve::Held);
    }

    #[test]
    fn a_disk_below_the_hard_limit_starts_without_a_reserve_and_releases_one() {
        let data = tempfile::tempdir().unwrap();
        drop(DiskMonitor::open(data.path(), &roomy()).unwrap());
        // No disk has this much free, so every one counts as nearly full.
        let tight = DiskConfig {
            soft_percent: 90,
            soft_bytes: u64::MAX,
            hard_percent: 90,
            hard_bytes: u64::MAX,
            reserve_bytes: u64::MAX / 2,
        };
        let monitor = DiskMonitor::open(data.path(), &tight).unwrap();
        assert_eq!(monitor.reserve_bytes(), 0);
        assert_eq!(monitor.level(), DiskLevel::ReserveGone);
        assert!(monitor.level().remark().is_some());
        monitor.release().unwrap();
        assert!(!reserve_path(data.path()).exists());
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        assert!(DiskMonitor::open(Path::new("/nowhere/at/all"), &roomy()).is_err());
    }
}
