//! What can be done to a queue, as small numbers that shrink well: each chooses among what exists.

use bytes::BytesMut;
use millpond_protocol::control::{
    DeadFilter, DeadReason, LeaseName, ProducerResume, RedriveTarget,
};
use millpond_protocol::hot::AckRun;
use millpond_protocol::policy::{SubscriptionMode, SubscriptionPatch, TopicPatch};
use millpond_protocol::{
    Delivery, Epoch, Offset, ProducerKey, Sequence, SessionId, SubscriptionConfig, SubscriptionId,
    TopicConfig, TopicId,
};
use millpond_queue::{OffsetRun, Outcome, Record, SettleEntry, StartPosition};

use crate::make::{message, position, said, subscription_config, topic_config};
use crate::world::World;

/// What to do, and three numbers that choose how.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Op(pub Kind, pub u8, pub u8, pub u8);

/// On one line, to be copied into a test.
impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(kind, a, b, c) = self;
        write!(f, "Op(Kind::{kind:?}, {a}, {b}, {c})")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Turn,
    Advance,
    Publish,
    Ack,
    Settle,
    Credit,
    SessionOpen,
    OpenProducer,
    Dispatch,
    ApplyPending,
    Late,
    Wake,
    Close,
    Detach,
    Attach,
    Renew,
    Extend,
    Commit,
    Restart,
    Snapshot,
    Pause,
    Resume,
    Seek,
    SubUpdate,
    SubCreate,
    SubDelete,
    TopicCreate,
    TopicUpdate,
    TopicPurge,
    TopicDelete,
    CloseProducer,
    Redrive,
    RedriveCancel,
    DeadPurge,
    Damaged,
    LetGo,
    Token,
    Hold,
}

const TOPICS: [&str; 4] = ["orders", "mails", "orders.work.dead", "spill"];
const SUBS: [&str; 3] = ["work", "audit", "bad.name"];

impl World {
    pub fn run(&mut self, ops: &[Op]) {
        for op in ops {
            self.step(*op);
            self.check();
        }
    }

    /// A topic and a subscription with a consumer that has credit, and a producer.
    pub fn set_up(&mut self, mode: SubscriptionMode, shape: u8) {
        let (name, config) = (TOPICS[0], TopicConfig::default());
        self.commit(&Record::TopicCreate { name, config });
        let topic = self.model.topic_named(name).expect("it was just created");
        let (name, start) = (SUBS[0], StartPosition::Earliest);
        let config = SubscriptionConfig {
            mode,
            ..subscription_config(shape, shape / 7)
        };
        self.commit(&Record::SubscriptionCreate {
            topic,
            name,
            config,
            start,
        });
        self.step(Op(Kind::OpenProducer, 0, 0, 0));
        self.step(Op(Kind::SessionOpen, 0, 0, 0));
        self.step(Op(Kind::Credit, 0, 20, 0));
    }

    pub fn step(&mut self, Op(kind, a, b, c): Op) {
        match kind {
            Kind::Turn => self.turn(),
            Kind::Advance => self.advance(a, b),
            Kind::Wake => {
                let wakes = self.core.next_wakeup(self.now);
                self.now = wakes.map_or(self.now, |at| at.max(self.now));
                self.turn();
            }
            Kind::Publish => self.publish(a, b, c),
            Kind::Ack => self.settle_held(a, 0, b),
            Kind::Settle => self.settle_held(a, 1 + b % 7, c),
            Kind::Late => self.settle_late(a, b, c),
            Kind::Credit => self.op_credit(a, b, c),
            Kind::Dispatch => {
                self.dispatch(1 + usize::from(a % 8));
            }
            Kind::ApplyPending => self.apply_pending(1 + usize::from(a % 3)),
            Kind::Restart => {
                if a.is_multiple_of(2) {
                    self.apply_all_pending();
                }
                self.restart();
            }
            Kind::Snapshot if a.is_multiple_of(2) => self.take_snapshot(),
            Kind::Snapshot => self.begin_snapshot(),
            Kind::Token => self.token(a, b),
            Kind::Hold => {
                self.model.holding = a.is_multiple_of(2);
                self.core
                    .hold_leases((a.is_multiple_of(2)).then_some("the disk's reserve is gone"));
            }
            Kind::SessionOpen
            | Kind::Close
            | Kind::Detach
            | Kind::Attach
            | Kind::Renew
            | Kind::Extend
            | Kind::Commit => self.step_session(kind, a, b, c),
            Kind::OpenProducer => self.open_producer(a, b, c),
            Kind::CloseProducer => {
                let keys: Vec<_> = self
                    .model
                    .producers
                    .iter()
                    .map(|(k, p)| (*k, p.epoch))
                    .collect();
                if let Some((producer, epoch)) = pick(&keys, a) {
                    let epoch = if b.is_multiple_of(4) {
                        Epoch(epoch.0 - 1)
                    } else {
                        epoch
                    };
                    self.commit(&Record::CloseProducer { producer, epoch });
                }
            }
            Kind::TopicCreate | Kind::TopicUpdate | Kind::TopicPurge | Kind::TopicDelete => {
                self.step_topic(kind, a, b, c)
            }
            Kind::Redrive | Kind::RedriveCancel | Kind::DeadPurge | Kind::Damaged => {
                self.step_dead(kind, a, b, c)
            }
            Kind::LetGo => self.let_go(a, b, c),
            _ => self.step_subscription(kind, a, b, c),
        }
    }

    fn advance(&mut self, a: u8, b: u8) {
        const STEPS_MS: [u64; 12] = [
            1, 10, 50, 100, 500, 1_000, 1_000, 2_000, 5_000, 10_000, 31_000, 61_000,
        ];
        let step = match a {
            0..=240 => STEPS_MS[usize::from(a) * STEPS_MS.len() / 241] * 1_000 + u64::from(b),
            241..=250 => 3_600_000_000,
            _ => 8 * 24 * 3_600_000_000,
        };
        // Nothing is on its way to the log for as long as a timeout takes.
        if step >= 1_000_000 {
            self.apply_all_pending();
        }
        self.now.0 += step;
    }

    fn topic(&self, a: u8) -> TopicId {
        let ids: Vec<_> = self.model.topics.keys().copied().collect();
        pick(&ids, a).unwrap_or(TopicId(9_999))
    }

    fn sub(&self, a: u8) -> SubscriptionId {
        let ids: Vec<_> = self.model.subs.keys().copied().collect();
        pick(&ids, a).unwrap_or(SubscriptionId(9_999))
    }

    fn session(&self, a: u8) -> Option<SessionId> {
        let ids: Vec<_> = self.model.sessions.keys().copied().collect();
        pick(&ids, a)
    }

    fn token(&mut self, a: u8, b: u8) {
        let name = ["ops", "app"][usize::from(a % 2)];
        match b % 2 {
            0 => self.commit(&Record::TokenAdd {
                name,
                hash: [a; 32],
            }),
            _ => self.commit(&Record::TokenRevoke { name }),
        };
    }

    fn open_producer(&mut self, a: u8, b: u8, c: u8) {
        let ids = [Some("p"), Some("q"), None];
        // Letters alone belong into topics made for letters.
        let topics = self.model.topics.iter().filter(|(_, topic)| !topic.is_dead);
        let topics: Vec<_> = topics.map(|(id, _)| *id).collect();
        let topic = pick(&topics, b).unwrap_or(TopicId(9_999));
        let mut resume = None;
        if c % 3 == 2 {
            resume = pick(&self.opened_with, c / 3);
            // What a client can know: nothing beyond what was accepted, or what was forgotten.
            if let (Some(resume), true) = (&mut resume, c.is_multiple_of(5)) {
                resume.last_known = Sequence(resume.last_known.0 + 3);
            }
        }
        let producer_id = ids[usize::from(a % 3)];
        let of_topic = |resume: &ProducerResume| {
            let known = self.model.producers.get(&resume.producer);
            known.is_none_or(|known| known.topic == topic && known.name.as_deref() == producer_id)
        };
        let resume = resume.filter(of_topic);
        let owner = u64::from(a) << 8 | u64::from(c);
        let opened = self.commit(&Record::OpenProducer {
            topic,
            producer_id,
            resume,
            owner,
        });
        if let Outcome::ProducerOpened {
            producer,
            epoch,
            last_sequence,
            ..
        } = opened
        {
            self.opened_with.push(ProducerResume {
                producer,
                epoch,
                last_known: last_sequence,
            });
        }
    }

    fn publish(&mut self, a: u8, b: u8, c: u8) {
        let keys: Vec<_> = self.model.producers.keys().copied().collect();
        let producer = pick(&keys, a).unwrap_or(ProducerKey(9_999));
        let known = self.model.producers.get(&producer).cloned();
        let topic = known.as_ref().map_or(self.topic(a), |known| known.topic);
        let (last, mut epoch) = known.as_ref().map_or((0, Epoch(1)), |p| (p.last, p.epoch));
        let count = 1 + u64::from(c % 5);
        let (previous, first, step) = match b % 12 {
            0..=4 => (last, last + 1, 1),
            5 => (last, last + 3, 1),
            6 => (last, last + 1, 2),
            7 => (last.saturating_sub(2), last.saturating_sub(2) + 1, 1),
            8 => (last.saturating_sub(4), last.saturating_sub(4) + 1, 3),
            9 => (last + 2, last + 3, 1),
            10 => (last.saturating_sub(5), last.saturating_sub(5) + 1, 1),
            _ => {
                epoch = Epoch(epoch.0 - 1);
                (last, last + 1, 1)
            }
        };
        let mut bytes = BytesMut::new();
        for i in 0..count {
            let message = message(b, c, i);
            message.encode(Sequence(first + i * step), &mut bytes);
        }
        self.commit(&Record::Publish {
            topic,
            producer,
            epoch,
            previous: Sequence(previous),
            count: count as u32,
            messages: &bytes,
        });
    }

    fn op_credit(&mut self, a: u8, b: u8, c: u8) {
        let attached = self
            .model
            .sessions
            .iter()
            .filter(|(_, session)| session.attached);
        let attached: Vec<_> = attached.map(|(id, _)| *id).collect();
        let Some(session) = pick(&attached, a) else {
            return;
        };
        let max_bytes = if c % 16 == 15 { 200 } else { u64::MAX };
        self.grant(session, u64::from(b % 24), max_bytes, u64::from(c % 4));
    }

    /// Ends leases that a session holds.
    fn settle_held(&mut self, a: u8, what: u8, c: u8) {
        let Some(session) = self.session(a) else {
            return;
        };
        let subscription = self.model.sessions[&session].sub;
        let mut leases = self.model.applied_leases(session);
        if leases.is_empty() {
            return;
        }
        let start = usize::from(c / 8) % leases.len();
        leases.rotate_left(start);
        leases.truncate(1 + usize::from(c % 8));
        self.settle(subscription, session, &leases, what, c);
    }

    /// Repeats, and what comes too late, from the wrong session or under a wrong number.
    fn settle_late(&mut self, a: u8, b: u8, c: u8) {
        let chosen = usize::from(a) * self.past.len() / 256;
        let Some((subscription, mut session, mut lease)) = self.past.get(chosen).copied() else {
            return;
        };
        match c % 8 {
            0 => session = self.session(c / 8).unwrap_or(session),
            1 => session = SessionId(77),
            2 => lease.delivery = Delivery(lease.delivery.0 + 1),
            3 => lease.delivery = Delivery(lease.delivery.0.saturating_sub(1)),
            4 => lease.offset = Offset(lease.offset.0 + 1),
            _ => {}
        }
        self.settle(subscription, session, &[lease], b % 8, c);
    }

    fn settle(
        &mut self,
        subscription: SubscriptionId,
        session: SessionId,
        leases: &[LeaseName],
        what: u8,
        c: u8,
    ) {
        let mut acks: Vec<AckRun> = Vec::new();
        let mut items = Vec::new();
        for (i, lease) in leases.iter().enumerate() {
            match said(what, i, c) {
                Some(outcome) => items.push(SettleEntry {
                    lease: *lease,
                    outcome,
                    begun_at: None,
                    history: Vec::new(),
                }),
                None => match acks.last_mut() {
                    Some(run)
                        if run.offset.0 + u64::from(run.run) == lease.offset.0
                            && run.delivery == lease.delivery =>
                    {
                        run.run += 1
                    }
                    _ => acks.push(AckRun {
                        offset: lease.offset,
                        delivery: lease.delivery,
                        run: 1,
                    }),
                },
            }
        }
        self.core.enrich(session, &mut items);
        self.model.check_enriched(subscription, session, &items);
        self.commit(&Record::Settle {
            subscription,
            session,
            acks,
            items,
        });
    }

    fn step_session(&mut self, kind: Kind, a: u8, b: u8, c: u8) {
        if kind == Kind::SessionOpen {
            let (session, subscription) = (self.new_session_id(), self.sub(a));
            let (token, consumer_name) = (u64::from(b), "worker");
            self.commit(&Record::SessionOpen {
                subscription,
                session,
                token,
                consumer_name,
            });
            return;
        }
        let Some(id) = self.session(a) else {
            return;
        };
        let session = self.model.sessions[&id].clone();
        match kind {
            Kind::Close => {
                let (begun, story) = (Vec::<OffsetRun>::new(), None);
                self.commit(&Record::SessionEnd {
                    session: id,
                    clean: true,
                    begun,
                    story,
                });
            }
            Kind::Detach if session.attached => {
                self.core.detach(id, self.now);
                let known = self.model.sessions.get_mut(&id).expect("chosen above");
                (known.attached, known.since) = (false, self.now);
            }
            Kind::Attach => self.attach(id, b),
            Kind::Renew if session.attached => {
                self.core.renew(id, self.now);
                self.model
                    .sessions
                    .get_mut(&id)
                    .expect("chosen above")
                    .alive = self.now;
            }
            Kind::Extend if session.attached => self.extend(id, b),
            Kind::Commit => {
                let sub = &self.model.subs[&session.sub];
                let next = (sub.committed + u64::from(b % 8)).saturating_sub(2);
                let subscription = if c.is_multiple_of(16) {
                    self.sub(c)
                } else {
                    session.sub
                };
                self.commit(&Record::Commit {
                    subscription,
                    session: id,
                    next: Offset(next),
                });
            }
            _ => {}
        }
    }

    fn attach(&mut self, id: SessionId, b: u8) {
        let now = self.now;
        let expected = self.model.applied_leases(id);
        let maybe = self.model.leases_of(id);
        let ends = self.model.is_ending(id);
        let session = self
            .model
            .sessions
            .get_mut(&id)
            .expect("chosen by the caller");
        if b.is_multiple_of(8) {
            assert_eq!(
                self.core.attach(id, session.token + 1, now),
                None,
                "a wrong token"
            );
            return;
        }
        let Some(attached) = self.core.attach(id, session.token, now) else {
            assert!(ends, "{id:?} may come back: {session:?}");
            return;
        };
        let mut leases = attached.leases.clone();
        leases.sort();
        let told = expected
            .iter()
            .all(|lease| leases.binary_search(lease).is_ok());
        assert!(
            told && leases.iter().all(|lease| maybe.contains(lease)),
            "{leases:?}, {expected:?}"
        );
        (session.attached, session.since, session.alive) = (true, now, now);
        session.resumed = now;
        // A mark that came before the lease was applied is lost.
        session.marks.retain(|lease, _| expected.contains(lease));
        (session.max_messages, session.max_bytes, session.begun) = (0, 0, 0);
        session.stuck = false;
        session.sent.clear();
        session.read = None;
        let sub = &self.model.subs[&session.sub];
        assert_eq!(attached.subscription, sub.id);
        if !sub.is_queue() {
            assert_eq!(attached.position.0, sub.committed);
            assert_eq!(attached.active, sub.line.first() == Some(&id));
        }
    }

    fn extend(&mut self, id: SessionId, b: u8) {
        let marks = self.model.sessions[&id].marks.clone();
        let begun = self
            .model
            .applied_leases(id)
            .into_iter()
            .filter(|l| marks.contains_key(l));
        let begun: Vec<_> = begun.collect();
        let Some(lease) = pick(&begun, b) else {
            return;
        };
        if self.model.is_expiring(id, lease) || self.model.is_ending(id) {
            return;
        }
        let extended = self.core.extend(id, lease, self.now);
        assert_eq!(extended, Ok(()), "{lease:?} is held and begun");
        self.core.renew(id, self.now);
        let session = self
            .model
            .sessions
            .get_mut(&id)
            .expect("chosen by the caller");
        session.marks.insert(lease, self.now);
        session.alive = self.now;
    }

    fn step_topic(&mut self, kind: Kind, a: u8, b: u8, c: u8) {
        self.apply_all_pending();
        let topic = self.topic(a);
        match kind {
            Kind::TopicCreate => {
                let (name, config) = (TOPICS[usize::from(a % 4)], topic_config(b, c));
                self.commit(&Record::TopicCreate { name, config });
            }
            Kind::TopicUpdate => {
                let config = topic_config(b, c);
                let patch = TopicPatch {
                    retention_ms: Some(config.retention_ms),
                    max_bytes: Some(config.max_bytes),
                    max_messages: Some(config.max_messages),
                    on_limit: Some(config.on_limit),
                    ttl_ms: Some(config.ttl_ms),
                };
                self.commit(&Record::TopicUpdate { topic, patch });
            }
            Kind::TopicPurge => {
                self.commit(&Record::TopicPurge { topic });
            }
            _ => {
                self.commit(&Record::TopicDelete { topic });
            }
        }
    }

    fn step_subscription(&mut self, kind: Kind, a: u8, b: u8, c: u8) {
        let subscription = self.sub(a);
        match kind {
            Kind::Pause => self.commit(&Record::SubscriptionPause { subscription }),
            Kind::Resume => self.commit(&Record::SubscriptionResume { subscription }),
            Kind::SubDelete => self.commit(&Record::SubscriptionDelete { subscription }),
            Kind::Seek => {
                let to = position(b);
                self.commit(&Record::SubscriptionSeek { subscription, to })
            }
            Kind::SubUpdate => {
                self.apply_all_pending();
                let config = subscription_config(b, c);
                let patch = SubscriptionPatch {
                    backoff: Some(config.backoff),
                    jitter: Some(config.jitter),
                    max_attempts: Some(config.max_attempts),
                    max_deliveries: Some(config.max_deliveries),
                    max_in_flight: Some(config.max_in_flight),
                    dead_letter: (c.is_multiple_of(8))
                        .then(|| TOPICS[usize::from(b % 4)].to_owned()),
                    ..SubscriptionPatch::default()
                };
                self.commit(&Record::SubscriptionUpdate {
                    subscription,
                    patch,
                })
            }
            _ => {
                let topic = self.topic(a);
                let name = SUBS[usize::from(b) * SUBS.len() / 300];
                let mut config = subscription_config(c, b);
                if c.is_multiple_of(3) {
                    config.mode = SubscriptionMode::Stream;
                }
                if c % 4 == 1 {
                    config.dead_letter = Some(TOPICS[usize::from(b % 4)].to_owned());
                }
                let start = position(c);
                self.commit(&Record::SubscriptionCreate {
                    topic,
                    name,
                    config,
                    start,
                })
            }
        };
    }

    /// As the shard does it before it cleans; something that may be needed is among it.
    fn let_go(&mut self, a: u8, b: u8, c: u8) {
        let topic = self.topic(a);
        let end = Offset(u64::from(b) * 2);
        let most = 1 + usize::from(c % 8);
        let mut ranges = self.core.unneeded_between(topic, Offset(0), end, most);
        ranges.push(OffsetRun {
            offset: Offset(u64::from(c % 16)),
            count: 3,
        });
        self.commit(&Record::LetGo { topic, ranges });
    }

    fn step_dead(&mut self, kind: Kind, a: u8, b: u8, c: u8) {
        if kind == Kind::Damaged {
            let (topic, offset) = (self.topic(a), Offset(u64::from(b % 16)));
            let ranges = vec![OffsetRun {
                offset,
                count: 1 + u32::from(c % 3),
            }];
            self.commit(&Record::Damaged { topic, ranges });
            return;
        }
        if kind == Kind::RedriveCancel {
            let jobs: Vec<_> = self.model.jobs.keys().copied().collect();
            if let Some(job) = pick(&jobs, a) {
                self.commit(&Record::RedriveCancel { job });
            }
            return;
        }
        let letters = self.model.letters();
        let letters: Vec<_> = letters
            .map(|(dead, at, letter)| (dead, at, letter.clone()))
            .collect();
        let Some((topic, at, letter)) = pick(&letters, a) else {
            return;
        };
        let filter = DeadFilter {
            offsets: if b.is_multiple_of(4) {
                vec![Offset(at), Offset(99)]
            } else {
                Vec::new()
            },
            reason: (b % 8 == 1).then_some(DeadReason::MaxAttempts),
            limit: (b % 8 == 2).then_some(1),
        };
        let (source_topic, subscription) = (letter.topic_name.as_str(), letter.sub_name.as_str());
        if kind == Kind::DeadPurge {
            self.commit(&Record::DeadPurge {
                topic,
                source_topic,
                subscription,
                filter,
            });
            return;
        }
        let rate_per_s = (c.is_multiple_of(4)).then_some(1 + u32::from(c / 64));
        let target = match c % 3 {
            0 => RedriveTarget::Topic,
            _ => RedriveTarget::Subscription,
        };
        self.commit(&Record::Redrive {
            topic,
            source_topic,
            subscription,
            filter,
            rate_per_s,
            target,
        });
    }
}

fn pick<T: Clone>(all: &[T], choice: u8) -> Option<T> {
    all.get(usize::from(choice) % all.len().max(1)).cloned()
}
