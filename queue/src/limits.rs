//! Named bounds of the core, with what they cost.

/// What the core is configured with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// A hash of the store's id: jitter differs from store to store and never from run to run.
    pub seed: u64,
    /// Bytes of retry state per subscription at which first deliveries stop. Default 64 MiB.
    pub retry_bytes_max: u64,
    /// Bytes of dedup state over all producers; beyond it those idle longest go. Default 64 MiB.
    pub dedup_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            retry_bytes_max: 64 << 20,
            dedup_bytes_max: 64 << 20,
        }
    }
}

/// How long a session whose connection broke, or whose broker restarted, may take to come back, in
/// milliseconds.
pub const SESSION_GRACE_MS: u64 = 10_000;
/// How long an idle producer's state is kept, in milliseconds (7 days).
pub const PRODUCER_IDLE_MS: u64 = 7 * 24 * 3_600 * 1_000;
/// Most topics, dead-letter topics included.
pub const TOPICS_MAX: usize = 100_000;
/// Most subscriptions over all topics.
pub const SUBSCRIPTIONS_MAX: usize = 100_000;
/// Most sessions of one subscription.
pub const SESSIONS_MAX: usize = 10_000;
/// Timers that one `dispatch` looks at.
pub(crate) const RINGS_MAX: usize = 256;
/// Messages that a subscription may hand out before the next one has its turn.
pub(crate) const QUANTUM: usize = 1_024;
/// Most messages in one hand-out to one session.
pub(crate) const HANDOUT_MAX: u64 = 1_024;
/// Shelves of retries that are opened, after a start, whenever a subscription has its turn: 512 retries each at
/// most, about 0.1 ms.
pub(crate) const SHELVES_OPENED_MAX: usize = 8;
/// Offsets that one hand-out looks at to find new messages among finished and delayed ones.
pub(crate) const SCAN_MAX: u64 = 65_536;
/// Most messages that one record expires or files.
pub(crate) const EXPIRE_MAX: u64 = 1_024;
/// Bytes of what time has asked for after which one `dispatch` looks at no further timers.
pub(crate) const TIMED_BYTES_TARGET: usize = 1 << 20;
/// Bytes of the records that one `dispatch` proposes, at the most; its hand-outs are the last of these.
pub const PROPOSED_BYTES_MAX: usize =
    TIMED_BYTES_TARGET + crate::effect::TIMED_BYTES_MAX + (512 << 10);
/// Most letters in one step of a redrive.
pub(crate) const REDRIVE_STEP_MAX: usize = 256;
/// Most letters that one step looks at.
pub(crate) const REDRIVE_SCAN_MAX: usize = 4_096;

const _: () = assert!(HANDOUT_MAX <= millpond_protocol::limits::DELIVER_MESSAGES_MAX as u64);
/// Letters that one page of a listing looks at.
pub(crate) const DEAD_SCAN_MAX: usize = 10_000;
/// Delayed messages that one look counts one by one, over all subscriptions that it shows; some 5 ms.
pub(crate) const DELAYS_COUNTED_MAX: u64 = 100_000;
