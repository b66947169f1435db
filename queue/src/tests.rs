//! A queue with a log and a clock, for tests. Every record goes through its bytes, every step is
//! checked for invariants, and at the end of every test the log is folded again, whole and from a
//! snapshot, to the same bytes.

mod dead;
mod dispatch;
mod expiry;
mod let_go;
mod publish;
mod sessions;
mod settle;
mod snapshot;
mod streams;
mod view;

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{LeaseName, Outcome as Verdict, RejectKind};
use millpond_protocol::hot::{AckRun, ConsumerCredit, Credit};
use millpond_protocol::{
    Delivery, Epoch, ErrorCode, LogIndex, Message, Offset, ProducerKey, Sequence, SessionId, Stamp,
    SubscriptionConfig, SubscriptionId, TopicConfig, TopicId,
};

use crate::{
    Effect, Options, Outcome, Place, Proposal, Queue, Record, Refusal, SettleEntry, StartPosition,
};

/// A message as it was handed out.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Got {
    session: u64,
    offset: u64,
    delivery: u32,
    attempt: u32,
}

struct Logged {
    place: Place,
    stamp: Stamp,
    kind: u8,
    bytes: Vec<u8>,
}

struct Rig {
    queue: Queue,
    log: Vec<Logged>,
    now: Stamp,
    effects: Vec<Effect>,
    producers: std::collections::BTreeMap<TopicId, (ProducerKey, u64)>,
    granted: std::collections::BTreeMap<u64, u64>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        Self {
            queue: Queue::new(options),
            log: Vec::new(),
            now: Stamp(1_000_000_000_000),
            effects: Vec::new(),
            producers: Default::default(),
            granted: Default::default(),
        }
    }

    fn apply(&mut self, record: &Record<'_>) -> Outcome {
        self.now = self.now.next();
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let place = Place {
            index: LogIndex(self.log.len() as u64 + 1),
            record: 0,
        };
        let read = Record::decode(record.kind(), &bytes).unwrap();
        assert_eq!(&read, record, "a record survives its bytes");
        let outcome = self.queue.apply(place, self.now, &read, &mut self.effects);
        self.queue.check_invariants();
        self.log.push(Logged {
            place,
            stamp: self.now,
            kind: record.kind(),
            bytes,
        });
        outcome
    }

    fn wait(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn topic(&mut self, name: &str) -> TopicId {
        self.topic_with(name, TopicConfig::default())
    }

    fn topic_with(&mut self, name: &str, config: TopicConfig) -> TopicId {
        match self.apply(&Record::TopicCreate { name, config }) {
            Outcome::TopicCreated(id) => id,
            other => panic!("{other:?}"),
        }
    }

    fn sub(&mut self, topic: TopicId, name: &str) -> SubscriptionId {
        self.sub_with(topic, name, plain())
    }

    fn sub_with(
        &mut self,
        topic: TopicId,
        name: &str,
        config: SubscriptionConfig,
    ) -> SubscriptionId {
        let outcome = self.apply(&Record::SubscriptionCreate {
            topic,
            name,
            config,
            start: StartPosition::Earliest,
        });
        match outcome {
            Outcome::SubscriptionCreated(id) => id,
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self, subscription: SubscriptionId, session: u64) -> Outcome {
        self.granted.remove(&session);
        self.apply(&Record::SessionOpen {
            subscription,
            session: SessionId(session),
            token: session + 100,
            consumer_name: &format!("consumer-{session}"),
        })
    }

    /// Opens a session with credit for `credit` messages.
    fn consumer(&mut self, subscription: SubscriptionId, session: u64, credit: u64) {
        let opened = self.open(subscription, session);
        assert!(
            matches!(opened, Outcome::SessionOpened { .. }),
            "{opened:?}"
        );
        self.grant(session, credit);
    }

    /// `credit` more messages.
    fn grant(&mut self, session: u64, credit: u64) {
        *self.granted.entry(session).or_default() += credit;
        self.say(session, 0);
    }

    /// The first `begun` deliveries of the attachment are begun.
    fn say(&mut self, session: u64, begun: u64) {
        let credit = ConsumerCredit {
            credit: Credit {
                max_messages: self.granted.get(&session).copied().unwrap_or(0),
                max_bytes: u64::MAX,
            },
            begun,
        };
        self.queue.credit(SessionId(session), credit, self.now);
    }

    fn publish(&mut self, topic: TopicId, count: u64) -> u64 {
        let messages: Vec<_> = (0..count).map(|_| Message::new("x")).collect();
        self.publish_messages(topic, &messages)
    }

    /// Publishes with the topic's own producer; returns the first offset.
    fn publish_messages(&mut self, topic: TopicId, messages: &[Message]) -> u64 {
        match self.try_publish(topic, messages) {
            Outcome::Published {
                appended: Some(run),
                ..
            } => run.base.0,
            other => panic!("{other:?}"),
        }
    }

    fn try_publish(&mut self, topic: TopicId, messages: &[Message]) -> Outcome {
        let (key, last) = match self.producers.get(&topic) {
            Some(producer) => *producer,
            None => (self.open_producer(topic, Some("own")).0, 0),
        };
        let sequences = last + 1..last + 1 + messages.len() as u64;
        let bytes = batch(messages, sequences);
        let outcome = self.apply(&Record::Publish {
            topic,
            producer: key,
            epoch: Epoch(1),
            previous: Sequence(last),
            count: messages.len() as u32,
            messages: &bytes,
        });
        let last = match &outcome {
            Outcome::Published { last_accepted, .. } => last_accepted.0,
            Outcome::PublishRefused { last_accepted, .. } => last_accepted.0,
            other => panic!("{other:?}"),
        };
        self.producers.insert(topic, (key, last));
        outcome
    }

    fn open_producer(&mut self, topic: TopicId, name: Option<&str>) -> (ProducerKey, Epoch, u64) {
        let outcome = self.apply(&Record::OpenProducer {
            topic,
            producer_id: name,
            resume: None,
            owner: 7,
        });
        match outcome {
            Outcome::ProducerOpened {
                producer,
                epoch,
                last_sequence,
                ..
            } => (producer, epoch, last_sequence.0),
            other => panic!("{other:?}"),
        }
    }

    fn dispatch(&mut self) -> Vec<Proposal> {
        let mut out = Vec::new();
        for _ in 0..10_000 {
            if !self.queue.dispatch(self.now, 100_000, &mut out) {
                return out;
            }
        }
        panic!("dispatch has work without end: {out:?}");
    }

    /// Dispatches and applies what is proposed, until nothing is; returns the hand-outs in order.
    fn run(&mut self) -> Vec<Got> {
        let mut got = Vec::new();
        for _ in 0..1_000 {
            let proposals = self.dispatch();
            if proposals.is_empty() {
                return got;
            }
            for proposal in proposals {
                self.enact(&proposal, &mut got);
            }
        }
        panic!("proposals without end");
    }

    fn enact(&mut self, proposal: &Proposal, got: &mut Vec<Got>) {
        match proposal {
            Proposal::Lease {
                record,
                session,
                ranges,
                ..
            } => {
                self.apply(record);
                for range in ranges {
                    got.extend(
                        (range.offset.0..)
                            .take(range.count as usize)
                            .map(|offset| Got {
                                session: session.0,
                                offset,
                                delivery: range.delivery.0,
                                attempt: range.attempt,
                            }),
                    );
                }
            }
            Proposal::Log(record) => {
                self.apply(record);
            }
            Proposal::Stream {
                session,
                offset,
                count,
                ..
            } => got.extend((offset.0..).take(*count as usize).map(|offset| Got {
                session: session.0,
                offset,
                delivery: 0,
                attempt: 0,
            })),
            Proposal::Notice { .. } => {}
        }
    }

    /// The offsets that are handed out by now.
    fn offsets(&mut self) -> Vec<u64> {
        self.run().iter().map(|got| got.offset).collect()
    }

    /// Waits and works until just after `ms` from now; returns when what was handed out.
    fn run_for(&mut self, ms: u64) -> Vec<(u64, Got)> {
        let start = self.now;
        let end = start.plus_ms(ms);
        let mut got = Vec::new();
        loop {
            let at = self.now.ms_since(start);
            got.extend(self.run().into_iter().map(|one| (at, one)));
            match self.queue.next_wakeup(self.now) {
                Some(at) if at <= end => self.now = self.now.next().max(at),
                _ => break,
            }
        }
        self.now = self.now.max(end);
        got
    }

    fn ack(&mut self, sub: SubscriptionId, session: u64, offset: u64, delivery: u32) -> Outcome {
        self.acks(sub, session, &[(offset, delivery, 1)])
    }

    fn acks(&mut self, sub: SubscriptionId, session: u64, runs: &[(u64, u32, u32)]) -> Outcome {
        let acks = runs.iter().map(|(offset, delivery, run)| AckRun {
            offset: Offset(*offset),
            delivery: Delivery(*delivery),
            run: *run,
        });
        self.apply(&Record::Settle {
            subscription: sub,
            session: SessionId(session),
            acks: acks.collect(),
            items: Vec::new(),
        })
    }

    fn settle(
        &mut self,
        sub: SubscriptionId,
        session: u64,
        offset: u64,
        delivery: u32,
        outcome: Verdict,
    ) -> Outcome {
        let mut items = vec![SettleEntry {
            lease: lease(offset, delivery),
            outcome,
            begun_at: None,
            history: Vec::new(),
        }];
        self.queue.enrich(SessionId(session), &mut items);
        self.apply(&Record::Settle {
            subscription: sub,
            session: SessionId(session),
            acks: Vec::new(),
            items,
        })
    }

    fn nack(&mut self, sub: SubscriptionId, session: u64, offset: u64, delivery: u32) -> Outcome {
        self.settle(sub, session, offset, delivery, nack())
    }

    fn end(&mut self, session: u64) -> Outcome {
        self.apply(&Record::SessionEnd {
            session: SessionId(session),
            clean: true,
            begun: Vec::new(),
            story: None,
        })
    }

    fn view(&self, sub: SubscriptionId) -> millpond_protocol::control::SubscriptionView {
        self.queue.subscription_view(sub, self.now).unwrap()
    }

    /// The letters of the first topic's subscription of this name.
    fn letters(&self, topic: &str, sub: &str) -> Vec<(u64, crate::Letter)> {
        let dead = self.queue.dead_topic(topic, sub).unwrap();
        let page = self.queue.dead_letters(dead, topic, sub, Offset(0), 1_000);
        page.letters
            .into_iter()
            .map(|(at, letter)| (at.0, letter))
            .collect()
    }

    /// Folds the log again: whole, and from a snapshot begun in its middle and told while the rest is folded.
    fn check_replay(&mut self) {
        let want = whole(&mut self.queue);
        let mut again = Queue::new(self.queue.options.clone());
        let mut half = Vec::new();
        for (at, logged) in self.log.iter().enumerate() {
            if at == self.log.len() / 2 {
                again.begin_snapshot();
            }
            fold(&mut again, logged);
            if at % 3 == 0
                && let Some(delta) = again.tell_snapshot(1)
            {
                half = delta.dirty;
            }
        }
        if let Some(delta) = again.tell_snapshot(usize::MAX) {
            half = delta.dirty;
        }
        assert_eq!(
            whole(&mut again),
            want,
            "the same records make the same state"
        );
        if half.is_empty() {
            return;
        }
        let mut restored = Queue::restore(self.queue.options.clone(), half.into_iter()).unwrap();
        for logged in &self.log[self.log.len() / 2..] {
            fold(&mut restored, logged);
        }
        restored.check_invariants();
        assert_eq!(
            whole(&mut restored),
            want,
            "snapshot and suffix make the same state"
        );
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_replay();
        }
    }
}

fn fold(queue: &mut Queue, logged: &Logged) {
    let record = Record::decode(logged.kind, &logged.bytes).unwrap();
    queue.apply(logged.place, logged.stamp, &record, &mut Vec::new());
}

fn whole(queue: &mut Queue) -> Vec<(u64, Bytes)> {
    // One that is being told goes on until it is told.
    queue.tell_snapshot(usize::MAX);
    queue.dirty = Default::default();
    queue.snapshot().dirty
}

fn batch(messages: &[Message], sequences: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut out = BytesMut::new();
    for (message, sequence) in messages.iter().zip(sequences) {
        message.encode(Sequence(sequence), &mut out);
    }
    out.to_vec()
}

/// No jitter and round waits.
fn plain() -> SubscriptionConfig {
    SubscriptionConfig {
        jitter: millpond_protocol::Jitter::None,
        ..Default::default()
    }
}

fn lease(offset: u64, delivery: u32) -> LeaseName {
    LeaseName {
        offset: Offset(offset),
        delivery: Delivery(delivery),
    }
}

fn nack() -> Verdict {
    Verdict::Nack {
        delay_ms: None,
        code: 5,
        reason: "no".into(),
    }
}

fn reject() -> Verdict {
    Verdict::Reject {
        kind: RejectKind::Rejected,
        code: 6,
        reason: "never".into(),
    }
}

fn release() -> Verdict {
    Verdict::Release { delay_ms: None }
}

fn settled(count: u64) -> Outcome {
    Outcome::Settled {
        count,
        refused: Vec::new(),
    }
}

fn late(state: millpond_protocol::control::MessageState) -> Outcome {
    Outcome::Settled {
        count: 1,
        refused: vec![Refusal {
            ordinal: 0,
            code: ErrorCode::LeaseLost,
            state,
        }],
    }
}

fn code(outcome: &Outcome) -> Option<ErrorCode> {
    match outcome {
        Outcome::Error(error) | Outcome::PublishRefused { error, .. } => Some(error.code),
        _ => None,
    }
}
