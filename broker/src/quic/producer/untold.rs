//! What a publish stream took in and has not told the end of: answers that wait to be written, and what
//! they will be answers to.
//!
//! ```text
//! untold <= UNTOLD_BYTES_MAX + one frame's        beyond it the stream is not read
//! untold <= FREE_BYTES + paid                     before another frame is read
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use millpond_protocol::limits::BATCH_MESSAGES_MAX;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::memory::Permit;

/// Most that the answers of a stream may take: those to 30,000 publishes of one message, or to 300,000
/// messages in large batches. Several groups are no more.
const UNTOLD_BYTES_MAX: u64 = 8 << 20;
/// What is free of it: the answers to a few small publishes cost less than their accounting.
const FREE_BYTES: u64 = 16 << 10;
/// What is paid for at once beyond that.
pub const STEP_BYTES: u64 = 64 << 10;
/// What an answer takes in the mailbox, with the text of a refusal.
const ANSWER_BYTES: u64 = 256;
/// What it takes besides for each message: those of one publish may all have been there already, each at
/// another place.
const ROW_BYTES: u64 = size_of::<millpond_protocol::hot::AckRow>() as u64;

const _: () = assert!(answer_bytes(BATCH_MESSAGES_MAX as u64) <= UNTOLD_BYTES_MAX);

/// What the answer to so many messages may take; to none, that to an opening, or the end of a producer.
pub const fn answer_bytes(messages: u64) -> u64 {
    ANSWER_BYTES + ROW_BYTES * messages
}

#[derive(Default)]
pub struct Untold {
    bytes: AtomicU64,
    paid: Mutex<Vec<Permit>>,
    fewer: Notify,
}

impl Untold {
    /// There is to be an answer of so many bytes.
    pub fn owe(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Answers of so many bytes have been written.
    pub fn told(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let left = self.bytes.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        let steps = left.saturating_sub(FREE_BYTES).div_ceil(STEP_BYTES);
        self.paid.lock().truncate(steps as usize);
        self.fewer.notify_one();
    }

    /// Waits until another frame may be read.
    pub async fn few(&self) {
        while self.bytes.load(Ordering::Relaxed) >= UNTOLD_BYTES_MAX {
            self.fewer.notified().await;
        }
    }

    /// Whether `STEP_BYTES` more are to be paid for before another frame is read.
    pub fn is_unpaid(&self) -> bool {
        let bytes = self.bytes.load(Ordering::Relaxed);
        bytes > FREE_BYTES && bytes > FREE_BYTES + STEP_BYTES * self.paid.lock().len() as u64
    }

    pub fn pay(&self, step: Permit) {
        self.paid.lock().push(step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::{Class, MemoryBudget};

    #[tokio::test]
    async fn a_stream_is_read_again_once_its_answers_are_written() {
        let untold = Untold::default();
        let is_read = async || {
            tokio::select! {
                biased;
                () = untold.few() => true,
                () = std::future::ready(()) => false,
            }
        };
        untold.owe(UNTOLD_BYTES_MAX - 1);
        assert!(is_read().await);
        untold.owe(answer_bytes(1));
        assert!(!is_read().await);
        untold.told(answer_bytes(1));
        assert!(is_read().await);
    }

    #[test]
    fn what_is_untold_is_paid_for_until_it_is_told() {
        let memory = MemoryBudget::new(&MemoryConfig::default());
        let share = memory.connection(None);
        let untold = Untold::default();
        let pay = || {
            while untold.is_unpaid() {
                let step = memory.try_acquire(STEP_BYTES, Class::Inbound, &share);
                untold.pay(step.unwrap());
            }
            memory.used(Class::Inbound)
        };
        untold.owe(FREE_BYTES);
        assert_eq!(pay(), 0);
        untold.owe(1);
        assert_eq!(pay(), STEP_BYTES);
        untold.owe(2 * STEP_BYTES);
        assert_eq!(pay(), 3 * STEP_BYTES);
        untold.told(2 * STEP_BYTES);
        assert_eq!(memory.used(Class::Inbound), STEP_BYTES);
        untold.told(FREE_BYTES + 1);
        assert_eq!(memory.used(Class::Inbound), 0);
    }
}
