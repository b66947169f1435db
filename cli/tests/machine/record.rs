//! What happened, in the order in which the clients saw it: written by all of them, read by the oracle.
//!
//! An operation is written down before it is sent and its answer after it has come, so that the
//! oracle's order holds whatever lay between. What is asked from the broker beside it (messages on the
//! disk, floors) gets its place before it is asked: what others are told meanwhile comes later.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::history::{
    Delivery, End, Event, History, How, Identity, Placed, Seen, Sent, Settling, SubNo, SubRules,
    TopicNo, TopicRules, TopicSeen,
};
use crate::oracle::judge;

/// Taken off every time at which something was asked: the broker's clock may run 500 ppm fast.
const SLACK_US: u64 = 500;

pub struct Record {
    began: Instant,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    topics: Vec<TopicRules>,
    subs: Vec<SubRules>,
    /// A place that was never filled is none.
    events: Vec<Option<Event>>,
    /// Where a message was first sent.
    first_sent: HashMap<u64, usize>,
    /// Unanswered, of producers that send again by themselves.
    pending: BTreeMap<u64, (Identity, TopicNo, Sent)>,
    /// Delivered and not settled, by subscription, session and offset.
    out: BTreeMap<(SubNo, u64, u64), u32>,
    reach: BTreeMap<u64, Reach>,
    next_id: u64,
    /// A stop that is not written down yet: what clients still hand out until the next start comes from
    /// the process before.
    is_stopped: bool,
    counts: Counts,
    /// What a client was told that it should never be told.
    faults: Vec<String>,
}

/// How much has been answered well.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub accepted: u64,
    /// Of producers that last.
    pub lasting: u64,
    pub settled: u64,
    pub delivered: u64,
    pub refused: u64,
    pub stops: u64,
    /// How often connections may have broken: at each stop, and before and after each standstill.
    pub breaks: u64,
}

/// How far a producer has come.
#[derive(Copy, Clone, Debug, Default)]
pub struct Reach {
    pub sent: u64,
    pub accepted: u64,
}

/// Whether a producer sends again after its connection broke.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Lasting {
    Yes,
    No,
}

impl Record {
    pub fn new(topics: Vec<TopicRules>, subs: Vec<SubRules>) -> Self {
        let inner = Inner {
            topics,
            subs,
            ..Inner::default()
        };
        Self {
            began: Instant::now(),
            inner: Mutex::new(inner),
        }
    }

    pub fn now_us(&self) -> u64 {
        SLACK_US + self.began.elapsed().as_micros() as u64
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    pub fn fault(&self, what: String) {
        self.lock().faults.push(what);
    }

    pub fn faults(&self) -> Vec<String> {
        self.lock().faults.clone()
    }

    pub fn sent(&self, producer: Identity, topic: TopicNo, sent: Sent, lasting: Lasting) {
        let at = self.now_us() - SLACK_US;
        let mut inner = self.lock();
        let index = inner.events.len();
        inner.first_sent.entry(sent.digest).or_insert(index);
        let reach = inner.reach.entry(producer.key).or_default();
        reach.sent = reach.sent.max(sent.sequence);
        if lasting == Lasting::Yes {
            inner.pending.insert(sent.digest, (producer, topic, sent));
        }
        inner.push_send(producer, topic, sent);
        inner.push(Event::SendTaken {
            messages: vec![sent],
            at,
        });
    }

    pub fn accepted(&self, producer: Identity, topic: TopicNo, placed: Placed) {
        let mut inner = self.lock();
        let lasting = inner.pending.remove(&placed.digest).is_some();
        inner.counts.accepted += 1;
        inner.counts.lasting += u64::from(lasting);
        let reach = inner.reach.entry(producer.key).or_default();
        reach.accepted = reach.accepted.max(placed.sequence);
        inner.push(Event::Accepted {
            producer,
            topic,
            messages: vec![placed],
        });
    }

    /// The client says that it was not appended.
    pub fn refused(&self, digest: u64) {
        let mut inner = self.lock();
        inner.pending.remove(&digest);
        inner.counts.refused += 1;
    }

    pub fn reach(&self, key: u64) -> Reach {
        self.lock().reach.get(&key).copied().unwrap_or_default()
    }

    pub fn delivered(&self, delivery: Delivery) {
        let mut inner = self.lock();
        inner.counts.delivered += 1;
        let lease = (delivery.sub, delivery.session, delivery.offset);
        inner.out.insert(lease, delivery.delivery);
        inner.push(Event::Delivered(delivery));
    }

    /// About to be settled; the name of that.
    pub fn settling(&self, sub: SubNo, session: u64, item: Settling) -> u64 {
        let at = self.now_us() - SLACK_US;
        let mut inner = self.lock();
        inner.out.remove(&(sub, session, item.offset));
        let id = inner.id();
        inner.push(Event::SettleTaken {
            id,
            sub,
            session,
            items: vec![item],
            at,
        });
        id
    }

    pub fn settled(&self, id: u64, is_refused: bool) {
        let mut inner = self.lock();
        inner.counts.settled += u64::from(!is_refused);
        let refused = if is_refused { vec![0] } else { Vec::new() };
        inner.push(Event::Settled { id, refused });
    }

    pub fn active(&self, sub: SubNo, session: u64, from: u64) {
        self.lock().push(Event::Active { sub, session, from });
    }

    pub fn committing(&self, sub: SubNo, next: u64) -> u64 {
        let mut inner = self.lock();
        let id = inner.id();
        inner.push(Event::CommitTaken { id, sub, next });
        id
    }

    pub fn committed(&self, id: u64, is_refused: bool) {
        let mut inner = self.lock();
        inner.counts.settled += u64::from(!is_refused);
        inner.push(Event::Committed {
            id,
            refused: is_refused,
        });
    }

    /// The process is gone.
    pub fn stopped(&self) {
        let mut inner = self.lock();
        inner.counts.stops += 1;
        inner.counts.breaks += 1;
        inner.is_stopped = true;
    }

    /// Connections may break, or have broken, without a stop.
    pub fn breaks(&self) {
        self.lock().counts.breaks += 1;
    }

    /// A process serves; the place for what will be found in it. Producers that last send everything
    /// again by themselves.
    pub fn started(&self) -> usize {
        let mut inner = self.lock();
        if std::mem::take(&mut inner.is_stopped) {
            inner.push(Event::Stopped);
        }
        let mut lost: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for ((sub, session, offset), delivery) in &inner.out {
            let leases = lost.entry((*sub, *session)).or_default();
            leases.push((*offset, *delivery));
        }
        // Those that do not come back leave their numbers to others; those that do lose nothing by it.
        for ((sub, session), leases) in lost {
            inner.push(Event::Lost {
                sub,
                session,
                leases,
            });
        }
        let place = inner.reserve();
        let pending: Vec<_> = inner.pending.values().copied().collect();
        for (producer, topic, sent) in pending {
            inner.push_send(producer, topic, sent);
        }
        place
    }

    /// What was found on the disk; read after its place was taken, so later messages are left out. How far
    /// each topic has been looked at by that.
    pub fn found(&self, place: usize, mut topics: Vec<TopicSeen>) -> Vec<(TopicNo, u64)> {
        let at = self.now_us();
        let mut inner = self.lock();
        for topic in &mut topics {
            let is_later = |seen: &Seen| {
                let first = inner.first_sent.get(&seen.digest);
                first.is_some_and(|first| *first > place)
            };
            if let Some(cut) = topic.messages.iter().position(is_later) {
                topic.next = topic.messages[cut].offset;
                topic.messages.truncate(cut);
            }
        }
        let ends = topics.iter().map(|seen| {
            let last = seen.messages.last();
            (seen.topic, last.map_or(seen.from, |last| last.offset + 1))
        });
        let ends = ends.collect();
        inner.events[place] = Some(Event::Started { at, topics });
        ends
    }

    pub fn reserve(&self) -> usize {
        self.lock().reserve()
    }

    pub fn floor(&self, place: usize, sub: SubNo, floor: u64) {
        self.lock().events[place] = Some(Event::Floor { sub, floor });
    }

    /// All that is wrong, in words.
    pub fn judged(&self, end: Option<End>) -> Vec<String> {
        let inner = self.lock();
        let mut events: Vec<Event> = inner.events.iter().flatten().cloned().collect();
        events.extend(inner.is_stopped.then_some(Event::Stopped));
        events.extend(end.map(Event::End));
        let history = History {
            topics: inner.topics.clone(),
            subs: inner.subs.clone(),
            events,
        };
        let broken = judge(&history).into_iter().map(|broken| broken.to_string());
        let faults = inner.faults.iter().cloned();
        let mut wrong: Vec<String> = faults.chain(broken).collect();
        if !wrong.is_empty() {
            wrong.push(format!("all that happened: {}", keep(&history)));
        }
        wrong
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn push(&mut self, event: Event) {
        self.events.push(Some(event));
    }

    fn push_send(&mut self, producer: Identity, topic: TopicNo, sent: Sent) {
        self.push(Event::Send {
            producer,
            topic,
            messages: vec![sent],
        });
    }

    fn reserve(&mut self) -> usize {
        self.events.push(None);
        self.events.len() - 1
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// Writes a history down for whoever looks into it; where it is.
fn keep(history: &History) -> String {
    let lines = history.events.iter().enumerate();
    let text: String = lines
        .map(|(number, event)| format!("{number} {event:?}\n"))
        .collect();
    let file = tempfile::Builder::new()
        .prefix("millpond-history-")
        .tempfile();
    let kept = file.and_then(|file| {
        std::fs::write(file.path(), text)?;
        Ok(file.keep()?.1)
    });
    kept.map_or_else(|error| error.to_string(), |path| path.display().to_string())
}

/// What is settled how.
pub fn settling(offset: u64, delivery: u32, how: How) -> Settling {
    Settling {
        offset,
        delivery,
        how,
    }
}
