//! Results of many operations that were sent together, awaited one by one.
//!
//! One allocation serves a whole batch: each operation has a slot, results come as runs of slots.
//! Runs may come in any order and never overlap.

use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// Tasks to be woken once the caller holds no lock.
#[derive(Default)]
pub struct Wakeups(Vec<Waker>);

impl Wakeups {
    pub fn push(&mut self, waker: Waker) {
        self.0.push(waker);
    }

    pub fn wake(self) {
        for waker in self.0 {
            waker.wake();
        }
    }
}

/// The slots of one batch.
#[derive(Debug)]
pub struct Slots<R> {
    inner: Mutex<Inner<R>>,
}

#[derive(Debug)]
struct Inner<R> {
    runs: Vec<Run<R>>,
    wakers: Vec<Option<Waker>>,
}

#[derive(Debug)]
struct Run<R> {
    from: u32,
    count: u32,
    result: R,
}

impl<R: Clone> Slots<R> {
    pub fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                runs: Vec::new(),
                wakers: Vec::new(),
            }),
        }
    }

    /// Resolves `count` slots from `from` on with one result.
    pub fn resolve(&self, from: u32, count: u32, result: R, wakeups: &mut Wakeups) {
        let mut inner = self.inner.lock();
        inner.runs.push(Run {
            from,
            count,
            result,
        });
        let end = inner.wakers.len().min((from + count) as usize);
        for waker in inner.wakers.iter_mut().take(end).skip(from as usize) {
            if let Some(waker) = waker.take() {
                wakeups.push(waker);
            }
        }
    }

    /// The result of a slot and its position within the run that it came with.
    pub fn poll(&self, slot: u32, context: &Context<'_>) -> Poll<(u32, R)> {
        let mut inner = self.inner.lock();
        if let Some(run) = inner.runs.iter().find(|run| run.contains(slot)) {
            return Poll::Ready((slot - run.from, run.result.clone()));
        }
        let index = slot as usize;
        if inner.wakers.len() <= index {
            inner.wakers.resize(index + 1, None);
        }
        match &mut inner.wakers[index] {
            Some(waker) => waker.clone_from(context.waker()),
            empty => *empty = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl<R> Run<R> {
    fn contains(&self, slot: u32) -> bool {
        slot >= self.from && slot - self.from < self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_run_wakes_and_answers_its_slots_only() {
        let slots = Slots::new();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let context = Context::from_waker(&waker);
        for slot in [0, 2, 3] {
            assert!(slots.poll(slot, &context).is_pending());
        }
        let mut wakeups = Wakeups::default();
        slots.resolve(2, 2, "late", &mut wakeups);
        wakeups.wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
        assert_eq!(slots.poll(3, &context), Poll::Ready((1, "late")));
        assert!(slots.poll(0, &context).is_pending());
    }
}
