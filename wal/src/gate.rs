//! A gate that lets through only so much at a time.
//!
//! Owns a bounded amount of credit, messages and bytes, and the queue of those who wait for it. What is
//! let in is debited before it takes memory and returned when its [`Permit`] is dropped.
//!
//! Invariants: `0 <= in use <= capacity` for both kinds; who asked first is served first, so a large
//! request is not starved by small ones, and `try_acquire` does not overtake; at most `waiters_max` wait.
//!
//! Waiting is a plain [`Future`] that a task polls, of no runtime; a thread that may not wait uses
//! [`CreditGate::try_acquire`]. It deliberately knows nothing of who asks or why it is short of
//! credit: shares per connection are several gates.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use thiserror::Error;

use crate::sync::{Arc, Mutex, MutexGuard};

/// An amount of both kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    pub messages: u64,
    pub bytes: u64,
}

impl Credit {
    fn fits_in(self, room: Credit) -> bool {
        self.messages <= room.messages && self.bytes <= room.bytes
    }

    fn add(&mut self, more: Credit) {
        self.messages += more.messages;
        self.bytes += more.bytes;
    }

    fn take(&mut self, less: Credit) {
        self.messages -= less.messages;
        self.bytes -= less.bytes;
    }
}

/// Why credit was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    #[error("no credit is free now; wait, or try again later")]
    Busy,
    #[error("as many as may wait for credit are waiting; try again later")]
    Crowded,
    #[error("more was asked for than the gate lets through at all; send less at a time")]
    TooLarge,
    #[error("the gate is closed; nothing is let through any more")]
    Closed,
}

/// Clones are the same gate.
#[derive(Clone, Debug)]
pub struct CreditGate {
    state: Arc<Mutex<State>>,
}

impl CreditGate {
    /// A gate with all of `capacity` free.
    pub fn new(capacity: Credit, waiters_max: usize) -> CreditGate {
        CreditGate {
            state: Arc::new(Mutex::new(State {
                capacity,
                free: capacity,
                waiters_max,
                next_ticket: 0,
                waiting: BTreeMap::new(),
                granted: BTreeMap::new(),
                end: End::Open,
            })),
        }
    }

    /// Takes credit if it is free and nobody waits for any.
    pub fn try_acquire(&self, wanted: Credit) -> Result<Permit, Refused> {
        let mut state = self.state.lock();
        state.admit(wanted)?;
        if !state.waiting.is_empty() || !wanted.fits_in(state.free) {
            return Err(Refused::Busy);
        }
        state.free.take(wanted);
        Ok(self.permit(wanted))
    }

    /// Waits for credit. Cancel-safe: dropped, it leaves the queue and takes nothing along. The place
    /// in the queue is taken at the first poll.
    pub fn acquire(&self, wanted: Credit) -> Acquire {
        Acquire {
            gate: self.clone(),
            wanted,
            ticket: None,
        }
    }

    /// Everyone who waits, now or later, is refused; permits stay good.
    pub fn close(&self) {
        let wakers = {
            let mut state = self.state.lock();
            state.end = End::Closed;
            std::mem::take(&mut state.waiting)
        };
        for waiter in wakers.into_values() {
            waiter.waker.wake();
        }
    }

    /// What could be taken now if nobody waited.
    pub fn free(&self) -> Credit {
        self.state.lock().free
    }

    /// How many wait.
    pub fn waiters(&self) -> usize {
        self.state.lock().waiting.len()
    }

    fn permit(&self, credit: Credit) -> Permit {
        Permit {
            gate: self.clone(),
            credit,
        }
    }

    fn give_back(&self, credit: Credit) {
        let mut state = self.state.lock();
        state.free.add(credit);
        assert!(
            state.free.fits_in(state.capacity),
            "more was given back than was taken"
        );
        grant_and_wake(state);
    }
}

/// Credit taken; dropping it gives it back.
#[must_use = "credit is given back when the permit is dropped"]
#[derive(Debug)]
pub struct Permit {
    gate: CreditGate,
    credit: Credit,
}

impl Permit {
    pub fn credit(&self) -> Credit {
        self.credit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.give_back(self.credit);
    }
}

/// A place in the queue of a gate.
#[must_use = "a future does nothing unless it is polled"]
#[derive(Debug)]
pub struct Acquire {
    gate: CreditGate,
    wanted: Credit,
    /// `None` before the first poll and after the last.
    ticket: Option<Ticket>,
}

impl Future for Acquire {
    type Output = Result<Permit, Refused>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(ticket) = self.ticket else {
            return self.first_poll(cx.waker());
        };
        let mut state = self.gate.state.lock();
        if state.granted.remove(&ticket).is_some() {
            drop(state);
            self.ticket = None;
            return Poll::Ready(Ok(self.gate.permit(self.wanted)));
        }
        match state.waiting.get_mut(&ticket) {
            Some(waiter) => {
                waiter.waker.clone_from(cx.waker());
                Poll::Pending
            }
            None => {
                drop(state);
                self.ticket = None;
                Poll::Ready(Err(Refused::Closed))
            }
        }
    }
}

impl Acquire {
    fn first_poll(&mut self, waker: &Waker) -> Poll<Result<Permit, Refused>> {
        match self.gate.try_acquire(self.wanted) {
            Err(Refused::Busy) => {}
            decided => return Poll::Ready(decided),
        }
        let mut state = self.gate.state.lock();
        if let Err(refused) = state.admit(self.wanted) {
            return Poll::Ready(Err(refused));
        }
        if state.waiting.len() >= state.waiters_max {
            return Poll::Ready(Err(Refused::Crowded));
        }
        let ticket = Ticket(state.next_ticket);
        state.next_ticket += 1;
        let waiter = Waiter {
            wanted: self.wanted,
            waker: waker.clone(),
        };
        state.waiting.insert(ticket, waiter);
        self.ticket = Some(ticket);
        // Credit may have come back since the try above; then this waker is called at once.
        grant_and_wake(state);
        Poll::Pending
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else {
            return;
        };
        let mut state = self.gate.state.lock();
        if let Some(credit) = state.granted.remove(&ticket) {
            state.free.add(credit);
        } else {
            state.waiting.remove(&ticket);
        }
        // Whoever stood behind it may fit now.
        grant_and_wake(state);
    }
}

#[derive(Debug)]
struct State {
    capacity: Credit,
    free: Credit,
    waiters_max: usize,
    next_ticket: u64,
    /// In the order of asking.
    waiting: BTreeMap<Ticket, Waiter>,
    /// Debited for waiters that were woken and have not been polled since.
    granted: BTreeMap<Ticket, Credit>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ticket(u64);

#[derive(Debug)]
struct Waiter {
    wanted: Credit,
    waker: Waker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Closed,
}

impl State {
    fn admit(&self, wanted: Credit) -> Result<(), Refused> {
        if self.end == End::Closed {
            Err(Refused::Closed)
        } else if !wanted.fits_in(self.capacity) {
            Err(Refused::TooLarge)
        } else {
            Ok(())
        }
    }

    /// Serves the queue from its front for as long as there is credit.
    fn grant(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        while let Some(first) = self.waiting.first_entry() {
            let wanted = first.get().wanted;
            if !wanted.fits_in(self.free) {
                break;
            }
            let (ticket, waiter) = first.remove_entry();
            self.free.take(wanted);
            self.granted.insert(ticket, wanted);
            wakers.push(waiter.waker);
        }
        wakers
    }
}

/// Wakers run foreign code, so they are called without the lock.
fn grant_and_wake(mut state: MutexGuard<'_, State>) {
    let wakers = state.grant();
    drop(state);
    wakers.into_iter().for_each(Waker::wake);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    const CAPACITY: Credit = credit(10, 1000);

    const fn credit(messages: u64, bytes: u64) -> Credit {
        Credit { messages, bytes }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    struct Waiting {
        future: Pin<Box<Acquire>>,
        wakes: std::sync::Arc<Wakes>,
    }

    impl Waiting {
        fn on(gate: &CreditGate, wanted: Credit) -> Waiting {
            Waiting {
                future: Box::pin(gate.acquire(wanted)),
                wakes: std::sync::Arc::default(),
            }
        }

        fn poll(&mut self) -> Poll<Result<Permit, Refused>> {
            let waker = Waker::from(self.wakes.clone());
            self.future.as_mut().poll(&mut Context::from_waker(&waker))
        }

        fn permit(&mut self) -> Permit {
            match self.poll() {
                Poll::Ready(Ok(permit)) => permit,
                other => panic!("expected a permit, got {other:?}"),
            }
        }

        fn wakes(&self) -> usize {
            self.wakes.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn credit_is_bounded_in_both_kinds_and_comes_back() {
        let gate = CreditGate::new(CAPACITY, 10);
        let most = gate.try_acquire(credit(9, 100)).unwrap();
        assert_eq!(gate.try_acquire(credit(2, 1)).map(drop), Err(Refused::Busy));
        assert_eq!(
            gate.try_acquire(credit(1, 901)).map(drop),
            Err(Refused::Busy)
        );
        let rest = gate.try_acquire(credit(1, 900)).unwrap();
        assert_eq!(rest.credit(), credit(1, 900));
        assert_eq!(gate.free(), credit(0, 0));
        drop((most, rest));
        assert_eq!(gate.free(), CAPACITY);
    }

    #[test]
    fn more_than_all_is_refused_at_once() {
        let gate = CreditGate::new(CAPACITY, 10);
        let refused = gate.try_acquire(credit(1, 1001));
        assert_eq!(refused.map(drop), Err(Refused::TooLarge));
        let waited = Waiting::on(&gate, credit(11, 1)).poll();
        assert!(matches!(waited, Poll::Ready(Err(Refused::TooLarge))));
        assert_eq!(gate.waiters(), 0);
    }

    #[test]
    fn who_asked_first_is_served_first() {
        let gate = CreditGate::new(CAPACITY, 10);
        let held = gate.try_acquire(credit(1, 900)).unwrap();
        let mut large = Waiting::on(&gate, credit(1, 1000));
        let mut small = Waiting::on(&gate, credit(1, 10));
        assert!(large.poll().is_pending() && small.poll().is_pending());
        let overtaking = gate.try_acquire(credit(1, 10));
        assert_eq!(overtaking.map(drop), Err(Refused::Busy));

        drop(held);
        assert_eq!((large.wakes(), small.wakes()), (1, 0));
        let permit = large.permit();
        assert!(small.poll().is_pending());
        drop(permit);
        assert_eq!(small.permit().credit(), credit(1, 10));
    }

    #[test]
    fn a_cancelled_wait_takes_nothing_along() {
        let gate = CreditGate::new(CAPACITY, 10);
        let held = gate.try_acquire(CAPACITY).unwrap();
        let mut first = Waiting::on(&gate, CAPACITY);
        let mut second = Waiting::on(&gate, credit(1, 1));
        assert!(first.poll().is_pending() && second.poll().is_pending());
        drop(held);
        assert_eq!(first.wakes(), 1, "granted, not yet polled");
        drop(first);
        assert_eq!(second.wakes(), 1);
        drop(second.permit());
        assert_eq!(gate.free(), CAPACITY);
        assert_eq!(gate.waiters(), 0);
    }

    #[test]
    fn leaving_the_front_lets_the_next_in() {
        let gate = CreditGate::new(CAPACITY, 10);
        let _held = gate.try_acquire(credit(1, 500)).unwrap();
        let mut large = Waiting::on(&gate, credit(1, 600));
        let mut small = Waiting::on(&gate, credit(1, 400));
        assert!(large.poll().is_pending() && small.poll().is_pending());
        drop(large);
        assert_eq!(small.permit().credit(), credit(1, 400));
    }

    #[test]
    fn the_queue_is_bounded() {
        let gate = CreditGate::new(CAPACITY, 1);
        let _held = gate.try_acquire(CAPACITY).unwrap();
        let mut first = Waiting::on(&gate, credit(1, 1));
        assert!(first.poll().is_pending());
        let second = Waiting::on(&gate, credit(1, 1)).poll();
        assert!(matches!(second, Poll::Ready(Err(Refused::Crowded))));
    }

    #[test]
    fn closing_refuses_all_who_wait_and_all_who_come() {
        let gate = CreditGate::new(CAPACITY, 10);
        let held = gate.try_acquire(CAPACITY).unwrap();
        let mut waiting = Waiting::on(&gate, credit(1, 1));
        assert!(waiting.poll().is_pending());
        gate.close();
        assert_eq!(waiting.wakes(), 1);
        assert!(matches!(waiting.poll(), Poll::Ready(Err(Refused::Closed))));
        drop(held);
        assert_eq!(gate.free(), CAPACITY);
        assert_eq!(
            gate.try_acquire(credit(1, 1)).map(drop),
            Err(Refused::Closed)
        );
    }

    #[test]
    fn what_was_granted_before_closing_is_good() {
        let gate = CreditGate::new(CAPACITY, 10);
        let held = gate.try_acquire(CAPACITY).unwrap();
        let mut waiting = Waiting::on(&gate, credit(1, 1));
        assert!(waiting.poll().is_pending());
        drop(held);
        gate.close();
        assert_eq!(waiting.permit().credit(), credit(1, 1));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;
    use std::task::Wake;

    use super::*;

    const ONE: Credit = Credit {
        messages: 1,
        bytes: 1,
    };

    struct Unpark(thread::Thread);

    impl Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
        let waker = Waker::from(std::sync::Arc::new(Unpark(thread::current())));
        loop {
            let polled = Pin::new(&mut future).poll(&mut Context::from_waker(&waker));
            match polled {
                Poll::Ready(output) => return output,
                Poll::Pending => thread::park(),
            }
        }
    }

    /// `others` and this thread visit a room for one.
    fn visit_all(others: usize) {
        let gate = CreditGate::new(ONE, 4);
        let inside = Arc::new(AtomicUsize::new(0));
        let visit = |gate: &CreditGate, inside: &AtomicUsize| {
            let permit = block_on(gate.acquire(ONE)).expect("is open");
            assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
            inside.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        };
        let others: Vec<_> = (0..others)
            .map(|_| {
                let (gate, inside) = (gate.clone(), inside.clone());
                thread::spawn(move || visit(&gate, &inside))
            })
            .collect();
        visit(&gate, &inside);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(gate.free(), ONE);
    }

    #[test]
    fn no_more_than_the_capacity_is_inside_and_all_get_in() {
        loom::model(|| visit_all(1));
    }

    #[test]
    fn three_visitors_all_get_in() {
        // All schedules of three take minutes; two preemptions find what is found in practice.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| visit_all(2));
    }

    #[test]
    fn a_wait_given_up_while_it_is_granted_loses_no_credit() {
        loom::model(|| {
            let gate = CreditGate::new(ONE, 4);
            let held = gate.try_acquire(ONE).expect("all is free");
            let quitter = {
                let gate = gate.clone();
                thread::spawn(move || {
                    let mut wait = gate.acquire(ONE);
                    let polled = Pin::new(&mut wait).poll(&mut Context::from_waker(Waker::noop()));
                    drop(polled);
                })
            };
            let waiter = {
                let gate = gate.clone();
                thread::spawn(move || drop(block_on(gate.acquire(ONE)).expect("is open")))
            };
            drop(held);
            quitter.join().unwrap();
            waiter.join().unwrap();
            assert_eq!(gate.free(), ONE);
        });
    }

    #[test]
    fn a_large_wait_given_up_lets_in_the_small_one_behind_it() {
        loom::model(|| {
            let all = Credit {
                messages: 2,
                bytes: 2,
            };
            let gate = CreditGate::new(all, 4);
            let held = gate.try_acquire(ONE).expect("all is free");
            let mut large = gate.acquire(all);
            let polled = Pin::new(&mut large).poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending(), "half of it is held");
            let small = {
                let gate = gate.clone();
                thread::spawn(move || drop(block_on(gate.acquire(ONE)).expect("is open")))
            };
            // The small one may wait behind it by now, or come later.
            drop(large);
            small.join().unwrap();
            drop(held);
            assert_eq!(gate.free(), all);
        });
    }

    #[test]
    fn a_shutdown_ends_every_request_wherever_it_is() {
        use crate::entry::LogIndex;
        use crate::watermark::{Waited, Watermark};

        loom::model(|| {
            let gate = CreditGate::new(ONE, 4);
            let watermark = Watermark::new(LogIndex(0));
            let reader = watermark.reader();
            let held = gate.try_acquire(ONE).expect("all is free");
            let request = {
                let gate = gate.clone();
                thread::spawn(move || {
                    let permit = block_on(gate.acquire(ONE)).ok()?;
                    let waited =
                        reader.wait_durable(LogIndex(1), std::time::Duration::from_secs(3600));
                    drop(permit);
                    Some(waited)
                })
            };
            drop(held);
            gate.close();
            watermark.set_appended(LogIndex(1));
            drop(watermark);
            let end = request.join().unwrap();
            assert!(matches!(end, None | Some(Waited::Closed)), "{end:?}");
            assert_eq!(gate.free(), ONE);
        });
    }

    #[test]
    fn closing_leaves_nobody_waiting() {
        loom::model(|| {
            let gate = CreditGate::new(ONE, 4);
            let held = gate.try_acquire(ONE).expect("all is free");
            let waiter = {
                let gate = gate.clone();
                thread::spawn(move || block_on(gate.acquire(ONE)).map(drop))
            };
            gate.close();
            assert_eq!(waiter.join().unwrap(), Err(Refused::Closed));
            drop(held);
            assert_eq!(gate.free(), ONE);
        });
    }
}
