//! How far the log is: appended, and durable.
//!
//! Owns the two numbers and their waiters. Nothing is acknowledged and no message leaves above
//! durable, so other threads take it from here and nowhere else.
//!
//! Invariant: `durable <= appended`; both only rise, but for [`Watermark::cut`].
//!
//! The numbers are read without a lock. One thread writes them; waiting is by parking, so it belongs
//! on threads that may block.

use std::time::{Duration, Instant};

use crate::entry::LogIndex;
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering};

/// The writing end, held by the log. Dropping it closes the watermark.
#[derive(Debug)]
pub struct Watermark {
    shared: Arc<Shared>,
}

/// The reading end; clones see the same numbers.
#[derive(Clone, Debug)]
pub struct WatermarkReader {
    shared: Arc<Shared>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The entry is durable.
    Durable,
    TimedOut,
    /// The log is closed or poisoned, and the entry was not durable by then.
    Closed,
}

impl Watermark {
    /// After recovery: everything up to `durable` is there.
    pub fn new(durable: LogIndex) -> Watermark {
        Watermark {
            shared: Arc::new(Shared {
                appended: AtomicU64::new(durable.0),
                durable: AtomicU64::new(durable.0),
                waiting: Mutex::new(Waiting {
                    end: End::Open,
                    waiters: 0,
                }),
                changed: Condvar::new(),
            }),
        }
    }

    /// # Panics
    /// If `index` is below what was appended: entries are appended in order.
    pub fn set_appended(&self, index: LogIndex) {
        let before = self.shared.appended.load(Ordering::Relaxed);
        assert!(before <= index.0, "appended fell from {before} to {index}");
        self.shared.appended.store(index.0, Ordering::Release);
    }

    /// Wakes who waits for it.
    ///
    /// # Panics
    /// If `index` is below what was durable or above what was appended.
    pub fn set_durable(&self, index: LogIndex) {
        let before = self.shared.durable.load(Ordering::Relaxed);
        let appended = self.shared.appended.load(Ordering::Relaxed);
        assert!(
            before <= index.0 && index.0 <= appended,
            "durable {before} cannot become {index} with {appended} appended"
        );
        self.shared
            .change(|_| self.shared.durable.store(index.0, Ordering::Release));
    }

    /// Entries above `last` were cut off for good.
    pub fn cut(&self, last: LogIndex) {
        // Durable first, so that no reader sees it above appended.
        self.shared.durable.fetch_min(last.0, Ordering::AcqRel);
        self.shared.appended.fetch_min(last.0, Ordering::AcqRel);
    }

    /// Nothing will become durable any more; waiters return.
    pub fn close(&self) {
        self.shared.change(|waiting| waiting.end = End::Closed);
    }

    pub fn reader(&self) -> WatermarkReader {
        WatermarkReader {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Watermark {
    fn drop(&mut self) {
        self.close();
    }
}

impl WatermarkReader {
    pub fn durable(&self) -> LogIndex {
        LogIndex(self.shared.durable.load(Ordering::Acquire))
    }

    pub fn appended(&self) -> LogIndex {
        LogIndex(self.shared.appended.load(Ordering::Acquire))
    }

    /// Parks until `index` is durable, the log is closed or `timeout` has passed.
    pub fn wait_durable(&self, index: LogIndex, timeout: Duration) -> Waited {
        if self.durable() >= index {
            return Waited::Durable;
        }
        let deadline = Instant::now() + timeout;
        let mut waiting = self.shared.waiting.lock();
        waiting.waiters += 1;
        let waited = loop {
            // Under the lock that `set_durable` takes: a change is seen here or wakes the wait below.
            if self.durable() >= index {
                break Waited::Durable;
            }
            if waiting.end == End::Closed {
                break Waited::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Waited::TimedOut;
            }
            waiting = self.shared.changed.wait_for(waiting, left);
        };
        waiting.waiters -= 1;
        waited
    }
}

#[derive(Debug)]
struct Shared {
    appended: AtomicU64,
    durable: AtomicU64,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug)]
struct Waiting {
    end: End,
    /// A commit that nobody waits for costs no wake-up call.
    waiters: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Closed,
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.waiting.lock();
        change(&mut waiting);
        if waiting.waiters > 0 {
            self.changed.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn numbers_are_seen_by_all_readers() {
        let watermark = Watermark::new(LogIndex(5));
        let reader = watermark.reader();
        assert_eq!(
            (reader.durable(), reader.appended()),
            (LogIndex(5), LogIndex(5))
        );
        watermark.set_appended(LogIndex(9));
        watermark.set_durable(LogIndex(7));
        let reader = reader.clone();
        assert_eq!(
            (reader.durable(), reader.appended()),
            (LogIndex(7), LogIndex(9))
        );
        watermark.cut(LogIndex(6));
        assert_eq!(
            (reader.durable(), reader.appended()),
            (LogIndex(6), LogIndex(6))
        );
    }

    #[test]
    fn a_wait_ends_when_the_entry_is_durable() {
        let watermark = Watermark::new(LogIndex(0));
        let reader = watermark.reader();
        let waiter = std::thread::spawn(move || {
            let waited = reader.wait_durable(LogIndex(3), LONG);
            (waited, reader.durable())
        });
        watermark.set_appended(LogIndex(3));
        for index in 1..=3 {
            watermark.set_durable(LogIndex(index));
        }
        assert_eq!(waiter.join().unwrap(), (Waited::Durable, LogIndex(3)));
    }

    #[test]
    fn a_wait_ends_when_the_log_is_gone() {
        let watermark = Watermark::new(LogIndex(2));
        let reader = watermark.reader();
        let waiter = {
            let reader = reader.clone();
            std::thread::spawn(move || reader.wait_durable(LogIndex(3), LONG))
        };
        drop(watermark);
        assert_eq!(waiter.join().unwrap(), Waited::Closed);
        assert_eq!(reader.wait_durable(LogIndex(2), LONG), Waited::Durable);
        assert_eq!(reader.wait_durable(LogIndex(3), LONG), Waited::Closed);
    }

    #[test]
    fn a_wait_ends_in_time() {
        let watermark = Watermark::new(LogIndex(0));
        let waited = watermark
            .reader()
            .wait_durable(LogIndex(1), Duration::from_millis(1));
        assert_eq!(waited, Waited::TimedOut);
    }

    #[test]
    #[should_panic(expected = "durable 1 cannot become 3 with 2 appended")]
    fn durable_never_passes_appended() {
        let watermark = Watermark::new(LogIndex(1));
        watermark.set_appended(LogIndex(2));
        watermark.set_durable(LogIndex(3));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let watermark = Watermark::new(LogIndex(0));
            let waiters: Vec<_> = [1, 2]
                .map(|index| {
                    let reader = watermark.reader();
                    thread::spawn(move || {
                        let waited = reader.wait_durable(LogIndex(index), LONG);
                        assert_eq!(waited, Waited::Durable);
                        assert!(reader.durable().0 >= index);
                    })
                })
                .into();
            watermark.set_appended(LogIndex(2));
            watermark.set_durable(LogIndex(1));
            watermark.set_durable(LogIndex(2));
            for waiter in waiters {
                waiter.join().unwrap();
            }
        });
    }

    #[test]
    fn closing_ends_every_wait_and_durable_wins() {
        loom::model(|| {
            let watermark = Watermark::new(LogIndex(0));
            let spawn = |index| {
                let reader = watermark.reader();
                thread::spawn(move || reader.wait_durable(LogIndex(index), LONG))
            };
            let (first, second) = (spawn(1), spawn(2));
            watermark.set_appended(LogIndex(1));
            watermark.set_durable(LogIndex(1));
            drop(watermark);
            assert_eq!(first.join().unwrap(), Waited::Durable);
            assert_eq!(second.join().unwrap(), Waited::Closed);
        });
    }

    #[test]
    fn an_error_wakes_all_who_wait() {
        loom::model(|| {
            let watermark = Watermark::new(LogIndex(0));
            let waiters = [1, 2].map(|index| {
                let reader = watermark.reader();
                thread::spawn(move || reader.wait_durable(LogIndex(index), LONG))
            });
            watermark.set_appended(LogIndex(2));
            // What a failed sync does: nothing becomes durable any more.
            watermark.close();
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap(), Waited::Closed);
            }
        });
    }

    #[test]
    fn who_sees_an_index_as_durable_sees_what_was_written_before() {
        loom::model(|| {
            let entry = Arc::new(loom::cell::UnsafeCell::new(0));
            let watermark = Watermark::new(LogIndex(0));
            let readers = [Wait::Look, Wait::Park].map(|wait| {
                let (entry, reader) = (entry.clone(), watermark.reader());
                thread::spawn(move || {
                    if wait == Wait::Park {
                        assert_eq!(reader.wait_durable(LogIndex(1), LONG), Waited::Durable);
                    }
                    if reader.durable() >= LogIndex(1) {
                        // Loom's cell panics if this may overlap with the write below.
                        entry.with(|at| assert!(!at.is_null()));
                    }
                })
            });
            entry.with_mut(|at| assert!(!at.is_null()));
            watermark.set_appended(LogIndex(1));
            watermark.set_durable(LogIndex(1));
            for reader in readers {
                reader.join().unwrap();
            }
        });
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Wait {
        Look,
        Park,
    }

    #[test]
    fn durable_is_never_seen_above_appended() {
        loom::model(|| {
            let watermark = Watermark::new(LogIndex(0));
            let reader = watermark.reader();
            let seen = thread::spawn(move || {
                let durable = reader.durable();
                assert!(durable <= reader.appended());
            });
            for index in 1..=2 {
                watermark.set_appended(LogIndex(index));
                watermark.set_durable(LogIndex(index));
            }
            seen.join().unwrap();
        });
    }
}
