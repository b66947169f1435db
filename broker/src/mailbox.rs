//! What the shard answers to one stream, until its session takes it.
//!
//! Unbounded, because what is in it is bounded elsewhere: answers to a publish stream by
//! `quic/producer/untold.rs`, deliveries by a consumer's credit, settlements by `quic/settlement.rs`,
//! responses by `REQUESTS_MAX`. The runtime's own channel takes room for 32 values before the first is
//! sent, and most streams are idle: an idle mailbox keeps room for none.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use tokio::task::coop::cooperative;

/// A mailbox and a way into it.
pub fn mailbox<T>() -> (Sender<T>, Mailbox<T>) {
    let inner = Arc::new(Mutex::new(Inner {
        values: VecDeque::new(),
        waker: None,
        is_open: true,
    }));
    (Sender(Arc::clone(&inner)), Mailbox(inner))
}

/// Puts values in. Clones lead into the same mailbox.
pub struct Sender<T>(Shared<T>);

/// Takes values out, in the order in which they were put in.
pub struct Mailbox<T>(Shared<T>);

type Shared<T> = Arc<Mutex<Inner<T>>>;

struct Inner<T> {
    values: VecDeque<T>,
    /// Whoever waits for a value.
    waker: Option<Waker>,
    /// Somebody may still take something out.
    is_open: bool,
}

impl<T> Sender<T> {
    /// A value for a mailbox that has gone is dropped.
    pub fn send(&self, value: T) {
        let mut inner = self.0.lock();
        if !inner.is_open {
            return;
        }
        inner.values.push_back(value);
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Mailbox<T> {
    /// The next value, waited for. Cancel-safe. Whoever takes many in a row lets others run in between.
    pub fn recv(&mut self) -> impl Future<Output = T> {
        cooperative(poll_fn(|context| self.poll(context)))
    }

    /// The next value, if it is there.
    pub fn try_recv(&mut self) -> Option<T> {
        self.0.lock().values.pop_front()
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<T> {
        let mut inner = self.0.lock();
        if let Some(value) = inner.values.pop_front() {
            return Poll::Ready(value);
        }
        inner.values = VecDeque::new();
        match &mut inner.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.is_open = false;
        let left = std::mem::take(&mut inner.values);
        drop(inner);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_put_in_comes_out_in_order() {
        let (sender, mut mailbox) = mailbox();
        (0..5).for_each(|nth| sender.send(nth));
        assert_eq!(mailbox.recv().await, 0);
        assert_eq!(mailbox.try_recv(), Some(1));
        for nth in 2..5 {
            assert_eq!(mailbox.recv().await, nth);
        }
        assert_eq!(mailbox.try_recv(), None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_waits_is_woken_by_another_thread() {
        const VALUES: u32 = 100_000;
        let (sender, mut mailbox) = mailbox();
        let sending = std::thread::spawn(move || (0..VALUES).for_each(|nth| sender.send(nth)));
        let receiving = tokio::spawn(async move {
            for nth in 0..VALUES {
                assert_eq!(mailbox.recv().await, nth);
            }
        });
        receiving.await.unwrap();
        sending.join().unwrap();
    }

    #[tokio::test]
    async fn one_who_waits_keeps_no_room_and_takes_what_comes_later() {
        let (sender, mut mailbox) = mailbox();
        (0..100).for_each(|nth| sender.send(nth));
        while mailbox.try_recv().is_some() {}
        tokio::select! {
            biased;
            _ = mailbox.recv() => panic!("there was nothing"),
            () = std::future::ready(()) => {}
        }
        assert_eq!(mailbox.0.lock().values.capacity(), 0);
        sender.send(7);
        assert_eq!(mailbox.recv().await, 7);
    }

    #[tokio::test]
    async fn what_nobody_can_take_is_not_kept() {
        let (sender, mailbox) = mailbox();
        let kept = Arc::new(());
        sender.send(Arc::clone(&kept));
        drop(mailbox);
        sender.send(Arc::clone(&kept));
        assert_eq!(Arc::strong_count(&kept), 1);
    }

    #[tokio::test]
    async fn one_with_much_to_take_lets_others_run() {
        let (sender, mut mailbox) = mailbox();
        (0..10_000).for_each(|nth| sender.send(nth));
        let busy = tokio::spawn(async move { while mailbox.recv().await < 9_999 {} });
        tokio::task::yield_now().await;
        assert!(!busy.is_finished());
        busy.await.unwrap();
    }
}
