//! The memory that clients may take, debited before it is allocated. How large its parts are is said
//! in `config`.
//!
//! ```text
//! bytes of live permits <= the messages' part
//! bytes of live permits of one share <= that share's limit          (connection, token, topic)
//! bytes of live loans of a pool <= the pool                         (sessions, QUIC's windows)
//! ```
//!
//! A share keeps one user from taking everything: whoever waits because of their own share holds
//! nothing of the others'. Each of the four places has three lanes: small requests in, small ones out,
//! and large ones. Whoever is small may take of the large lane what is free and nobody waits for, but
//! waits in their own; so small ones wait for small ones only, and a large one only for what was there
//! before it. A lane is first come, first served. The places are entered in one order (connection,
//! token, topic, all), so nobody waits in a circle.
//!
//! It counts bytes, it allocates none.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use millpond_protocol::limits::FRAME_BYTES_MAX;
use millpond_protocol::{ErrorCode, TopicId, WireError};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::MemoryConfig;

/// The whole budget and its shares. Clones are the same budget.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    bytes: u64,
    sessions: Pool,
    receive: Pool,
    send: Pool,
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

/// Bytes for as long as a connection, stream or window lasts; given back when it is dropped.
#[derive(Debug)]
pub struct Loan {
    pool: Pool,
    bytes: u64,
}

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
            bytes: config.budget_bytes,
            sessions: Pool::new(config.session_bytes()),
            receive: Pool::new(config.receive_bytes()),
            send: Pool::new(config.send_bytes()),
            whole: Part::new(config.message_bytes()),
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

    /// What a connection or stream costs by being there; `None` if there is no room for another.
    #[must_use]
    pub fn session(&self, bytes: u64) -> Option<Loan> {
        self.0.sessions.take(bytes)
    }

    /// Room for bytes that were received and not read: as much as is wanted, or as can be spared.
    #[must_use]
    pub fn receive_window(&self, wanted: u64) -> Loan {
        self.0.receive.spare(wanted, 0)
    }

    /// As `receive_window`, for streams with little to say, which leave half to the others.
    #[must_use]
    pub fn small_receive_window(&self, wanted: u64) -> Loan {
        self.0.receive.spare(wanted, self.0.receive.0.all / 2)
    }

    /// Room for bytes that were written and not acknowledged, likewise.
    #[must_use]
    pub fn send_window(&self, wanted: u64) -> Loan {
        self.0.send.spare(wanted, 0)
    }

    /// What the pools have lent: (which, bytes).
    #[must_use]
    pub fn lent(&self) -> [(&'static str, u64); 3] {
        [
            ("sessions", self.0.sessions.lent()),
            ("quic_receive", self.0.receive.lent()),
            ("quic_send", self.0.send.lent()),
        ]
    }

    /// Bytes of messages in one deliver frame: little where the budget is small, so that many consumers
    /// that do not read hold little.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        (self.0.whole.limit / FRAMES_IN_ALL).clamp(FRAME_BYTES.start, FRAME_BYTES.end)
    }

    /// A permit if there is room now and nobody waits for it.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64, class: Class, share: &Share) -> Option<Permit> {
        let amount = u32::try_from(bytes).ok()?;
        let mut held = Held::default();
        for (slot, part) in held.iter_mut().zip(self.parts(share)) {
            *slot = match part {
                Some(part) => Some(part.try_take(amount, class)?),
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
            .map(|part| part.large_bytes);
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
                *slot = Some(part.take(amount, class).await);
            }
        }
        Ok(self.permit(amount, class, held))
    }

    /// The budget in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.bytes
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

    /// Whether anybody waits for what `share` has, itself included.
    #[must_use]
    pub fn is_short(&self, share: &Share) -> bool {
        let mut parts = self.parts(share).into_iter().flatten();
        parts.any(|part| part.waiting.load(Ordering::Relaxed) > 0)
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

/// A number of bytes that is given out and taken back, in three lanes.
#[derive(Debug)]
struct Part {
    /// Of requests of up to `SMALL_BYTES_MAX`, by class.
    small: [Arc<Semaphore>; Class::ALL.len()],
    large: Arc<Semaphore>,
    limit: u64,
    large_bytes: u64,
    waiting: AtomicUsize,
}

impl Part {
    fn new(limit: u64) -> Arc<Self> {
        let lane = |bytes: u64| {
            let permits = usize::try_from(bytes).unwrap_or(Semaphore::MAX_PERMITS);
            Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
        };
        let small_bytes = limit.saturating_sub(FRAME_BYTES_MAX as u64) / 2;
        let small_bytes = small_bytes.min(limit / 4);
        let large_bytes = limit - 2 * small_bytes;
        Arc::new(Self {
            small: [lane(small_bytes), lane(small_bytes)],
            large: lane(large_bytes),
            limit,
            large_bytes,
            waiting: AtomicUsize::new(0),
        })
    }

    fn used(&self) -> u64 {
        let lanes = self.small.iter().chain([&self.large]);
        let free: u64 = lanes.map(|lane| lane.available_permits() as u64).sum();
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

    fn try_take(&self, bytes: u32, class: Class) -> Option<OwnedSemaphorePermit> {
        let take = |lane: &Arc<Semaphore>| lane.clone().try_acquire_many_owned(bytes).ok();
        let small = is_small(bytes).then(|| take(&self.small[class as usize]));
        // While somebody waits in a lane, nothing is free in it.
        small.flatten().or_else(|| take(&self.large))
    }

    async fn take(&self, bytes: u32, class: Class) -> OwnedSemaphorePermit {
        if let Some(taken) = self.try_take(bytes, class) {
            return taken;
        }
        let lane = if is_small(bytes) {
            &self.small[class as usize]
        } else {
            &self.large
        };
        let _waiter = Waiter::new(&self.waiting);
        let taken = lane.clone().acquire_many_owned(bytes).await;
        taken.expect("a part's semaphore is never closed")
    }
}

fn is_small(bytes: u32) -> bool {
    u64::from(bytes) <= SMALL_BYTES_MAX
}

/// A number of bytes that is lent for long. Nobody waits for it. Clones are the same.
#[derive(Clone, Debug)]
struct Pool(Arc<PoolBytes>);

#[derive(Debug)]
struct PoolBytes {
    free: AtomicU64,
    all: u64,
}

impl Pool {
    fn new(bytes: u64) -> Self {
        Self(Arc::new(PoolBytes {
            free: AtomicU64::new(bytes),
            all: bytes,
        }))
    }

    fn lent(&self) -> u64 {
        self.0.all - self.0.free.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> Option<Loan> {
        let taken = self.change(|free| free.checked_sub(bytes));
        taken.then(|| Loan {
            pool: self.clone(),
            bytes,
        })
    }

    /// As much as is wanted, but at most a sixteenth of what is free beyond what is to be left: the next
    /// one shall have some too.
    fn spare(&self, wanted: u64, left: u64) -> Loan {
        let mut bytes = 0;
        self.change(|free| {
            bytes = wanted.min(free.saturating_sub(left) / SPARE_PART);
            Some(free - bytes)
        });
        Loan {
            pool: self.clone(),
            bytes,
        }
    }

    fn change(&self, change: impl FnMut(u64) -> Option<u64>) -> bool {
        let order = Ordering::Relaxed;
        self.0.free.fetch_update(order, order, change).is_ok()
    }
}

impl Loan {
    /// The bytes that were lent.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.pool.0.free.fetch_add(self.bytes, Ordering::Relaxed);
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

/// What a connection costs by being there: its state in the QUIC and TLS libraries, the tasks of it and
/// of its control stream, and the windows that it has before it uses any (`transport::BASE_WINDOW_BYTES`
/// in each direction).
pub const CONNECTION_BYTES: u64 = 30 << 10;
/// What a stream costs by being there: its task, its channel, its place in the shard, and what is read
/// ahead of it.
pub const STREAM_BYTES: u64 = 12 << 10;
/// The part of what a pool has left that one loan may take.
const SPARE_PART: u64 = 16;
/// Requests up to here are small. A batch of small messages is.
const SMALL_BYTES_MAX: u64 = 1 << 20;
/// Deliver frames for which the messages' part has room.
const FRAMES_IN_ALL: u64 = 512;
/// Bytes of messages after which a deliver frame is closed, at the smallest budget and at a large one.
const FRAME_BYTES: std::ops::Range<u64> = 32 << 10..256 << 10;
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
            bytes: part(128),
            sessions: Pool::new(part(1)),
            receive: Pool::new(part(1)),
            send: Pool::new(part(1)),
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

    /// Takes all that a share may have, to the last MiB.
    fn fill(budget: &MemoryBudget, share: &Share) -> Vec<Permit> {
        let mut held = Vec::new();
        for mib in [16, 1] {
            for class in Class::ALL {
                let more = || budget.try_acquire(mib << 20, class, share);
                held.extend(std::iter::from_fn(more));
            }
        }
        held
    }

    /// Takes all that everybody may have, to the last MiB.
    fn fill_all(budget: &MemoryBudget) -> Vec<Permit> {
        let connections = (0..8).map(|_| fill(budget, &budget.connection(None)));
        let held: Vec<_> = connections.flatten().collect();
        assert!(budget.0.whole.used() > 63 << 20);
        held
    }

    #[test]
    fn the_budget_is_debited_and_given_back() {
        let budget = budget();
        let (one, two) = (budget.connection(None), budget.connection(None));
        let first = try_mib(&budget, 16, &one).unwrap();
        let second = budget.try_acquire(7, Class::Outbound, &two).unwrap();
        assert_eq!(second.bytes(), 7);
        assert_eq!(budget.used(Class::Inbound), 16 << 20);
        assert_eq!(budget.used(Class::Outbound), 7);
        drop((first, second));
        assert_eq!(budget.used(Class::Inbound), 0);
        assert_eq!(budget.0.whole.used(), 0);
    }

    #[test]
    fn a_full_connection_token_or_topic_leaves_the_budget_to_others() {
        let budget = budget();
        let own = budget.connection(None);
        let held = fill(&budget, &own);
        assert!(try_mib(&budget, 1, &own).is_none(), "connection");
        let other = budget.connection(None);
        drop(try_mib(&budget, 16, &other).expect("another connection"));
        drop(held);

        let shared = budget.topic(&budget.connection(Some("a")), TopicId(1));
        let same_topic = budget.topic(&budget.connection(Some("b")), TopicId(1));
        let _topic_held = fill(&budget, &shared);
        assert!(try_mib(&budget, 1, &same_topic).is_none(), "topic");

        let second = budget.topic(&budget.connection(Some("a")), TopicId(2));
        let _token_held = fill(&budget, &second);
        let third = budget.connection(Some("a"));
        assert!(try_mib(&budget, 5, &third).is_none(), "token");
        assert!(try_mib(&budget, 5, &budget.connection(Some("b"))).is_some());
    }

    #[test]
    fn a_refused_request_leaves_no_debit_in_its_shares() {
        let budget = budget();
        let _held = fill_all(&budget);
        let share = budget.topic(&budget.connection(Some("a")), TopicId(1));
        assert!(try_mib(&budget, 2, &share).is_none());
        assert_eq!(share.connection.used(), 0);
        assert_eq!(share.token.unwrap().used(), 0);
        assert_eq!(share.topic.unwrap().used(), 0);
    }

    #[tokio::test]
    async fn a_waiter_gets_what_another_gives_back() {
        let budget = budget();
        let held = fill_all(&budget);
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
    async fn small_requests_do_not_wait_behind_large_ones_nor_large_ones_behind_small() {
        let budget = budget();
        let large = [(); 3].map(|()| budget.connection(None));
        let _first = try_mib(&budget, 16, &large[0]).unwrap();
        let second = try_mib(&budget, 16, &large[1]).unwrap();
        let third = budget.acquire(16 << 20, Class::Inbound, &large[2]);
        tokio::pin!(third);
        assert!(is_pending(third.as_mut()).await);

        // However many large ones wait, small ones have their lane.
        let small = (0..16).map(|_| try_mib(&budget, 1, &budget.connection(None)));
        let small: Vec<_> = small.map(|permit| permit.expect("a small one")).collect();
        let out = budget.connection(None);
        assert!(budget.try_acquire(1 << 20, Class::Outbound, &out).is_some());

        // However many small ones want it, what comes back is the large one's that waits.
        drop(second);
        assert!(try_mib(&budget, 1, &budget.connection(None)).is_none());
        assert_eq!(third.await.unwrap().bytes(), 16 << 20);
        // And when none waits, it is anybody's.
        assert!(try_mib(&budget, 1, &budget.connection(None)).is_some());
        drop(small);
    }

    #[tokio::test]
    async fn who_waits_for_their_own_share_holds_nothing_of_everybodys() {
        let budget = budget();
        let share = budget.connection(None);
        let _held = try_mib(&budget, 16, &share).unwrap();
        let waiting = budget.acquire(16 << 20, Class::Inbound, &share);
        tokio::pin!(waiting);
        assert!(is_pending(waiting.as_mut()).await);
        assert_eq!(budget.0.whole.used(), 16 << 20);
        assert!(try_mib(&budget, 16, &budget.connection(None)).is_some());
    }

    #[tokio::test]
    async fn what_others_wait_for_is_wanted_and_ones_own_is_not() {
        let budget = budget();
        let (one, two) = (budget.connection(None), budget.connection(None));
        let own = try_mib(&budget, 16, &one).unwrap();
        {
            let waiting = budget.acquire(16 << 20, Class::Inbound, &one);
            tokio::pin!(waiting);
            assert!(is_pending(waiting.as_mut()).await);
            assert!(!budget.is_wanted(&one), "it waits for its own share");
        }
        let _rest = fill_all(&budget);
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
        let held = fill_all(&budget);
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
        let limit = share.connection.large_bytes;
        assert!(limit >= FRAME_BYTES_MAX as u64);
        for bytes in [limit + 1, u64::MAX] {
            let refused = budget.acquire(bytes, Class::Inbound, &share).await;
            assert_eq!(refused.unwrap_err(), Refused::TooLarge { bytes, limit });
        }
    }

    #[tokio::test]
    async fn only_so_many_may_wait() {
        let budget = budget();
        let _held = fill_all(&budget);
        budget.0.waiting.store(WAITING_MAX, Ordering::Relaxed);
        let share = budget.connection(None);
        let refused = budget.acquire(2 << 20, Class::Inbound, &share).await;
        let wire = WireError::from(refused.unwrap_err());
        assert_eq!(wire.code, ErrorCode::Memory);
        assert!(wire.retry_after_ms.is_some());
        assert_eq!(budget.waiting(), WAITING_MAX, "the refused one left");
    }

    #[test]
    fn pressure_rises_with_use() {
        let budget = budget();
        assert_eq!(budget.pressure(), Pressure::Calm);
        let mut held = Vec::new();
        for mib in [16, 16].into_iter().chain([1; 13]) {
            held.extend(try_mib(&budget, mib, &budget.connection(None)));
        }
        assert_eq!(budget.pressure(), Pressure::Raised);
        held.extend(fill_all(&budget));
        assert_eq!(budget.pressure(), Pressure::High);
        drop(held);

        let share = budget.topic(&budget.connection(Some("a")), TopicId(1));
        let other = budget.topic(&budget.connection(Some("b")), TopicId(1));
        let _held = fill(&budget, &share);
        assert_eq!(other.pressure(), Pressure::High, "its topic is full");
        assert_eq!(budget.pressure(), Pressure::Calm);
    }

    #[test]
    fn a_pool_lends_what_it_has_and_leaves_the_next_one_some() {
        let budget = budget();
        let most = budget.session(1 << 20).unwrap();
        assert!(budget.session(1).is_none());
        drop(most);
        assert!(budget.session(1).is_some());

        let all = 1 << 20;
        let mut loans = Vec::new();
        for _ in 0..100 {
            loans.push(budget.receive_window(u64::MAX));
        }
        assert_eq!(loans[0].bytes(), all / 16);
        assert!(loans.iter().rev().take(50).all(|loan| loan.bytes() > 0));
        assert_eq!(budget.small_receive_window(u64::MAX).bytes(), 0);
        let lent: u64 = loans.iter().map(Loan::bytes).sum();
        assert_eq!(budget.lent()[1], ("quic_receive", lent));
        assert!(lent <= all);
        drop(loans);
        assert!(budget.small_receive_window(u64::MAX).bytes() > 0);
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
