//! What the model found: the shortest way to show it, one test for each.

use std::sync::mpsc;
use std::time::Duration;

use bytes::BytesMut;
use millpond_protocol::control::{LeaseName, MessageState, Outcome as Said, RejectKind};
use millpond_protocol::hot::{AckRun, ConsumerCredit, Credit};
use millpond_protocol::policy::{OnLimit, TopicPatch};
use millpond_protocol::{
    Delivery, Epoch, LogIndex, Message, Offset, ProducerKey, Sequence, SessionId, Stamp,
    SubscriptionConfig, SubscriptionId, TopicConfig, TopicId,
};
use millpond_queue::{
    Effect, Expired, Handout, LeaseRange, Options, Outcome, Place, Proposal, Queue, Record,
    Refusal, SettleEntry, StartPosition,
};

const SECOND: u64 = 1_000_000;
const A: SessionId = SessionId(1 << 32 | 1);
const B: SessionId = SessionId(1 << 32 | 2);

/// A topic, a queue subscription without jitter and an anonymous producer.
struct Bench {
    core: Queue,
    now: u64,
    index: u64,
    topic: TopicId,
    sub: SubscriptionId,
    producer: ProducerKey,
    last: u64,
}

impl Bench {
    fn new(config: SubscriptionConfig) -> Self {
        let mut bench = Self {
            core: Queue::new(Options::default()),
            now: 1_000 * SECOND,
            index: 0,
            topic: TopicId(0),
            sub: SubscriptionId(0),
            producer: ProducerKey(0),
            last: 0,
        };
        bench.log(&Record::Start { recovery_epoch: 1 });
        let config_of_topic = TopicConfig::default();
        let created = bench.log(&Record::TopicCreate {
            name: "t",
            config: config_of_topic,
        });
        let Outcome::TopicCreated(topic) = created else {
            panic!("{created:?}");
        };
        let (name, start) = ("s", StartPosition::Earliest);
        let created = bench.log(&Record::SubscriptionCreate {
            topic,
            name,
            config,
            start,
        });
        let Outcome::SubscriptionCreated(sub) = created else {
            panic!("{created:?}");
        };
        let (producer_id, resume, owner) = (None, None, 1);
        let opened = bench.log(&Record::OpenProducer {
            topic,
            producer_id,
            resume,
            owner,
        });
        let Outcome::ProducerOpened { producer, .. } = opened else {
            panic!("{opened:?}");
        };
        Self {
            topic,
            sub,
            producer,
            ..bench
        }
    }

    fn log(&mut self, record: &Record<'_>) -> Outcome {
        self.log_with(record).0
    }

    fn log_with(&mut self, record: &Record<'_>) -> (Outcome, Vec<Effect>) {
        self.now += 1;
        self.index += 1;
        let place = Place {
            index: LogIndex(self.index),
            record: 0,
        };
        let mut effects = Vec::new();
        let outcome = self
            .core
            .apply(place, Stamp(self.now), record, &mut effects);
        (outcome, effects)
    }

    fn publish(&mut self, message: &Message) -> Outcome {
        let mut messages = BytesMut::new();
        message.encode(Sequence(self.last + 1), &mut messages);
        self.last += 1;
        let (topic, producer, previous) = (self.topic, self.producer, Sequence(self.last - 1));
        self.log(&Record::Publish {
            topic,
            producer,
            epoch: Epoch(1),
            previous,
            count: 1,
            messages: &messages,
        })
    }

    fn open(&mut self, session: SessionId, credit: u64) {
        let (subscription, token, consumer_name) = (self.sub, 1, "c");
        self.log(&Record::SessionOpen {
            subscription,
            session,
            token,
            consumer_name,
        });
        self.credit(session, credit, 0);
    }

    fn credit(&mut self, session: SessionId, max_messages: u64, begun: u64) {
        let credit = Credit {
            max_messages,
            max_bytes: u64::MAX,
        };
        self.core
            .credit(session, ConsumerCredit { credit, begun }, Stamp(self.now));
    }

    /// One call of dispatch, applied; what was handed out to whom.
    fn turn(&mut self) -> Vec<(SessionId, Handout)> {
        let (mut proposals, mut handed) = (Vec::new(), Vec::new());
        while self.core.dispatch(Stamp(self.now), 100, &mut proposals) {}
        for proposal in proposals {
            match proposal {
                Proposal::Lease {
                    record,
                    session,
                    ranges,
                    ..
                } => {
                    handed.extend(ranges.iter().map(|handout| (session, *handout)));
                    self.log(&record);
                }
                Proposal::Log(record) => {
                    self.log(&record);
                }
                _ => {}
            }
        }
        handed
    }

    fn wait_ms(&mut self, ms: u64) {
        self.now += ms * 1_000;
    }

    fn settle(&mut self, session: SessionId, lease: LeaseName, outcome: Said) -> Vec<Refusal> {
        let items = vec![SettleEntry {
            lease,
            outcome,
            begun_at: None,
            history: Vec::new(),
        }];
        let settled = self.log(&Record::Settle {
            subscription: self.sub,
            session,
            acks: Vec::new(),
            items,
        });
        refused(settled)
    }

    fn ack(&mut self, session: SessionId, lease: LeaseName) -> Vec<Refusal> {
        let acks = vec![AckRun {
            offset: lease.offset,
            delivery: lease.delivery,
            run: 1,
        }];
        let (subscription, items) = (self.sub, Vec::new());
        refused(self.log(&Record::Settle {
            subscription,
            session,
            acks,
            items,
        }))
    }
}

fn refused(outcome: Outcome) -> Vec<Refusal> {
    match outcome {
        Outcome::Settled { refused, .. } => refused,
        other => panic!("{other:?}"),
    }
}

fn lease(offset: u64, delivery: u32) -> LeaseName {
    LeaseName {
        offset: Offset(offset),
        delivery: Delivery(delivery),
    }
}

fn nack() -> Said {
    Said::Nack {
        delay_ms: Some(0),
        code: 0,
        reason: String::new(),
    }
}

/// Runs it beside the test, which fails if it takes for ever.
fn ends_in_time(what: &str, run: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || {
        run();
        // Nobody listens if it was too late.
        let _ = done.send(());
    });
    let finished = finished.recv_timeout(Duration::from_secs(5));
    assert_eq!(finished, Ok(()), "{what} never returns, or panicked");
}

// SEMANTICS 1.1: the clock of a lease that another has by now is nobody's business.
#[test]
fn a_begin_mark_for_a_lease_that_another_has_now_does_not_hang() {
    ends_in_time("credit", || {
        let mut bench = Bench::new(SubscriptionConfig::default());
        bench.open(A, 2);
        bench.publish(&Message::new("0"));
        bench.publish(&Message::new("1"));
        bench.turn();
        let ranges = vec![LeaseRange {
            offset: Offset(0),
            count: 2,
            delivery: Delivery(1),
        }];
        let (subscription, session) = (bench.sub, A);
        bench.log(&Record::Expire(Expired::Held {
            subscription,
            session,
            ranges,
        }));
        bench.open(B, 2);
        bench.turn();
        // A's user takes the first of the two that B has now.
        bench.credit(A, 2, 1);
    });
}

// SEMANTICS 1.1: two that were handed out one after the other are called back one after the other.
#[test]
fn calling_back_a_part_of_what_a_session_holds_does_not_hang() {
    ends_in_time("dispatch", || {
        let mut bench = Bench::new(SubscriptionConfig {
            hold_max_ms: 5_000,
            ..SubscriptionConfig::default()
        });
        bench.open(A, 2);
        bench.publish(&Message::new("0"));
        bench.turn();
        bench.wait_ms(1_000);
        bench.publish(&Message::new("1"));
        bench.turn();
        bench.wait_ms(4_000);
        let mut proposals = Vec::new();
        bench.core.dispatch(Stamp(bench.now), 10, &mut proposals);
        let (subscription, session) = (bench.sub, A);
        let range = LeaseRange {
            offset: Offset(0),
            count: 1,
            delivery: Delivery(1),
        };
        let held = Record::Expire(Expired::Held {
            subscription,
            session,
            ranges: vec![range],
        });
        assert_eq!(proposals, [Proposal::Log(held)]);
    });
}

// SEMANTICS 1.10: redeliveries and delayed messages come when they are due, record or no record.
#[test]
fn a_delayed_message_at_the_cursor_comes_when_it_is_due() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    bench.open(A, 10);
    bench.publish(&Message::new("now"));
    let mut delayed = Message::new("later");
    delayed.delay_ms = 100;
    bench.publish(&delayed);
    assert_eq!(bench.turn().len(), 1);
    assert_eq!(bench.ack(A, lease(0, 1)), []);
    assert_eq!(bench.turn(), []);
    bench.wait_ms(100);
    let handed = bench.turn();
    assert_eq!(handed.len(), 1, "due by now: {handed:?}");
    assert_eq!(bench.turn(), [], "and only once");
}

// SEMANTICS 1, the table: ttl makes it dead; it is not given to a handler beside that.
#[test]
fn a_message_whose_time_to_live_is_over_is_not_handed_out() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    let mut short = Message::new("short");
    short.ttl_ms = 1_000;
    bench.publish(&short);
    bench.open(A, 10);
    bench.wait_ms(5_000);
    assert_eq!(bench.turn(), []);
}

// SEMANTICS 1.5: repeating the same settlement is fine; another one is LeaseLost.
#[test]
fn a_reject_after_a_nack_is_told_that_its_lease_is_over() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    bench.open(A, 1);
    bench.publish(&Message::new("0"));
    bench.turn();
    assert_eq!(bench.settle(A, lease(0, 1), nack()), []);
    assert_eq!(
        bench.settle(A, lease(0, 1), nack()),
        [],
        "the same again is fine"
    );
    let reject = Said::Reject {
        kind: RejectKind::Rejected,
        code: 0,
        reason: String::new(),
    };
    let refused = bench.settle(A, lease(0, 1), reject);
    assert_eq!(
        refused.len(),
        1,
        "it changed nothing and must not look as if it had"
    );
    assert_eq!(refused[0].state, MessageState::Ready);
}

// SEMANTICS 1.5: a settlement must name its session.
#[test]
fn an_ack_under_an_older_delivery_number_counts_only_from_its_own_session() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    bench.open(A, 2);
    bench.publish(&Message::new("0"));
    for delivery in 1..=2 {
        bench.turn();
        let release = Said::Release {
            delay_ms: Some(1_000_000),
        };
        let said = if delivery == 1 { nack() } else { release };
        assert_eq!(bench.settle(A, lease(0, delivery), said), []);
    }
    // B never had it.
    bench.open(B, 0);
    let refused = bench.ack(B, lease(0, 1));
    assert_eq!(refused.len(), 1, "B cannot finish what it never had");
}

// The same of what is counted: a message that expired before its delay was over is not scheduled.
#[test]
fn a_message_that_died_before_it_was_due_is_not_counted_as_scheduled() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    let mut message = Message::new("0");
    (message.delay_ms, message.ttl_ms) = (2_000, 1_000);
    bench.publish(&Message::new("1"));
    bench.publish(&message);
    bench.wait_ms(1_000);
    bench.turn();
    let view = bench.core.subscription_view(bench.sub, Stamp(bench.now));
    let view = view.expect("it exists");
    assert_eq!(
        (view.backlog, view.ready, view.scheduled, view.dead),
        (1, 1, 0, 1)
    );
}

// The same: what lies before a subscription's start is none of its business.
#[test]
fn a_delayed_message_before_the_start_is_not_counted_as_scheduled() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    let mut message = Message::new("0");
    message.delay_ms = 2_000;
    bench.publish(&message);
    let (topic, config) = (bench.topic, SubscriptionConfig::default());
    let (name, start) = ("late", StartPosition::Latest);
    let created = bench.log(&Record::SubscriptionCreate {
        topic,
        name,
        config,
        start,
    });
    let Outcome::SubscriptionCreated(late) = created else {
        panic!("{created:?}");
    };
    bench.publish(&Message::new("1"));
    let view = bench
        .core
        .subscription_view(late, Stamp(bench.now))
        .expect("it exists");
    assert_eq!((view.backlog, view.ready, view.scheduled), (1, 1, 0));
}

// SEMANTICS 3: a letter tells its deliveries, also of a message that was just being worked on.
#[test]
fn a_letter_of_a_message_that_was_leased_when_the_limit_killed_it_counts_its_delivery() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    let patch = TopicPatch {
        max_messages: Some(Some(1)),
        on_limit: Some(OnLimit::DeadLetter),
        ..TopicPatch::default()
    };
    let topic = bench.topic;
    bench.log(&Record::TopicUpdate { topic, patch });
    bench.open(A, 1);
    bench.publish(&Message::new("0"));
    assert_eq!(bench.turn().len(), 1);
    bench.publish(&Message::new("1"));
    bench.turn();
    let dead = bench.core.topic_id("t.s.dead").expect("from birth");
    let letter = bench.core.letter(dead, Offset(0)).expect("it is dead");
    assert_eq!((letter.source_offset, letter.deliveries), (Offset(0), 1));
}

// DESIGN 2: one overlay holds every proposal not yet applied, so nothing is handed out twice.
#[test]
fn a_seek_does_not_hand_out_again_under_the_name_of_what_is_on_its_way() {
    let mut bench = Bench::new(SubscriptionConfig::default());
    bench.open(A, 10);
    bench.publish(&Message::new("0"));
    let mut on_its_way = Vec::new();
    bench.core.dispatch(Stamp(bench.now), 10, &mut on_its_way);
    assert_eq!(on_its_way.len(), 1);
    let (subscription, to) = (bench.sub, StartPosition::At(Offset(0)));
    bench.log(&Record::SubscriptionSeek { subscription, to });
    let mut again = Vec::new();
    bench.core.dispatch(Stamp(bench.now), 10, &mut again);
    assert_ne!(again, on_its_way, "the same lease for the second time");
}

// SEMANTICS 1.4: what is not in flight any more takes no room.
#[test]
fn a_leased_message_that_the_limit_killed_makes_room_for_the_next() {
    let mut bench = Bench::new(SubscriptionConfig {
        max_in_flight: 1,
        ..SubscriptionConfig::default()
    });
    bench.open(A, 10);
    bench.publish(&Message::new("0"));
    assert_eq!(bench.turn().len(), 1);
    bench.publish(&Message::new("1"));
    let patch = TopicPatch {
        max_messages: Some(Some(1)),
        on_limit: Some(OnLimit::DeadLetter),
        ..TopicPatch::default()
    };
    let topic = bench.topic;
    bench.log(&Record::TopicUpdate { topic, patch });
    // The first turn lets the oldest go, the second one has room.
    let handed = [bench.turn(), bench.turn()].concat();
    assert_eq!(
        handed.len(),
        1,
        "the second message waits for nothing: {handed:?}"
    );
}
