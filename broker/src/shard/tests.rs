//! What the shard does by itself, on a simulated disk and a clock in the test's hands.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

use bytes::BytesMut;
use millpond_protocol::control::{
    CreateSubscription, LeaseName, OpenConsumer, OpenProducer, Outcome as Verdict, RejectKind,
    Request, SessionResume, SettleItem,
};
use millpond_protocol::hot::{AckRun, ConsumerCredit, Credit};
use millpond_protocol::{Delivery, Message, Offset, ProducerHandle, Sequence, TopicConfig};
use millpond_queue::StartPosition;
use millpond_wal::sim::SimStorage;
use millpond_wal::storage::Storage as _;

use super::io::{Answer, Opened, ResolvedRequest};
use super::*;
use crate::clock::ManualClock;

const WALL_US: u64 = 1_767_225_600_000_000;
const SECOND_US: u64 = 1_000_000;

struct Rig {
    storage: SimStorage,
    shard: Shard<SimStorage, ManualClock>,
    clock: ManualClock,
    streams: u64,
}

impl Rig {
    /// A shard with one topic, which has just begun to serve.
    fn new() -> Self {
        let (storage, clock) = (SimStorage::new(1), ManualClock::new(WALL_US));
        let mut rig = Self {
            shard: open(&storage, &clock),
            storage,
            clock,
            streams: 0,
        };
        let (name, config) = ("orders".to_owned(), TopicConfig::default());
        let request = ResolvedRequest::Plain(Request::TopicCreate { name, config });
        rig.ask(Input::Request {
            stream: StreamId(0),
            id: 1,
            request,
        });
        rig
    }

    fn ask(&mut self, input: Input<()>) -> Vec<(StreamId, Output)> {
        let mut out = Outbox::default();
        self.shard.input(input, &mut out);
        // A subscription that is made for a consumer takes a commit of its own.
        self.shard.commit(&mut out).unwrap();
        self.shard.commit(&mut out).unwrap();
        out.replies
    }

    /// Opens a consumer, or takes a session up again, on a stream of its own.
    fn consume(&mut self, resume: Option<SessionResume>) -> (StreamId, Opened) {
        self.streams += 1;
        let stream = StreamId(self.streams);
        let open = OpenConsumer {
            topic: "orders".to_owned(),
            subscription: "billing".to_owned(),
            create: Some(CreateSubscription::default()),
            resume,
            consumer_name: "c".to_owned(),
        };
        let replies = self.ask(Input::OpenConsumer {
            stream,
            open,
            token: 7,
            start: StartPosition::Earliest,
        });
        let opened = replies.into_iter().find_map(|(to, output)| match output {
            Output::ConsumerOpened(opened) if to == stream => Some(*opened),
            _ => None,
        });
        (stream, opened.expect("the consumer is opened"))
    }

    /// A session whose connection has just broken.
    fn detached(&mut self) -> SessionResume {
        let (stream, opened) = self.consume(None);
        let session = opened.session;
        self.ask(Input::Detach { session, stream });
        SessionResume { session, token: 7 }
    }

    fn publish(&mut self) {
        self.publish_to("orders", 1);
    }

    fn publish_to(&mut self, topic: &str, count: u32) {
        let stream = StreamId(100);
        let open = OpenProducer {
            handle: ProducerHandle(1),
            topic: topic.to_owned(),
            producer_id: None,
            resume: None,
        };
        let replies = self.ask(Input::OpenProducer {
            stream,
            open,
            owner: 1,
        });
        let Some((
            _,
            Output::ProducerOpened {
                topic,
                producer,
                epoch,
                ..
            },
        )) = replies.into_iter().next()
        else {
            panic!("the producer is opened");
        };
        let mut messages = BytesMut::new();
        for number in 1..=count {
            Message::new("m").encode(Sequence(u64::from(number)), &mut messages);
        }
        self.ask(Input::Publish {
            stream,
            handle: ProducerHandle(1),
            topic,
            producer,
            epoch,
            previous: Sequence(0),
            count,
            messages: messages.freeze(),
            keep: (),
        });
    }

    /// Gives credit for ten messages on a stream; how many are handed out then.
    fn grant(&mut self, session: SessionId, stream: StreamId) -> usize {
        self.ask(credit(session, stream));
        let mut out = Outbox::default();
        self.shard.dispatch(&mut out);
        deliveries(&out)
    }

    /// The same behind something else in one group, and how many are handed out before the group is
    /// committed.
    fn grant_behind(&mut self, first: Input<()>, session: SessionId, stream: StreamId) -> usize {
        let mut out = Outbox::default();
        self.shard.input(first, &mut out);
        self.shard.input(credit(session, stream), &mut out);
        self.shard.dispatch_early(&mut out);
        deliveries(&out)
    }

    /// One round of the shard with nothing coming in.
    fn round(&mut self) {
        let mut out = Outbox::default();
        self.shard.wake();
        self.shard.dispatch(&mut out);
        self.shard.commit(&mut out).unwrap();
        self.shard.vouch_if_due().unwrap();
    }

    /// Rests as often as the shard wants to, until so much time has passed.
    fn rest(&mut self, us: u64) {
        let until = self.clock.boottime_us() + us;
        while self.clock.boottime_us() < until {
            let left = until - self.clock.boottime_us();
            let wait = self.shard.wait_us().clamp(1, left);
            self.clock.advance_us(wait);
            self.round();
        }
    }
}

fn credit(session: SessionId, stream: StreamId) -> Input<()> {
    let credit = Credit {
        max_messages: 10,
        max_bytes: 1 << 20,
    };
    let credit = ConsumerCredit { credit, begun: 1 };
    Input::Credit {
        stream,
        session,
        credit,
    }
}

fn deliveries(out: &Outbox<SimStorage>) -> usize {
    let handed = out.replies.iter();
    handed
        .filter(|(_, output)| matches!(output, Output::Deliver(_)))
        .count()
}

/// Asks for a topic.
fn create(number: u64) -> Input<()> {
    let name = format!("topic-{number}");
    let config = TopicConfig::default();
    let request = ResolvedRequest::Plain(Request::TopicCreate { name, config });
    Input::Request {
        stream: StreamId(0),
        id: number,
        request,
    }
}

/// Asks for it as the shard's thread does; whether it was made.
fn creates(rig: &mut Rig, number: u64) -> bool {
    let mut out = Outbox::default();
    rig.shard.input(create(number), &mut out);
    rig.shard.commit_if_due(&mut out).unwrap();
    made(&out).any(|id| id == number)
}

/// The requests that are answered well.
fn made(out: &Outbox<SimStorage>) -> impl Iterator<Item = u64> {
    let made = |output: &Output| match output {
        Output::Response { id, answer } => match &**answer {
            Answer::Ready(result) => result.is_ok().then_some(*id),
            _ => None,
        },
        _ => None,
    };
    out.replies
        .iter()
        .filter_map(move |(_, output)| made(output))
}

fn open(storage: &SimStorage, clock: &ManualClock) -> Shard<SimStorage, ManualClock> {
    open_with_spares(storage, clock, 0)
}

fn open_with_spares(
    storage: &SimStorage,
    clock: &ManualClock,
    spare_segments: usize,
) -> Shard<SimStorage, ManualClock> {
    let options = ShardOptions {
        log: millpond_wal::Options {
            segment_bytes: 1 << 20,
            spare_segments,
            ..millpond_wal::Options::default()
        },
        snapshot_every_bytes: 1 << 20,
    };
    Shard::open(storage.clone(), clock.clone(), None, options)
        .unwrap()
        .0
}

#[test]
fn spares_are_made_one_after_the_other_until_there_are_enough() {
    let mut shard = open_with_spares(&SimStorage::new(1), &ManualClock::new(1), 2);
    let mut made = 0;
    loop {
        let mut out = Outbox::default();
        shard.upkeep(&mut out).unwrap();
        let Some(Job::Spare(job)) = out.jobs.pop() else {
            break;
        };
        shard.job_done(Done::Spare(job.run())).unwrap();
        made += 1;
    }
    assert_eq!(made, 2, "within the same microsecond");
}

#[test]
fn a_session_that_does_not_come_back_ends_after_its_grace() {
    let mut rig = Rig::new();
    let resume = rig.detached();
    rig.rest(10 * SECOND_US + SECOND_US / 10);
    assert!(!rig.consume(Some(resume)).1.resumed);
}

#[test]
fn credit_of_the_stream_before_counts_for_nothing_once_a_session_is_taken_up_on_another() {
    let mut rig = Rig::new();
    rig.publish();
    let (old, opened) = rig.consume(None);
    let session = opened.session;
    let (new, resumed) = rig.consume(Some(SessionResume { session, token: 7 }));
    assert!(resumed.resumed);
    assert_eq!(rig.grant(session, old), 0);
    assert_eq!(rig.grant(session, new), 1);
}

#[test]
fn what_is_asked_for_beside_settlements_leaves_before_their_commit() {
    let mut rig = Rig::new();
    rig.publish();
    let (stream, Opened { session, .. }) = rig.consume(None);
    let run = AckRun {
        offset: Offset(0),
        delivery: Delivery(9),
        run: 1,
    };
    let stale = Input::Settle {
        stream,
        session,
        acks: vec![run],
        items: Vec::new(),
    };
    assert_eq!(rig.grant_behind(stale, session, stream), 1);
}

/// Found by the simulator: a lease behind the end of its session is void, and its name was given again.
#[test]
fn nothing_is_handed_out_behind_what_may_make_it_void() {
    let mut rig = Rig::new();
    rig.publish();
    let (stream, Opened { session, .. }) = rig.consume(None);
    let close = Input::CloseSession { stream, session };
    assert_eq!(rig.grant_behind(close, session, stream), 0);
}

/// A nack is short in the log and long to replay.
#[test]
fn a_snapshot_follows_many_nacks_although_they_are_few_bytes() {
    let mut rig = Rig::new();
    let nacks = nacks_until_a_snapshot(&mut rig, usize::MAX);
    assert!(
        nacks <= 4_096,
        "{nacks}, a mebibyte by what they take to replay"
    );
}

#[test]
fn nacks_that_a_start_had_to_replay_count_for_the_next_snapshot() {
    let mut rig = Rig::new();
    let before = nacks_until_a_snapshot(&mut rig, 3_000);
    rig.storage.restart_process();
    rig.shard = open(&rig.storage, &rig.clock);
    let nacks = before + nacks_until_a_snapshot(&mut rig, usize::MAX);
    assert!(nacks <= 4_096, "{nacks} since the last snapshot");
}

/// Nacks, with upkeep and its jobs beside them, until there is a snapshot, or so many were sent; how many.
fn nacks_until_a_snapshot(rig: &mut Rig, most: usize) -> usize {
    let (stream, Opened { session, .. }) = rig.consume(None);
    let nack = |offset| SettleItem {
        lease: LeaseName {
            offset: Offset(offset),
            delivery: Delivery(1),
        },
        outcome: Verdict::Nack {
            delay_ms: None,
            code: 0,
            reason: String::new(),
        },
    };
    let (mut nacks, mut snapshots) = (0, 0);
    while snapshots == 0 && nacks < most && nacks < 10_000 {
        let items = (0..64).map(nack).collect();
        rig.ask(Input::Settle {
            stream,
            session,
            acks: Vec::new(),
            items,
        });
        nacks += 64;
        let mut out = Outbox::default();
        rig.shard.upkeep(&mut out).unwrap();
        for job in out.jobs {
            snapshots += usize::from(matches!(job, Job::Snapshot(_)));
            rig.shard.job_done(job.run()).unwrap();
        }
    }
    nacks
}

#[test]
fn a_segment_that_a_full_disk_keeps_from_being_sealed_is_tried_again_after_a_second() {
    use std::io::ErrorKind;
    let mut rig = Rig::new();
    let sealing = |shard: &mut Shard<_, _>| {
        let mut out = Outbox::default();
        shard.upkeep(&mut out).unwrap();
        out.jobs.iter().any(|job| matches!(job, Job::Seal(_)))
    };
    rig.shard.log.roll().unwrap();
    assert!(sealing(&mut rig.shard));
    for full in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
        let full = millpond_wal::JobError {
            what: "seal",
            file: "a segment".to_owned(),
            source: full.into(),
        };
        rig.shard.job_done(Done::Seal(Err(full))).unwrap();
        assert!(!sealing(&mut rig.shard));
        rig.clock.advance_us(SECOND_US);
        assert!(sealing(&mut rig.shard));
    }
}

#[test]
fn a_session_that_came_back_while_the_disk_stood_still_is_heard() {
    let mut rig = Rig::new();
    let resume = rig.detached();
    rig.rest(SECOND_US);
    rig.clock.advance_us(12 * SECOND_US);
    rig.round();
    assert!(rig.consume(Some(resume)).1.resumed);
}

#[test]
fn after_a_start_the_grace_counts_from_when_the_shard_serves() {
    let mut rig = Rig::new();
    let resume = rig.detached();
    rig.storage.restart_process();
    rig.shard = open(&rig.storage, &rig.clock);
    // Synced, listening, and only now awake.
    rig.clock.advance_us(11 * SECOND_US);
    rig.round();
    rig.rest(9 * SECOND_US);
    assert!(rig.consume(Some(resume)).1.resumed);
}

#[test]
fn a_group_is_full_of_acknowledgements_that_cover_many_offsets() {
    let mut rig = Rig::new();
    rig.publish();
    let (stream, Opened { session, .. }) = rig.consume(None);
    let never_leased = || Input::<()>::Settle {
        stream,
        session,
        acks: vec![AckRun {
            offset: Offset(1 << 40),
            delivery: Delivery(1),
            run: 65_536,
        }],
        items: Vec::new(),
    };
    let mut out = Outbox::default();
    for full in [false, false, false, true] {
        rig.shard.input(never_leased(), &mut out);
        assert_eq!(rig.shard.is_group_full(), full);
    }
    rig.shard.commit(&mut out).unwrap();
    assert!(!rig.shard.is_group_full());
}

#[test]
fn a_status_that_leaves_topics_out_is_ready_all_the_same() {
    let mut rig = Rig::new();
    let mut out = Outbox::default();
    (1..=5_000).for_each(|number| rig.shard.input(create(number), &mut out));
    rig.shard.commit(&mut out).unwrap();
    let status = rig.shard.status();
    assert_eq!(status.topics.len(), 5_000, "without one of them");
    assert_eq!(status.remarks.len(), 1, "{:?}", status.remarks);
    assert!(status.ready);
}

#[test]
fn a_peek_among_letters_looks_no_further_than_its_page() {
    let mut rig = Rig::new();
    rig.publish();
    let (stream, Opened { session, .. }) = rig.consume(None);
    assert_eq!(rig.grant(session, stream), 1);
    let lease = LeaseName {
        offset: Offset(0),
        delivery: Delivery(1),
    };
    let outcome = Verdict::Reject {
        kind: RejectKind::Rejected,
        code: 0,
        reason: String::new(),
    };
    rig.ask(Input::Settle {
        stream,
        session,
        acks: Vec::new(),
        items: vec![SettleItem { lease, outcome }],
    });
    let topic = "orders.billing.dead".to_owned();
    rig.publish_to(&topic, 2_000);
    let request = ResolvedRequest::Plain(Request::Peek {
        topic,
        from: Offset(0),
        limit: 10,
    });
    let replies = rig.ask(Input::Request {
        stream,
        id: 1,
        request,
    });
    let Some((_, Output::Response { answer, .. })) = replies.into_iter().next() else {
        panic!("the peek is answered");
    };
    let Answer::Peek {
        end,
        next,
        elsewhere,
        ..
    } = *answer
    else {
        panic!("by a page");
    };
    assert_eq!(elsewhere.len(), 1, "the letter");
    assert_eq!((end, next), (Offset(1_010), Offset(2_001)));
}

#[test]
fn a_shard_that_may_only_read_rests() {
    let mut rig = Rig::new();
    (2..8).for_each(|number| assert!(creates(&mut rig, number)));
    let names = rig.storage.list().unwrap();
    let segment = names.iter().find(|name| name.ends_with(".log"));
    let third = 2 * millpond_wal::storage::BLOCK_BYTES as u64;
    rig.storage.corrupt(segment.unwrap(), third, 8).unwrap();
    rig.storage.restart_process();
    rig.shard = open(&rig.storage, &rig.clock);
    assert!(rig.shard.gates().read_only);
    for _ in 0..5 {
        assert!(rig.shard.wait_us() >= SECOND_US / 10, "it does not spin");
        rig.clock.advance_us(SECOND_US);
        rig.round();
        rig.shard.upkeep(&mut Outbox::default()).unwrap();
    }
}

#[test]
fn a_full_disk_holds_a_commit_back_until_there_is_space() {
    let mut rig = Rig::new();
    let space = rig.storage.space().unwrap();
    rig.storage
        .set_capacity(space.total_bytes - space.free_bytes);
    let mut number = 2;
    while creates(&mut rig, number) {
        number += 1;
        assert!(number < 300, "a segment has not so many blocks");
    }
    assert!(number > 2, "what has a segment goes on");
    assert!(rig.shard.wait_us() > 0, "it does not spin");
    assert!(!rig.shard.remarks().is_empty(), "and says why");

    rig.storage.set_capacity(space.total_bytes);
    rig.clock.advance_us(HELD_RETRY_US);
    let mut out = Outbox::default();
    rig.shard.commit_if_due(&mut out).unwrap();
    assert!(
        made(&out).any(|id| id == number),
        "the group that was held back"
    );
    assert!(rig.shard.remarks().is_empty());
    assert!(creates(&mut rig, number + 1));

    rig.storage.restart();
    let shard = open(&rig.storage, &rig.clock);
    let last = format!("topic-{}", number + 1);
    assert!(shard.queue().topic_id(&last).is_some());
}
