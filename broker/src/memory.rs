//! The memory that messages may take, debited before it is allocated.
//!
//! ```text
//! bytes of live permits <= budget
//! bytes of live permits of one share <= that share's limit          (connection, token, topic)
//! ```
//!
//! A share keeps one user from taking the whole budget: whoever waits because of their own share
//! holds nothing of the budget. Waiting is first come, first served in each of the four places,
//! so a large request is not overtaken for ever by small ones. The places are entered in one
//! order (connection, token, topic, budget), so nobody waits in a circle.
//!
//! It counts bytes, it allocates none; and it does not count what the QUIC library buffers, which
//! the transport's windows bound.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

/// The whole budget. Clones are the same budget.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    whole: Share,
    used: [AtomicU64; Class::ALL.len()],
    waiting: AtomicUsize,
}

/// What memory is for, as metrics tell it apart.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// Frames on their way in, until what they ask for is durable.
    Inbound,
    /// Messages on their way out, until the transport has them.
    Outbound,
    /// Bodies kept to be delivered without reading them again.
    Cache,
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Inbound, Self::Outbound, Self::Cache];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
            Self::Cache => "cache",
        }
    }
}

/// One user's part of the budget. Clones are the same part.
#[derive(Clone, Debug)]
pub struct Share(Arc<Part>);

#[derive(Debug)]
struct Part {
    free: Arc<Semaphore>,
    limit: u64,
}

/// On whose account a permit goes; those left out are not limited.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    pub connection: Option<Share>,
    pub token: Option<Share>,
    pub topic: Option<Share>,
}

/// Bytes that may be allocated; given back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    class: Class,
    bytes: u32,
    /// One of each place that was entered; dropping them gives the bytes back.
    _held: [Option<OwnedSemaphorePermit>; 4],
}

/// How full a budget or share is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Less than 70 %.
    Calm,
    /// From 70 %: credit should shrink.
    Raised,
    /// From 90 %: no new credit.
    High,
}

/// Why a permit cannot be waited for.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{bytes} bytes can never be had: the limit is {limit}")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("too many requests wait for memory; try again later")]
    Crowded,
}

impl MemoryBudget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Budget {
            whole: Share::new(limit),
            used: Default::default(),
            waiting: AtomicUsize::new(0),
        }))
    }

    /// A permit if there is room now and nobody waits for it.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64, class: Class, shares: &Shares) -> Option<Permit> {
        let amount = u32::try_from(bytes).ok()?;
        let mut held = [const { None }; 4];
        for (slot, part) in held.iter_mut().zip(self.parts(shares)) {
            *slot = match part {
                Some(part) => Some(part.try_take(amount)?),
                None => None,
            };
        }
        Some(self.permit(amount, class, held))
    }

    /// Waits for a permit, first come, first served. Dropping the future gives everything back.
    ///
    /// # Errors
    /// The bytes are more than the smallest limit, or [`WAITING_MAX`] others wait already.
    pub async fn acquire(
        &self,
        bytes: u64,
        class: Class,
        shares: &Shares,
    ) -> Result<Permit, Refused> {
        if let Some(permit) = self.try_acquire(bytes, class, shares) {
            return Ok(permit);
        }
        let limit = self
            .parts(shares)
            .into_iter()
            .flatten()
            .map(|part| part.0.limit)
            .fold(u64::from(u32::MAX), u64::min);
        let too_large = Refused::TooLarge { bytes, limit };
        let amount = u32::try_from(bytes).map_err(|_| too_large)?;
        if bytes > limit {
            return Err(too_large);
        }
        let _seat = Seat::take(&self.0)?;
        let mut held = [const { None }; 4];
        for (slot, part) in held.iter_mut().zip(self.parts(shares)) {
            if let Some(part) = part {
                *slot = Some(part.take(amount).await);
            }
        }
        Ok(self.permit(amount, class, held))
    }

    /// The budget in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.whole.0.limit
    }

    /// Bytes of live permits of `class`.
    #[must_use]
    pub fn used(&self, class: Class) -> u64 {
        self.0.used[class as usize].load(Ordering::Relaxed)
    }

    /// Requests that wait for memory now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// How full the whole budget is.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.0.whole.pressure()
    }

    /// In the order in which they are entered: narrow ones first, so that who waits for their own
    /// holds nothing of everybody's.
    fn parts<'a>(&'a self, shares: &'a Shares) -> [Option<&'a Share>; 4] {
        [
            shares.connection.as_ref(),
            shares.token.as_ref(),
            shares.topic.as_ref(),
            Some(&self.0.whole),
        ]
    }

    fn permit(&self, bytes: u32, class: Class, held: [Option<OwnedSemaphorePermit>; 4]) -> Permit {
        self.0.used[class as usize].fetch_add(u64::from(bytes), Ordering::Relaxed);
        Permit {
            budget: self.0.clone(),
            class,
            bytes,
            _held: held,
        }
    }
}

impl Share {
    /// A part of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        let permits = usize::try_from(limit)
            .unwrap_or(Semaphore::MAX_PERMITS)
            .min(Semaphore::MAX_PERMITS);
        Self(Arc::new(Part {
            free: Arc::new(Semaphore::new(permits)),
            limit: permits as u64,
        }))
    }

    /// Bytes of live permits on this account.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0
            .limit
            .saturating_sub(self.0.free.available_permits() as u64)
    }

    /// How full this part is.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let used = self.used();
        if used >= self.0.limit / 10 * 9 {
            Pressure::High
        } else if used >= self.0.limit / 10 * 7 {
            Pressure::Raised
        } else {
            Pressure::Calm
        }
    }

    fn try_take(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        match self.0.free.clone().try_acquire_many_owned(bytes) {
            Ok(permit) => Some(permit),
            Err(TryAcquireError::NoPermits) => None,
            Err(TryAcquireError::Closed) => unreachable!("a share's semaphore is never closed"),
        }
    }

    async fn take(&self, bytes: u32) -> OwnedSemaphorePermit {
        let taken = self.0.free.clone().acquire_many_owned(bytes).await;
        taken.expect("a share's semaphore is never closed")
    }
}

impl Permit {
    /// The bytes that this permit stands for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.bytes)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.used[self.class as usize].fetch_sub(u64::from(self.bytes), Ordering::Relaxed);
    }
}

/// A place among those who wait.
struct Seat<'a>(&'a Budget);

impl<'a> Seat<'a> {
    fn take(budget: &'a Budget) -> Result<Self, Refused> {
        let seat = Self(budget);
        if budget.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_MAX {
            return Err(Refused::Crowded);
        }
        Ok(seat)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Shares by key (a topic, a token): made when first asked for, gone when nobody holds them.
#[derive(Debug)]
pub struct Bulkheads<K> {
    limit: u64,
    shares: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    by_key: BTreeMap<K, Weak<Part>>,
    /// Length at which dead entries are swept out, so that sweeping is paid for by inserting.
    sweep_at: usize,
}

impl<K: Ord> Bulkheads<K> {
    /// Shares of `limit` bytes each.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            shares: Mutex::new(Table {
                by_key: BTreeMap::new(),
                sweep_at: SWEEP_AT_MIN,
            }),
        }
    }

    /// The share of `key`. All who ask while somebody holds it get the same one.
    #[must_use]
    pub fn share<Q: Ord + ToOwned<Owned = K> + ?Sized>(&self, key: &Q) -> Share
    where
        K: Borrow<Q>,
    {
        let mut table = self.shares.lock();
        if let Some(part) = table.by_key.get(key).and_then(Weak::upgrade) {
            return Share(part);
        }
        if table.by_key.len() >= table.sweep_at {
            table.by_key.retain(|_, part| part.strong_count() > 0);
            table.sweep_at = (table.by_key.len() * 2).max(SWEEP_AT_MIN);
        }
        let share = Share::new(self.limit);
        table
            .by_key
            .insert(key.to_owned(), Arc::downgrade(&share.0));
        share
    }
}

/// Most requests that may wait for memory at once; each is a stream that has read a frame header.
pub const WAITING_MAX: usize = 65_536;
const SWEEP_AT_MIN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn on_connection(share: &Share) -> Shares {
        Shares {
            connection: Some(share.clone()),
            ..Shares::default()
        }
    }

    #[test]
    fn the_budget_is_debited_and_given_back() {
        let budget = MemoryBudget::new(100);
        let none = Shares::default();
        let first = budget.try_acquire(60, Class::Inbound, &none).unwrap();
        assert_eq!(first.bytes(), 60);
        assert!(budget.try_acquire(41, Class::Outbound, &none).is_none());
        let second = budget.try_acquire(40, Class::Outbound, &none).unwrap();
        assert_eq!(
            (budget.used(Class::Inbound), budget.used(Class::Outbound)),
            (60, 40)
        );
        drop((first, second));
        assert_eq!(budget.used(Class::Inbound), 0);
        assert!(budget.try_acquire(100, Class::Cache, &none).is_some());
    }

    #[test]
    fn a_full_share_leaves_the_budget_to_others() {
        let budget = MemoryBudget::new(100);
        let (greedy, modest) = (Share::new(50), Share::new(50));
        let _held = budget
            .try_acquire(50, Class::Inbound, &on_connection(&greedy))
            .unwrap();
        let refused = budget.try_acquire(1, Class::Inbound, &on_connection(&greedy));
        assert!(refused.is_none());
        let other = budget.try_acquire(50, Class::Inbound, &on_connection(&modest));
        assert!(other.is_some());
    }

    #[test]
    fn a_refused_request_leaves_no_debit_in_its_shares() {
        let budget = MemoryBudget::new(10);
        let share = Share::new(50);
        assert!(
            budget
                .try_acquire(20, Class::Inbound, &on_connection(&share))
                .is_none()
        );
        assert_eq!(share.used(), 0);
    }

    #[tokio::test]
    async fn a_waiter_gets_what_another_gives_back() {
        let budget = MemoryBudget::new(100);
        let none = Shares::default();
        let held = budget.try_acquire(80, Class::Inbound, &none).unwrap();
        let waiting = tokio::spawn({
            let budget = budget.clone();
            async move { budget.acquire(50, Class::Inbound, &Shares::default()).await }
        });
        while budget.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        drop(held);
        let permit = waiting.await.unwrap().unwrap();
        assert_eq!(permit.bytes(), 50);
        assert_eq!((budget.used(Class::Inbound), budget.waiting()), (50, 0));
    }

    #[tokio::test]
    async fn a_large_request_is_not_overtaken_by_small_ones() {
        let budget = MemoryBudget::new(100);
        let none = Shares::default();
        let held = budget.try_acquire(80, Class::Inbound, &none).unwrap();
        let large = budget.acquire(90, Class::Inbound, &none);
        tokio::pin!(large);
        assert!(is_pending(large.as_mut()).await);
        let small = budget.try_acquire(10, Class::Inbound, &none);
        assert!(small.is_none(), "the free bytes are kept for the large one");
        drop(held);
        assert_eq!(large.await.unwrap().bytes(), 90);
    }

    #[tokio::test]
    async fn a_request_given_up_leaves_nothing_behind() {
        let budget = MemoryBudget::new(100);
        let share = Share::new(60);
        let held = budget
            .try_acquire(80, Class::Inbound, &Shares::default())
            .unwrap();
        {
            let shares = on_connection(&share);
            let waiting = budget.acquire(50, Class::Inbound, &shares);
            tokio::pin!(waiting);
            assert!(is_pending(waiting.as_mut()).await);
            assert_eq!((share.used(), budget.waiting()), (50, 1));
        }
        assert_eq!((share.used(), budget.waiting()), (0, 0));
        drop(held);
        let all = budget.try_acquire(100, Class::Inbound, &Shares::default());
        assert!(all.is_some());
    }

    #[tokio::test]
    async fn what_can_never_be_had_is_refused_at_once() {
        let budget = MemoryBudget::new(100);
        let shares = on_connection(&Share::new(60));
        let refused = budget.acquire(61, Class::Inbound, &shares).await;
        assert_eq!(
            refused.unwrap_err(),
            Refused::TooLarge {
                bytes: 61,
                limit: 60
            }
        );
        let refused = budget.acquire(u64::MAX, Class::Inbound, &shares).await;
        assert!(matches!(refused, Err(Refused::TooLarge { .. })));
    }

    #[tokio::test]
    async fn only_so_many_may_wait() {
        let budget = MemoryBudget::new(100);
        let none = Shares::default();
        let _held = budget.try_acquire(100, Class::Inbound, &none).unwrap();
        budget.0.waiting.store(WAITING_MAX, Ordering::Relaxed);
        let refused = budget.acquire(1, Class::Inbound, &none).await;
        assert_eq!(refused.unwrap_err(), Refused::Crowded);
        assert_eq!(budget.waiting(), WAITING_MAX, "the refused one left");
    }

    #[test]
    fn pressure_rises_with_use() {
        let budget = MemoryBudget::new(100);
        let none = Shares::default();
        assert_eq!(budget.pressure(), Pressure::Calm);
        let _first = budget.try_acquire(70, Class::Inbound, &none).unwrap();
        assert_eq!(budget.pressure(), Pressure::Raised);
        let _second = budget.try_acquire(20, Class::Inbound, &none).unwrap();
        assert_eq!(budget.pressure(), Pressure::High);
        assert!(Pressure::High > Pressure::Raised);
    }

    #[test]
    fn a_key_has_one_share_while_somebody_holds_it() {
        let topics = Bulkheads::<String>::new(50);
        let budget = MemoryBudget::new(100);
        let share = topics.share("orders");
        let shares = Shares {
            topic: Some(share),
            ..Shares::default()
        };
        let _held = budget.try_acquire(30, Class::Inbound, &shares).unwrap();
        assert_eq!(topics.share("orders").used(), 30);
        assert_eq!(topics.share("mails").used(), 0);
    }

    #[test]
    fn shares_that_nobody_holds_are_swept_out() {
        let topics = Bulkheads::<u32>::new(50);
        let kept = topics.share(&0);
        for key in 1..10_000u32 {
            let _ = topics.share(&key);
        }
        assert!(topics.shares.lock().by_key.len() <= SWEEP_AT_MIN);
        assert!(Arc::ptr_eq(&kept.0, &topics.share(&0).0));
    }

    async fn is_pending<F: Future>(mut future: std::pin::Pin<&mut F>) -> bool {
        tokio::select! {
            biased;
            _ = &mut future => false,
            () = std::future::ready(()) => true,
        }
    }
}
