//! Writes the corpora: real encodings of everything that the targets read. To be run again when a format
//! or a target's own input layout changes: `cargo run --example seeds`, in this folder.
#![allow(clippy::print_stdout, reason = "a tool")]

use std::path::Path;

use bytes::{Bytes, BytesMut};
use millpond_fuzz::put_piece;
use millpond_fuzz::store::files;
use millpond_protocol::control::{
    CloseProducer, CreateSubscription, DeadFilter, GoAway, Hello, LeaseName, Leaving, OpenConsumer,
    OpenProducer, OpenSettlements, Outcome, ProducerEnded, RedriveTarget, RejectKind, Request,
    RequestFrame, Response, ResponseFrame, Settle, SettleItem, Settled,
};
use millpond_protocol::frame::{FrameType, empty, encode};
use millpond_protocol::hot::{
    AckKind, AckRow, AckRun, ConsumerCredit, Credit, DeliverHead, DeliverMeta, Publish, PublishAck,
    encode_acks, encode_commit,
};
use millpond_protocol::{
    Delivery, Epoch, ErrorCode, LogIndex, Message, Offset, ProducerHandle, ProducerKey, Sequence,
    SessionId, Stamp, StartAt, SubscriptionConfig, SubscriptionId, TopicConfig, TopicId, WireError,
};
use millpond_queue::{
    Expired, LeaseRange, Mark, OffsetRun, Options, Place, ProducerMark, Queue, Record, SettleEntry,
    StartPosition, TopicMark,
};

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let all = [
        ("frame", frames()),
        ("message", messages()),
        ("record", records()),
        ("queue", queues()),
        ("state", states()),
        ("snapshot", edits_of_snapshots()),
        ("store", edits_of_stores()),
        ("manifest", manifests()),
    ];
    for (target, seeds) in all {
        let folder = root.join(target);
        std::fs::create_dir_all(&folder).expect("the folder is ours");
        for (nth, seed) in seeds.iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{nth:02}")), seed).expect("so is the file");
        }
        println!("{target}: {} seeds", seeds.len());
    }
}

const HANDLE: ProducerHandle = ProducerHandle(1);

fn message() -> Message {
    let mut message = Message::new("payload");
    message.key = Bytes::from_static(b"key");
    message.headers = vec![("name".to_owned(), Bytes::from_static(b"value"))];
    message.delay_ms = 5;
    message.ttl_ms = 6;
    message
}

fn encoded(message: &Message, sequence: u64) -> BytesMut {
    let mut out = BytesMut::new();
    message.encode(Sequence(sequence), &mut out);
    out
}

fn messages() -> Vec<Vec<u8>> {
    let mut many = encoded(&Message::new("a"), 1);
    many.extend_from_slice(&encoded(&message(), 2));
    vec![encoded(&message(), 9).to_vec(), many.to_vec()]
}

fn publish() -> Bytes {
    let mut bodies = encoded(&Message::new("a"), 4);
    bodies.extend_from_slice(&encoded(&message(), 5));
    let mut out = BytesMut::from(&Publish::prefix(HANDLE, Sequence(3), 2, bodies.len())[..]);
    out.extend_from_slice(&bodies);
    out.freeze()
}

fn deliver() -> Bytes {
    let body = encoded(&message(), 5);
    let mut extra = Vec::new();
    millpond_protocol::message::put_header(&mut extra, "mp-dead-reason", b"rejected");
    let first = DeliverMeta {
        offset: Offset(7),
        delivery: Delivery(2),
        attempt: 2,
        ..DeliverMeta::default()
    };
    let mut head = DeliverHead::default();
    head.push(first, &extra, [body.len()]);
    let mut out = BytesMut::from(&head.encode()[..]);
    out.extend_from_slice(&body);
    out.freeze()
}

fn hot_frames() -> Vec<Bytes> {
    let credit = Credit {
        max_messages: 100,
        max_bytes: 1 << 20,
    };
    let mut ack = BytesMut::new();
    PublishAck {
        handle: HANDLE,
        credit,
        pressure: Some(ErrorCode::DiskLow),
        retry_after_ms: 50,
        rows: vec![AckRow {
            last_sequence: Sequence(5),
            offset: Offset(4),
            count: 2,
            kind: AckKind::Duplicate,
        }],
    }
    .encode(&mut ack);
    let mut acks = BytesMut::new();
    encode_acks(&[run()], &mut acks);
    let begun = 3;
    vec![
        publish(),
        deliver(),
        ack.freeze(),
        acks.freeze(),
        encode_commit(Offset(9)),
        ConsumerCredit { credit, begun }.encode(),
        empty(FrameType::Renew),
        empty(FrameType::CloseSession),
    ]
}

fn run() -> AckRun {
    AckRun {
        offset: Offset(0),
        delivery: Delivery(1),
        run: 3,
    }
}

fn lease(offset: u64) -> LeaseName {
    LeaseName {
        offset: Offset(offset),
        delivery: Delivery(1),
    }
}

fn outcomes() -> Vec<Outcome> {
    vec![
        Outcome::Nack {
            delay_ms: Some(7),
            code: 3,
            reason: "no".to_owned(),
        },
        Outcome::Reject {
            kind: RejectKind::Rejected,
            code: 4,
            reason: "never".to_owned(),
        },
        Outcome::Release { delay_ms: None },
        Outcome::Extend,
    ]
}

fn requests() -> Vec<Request> {
    let (topic, name) = ("t".to_owned(), "s".to_owned());
    vec![
        Request::Ping,
        Request::TopicCreate {
            name: topic.clone(),
            config: TopicConfig::default(),
        },
        Request::SubscriptionCreate {
            topic: topic.clone(),
            name: name.clone(),
            config: SubscriptionConfig::default(),
            start: StartAt::Time(Stamp(5)),
        },
        Request::DeadRedrive {
            topic: topic.clone(),
            subscription: name,
            filter: DeadFilter::default(),
            rate_per_s: Some(10),
            target: RedriveTarget::Topic,
        },
        Request::Peek {
            topic,
            from: Offset(3),
            limit: 10,
        },
        Request::Status,
    ]
}

fn control_frames() -> Vec<Bytes> {
    let frame = |kind, bytes: Result<Bytes, _>| -> Bytes {
        let _: FrameType = kind;
        bytes.expect("seeds are small")
    };
    macro_rules! frames {
        ($($kind:ident: $value:expr,)*) => {
            vec![$(frame(FrameType::$kind, encode(FrameType::$kind, &$value)),)*]
        };
    }
    let items = (0..).zip(outcomes()).map(|(offset, outcome)| SettleItem {
        lease: lease(offset),
        outcome,
    });
    let mut out = frames! {
        Hello: Hello {
            version_min: 1,
            version_max: 1,
            token: Some("secret".to_owned()),
            client_name: "c".to_owned(),
        },
        GoAway: GoAway { deadline_ms: 5, reason: "stops".to_owned() },
        Error: WireError::new(ErrorCode::Memory, "no room"),
        OpenProducer: OpenProducer {
            handle: HANDLE,
            topic: "t".to_owned(),
            producer_id: Some("p".to_owned()),
            resume: None,
        },
        CloseProducer: CloseProducer { handle: HANDLE, leaving: Leaving::ForGood },
        ProducerEnded: ProducerEnded {
            handle: HANDLE,
            error: Some(WireError::new(ErrorCode::Memory, "no room")),
        },
        OpenConsumer: OpenConsumer {
            topic: "t".to_owned(),
            subscription: "s".to_owned(),
            create: Some(CreateSubscription::default()),
            resume: None,
            consumer_name: "c".to_owned(),
        },
        OpenSettlements: OpenSettlements { session: SessionId(1), token: 9 },
        Settle: Settle { items: items.collect() },
        Settled: Settled { upto: 4, refused: vec![] },
        Response: ResponseFrame { id: 1, result: Ok(Response::Done) },
        Response: ResponseFrame { id: 1, result: Err(WireError::new(ErrorCode::Memory, "no")) },
    };
    out.extend(requests().into_iter().map(|request| {
        let frame = RequestFrame { id: 1, request };
        encode(FrameType::Request, &frame).expect("seeds are small")
    }));
    out
}

/// Where the stream is cut stands before it.
fn frames() -> Vec<Vec<u8>> {
    let all: Vec<Bytes> = hot_frames().into_iter().chain(control_frames()).collect();
    let mut seeds: Vec<Vec<u8>> = all
        .iter()
        .map(|frame| [&[9], &frame[..]].concat())
        .collect();
    seeds.push([&[200], &all.concat()[..]].concat());
    seeds
}

fn record_values(messages: &[u8]) -> Vec<Record<'_>> {
    let (topic, subscription, session) = (TopicId(1), SubscriptionId(1), SessionId(1));
    let items = (0..).zip(outcomes()).map(|(offset, outcome)| SettleEntry {
        lease: lease(offset),
        outcome,
        begun_at: Some(Stamp(5)),
        history: Vec::new(),
    });
    vec![
        Record::Start { recovery_epoch: 2 },
        Record::TopicCreate {
            name: "u",
            config: TopicConfig::default(),
        },
        Record::TopicUpdate {
            topic,
            patch: Default::default(),
        },
        Record::SubscriptionCreate {
            topic,
            name: "v",
            config: SubscriptionConfig::default(),
            start: StartPosition::At(Offset(2)),
        },
        Record::SubscriptionUpdate {
            subscription,
            patch: Default::default(),
        },
        Record::SubscriptionPause { subscription },
        Record::SubscriptionResume { subscription },
        Record::SubscriptionSeek {
            subscription,
            to: StartPosition::At(Offset(1)),
        },
        Record::OpenProducer {
            topic,
            producer_id: Some("q"),
            resume: None,
            owner: 3,
        },
        Record::Publish {
            topic,
            producer: ProducerKey(1),
            epoch: Epoch(1),
            previous: Sequence(0),
            count: 2,
            messages,
        },
        Record::SessionOpen {
            subscription,
            session: SessionId(2),
            token: 3,
            consumer_name: "d",
        },
        Record::Lease {
            subscription,
            session,
            ranges: vec![LeaseRange {
                offset: Offset(0),
                count: 2,
                delivery: Delivery(1),
            }],
        },
        Record::Settle {
            subscription,
            session,
            acks: vec![run()],
            items: items.collect(),
        },
        Record::Commit {
            subscription,
            session,
            next: Offset(1),
        },
        Record::Expire(Expired::MaxAge {
            subscription,
            below: Offset(1),
        }),
        Record::SessionEnd {
            session,
            clean: false,
            begun: vec![OffsetRun {
                offset: Offset(0),
                count: 1,
            }],
            story: Some(Default::default()),
        },
        Record::Trim {
            topic,
            first: Offset(1),
        },
        Record::Redrive {
            topic: TopicId(2),
            source_topic: "t",
            subscription: "s",
            filter: DeadFilter::default(),
            rate_per_s: None,
            target: RedriveTarget::Subscription,
        },
        Record::RedriveStep {
            job: 1,
            letters: vec![Offset(0)],
            next: Offset(1),
        },
        Record::RedriveCancel { job: 1 },
        Record::DeadPurge {
            topic: TopicId(2),
            source_topic: "t",
            subscription: "s",
            filter: DeadFilter::default(),
        },
        Record::TokenAdd {
            name: "a",
            hash: [1; 32],
        },
        Record::TokenRevoke { name: "a" },
        Record::Mark(Mark {
            next_topic: 2,
            next_subscription: 2,
            next_producer: 2,
            topics: vec![TopicMark {
                topic,
                name: "t",
                first: Offset(0),
                next: Offset(2),
                bytes: 90,
            }],
            producers: vec![ProducerMark {
                producer: ProducerKey(1),
                topic,
                name: Some("p"),
                epoch: Epoch(1),
                last: Sequence(2),
            }],
        }),
        Record::Skip {
            from: LogIndex(1),
            to: LogIndex(2),
            messages_max: 3,
        },
        Record::Damaged {
            topic,
            ranges: vec![OffsetRun {
                offset: Offset(0),
                count: 1,
            }],
        },
        Record::SubscriptionDelete { subscription },
        Record::TopicPurge { topic },
        Record::CloseProducer {
            producer: ProducerKey(1),
            epoch: Epoch(1),
        },
        Record::TopicDelete { topic },
    ]
}

fn batch() -> Vec<u8> {
    [&encoded(&Message::new("a"), 1)[..], &encoded(&message(), 2)].concat()
}

fn body(record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

fn records() -> Vec<Vec<u8>> {
    let batch = batch();
    let records = record_values(&batch);
    let seed = |record: &Record<'_>| [&[record.kind()], &body(record)[..]].concat();
    records.iter().map(seed).collect()
}

/// Steps of the `queue` target: everything once, and a small life with a retry and a dead letter.
fn queues() -> Vec<Vec<u8>> {
    let batch = batch();
    let mut every = Vec::new();
    for record in record_values(&batch) {
        every.push(record.kind() + 6);
        put_piece(&mut every, &body(&record));
        every.push(1);
    }
    let life = [2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 3, 1, 10, 0, 4, 1, 9, 1];
    let mut life = life.to_vec();
    for record in record_values(&batch) {
        if matches!(record, Record::Settle { .. } | Record::SessionEnd { .. }) {
            life.push(record.kind() + 6);
            put_piece(&mut life, &body(&record));
            life.extend([0, 0xff, 0xff, 0, 0, 1]);
        }
    }
    vec![every, life]
}

/// A state without retries, and with some, as both formats have them.
fn states() -> Vec<Vec<u8>> {
    let mut queue = Queue::new(Options::default());
    let batch = batch();
    for (nth, record) in (1..).zip(record_values(&batch)) {
        if matches!(record, Record::SubscriptionDelete { .. }) {
            break;
        }
        let place = Place {
            index: LogIndex(nth),
            record: 0,
        };
        queue.apply(place, Stamp(1_000 + nth), &record, &mut Vec::new());
    }
    let mut without = Vec::new();
    let mut retries = RETRIES_CLASS;
    for (id, chunk) in queue.snapshot().dirty {
        put_chunk(&mut without, id, &chunk);
        if id >> 60 == SUBSCRIPTION_CLASS {
            retries |= id & 0x0fff_ffff << 32;
        }
    }
    let with = |hex: &str| {
        let mut state = without.clone();
        put_chunk(&mut state, retries, &of_hex(hex.trim_end()));
        state
    };
    let both = [RETRIES, RETRIES_FORMAT_1].map(with);
    [vec![without], both.to_vec()].concat()
}

const RETRIES: &str = include_str!("../../queue/src/tests/snapshot/retries.txt");
const RETRIES_FORMAT_1: &str = include_str!("../../queue/src/tests/snapshot/retries_format_1.txt");
const RETRIES_CLASS: u64 = 8 << 60;
const SUBSCRIPTION_CLASS: u64 = 5;

fn put_chunk(out: &mut Vec<u8>, id: u64, chunk: &[u8]) {
    out.extend_from_slice(&id.to_le_bytes());
    put_piece(out, chunk);
}

fn of_hex(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal digits");
    (0..hex.len()).step_by(2).map(byte).collect()
}

fn edits_of_snapshots() -> Vec<Vec<u8>> {
    // A table offset, a chunk, a cut.
    vec![
        vec![1, 48, 0, 2, 0, 0x20],
        vec![0, 0, 16, 3, 1, 2, 3],
        vec![1, 0, 32, 0],
    ]
}

fn edits_of_stores() -> Vec<Vec<u8>> {
    let mut seeds = vec![vec![0], vec![1, 1, 2, 0, 16, 2, 1]];
    // A byte in the front of each block of each file, with and without the checksums put right.
    for (nth, file) in (0u8..).zip(files()) {
        let mut edits = Vec::new();
        for block in 0..(file.bytes.len() / 4_096).min(4) as u16 {
            let at = (block * 4_096 + 24).to_le_bytes();
            edits.extend([7, nth, at[0], at[1], 1, 9]);
        }
        for seals in [0, 1] {
            seeds.push([&[seals], &edits[..]].concat());
        }
    }
    seeds
}

/// The real records' payloads, from each place on.
fn manifests() -> Vec<Vec<u8>> {
    let manifest = files().iter().find(|file| file.name == "manifest");
    let manifest = manifest.expect("a store has one");
    let payloads: Vec<&[u8]> = manifest
        .bytes
        .chunks(4_096)
        .map(|block| {
            let length = u32::from_le_bytes([block[8], block[9], block[10], block[11]]);
            &block[40..40 + length as usize]
        })
        .collect();
    let kept = 0..payloads.len();
    let seed = |kept: usize| {
        let mut seed = vec![kept as u8];
        for payload in &payloads[kept..] {
            seed.push(2);
            put_piece(&mut seed, payload);
        }
        seed
    };
    kept.map(seed).collect()
}
