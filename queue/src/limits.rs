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
