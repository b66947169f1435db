//! What a consumer's handles and its task share: one session's deliveries, credit and settlements.
//!
//! ```text
//! received -> buffered -> taken by the user -> settled or dropped
//!             \________ outstanding _________/
//! granted = received + min(prefetch - outstanding, wanted in all - taken so far - buffered)
//! ```
//! so at most `prefetch` deliveries are outstanding, and a grant never shrinks. Counts of received
//! and begun deliveries are the delivery stream's own and start at 0 with each.

mod arrivals;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use millpond_protocol::control::{ConsumerOpened, LeaseName, LostReason, Outcome, SessionResume};
use millpond_protocol::hot::{ConsumerCredit, Credit, Delivered};
use millpond_protocol::{Offset, SessionId, SubscriptionMode};
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::Notify;

use super::settle::{SettleQueue, SettleSlot};
use crate::completion::Wakeups;
use crate::error::Error;
use crate::limits::{DROPPED_DELAY_MS, LOST_LEASES_MAX, SETTLEMENTS_PENDING_MAX};

/// How much a consumer may hold.
#[derive(Copy, Clone, Debug)]
pub struct Prefetch {
    pub messages: u64,
    pub bytes: u64,
    /// Messages that the user will take in all.
    pub in_all: u64,
}

/// One delivery on its way from the frame to the user.
pub struct Held {
    pub delivered: Delivered,
    session: SessionId,
    /// Where it stands among what the user has, once it is taken.
    slot: usize,
    /// Its number on its delivery stream, and which stream that was.
    ordinal: u64,
    generation: u32,
}

/// A delivery that the user has: its lease, and what it holds of the session.
#[derive(Copy, Clone)]
pub struct Taken {
    session: SessionId,
    pub lease: LeaseName,
    bytes: u64,
    slot: usize,
}

/// What the user gets next.
pub enum Item {
    Message(Held),
    Corrupt { first: Offset, next: Offset },
}

/// What the settlement stream's writer should do.
pub enum SettleNext {
    Write(Bytes),
    /// Every settlement has been written: close the session.
    Close,
    Wait,
}

/// Where a session is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// The handle is gone; deliveries that the user still has may be settled.
    Detached,
    /// Only answers are awaited.
    Closing,
    Ended(Error),
}

pub struct Session {
    prefetch: Prefetch,
    state: Mutex<State>,
    /// By each delivery told once between two looks of the writer, as `settle_work` is: see `Told`.
    credit_work: Notify,
    settle_work: Notify,
    progress: Notify,
    dropped: AtomicU64,
}

struct State {
    phase: Phase,
    /// The terminal error has been shown to the user.
    told: bool,
    resume: SessionResume,
    mode: SubscriptionMode,
    lease_ms: u64,
    generation: u32,
    buffer: VecDeque<Item>,
    received: u64,
    received_bytes: u64,
    begun: u64,
    granted: Credit,
    outstanding: u64,
    outstanding_bytes: u64,
    /// Messages that the user has taken, over all sessions.
    taken_in_all: u64,
    /// What the user has, by its slot; some of it may be of earlier sessions.
    taken: Slab<(SessionId, LeaseName)>,
    /// Of what the user has, and of what may still come: notices overtake deliveries. At most
    /// `LOST_LEASES_MAX`.
    lost: BTreeMap<LeaseName, LostReason>,
    /// Once so many are received, nothing is on its way of which a notice has told.
    lost_until: u64,
    /// No more than were taken when the session was resumed.
    strays: BTreeMap<LeaseName, Stray>,
    /// The broker is going away: nothing is handed out before the streams are open again.
    paused: bool,
    settle: SettleQueue,
    close_sent: bool,
    user: Option<Waker>,
    stream: StreamPosition,
    told_of: Told,
}

/// A lease that the user had when the session was resumed, and that the broker did not list. One that it lost
/// in a crash may come again under the same name.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Stray {
    /// The user still has it: what comes again is what the user has.
    Held,
    /// Settled since, and that may have counted against what comes again.
    Settled,
}

/// Which writers have been told of work and have not looked since. Telling one costs more than all else that a
/// delivery needs here, and there are thousands between two looks.
#[derive(Default)]
struct Told {
    credit: bool,
    settlements: bool,
}

/// Stream mode only: what has been received, so that a resumed stream repeats nothing.
#[derive(Default)]
struct StreamPosition {
    active: bool,
    /// A seek has been answered when these streams, by their generation, were open or being opened.
    sought: Option<u32>,
    resumed: bool,
    skip_below: Offset,
    next: Offset,
    /// What the broker has confirmed. One that comes back with less has been sent elsewhere.
    committed: Offset,
}

impl Session {
    pub fn new(opened: &ConsumerOpened, prefetch: Prefetch) -> Self {
        Self {
            prefetch,
            state: Mutex::new(State {
                phase: Phase::Open,
                told: false,
                resume: SessionResume {
                    session: opened.session,
                    token: opened.token,
                },
                mode: opened.mode,
                lease_ms: opened.lease_ms,
                generation: 0,
                buffer: VecDeque::new(),
                received: 0,
                received_bytes: 0,
                begun: 0,
                granted: Credit::default(),
                outstanding: 0,
                outstanding_bytes: 0,
                taken_in_all: 0,
                taken: Slab::new(),
                lost: BTreeMap::new(),
                lost_until: 0,
                strays: BTreeMap::new(),
                paused: false,
                settle: SettleQueue::default(),
                close_sent: false,
                user: None,
                stream: StreamPosition {
                    committed: opened.position,
                    ..StreamPosition::default()
                },
                told_of: Told::default(),
            }),
            credit_work: Notify::new(),
            settle_work: Notify::new(),
            progress: Notify::new(),
            dropped: AtomicU64::new(0),
        }
    }

    /// The next item for the user; `None` at the end.
    pub fn poll_item(&self, context: &mut Context<'_>) -> Poll<Option<Result<Item, Error>>> {
        let mut state = self.state.lock();
        if let Phase::Ended(error) = &state.phase {
            let error = error.clone();
            let told = std::mem::replace(&mut state.told, true);
            let end = if told || error == Error::Closed {
                None
            } else {
                Some(Err(error))
            };
            return Poll::Ready(end);
        }
        let next = if state.paused || state.stream.sought.is_some() {
            None
        } else {
            state.buffer.pop_front()
        };
        let Some(mut item) = next else {
            match &mut state.user {
                Some(waker) => waker.clone_from(context.waker()),
                empty => *empty = Some(context.waker().clone()),
            }
            return Poll::Pending;
        };
        if let Item::Message(held) = &mut item {
            state.begin(held);
        }
        let told = std::mem::replace(&mut state.told_of.credit, true);
        drop(state);
        if !told {
            self.credit_work.notify_one();
        }
        Poll::Ready(Some(Ok(item)))
    }

    /// Settles a delivery; it is no longer outstanding, whatever the answer.
    pub fn settle(&self, taken: Taken, outcome: Option<Outcome>) -> Result<SettleSlot, Error> {
        let lease = taken.lease;
        let mut state = self.state.lock();
        state.taken.remove(taken.slot);
        state.forget(taken.bytes);
        if taken.session == state.resume.session {
            state.lost.remove(&lease);
            if let Some(stray) = state.strays.get_mut(&lease) {
                *stray = Stray::Settled;
            }
        }
        let slot = state.settleable(taken.session).map(|()| match outcome {
            None => state.settle.ack(lease),
            Some(outcome) => state.settle.settle(lease, outcome),
        });
        let told = std::mem::replace(
            &mut state.told_of,
            Told {
                credit: true,
                settlements: true,
            },
        );
        drop(state);
        if !told.settlements {
            self.settle_work.notify_one();
        }
        if !told.credit {
            self.credit_work.notify_one();
        }
        if slot.is_err() {
            self.progress.notify_waiters();
        }
        slot
    }

    /// Starts the processing clock of a delivery again.
    pub fn extend(&self, taken: Taken) -> Result<SettleSlot, Error> {
        let mut state = self.state.lock();
        state.settleable(taken.session)?;
        let slot = state.settle.settle(taken.lease, Outcome::Extend);
        drop(state);
        self.settle_work.notify_one();
        Ok(slot)
    }

    /// A delivery that was dropped without a word: handed back, logged and counted.
    pub fn dropped(&self, taken: Taken) {
        let release = Outcome::Release {
            delay_ms: Some(DROPPED_DELAY_MS),
        };
        if self.settle(taken, Some(release)).is_ok() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                offset = taken.lease.offset.0,
                delivery = taken.lease.delivery.0,
                "a delivery was dropped without being settled; it is released"
            );
        }
    }

    pub fn dropped_count(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Why a taken delivery's lease is over, if the broker has said so.
    pub fn lost_reason(&self, taken: Taken) -> Option<LostReason> {
        let state = self.state.lock();
        if taken.session != state.resume.session {
            return Some(LostReason::LeaseExpired);
        }
        state.lost.get(&taken.lease).copied()
    }

    pub fn commit(&self, next: Offset) -> Result<SettleSlot, Error> {
        let mut state = self.state.lock();
        let session = state.resume.session;
        state.settleable(session)?;
        let slot = state.settle.commit(next);
        drop(state);
        self.settle_work.notify_one();
        Ok(slot)
    }

    pub fn is_active(&self) -> bool {
        self.state.lock().stream.active
    }

    /// Stream mode: a seek has been answered. What has come may be from before it, and more of that
    /// may be on its way, so nothing is handed out until streams are open that were asked for after
    /// this: they begin where it went.
    pub fn sought(&self) {
        let mut state = self.state.lock();
        state.stream.sought = Some(state.generation);
        drop(state);
        self.progress.notify_waiters();
    }

    /// Waits until the present streams are void because of a seek.
    pub async fn must_reopen(&self) {
        loop {
            let progress = self.progress.notified();
            {
                let state = self.state.lock();
                if state.phase == Phase::Open && state.stream.sought == Some(state.generation) {
                    return;
                }
            }
            progress.await;
        }
    }

    /// The credit frame that should stand now.
    pub fn credit(&self) -> ConsumerCredit {
        let mut state = self.state.lock();
        state.told_of.credit = false;
        state.grant(self.prefetch);
        ConsumerCredit {
            credit: state.granted,
            begun: state.begun,
        }
    }

    pub async fn credit_work(&self) {
        self.credit_work.notified().await;
    }

    /// What the settlement stream's writer should do.
    pub fn next_settlement(&self) -> SettleNext {
        let mut state = self.state.lock();
        state.told_of.settlements = false;
        if state.close_sent {
            return SettleNext::Wait;
        }
        if let Some(bytes) = state.settle.next() {
            return SettleNext::Write(bytes);
        }
        state.close_sent = match state.phase {
            Phase::Closing => true,
            Phase::Detached => state.outstanding == 0 && state.settle.pending() == 0,
            Phase::Open | Phase::Ended(_) => false,
        };
        if state.close_sent {
            SettleNext::Close
        } else {
            SettleNext::Wait
        }
    }

    pub async fn settle_work(&self) {
        self.settle_work.notified().await;
    }

    /// True if the broker has been asked to close the session.
    pub fn is_close_sent(&self) -> bool {
        self.state.lock().close_sent
    }

    /// True if there is a lease to be renewed.
    pub fn holds_leases(&self) -> bool {
        let state = self.state.lock();
        state.outstanding > 0 && state.mode == SubscriptionMode::Queue
    }

    pub fn lease_ms(&self) -> u64 {
        self.state.lock().lease_ms
    }

    pub fn resume(&self) -> SessionResume {
        self.state.lock().resume
    }

    /// The streams are gone.
    pub fn stream_lost(&self) {
        let mut state = self.state.lock();
        state.settle.lost();
        state.close_sent = false;
        state.generation = state.generation.wrapping_add(1);
        (state.received, state.received_bytes, state.begun) = (0, 0, 0);
        state.granted = Credit::default();
    }

    /// Nothing more is handed out on these streams.
    pub fn pause(&self) {
        self.state.lock().paused = true;
    }

    /// Waits until the user has nothing and every settlement is answered.
    pub async fn all_settled(&self) {
        loop {
            let progress = self.progress.notified();
            {
                let state = self.state.lock();
                if state.taken.is_empty() && state.settle.pending() == 0 {
                    return;
                }
            }
            progress.await;
        }
    }

    /// The streams are open again, for the same session or for a new one.
    pub fn reopened(&self, opened: &ConsumerOpened) {
        let mut wakeups = Wakeups::default();
        let mut state = self.state.lock();
        let same = opened.resumed && opened.session == state.resume.session;
        state.resume = SessionResume {
            session: opened.session,
            token: opened.token,
        };
        state.lease_ms = opened.lease_ms;
        if !same {
            tracing::warn!("the consumer's session was lost; a new one begins");
            state.settle.fail(&SESSION_LOST, &mut wakeups);
        }
        // What stands now the broker has said. A name that it lost in a crash may be given again.
        state.lost.clear();
        state.lost_until = 0;
        state.strays.clear();
        match state.mode {
            SubscriptionMode::Queue if same => state.resumed(&opened.leases),
            SubscriptionMode::Queue => state.clear_buffer(),
            SubscriptionMode::Stream => state.stream_reopened(same, opened.position),
        }
        state.paused = false;
        let user = state.user.take();
        drop(state);
        wakeups.wake();
        if let Some(user) = user {
            user.wake();
        }
        self.credit_work.notify_one();
        self.settle_work.notify_one();
        self.progress.notify_waiters();
    }

    /// Hands out nothing more; ends once what the user has is settled.
    pub fn detach(&self) {
        self.stop(Phase::Detached);
    }

    /// Hands out nothing more and ends once the broker has answered.
    pub fn close(&self) {
        self.stop(Phase::Closing);
    }

    /// The session is over.
    pub fn end(&self, error: &Error) {
        let mut wakeups = Wakeups::default();
        let mut state = self.state.lock();
        if matches!(state.phase, Phase::Ended(_)) {
            return;
        }
        state.phase = Phase::Ended(error.clone());
        state.clear_buffer();
        state.settle.fail(&Error::SessionEnded, &mut wakeups);
        let user = state.user.take();
        drop(state);
        wakeups.wake();
        if let Some(user) = user {
            user.wake();
        }
        self.progress.notify_waiters();
    }

    pub async fn ended(&self) {
        loop {
            let progress = self.progress.notified();
            if matches!(self.state.lock().phase, Phase::Ended(_)) {
                return;
            }
            progress.await;
        }
    }

    fn stop(&self, phase: Phase) {
        let mut state = self.state.lock();
        let later = match state.phase {
            Phase::Open => true,
            Phase::Detached => phase == Phase::Closing,
            Phase::Closing | Phase::Ended(_) => false,
        };
        if later {
            state.phase = phase;
            state.clear_buffer();
        }
        let user = state.user.take();
        drop(state);
        if let Some(user) = user {
            user.wake();
        }
        self.settle_work.notify_one();
    }
}

impl State {
    fn begin(&mut self, held: &mut Held) {
        self.taken_in_all += 1;
        if held.generation == self.generation {
            self.count_begun();
        }
        if self.mode == SubscriptionMode::Stream {
            self.forget(held.bytes());
        } else {
            held.slot = self.taken.insert((held.session, held.lease()));
        }
    }

    /// All that came on this delivery stream before what is still buffered is begun, or over.
    fn count_begun(&mut self) {
        let first = self.buffer.iter().find_map(|item| match item {
            Item::Message(held) if held.generation == self.generation => Some(held.ordinal),
            _ => None,
        });
        self.begun = self.begun.max(first.unwrap_or(self.received));
    }

    /// Keeps what stands. A lease that nobody here has was on its way when the streams broke: it is
    /// handed back, lest it wait unseen.
    fn resumed(&mut self, leases: &[LeaseName]) {
        let mut unseen: BTreeSet<LeaseName> = leases.iter().copied().collect();
        self.retain(|held| unseen.remove(&held.lease()));
        for (_, (session, lease)) in &self.taken {
            if *session != self.resume.session || unseen.remove(lease) {
                continue;
            }
            self.strays.insert(*lease, Stray::Held);
            if self.lost.len() < LOST_LEASES_MAX {
                self.lost.insert(*lease, LostReason::LeaseExpired);
            }
        }
        for lease in self.settle.leases() {
            unseen.remove(&lease);
        }
        for lease in unseen {
            self.settle
                .settle(lease, Outcome::Release { delay_ms: None });
        }
        self.settle.repeat();
    }

    fn grant(&mut self, prefetch: Prefetch) {
        if self.phase != Phase::Open || self.settle.pending() > SETTLEMENTS_PENDING_MAX {
            return;
        }
        // A broker that lost its last leases in a crash gives their names to the next ones: what is
        // settled under such a name must be answered before there can be another delivery of it.
        if self.settle.is_repeating() {
            return;
        }
        let wanted = prefetch
            .in_all
            .saturating_sub(self.taken_in_all + self.buffer.len() as u64);
        let room = prefetch.messages.saturating_sub(self.outstanding);
        let messages = self.received + room.min(wanted);
        let room = prefetch.bytes.saturating_sub(self.outstanding_bytes);
        let bytes = self.received_bytes.saturating_add(room);
        self.granted.max_messages = self.granted.max_messages.max(messages);
        self.granted.max_bytes = self.granted.max_bytes.max(bytes);
    }

    fn settleable(&self, session: SessionId) -> Result<(), Error> {
        match self.phase {
            Phase::Ended(_) => Err(Error::SessionEnded),
            _ if session != self.resume.session => Err(SESSION_LOST),
            _ if self.close_sent => Err(Error::SessionEnded),
            _ => Ok(()),
        }
    }

    fn stream_reopened(&mut self, same: bool, position: Offset) {
        let sought = self.stream.sought;
        if same && sought.is_none() && position >= self.stream.committed {
            self.stream.resumed = true;
            self.stream.skip_below = self.stream.next;
        } else {
            self.clear_buffer();
            self.stream = StreamPosition {
                active: same && self.stream.active,
                // These may have been attached before it: the next ones count.
                sought: sought.filter(|generation| *generation == self.generation),
                committed: position,
                ..StreamPosition::default()
            };
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(&Held) -> bool) {
        let mut gone = 0;
        let mut gone_bytes = 0;
        self.buffer.retain(|item| match item {
            Item::Message(held) if !keep(held) => {
                gone += 1;
                gone_bytes += held.bytes();
                false
            }
            _ => true,
        });
        self.outstanding -= gone;
        self.outstanding_bytes -= gone_bytes;
    }

    fn clear_buffer(&mut self) {
        self.retain(|_| false);
    }

    fn forget(&mut self, bytes: u64) {
        self.outstanding -= 1;
        self.outstanding_bytes -= bytes;
    }
}

impl Held {
    /// The right to settle it.
    pub fn taken(&self) -> Taken {
        Taken {
            session: self.session,
            lease: self.lease(),
            bytes: self.bytes(),
            slot: self.slot,
        }
    }

    pub fn lease(&self) -> LeaseName {
        LeaseName {
            offset: self.delivered.meta.offset,
            delivery: self.delivered.meta.delivery,
        }
    }

    /// What it takes of the byte credit, which counts messages only.
    pub fn bytes(&self) -> u64 {
        self.delivered.message.len() as u64
    }
}

/// What becomes of settlements whose session was lost while the consumer goes on in a new one.
const SESSION_LOST: Error = Error::LeaseLost { state: None };
