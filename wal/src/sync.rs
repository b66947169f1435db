//! Where the concurrent pieces take their atomics and locks from: the real ones, or loom's.
//!
//! Only [`crate::watermark`], [`crate::gate`] and [`crate::retire`] use it; their models run under
//! `--cfg loom`, everything else only has to compile there. The two wrappers hide that one family of
//! locks can be poisoned and the other cannot. The models run by
//! `RUSTFLAGS="--cfg loom" cargo test -p millpond-wal --release --lib loom`, in about two minutes.

#[cfg(loom)]
pub(crate) use loom::sync::Arc;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::Arc;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use std::time::Duration;

#[cfg(loom)]
use loom::sync as imp;
#[cfg(not(loom))]
use parking_lot as imp;

pub(crate) type MutexGuard<'a, T> = imp::MutexGuard<'a, T>;

#[derive(Debug)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Mutex<T> {
        Mutex(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(not(loom))]
        return self.0.lock();
        #[cfg(loom)]
        return self.0.lock().expect("a model stops at its first panic");
    }
}

#[derive(Debug)]
pub(crate) struct Condvar(imp::Condvar);

impl Condvar {
    pub(crate) fn new() -> Condvar {
        Condvar(imp::Condvar::new())
    }

    /// Waits for a notification or until `timeout` has passed; may wake for nothing. Loom has no
    /// time: there it waits for the notification alone.
    pub(crate) fn wait_for<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> MutexGuard<'a, T> {
        #[cfg(not(loom))]
        {
            let mut guard = guard;
            self.0.wait_for(&mut guard, timeout);
            guard
        }
        #[cfg(loom)]
        {
            let _no_time = timeout;
            let woken = self.0.wait(guard);
            woken.expect("a model stops at its first panic")
        }
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}
