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

use millpond_protocol::{ErrorCode, TopicId, WireError};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::MemoryConfig;

/// The whole budget and its shares. Clones are the same budget.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    whole: Arc<Part>,
    connection_bytes: u64,
    tokens: Bulkheads<String>,
    topics: Bulkheads<TopicId>,
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
}

impl Class {
    pub const ALL: [Self; 2] = [Self::Inbound, Self::Outbound];

    /// As metrics spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// On whose account permits go: one connection, its token, perhaps a topic. Clones are the same.
#[derive(Clone, Debug)]
pub struct Share {
    connection: Arc<Part>,
    token: Option<Arc<Part>>,
    topic: Option<Arc<Part>>,
}

/// Bytes that may be allocated; given back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    class: Class,
    bytes: u32,
    /// One of each part that was entered; dropping them gives the bytes back.
    _held: Held,
}

type Held = [Option<OwnedSemaphorePermit>; 4];

/// How full a budget or share is: what slows a sender down.
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
    #[error("{bytes} bytes are more than the broker's memory limits ever allow ({limit})")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("too many requests wait for the broker's memory; try again later")]
    Crowded,
}

impl From<Refused> for WireError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::TooLarge { .. } => Self::new(ErrorCode::TooLarge, refused.to_string()),
            Refused::Crowded => {
                Self::new(ErrorCode::Memory, refused.to_string()).retry_after(CROWDED_RETRY_MS)
            }
        }
    }
}

impl MemoryBudget {
    /// The budget that `config` allows.
    #[must_use]
    pub fn new(config: &MemoryConfig) -> Self {
        Self(Arc::new(Budget {
            whole: Part::new(config.budget_bytes),
            connection_bytes: config.connection_bytes(),
            tokens: Bulkheads::new(config.token_bytes()),
            topics: Bulkheads::new(config.topic_bytes()),
            used: Default::default(),
            waiting: AtomicUsize::new(0),
        }))
    }

    /// The share of a new connection, within that of its token if it showed one.
    #[must_use]
    pub fn connection(&self, token: Option<&str>) -> Share {
        Share {
            connection: Part::new(self.0.connection_bytes),
            token: token.map(|name| self.0.tokens.part(name)),
            topic: None,
        }
    }

    /// `share` within that of `topic` as well: for what is published there.
    #[must_use]
    pub fn topic(&self, share: &Share, topic: TopicId) -> Share {
        Share {
            topic: Some(self.0.topics.part(&topic)),
            ..share.clone()
        }
    }

    /// A permit if there is room now and nobody waits for it.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64, class: Class, share: &Share) -> Option<Permit> {
        let amount = u32::try_from(bytes).ok()?;
        let mut held = Held::default();
        for (slot, part) in held.iter_mut().zip(self.parts(share)) {
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
        share: &Share,
    ) -> Result<Permit, Refused> {
        if let Some(permit) = self.try_acquire(bytes, class, share) {
            return Ok(permit);
        }
        let limits = self
            .parts(share)
            .into_iter()
            .flatten()
            .map(|part| part.limit);
        let limit = limits.fold(u64::from(u32::MAX), u64::min);
        let too_large = Refused::TooLarge { bytes, limit };
        let amount = u32::try_from(bytes).map_err(|_| too_large)?;
        if bytes > limit {
            return Err(too_large);
        }
        let _seat = Seat::take(&self.0)?;
        let mut held = Held::default();
        for (slot, part) in held.iter_mut().zip(self.parts(share)) {
            if let Some(part) = part {
                *slot = Some(part.take(amount).await);
            }
        }
        Ok(self.permit(amount, class, held))
    }

    /// The budget in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.whole.limit
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

    /// Whether others wait for what `share` has of its token, its topic or the whole.
    #[must_use]
    pub fn is_wanted(&self, share: &Share) -> bool {
        let [_own, others @ ..] = self.parts(share);
        let mut others = others.into_iter().flatten();
        others.any(|part| part.waiting.load(Ordering::Relaxed) > 0)
    }

    /// How full the whole budget is.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.0.whole.pressure()
    }

    /// In the order in which they are entered: narrow ones first, so that who waits for their own
    /// holds nothing of everybody's.
    fn parts<'a>(&'a self, share: &'a Share) -> [Option<&'a Arc<Part>>; 4] {
        [
            Some(&share.connection),
            share.token.as_ref(),
            share.topic.as_ref(),
            Some(&self.0.whole),
        ]
    }

    fn permit(&self, bytes: u32, class: Class, held: Held) -> Permit {
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
    /// How full the fullest of its parts is: quota, not memory, slows this one down.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let others = [&self.token, &self.topic];
        others
            .into_iter()
            .flatten()
            .map(|part| part.pressure())
            .fold(self.connection.pressure(), Pressure::max)
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

/// A number of bytes that is given out and taken back.
#[derive(Debug)]
struct Part {
    free: Arc<Semaphore>,
    limit: u64,
    waiting: AtomicUsize,
}

impl Part {
    fn new(limit: u64) -> Arc<Self> {
        let permits = usize::try_from(limit)
            .unwrap_or(Semaphore::MAX_PERMITS)
            .min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            free: Arc::new(Semaphore::new(permits)),
            limit: permits as u64,
            waiting: AtomicUsize::new(0),
        })
    }

    fn used(&self) -> u64 {
        let free = self.free.available_permits() as u64;
        self.limit.saturating_sub(free)
    }

    fn pressure(&self) -> Pressure {
        let used = self.used();
        if used >= self.limit / 10 * 9 {
            Pressure::High
        } else if used >= self.limit / 10 * 7 {
            Pressure::Raised
        } else {
            Pressure::Calm
        }
    }

    fn try_take(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_many_owned(bytes).ok()
    }

    async fn take(&self, bytes: u32) -> OwnedSemaphorePermit {
        if let Some(taken) = self.try_take(bytes) {
            return taken;
        }
        let _waiter = Waiter::new(&self.waiting);
        let taken = self.free.clone().acquire_many_owned(bytes).await;
        taken.expect("a part's semaphore is never closed")
    }
}

/// Counts who waits for one part.
struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

/// Parts by key: made when first asked for, gone when nobody holds them.
#[derive(Debug)]
struct Bulkheads<K> {
    limit: u64,
    table: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    by_key: BTreeMap<K, Weak<Part>>,
    /// Length at which dead entries are swept out, so that sweeping is paid for by inserting.
    sweep_at: usize,
}

impl<K: Ord> Bulkheads<K> {
    fn new(limit: u64) -> Self {
        Self {
            limit,
            table: Mutex::new(Table {
                by_key: BTreeMap::new(),
                sweep_at: SWEEP_AT_MIN,
            }),
        }
    }

    /// All who ask while somebody holds the part of `key` get the same one.
    fn part<Q: Ord + ToOwned<Owned = K> + ?Sized>(&self, key: &Q) -> Arc<Part>
    where
        K: Borrow<Q>,
    {
        let mut table = self.table.lock();
        if let Some(part) = table.by_key.get(key).and_then(Weak::upgrade) {
            return part;
        }
        if table.by_key.len() >= table.sweep_at {
            table.by_key.retain(|_, part| part.strong_count() > 0);
            table.sweep_at = (table.by_key.len() * 2).max(SWEEP_AT_MIN);
        }
        let part = Part::new(self.limit);
        table.by_key.insert(key.to_owned(), Arc::downgrade(&part));
        part
    }
}

/// Most requests that may wait for memory at once; each is a stream that has read a frame header.
pub const WAITING_MAX: usize = 65_536;
const SWEEP_AT_MIN: usize = 64;
const CROWDED_RETRY_MS: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 MiB in all; 20, 20 and 40 for a connection, a topic and a token.
    fn budget() -> MemoryBudget {
        let part = |mib: u64| mib << 20;
        MemoryBudget(Arc::new(Budget {
            whole: Part::new(part(64)),
            connection_bytes: part(20),
            tokens: Bulkheads::new(part(40)),
            topics: Bulkheads::new(part(20)),
            used: Default::default(),
            waiting: AtomicUsize::new(0),
        }))
    }

    fn try_mib(budget: &MemoryBudget, mib: u64, share: &Share) -> Option<Permit> {
        budget.try_acquire(mib << 20, Class::Inbound, share)
    }

    /// Fills the budget up to `left` MiB.
    fn fill_but(budget: &MemoryBudget, left: u64) -> Vec<Permit> {
        let mut held = Vec::new();
        for mib in [16, 16, 16, 16 - left] {
            held.push(try_mib(budget, mib, &budget.connection(None)).unwrap());
        }
        held
    }

    #[test]
    fn the_budget_is_debited_and_given_back() {
        let budget = budget();
        let (one, two) = (budget.connection(None), budget.connection(None));
        let first = try_mib(&budget, 20, &one).unwrap();
        let second = budget.try_acquire(7, Class::Outbound, &two).unwrap();
        assert_eq!(second.bytes(), 7);
        assert_eq!(budget.used(Class::Inbound), 20 << 20);
        assert_eq!(budget.used(Class::Outbound), 7);
        drop((first, second));
        assert_eq!(budget.used(Class::Inbound), 0);
        assert_eq!(budget.0.whole.used(), 0);
    }

    #[test]
    fn a_full_connection_token_or_topic_leaves_the_budget_to_others() {
        let budget = budget();
        let own = budget.connection(None);
        let _held = try_mib(&budget, 20, &own).unwrap();
        assert!(try_mib(&budget, 1, &own).is_none(), "connection");
        let other = budget.connection(None);
        drop(try_mib(&budget, 20, &other).expect("another connection"));

        let shared = budget.topic(&budget.connection(Some("a")), TopicId(1));
        let same_topic = budget.topic(&budget.connection(Some("b")), TopicId(1));
        let _topic_held = try_mib(&budget, 20, &shared).unwrap();
        assert!(try_mib(&budget, 1, &same_topic).is_none(), "topic");

        let second = budget.topic(&budget.connection(Some("a")), TopicId(2));
        let _token_held = try_mib(&budget, 20, &second).unwrap();
        let third = budget.connection(Some("a"));
        assert!(try_mib(&budget, 1, &third).is_none(), "token");
        assert!(try_mib(&budget, 4, &budget.connection(Some("b"))).is_some());
    }

    #[test]
    fn a_refused_request_leaves_no_debit_in_its_shares() {
        let budget = budget();
        let _held = fill_but(&budget, 1);
        let share = budget.topic(&budget.connection(Some("a")), TopicId(1));
        assert!(try_mib(&budget, 2, &share).is_none());
        assert_eq!(share.connection.used(), 0);
        assert_eq!(share.token.unwrap().used(), 0);
        assert_eq!(share.topic.unwrap().used(), 0);
    }

    #[tokio::test]
    async fn a_waiter_gets_what_another_gives_back() {
        let budget = budget();
        let held = fill_but(&budget, 1);
        let share = budget.connection(None);
        let waiting = budget.acquire(10 << 20, Class::Inbound, &share);
        tokio::pin!(waiting);
        assert!(is_pending(waiting.as_mut()).await);
        assert_eq!(budget.waiting(), 1);
        drop(held);
        assert_eq!(waiting.await.unwrap().bytes(), 10 << 20);
        assert_eq!((budget.waiting(), budget.used(Class::Inbound)), (0, 0));
    }

    #[tokio::test]
    async fn a_large_request_is_not_overtaken_by_small_ones() {
        let budget = budget();
        let held = fill_but(&budget, 4);
        let (share, other) = (budget.connection(None), budget.connection(None));
        let large = budget.acquire(20 << 20, Class::Inbound, &share);
        tokio::pin!(large);
        assert!(is_pending(large.as_mut()).await);
        let small = try_mib(&budget, 1, &other);
        assert!(small.is_none(), "what is free is kept for the large one");
        drop(held);
        assert_eq!(large.await.unwrap().bytes(), 20 << 20);
    }

    #[tokio::test]
    async fn who_waits_for_their_own_share_holds_nothing_of_everybodys() {
        let budget = budget();
        let share = budget.connection(None);
        let _held = try_mib(&budget, 20, &share).unwrap();
        let waiting = budget.acquire(20 << 20, Class::Inbound, &share);
        tokio::pin!(waiting);
        assert!(is_pending(waiting.as_mut()).await);
        assert_eq!(budget.0.whole.used(), 20 << 20);
        assert!(try_mib(&budget, 20, &budget.connection(None)).is_some());
    }

    #[tokio::test]
    async fn what_others_wait_for_is_wanted_and_ones_own_is_not() {
        let budget = budget();
        let (one, two) = (budget.connection(None), budget.connection(None));
        let own = try_mib(&budget, 20, &one).unwrap();
        {
            let waiting = budget.acquire(20 << 20, Class::Inbound, &one);
            tokio::pin!(waiting);
            assert!(is_pending(waiting.as_mut()).await);
            assert!(!budget.is_wanted(&one), "it waits for its own share");
        }
        let others = [(); 3].map(|()| budget.connection(None));
        let _rest = [(20, 0), (20, 1), (3, 2)].map(|(mib, n)| try_mib(&budget, mib, &others[n]));
        let waiting = budget.acquire(2 << 20, Class::Inbound, &two);
        tokio::pin!(waiting);
        assert!(is_pending(waiting.as_mut()).await);
        assert!(budget.is_wanted(&one));
        drop(own);
        waiting.await.unwrap();
        assert!(!budget.is_wanted(&one));
    }

    #[tokio::test]
    async fn a_request_given_up_leaves_nothing_behind() {
        let budget = budget();
        let held = fill_but(&budget, 1);
        let share = budget.connection(None);
        {
            let waiting = budget.acquire(2 << 20, Class::Inbound, &share);
            tokio::pin!(waiting);
            assert!(is_pending(waiting.as_mut()).await);
            assert_eq!(share.connection.used(), 2 << 20);
        }
        assert_eq!((share.connection.used(), budget.waiting()), (0, 0));
        drop(held);
        assert_eq!(budget.0.whole.used(), 0);
    }

    #[tokio::test]
    async fn what_can_never_be_had_is_refused_at_once() {
        let budget = budget();
        let share = budget.connection(None);
        for bytes in [(20 << 20) + 1, u64::MAX] {
            let refused = budget.acquire(bytes, Class::Inbound, &share).await;
            let limit = 20 << 20;
            assert_eq!(refused.unwrap_err(), Refused::TooLarge { bytes, limit });
        }
    }

    #[tokio::test]
    async fn only_so_many_may_wait() {
        let budget = budget();
        let _held = fill_but(&budget, 0);
        budget.0.waiting.store(WAITING_MAX, Ordering::Relaxed);
        let share = budget.connection(None);
        let refused = budget.acquire(1, Class::Inbound, &share).await;
        let wire = WireError::from(refused.unwrap_err());
        assert_eq!(wire.code, ErrorCode::Memory);
        assert!(wire.retry_after_ms.is_some());
        assert_eq!(budget.waiting(), WAITING_MAX, "the refused one left");
    }

    #[test]
    fn pressure_rises_with_use() {
        let budget = budget();
        assert_eq!(budget.pressure(), Pressure::Calm);
        let held = fill_but(&budget, 16);
        assert_eq!(budget.pressure(), Pressure::Raised);
        let more = try_mib(&budget, 16, &budget.connection(None)).unwrap();
        assert_eq!(budget.pressure(), Pressure::High);
        drop((held, more));

        let share = budget.topic(&budget.connection(Some("a")), TopicId(1));
        let other = budget.topic(&budget.connection(Some("b")), TopicId(1));
        let _held = try_mib(&budget, 19, &share).unwrap();
        assert_eq!(other.pressure(), Pressure::High, "its topic is full");
        assert_eq!(budget.pressure(), Pressure::Calm);
    }

    #[test]
    fn parts_that_nobody_holds_are_swept_out() {
        let topics = Bulkheads::<TopicId>::new(50);
        let kept = topics.part(&TopicId(0));
        for id in 1..10_000 {
            drop(topics.part(&TopicId(id)));
        }
        assert!(topics.table.lock().by_key.len() <= SWEEP_AT_MIN);
        assert!(Arc::ptr_eq(&kept, &topics.part(&TopicId(0))));
    }

    async fn is_pending<F: Future>(mut future: std::pin::Pin<&mut F>) -> bool {
        tokio::select! {
            biased;
            _ = &mut future => false,
            () = std::future::ready(()) => true,
        }
    }
}
