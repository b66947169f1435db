//! Drives the core and the model through the same records and calls, and compares what can be seen.

use std::collections::BTreeMap;

use bytes::Bytes;
use millpond_protocol::hot::AckRun;
use millpond_protocol::policy::SubscriptionMode;
use millpond_protocol::{Delivery, LogIndex, Offset, SessionId, Stamp, SubscriptionId};
use millpond_queue::{Counters, Effect, Options, Outcome, Place, Queue, Record, SnapshotDelta};

use crate::fold::Applied;
use crate::judge::Turn;
use crate::state::*;

pub struct World {
    pub core: Queue,
    pub model: Model,
    pub now: Stamp,
    pub options: Options,
    log: Vec<Entry>,
    /// The latest bytes of every chunk, and how much of the log they cover.
    chunks: BTreeMap<u64, Bytes>,
    covered: usize,
    /// How much of the log the snapshot covers that is being told.
    telling: Option<usize>,
    pub recovery_epoch: u32,
    pub sessions_opened: u32,
    /// Leases that once were, for late settlements.
    pub past: Vec<(
        SubscriptionId,
        SessionId,
        millpond_protocol::control::LeaseName,
    )>,
    pub opened_with: Vec<millpond_protocol::control::ProducerResume>,
}

struct Entry {
    place: Place,
    stamp: Stamp,
    kind: u8,
    bytes: Vec<u8>,
    outcome: Outcome,
    effects: Vec<Effect>,
}

/// Turns after which work must have come to rest.
const TURNS_MAX: usize = 500;

impl World {
    pub fn new() -> Self {
        let options = Options {
            seed: 7,
            ..Options::default()
        };
        let mut world = Self {
            core: Queue::new(options.clone()),
            model: Model::default(),
            now: Stamp(1_700_000_000_000_000),
            options,
            log: Vec::new(),
            chunks: BTreeMap::new(),
            covered: 0,
            telling: None,
            recovery_epoch: 1,
            sessions_opened: 0,
            past: Vec::new(),
            opened_with: Vec::new(),
        };
        world.commit(&Record::Start { recovery_epoch: 1 });
        world
    }

    pub fn new_session_id(&mut self) -> SessionId {
        self.sessions_opened += 1;
        SessionId(u64::from(self.recovery_epoch) << 32 | u64::from(self.sessions_opened))
    }

    /// One record through the log's bytes into both.
    pub fn commit(&mut self, record: &Record<'_>) -> Outcome {
        self.now = Stamp(self.now.0 + 1);
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let kind = record.kind();
        let decoded = Record::decode(kind, &bytes).expect("what was encoded is decoded");
        assert_eq!(decoded, *record);
        let number = self.log.len() as u64;
        let place = Place {
            index: LogIndex(1 + number / 3),
            record: (number % 3) as u32,
        };
        let mut effects = Vec::new();
        let (counted, modelled) = (tally(self.core.counters()), self.model.counts);
        let outcome = self.core.apply(place, self.now, &decoded, &mut effects);
        let applied = Applied {
            place,
            stamp: self.now,
            outcome: &outcome,
            effects: &effects,
            core: &self.core,
        };
        self.model.fold(record, &applied);
        self.compare_counters(record, counted, modelled);
        if let Record::Lease {
            subscription,
            session,
            ranges,
        } = record
        {
            for range in ranges {
                for at in range.offset.0..range.offset.0 + u64::from(range.count) {
                    self.past
                        .push((*subscription, *session, name(at, range.delivery)));
                }
            }
        }
        self.log.push(Entry {
            place,
            stamp: self.now,
            kind,
            bytes,
            outcome: outcome.clone(),
            effects,
        });
        if number.is_multiple_of(4) {
            self.tell_snapshot(1);
        }
        outcome
    }

    fn compare_counters(&self, record: &Record<'_>, before: [u64; 9], modelled: Counts) {
        let (after, model) = (tally(self.core.counters()), self.model.counts);
        let core: Vec<u64> = after.iter().zip(before).map(|(a, b)| a - b).collect();
        let differ = [
            model.published - modelled.published,
            model.dedup_hits - modelled.dedup_hits,
            model.delivered - modelled.delivered,
            model.acked - modelled.acked,
            model.released - modelled.released,
            model.failures - modelled.failures,
            model.dead - modelled.dead,
            model.redriven - modelled.redriven,
            model.gaps - modelled.gaps,
        ];
        assert_eq!(
            core, differ,
            "published, dedup hits, delivered, acked, released, failures, dead, redriven, gaps \
             counted for {record:?}"
        );
    }

    /// Lets the core propose until it has no more, without applying anything.
    pub fn dispatch(&mut self, budget: usize) -> usize {
        let mut turn = Turn::default();
        let mut count = 0;
        for _ in 0..TURNS_MAX {
            let mut proposals = Vec::new();
            let more = self.core.dispatch(self.now, budget, &mut proposals);
            count += proposals.len();
            for proposal in &proposals {
                self.model.judge(proposal, self.now, &mut turn);
            }
            if !more {
                self.model.judge_rest(self.now, &turn);
                return count;
            }
        }
        panic!("dispatch always wants more");
    }

    /// Applies the oldest proposals.
    pub fn apply_pending(&mut self, count: usize) {
        for _ in 0..count {
            if self.model.pending.is_empty() {
                return;
            }
            let record = self.model.pending.remove(0);
            self.commit(&record);
        }
    }

    pub fn apply_all_pending(&mut self) {
        self.apply_pending(usize::MAX);
    }

    /// Dispatches and applies until all is at rest.
    pub fn turn(&mut self) {
        self.apply_all_pending();
        for _ in 0..TURNS_MAX {
            if self.dispatch(64) == 0 {
                let due = self.model.next_event(self.now);
                let wakes = self.core.next_wakeup(self.now);
                let in_time = due.is_none_or(|due| wakes.is_some_and(|wakes| wakes <= due));
                assert!(
                    in_time,
                    "{due:?} is slept through until {wakes:?}, now {:?}",
                    self.now
                );
                return;
            }
            self.apply_all_pending();
        }
        panic!("work never comes to rest");
    }

    pub fn take_snapshot(&mut self) {
        self.begin_snapshot();
        self.tell_snapshot(usize::MAX);
    }

    /// It is told while the world goes on, a shelf of retries at a time.
    pub fn begin_snapshot(&mut self) {
        self.tell_snapshot(usize::MAX);
        self.core.begin_snapshot();
        self.telling = Some(self.log.len());
    }

    fn tell_snapshot(&mut self, shelves: usize) {
        if let Some(covered) = self.telling
            && let Some(delta) = self.core.tell_snapshot(shelves)
        {
            merge(&mut self.chunks, delta);
            self.covered = covered;
            self.telling = None;
        }
    }

    /// A crash or a stop: all that is volatile is lost, and what was proposed.
    pub fn restart(&mut self) {
        let mut restored = match self.covered {
            0 => Queue::new(self.options.clone()),
            _ => Queue::restore(self.options.clone(), self.chunks.clone().into_iter())
                .expect("its own snapshot is read"),
        };
        replay(&mut restored, &self.log[self.covered..]);
        restored.check_invariants();
        let mut replayed = Queue::new(self.options.clone());
        replay(&mut replayed, &self.log);
        let whole = full(&mut replayed);
        // What the log would hold now: the old chunks with what has changed since.
        let mut suffix = match self.covered {
            0 => Default::default(),
            _ => self.chunks.clone(),
        };
        merge(&mut suffix, restored.snapshot());
        assert_eq!(
            diff(&suffix, &whole),
            Vec::<u64>::new(),
            "snapshot and suffix, whole replay"
        );
        self.take_snapshot();
        assert_eq!(
            diff(&self.chunks, &whole),
            Vec::<u64>::new(),
            "live deltas, whole replay"
        );
        self.core = restored;
        self.chunks = suffix;
        self.recovery_epoch += 1;
        self.commit(&Record::Start {
            recovery_epoch: self.recovery_epoch,
        });
    }

    /// Compares everything that can be seen from outside.
    pub fn check(&mut self) {
        self.core.check_invariants();
        self.probe();
        let (core, model) = (&self.core, &self.model);
        for (id, topic) in &model.topics {
            let view = core.topic_view(*id).expect("the topic exists");
            assert_eq!((view.name.as_str(), view.id), (topic.name.as_str(), *id));
            assert_eq!(view.config, topic.config);
            let told = (view.first.0, view.next.0);
            assert_eq!(
                told,
                (topic.first, topic.next()),
                "first and next of {}",
                topic.name
            );
            assert_eq!(core.first_kept(*id).0, topic.first);
            assert_eq!(
                u64::from(view.subscriptions),
                model.subs_of(*id).len() as u64
            );
            let letters = model.letters().filter(|(dead, _, _)| dead == id).count() as u64;
            assert_eq!(
                view.dead_letters.unwrap_or(0),
                letters,
                "letters in {}",
                topic.name
            );
            for at in topic.first..topic.next() {
                let needed = model.is_needed(*id, at) && !topic.is_dead;
                let body = topic.messages[at as usize].body;
                let is_live = core.is_live(body.0, Offset(body.1));
                assert!(
                    is_live || !needed,
                    "{at} of {} is needed by somebody",
                    topic.name
                );
            }
        }
        for (dead, at, letter) in model.letters() {
            assert!(
                core.letter(dead, Offset(at)).is_some(),
                "the letter is gone: {letter:?}"
            );
            assert!(
                core.is_live(letter.body.0, Offset(letter.body.1)),
                "no body: {letter:?}"
            );
            assert!(core.record_is_pinned(letter.place), "no story: {letter:?}");
        }
        for sub in model.subs.values() {
            self.check_subscription(sub);
        }
        for (number, job) in &model.jobs {
            let view = core.redrive_view(*number);
            if let Some(view) = view {
                assert_eq!((view.total, view.done), (job.total, job.done), "{job:?}");
            } else {
                assert!(
                    job.letters.is_empty(),
                    "a job that is not done is forgotten: {job:?}"
                );
            }
        }
        assert_eq!(core.tokens().len(), model.tokens.len());
        for (name, hash) in &model.tokens {
            assert_eq!(core.token_by_hash(hash), Some(name.as_str()));
        }
    }

    fn check_subscription(&self, sub: &Sub) {
        let (core, model) = (&self.core, &self.model);
        let view = core
            .subscription_view(sub.id, self.now)
            .expect("the subscription exists");
        assert_eq!(
            (view.name.as_str(), view.paused),
            (sub.name.as_str(), sub.paused)
        );
        assert_eq!(view.config, sub.config);
        let consumers = model.sessions_of(sub.id);
        assert!(view.consumers as usize <= consumers.len(), "{view:?}");
        if sub.config.mode == SubscriptionMode::Stream {
            assert_eq!(view.floor.0, sub.committed, "I7: {view:?}");
            return;
        }
        assert_eq!(
            view.floor.0, sub.floor,
            "I7, the ack floor: {view:?} {sub:?}"
        );
        assert_eq!(view.dead_letter, sub.dead_topic);
        let unfinished = sub.count(|item| !item.is_finished());
        assert_eq!(view.backlog, unfinished, "{view:?} {sub:?}");
        assert_eq!(
            view.ready + view.in_flight + view.scheduled,
            unfinished,
            "{view:?}"
        );
        let (leased, proposed) = model.in_flight(sub);
        let flying = leased..=leased + proposed;
        assert!(
            flying.contains(&view.in_flight),
            "{flying:?} are in flight: {view:?}"
        );
        let mut surely = 0;
        let mut maybe = 0;
        for at in 0..sub.items.len() as u64 {
            if let Some((from, until)) = model.available(sub, at) {
                let is_proposed = model.is_proposed(sub.id, at);
                // What is due by time alone may still be told as scheduled.
                let plain = sub.items[at as usize].state == State::Ready && until.0 <= self.now.0;
                let never_delayed = plain && model.message(sub, at).delay_ms == 0;
                surely += u64::from(never_delayed && !is_proposed);
                maybe += u64::from(from <= self.now);
            }
        }
        assert!(
            (surely..=maybe).contains(&view.ready),
            "{surely} to {maybe} are ready: {view:?}"
        );
        let letters = model
            .letters()
            .filter(|(_, _, letter)| letter.sub == sub.id)
            .count();
        if !sub.dead_topic.is_empty() {
            assert_eq!(view.dead, letters as u64, "{view:?}");
        }
    }

    /// Asks for the state of every message by settlements that nobody may make.
    fn probe(&mut self) {
        for id in self.model.subs.keys().copied().collect::<Vec<_>>() {
            let sub = &self.model.subs[&id];
            let Some(session) = self.model.sessions_of(id).first().copied() else {
                continue;
            };
            let next = sub.items.len() as u32;
            if next == 0 {
                continue;
            }
            let all = AckRun {
                offset: Offset(0),
                delivery: Delivery(u32::MAX),
                run: next,
            };
            self.commit(&Record::Settle {
                subscription: id,
                session,
                acks: vec![all],
                items: Vec::new(),
            });
        }
    }

    /// Nothing is stuck: with one good consumer for each subscription everything is finished.
    pub fn settle_down(&mut self) {
        self.restart();
        for id in self.model.subs.keys().copied().collect::<Vec<_>>() {
            self.commit(&Record::SubscriptionResume { subscription: id });
            for session in self.model.sessions_of(id) {
                let (begun, story) = (Vec::new(), None);
                self.commit(&Record::SessionEnd {
                    session,
                    clean: true,
                    begun,
                    story,
                });
            }
            let session = self.new_session_id();
            let (token, consumer_name) = (1, "last");
            self.commit(&Record::SessionOpen {
                subscription: id,
                session,
                token,
                consumer_name,
            });
        }
        for _ in 0..TURNS_MAX {
            for session in self.model.sessions.keys().copied().collect::<Vec<_>>() {
                self.grant(session, 1_000, u64::MAX, u64::MAX);
            }
            self.turn();
            for (id, session) in &self.model.sessions {
                assert!(session.attached, "{id:?} is there");
            }
            for session in self.model.sessions.keys().copied().collect::<Vec<_>>() {
                self.finish_all(session);
            }
            self.turn();
            if self.model.subs.values().all(|sub| self.is_finished(sub)) {
                self.check();
                return self.check_space();
            }
            let wakes = self
                .core
                .next_wakeup(self.now)
                .expect("something is still to come");
            self.now = wakes.max(self.now);
        }
        let unfinished = self.model.subs.values().find(|sub| !self.is_finished(sub));
        panic!("never finished: {unfinished:?}");
    }

    /// What everybody has finished is kept by nothing but letters.
    fn check_space(&mut self) {
        // Beyond every retention that the tests configure.
        self.now = self.now.plus_ms(60_000);
        self.turn();
        let letters = self.model.letters().map(|(_, _, letter)| letter.body);
        let mut bodies: Vec<_> = letters.collect();
        for (id, topic) in &self.model.topics {
            let needed = (0..topic.next()).filter(|at| self.model.is_needed(*id, *at));
            bodies.extend(needed.map(|at| topic.messages[at as usize].body));
        }
        for (id, topic) in &self.model.topics {
            if self.model.subs_of(*id).is_empty() || topic.is_dead {
                continue;
            }
            for at in 0..topic.next() {
                let body = topic.messages[at as usize].body;
                let is_live = self.core.is_live(body.0, Offset(body.1));
                let is_kept = bodies.contains(&body);
                assert!(is_kept || !is_live, "{at} of {} stays for ever", topic.name);
            }
        }
    }

    fn is_finished(&self, sub: &Sub) -> bool {
        match sub.is_queue() {
            true => sub.items.iter().all(Item::is_finished),
            false => sub.committed == self.model.topics[&sub.topic].next(),
        }
    }

    fn finish_all(&mut self, session: SessionId) {
        let id = self.model.sessions[&session].sub;
        if !self.model.subs[&id].is_queue() {
            let next = self.model.sessions[&session].read.unwrap_or(0);
            self.commit(&Record::Commit {
                subscription: id,
                session,
                next: Offset(next),
            });
            return;
        }
        let leases = self.model.applied_leases(session);
        let one = |lease: millpond_protocol::control::LeaseName| AckRun {
            offset: lease.offset,
            delivery: lease.delivery,
            run: 1,
        };
        let acks: Vec<_> = leases.into_iter().map(one).collect();
        if !acks.is_empty() {
            self.commit(&Record::Settle {
                subscription: id,
                session,
                acks,
                items: Vec::new(),
            });
        }
    }

    /// Credit for `more` messages, and as many as possible of `begun` more are begun.
    pub fn grant(&mut self, id: SessionId, more: u64, max_bytes: u64, begun: u64) {
        let held = self.model.leases_of(id);
        let now = self.now;
        let session = self
            .model
            .sessions
            .get_mut(&id)
            .expect("credit for one that is there");
        let sent = session.sent.len() as u64;
        session.max_messages = session.max_messages.max(sent + more);
        session.max_bytes = session.max_bytes.max(max_bytes);
        let upto = session.begun.saturating_add(begun).min(sent);
        for lease in &session.sent[session.begun as usize..upto as usize] {
            if held.contains(lease) {
                session.marks.insert(*lease, now);
            }
        }
        session.stuck &= upto == session.begun;
        session.begun = upto;
        session.alive = now;
        let credit = millpond_protocol::hot::ConsumerCredit {
            credit: millpond_protocol::hot::Credit {
                max_messages: session.max_messages,
                max_bytes: session.max_bytes,
            },
            begun: upto,
        };
        self.core.credit(id, credit, now);
    }
}

fn replay(core: &mut Queue, log: &[Entry]) {
    for entry in log {
        let record = Record::decode(entry.kind, &entry.bytes).expect("it was decoded before");
        let mut effects = Vec::new();
        let outcome = core.apply(entry.place, entry.stamp, &record, &mut effects);
        assert_eq!(
            outcome, entry.outcome,
            "the same answer at every replay of {record:?}"
        );
        assert_eq!(
            effects, entry.effects,
            "the same effects at every replay of {record:?}"
        );
    }
}

fn full(core: &mut Queue) -> BTreeMap<u64, Bytes> {
    let mut chunks = BTreeMap::new();
    merge(&mut chunks, core.snapshot());
    chunks
}

fn merge(chunks: &mut BTreeMap<u64, Bytes>, delta: SnapshotDelta) {
    chunks.extend(delta.dirty);
    for id in delta.removed {
        assert!(
            chunks.remove(&id).is_some(),
            "a chunk is removed that never was: {id:#x}"
        );
    }
}

/// Chunks that differ.
fn diff(left: &BTreeMap<u64, Bytes>, right: &BTreeMap<u64, Bytes>) -> Vec<u64> {
    let ids = left.keys().chain(right.keys());
    let mut differ: Vec<u64> = ids
        .filter(|id| left.get(id) != right.get(id))
        .copied()
        .collect();
    differ.dedup();
    differ
}

fn tally(counters: &Counters) -> [u64; 9] {
    [
        counters.published,
        counters.dedup_hits,
        counters.delivered,
        counters.acked,
        counters.released,
        counters.failures.values().sum(),
        counters.dead.values().sum(),
        counters.redriven,
        counters.sequence_gaps,
    ]
}
