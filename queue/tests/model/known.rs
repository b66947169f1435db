//! Where the core is known to differ; each has its test in `found.rs`. All `false` is the aim.

/// What is on its way when a seek comes is handed out once more, under the same name.
pub const SEEK_FORGETS_PROPOSALS: bool = true;
/// A message that expired before it was due is still counted as scheduled.
pub const DEAD_IS_SCHEDULED: bool = true;
/// A message whose time to live is over is handed out beside its expiry.
pub const EXPIRED_IS_HANDED_OUT: bool = true;
/// Another settlement of a lease that is over is answered like a repeated one.
pub const OTHER_SETTLEMENT_IS_REPEAT: bool = true;
/// A letter of a message that was leased when its topic's limit killed it says that it never was.
pub const TRIMMED_LEASE_IS_UNCOUNTED: bool = true;
/// An ack under an older delivery number counts whoever sends it.
pub const OLD_ACK_OF_ANYBODY: bool = true;
