//! What the pieces on the hot path cost by themselves: message and frame layouts, a group of records,
//! the queue's decisions. No disk and no network; those are measured by `load`.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use millpond_protocol::control::{LeaseName, Outcome as Verdict};
use millpond_protocol::frame::HEADER_BYTES;
use millpond_protocol::hot::{
    AckRun, ConsumerCredit, Credit, DeliverHead, DeliverMeta, Publish, decode_acks, decode_deliver,
    encode_acks,
};
use millpond_protocol::{
    Delivery, Epoch, LogIndex, Message, MessageView, Offset, ProducerHandle, ProducerKey, Sequence,
    SessionId, Stamp, SubscriptionConfig, SubscriptionId, TopicConfig, TopicId,
};
use millpond_queue::{Effect, Outcome, Place, Proposal, Queue, Record, SettleEntry, StartPosition};
use millpond_wal::sim::SimStorage;
use millpond_wal::{Log, Options};

/// Messages of one batch, hand-out or settlement.
const BATCH: u64 = 64;
const SIZES: [usize; 2] = [128, 1_024];
/// Messages that fail together.
const STORM: u64 = 1_024 * BATCH;
const SESSION: SessionId = SessionId(1 << 32 | 1);

criterion_group!(all, codec, entry, queue, retries);
criterion_main!(all);

fn batch(first: u64, payload: usize) -> Bytes {
    let mut out = BytesMut::new();
    for sequence in first..first + BATCH {
        Message::new(vec![0x5a; payload]).encode(Sequence(sequence), &mut out);
    }
    out.freeze()
}

fn verify(mut rest: &[u8]) -> u64 {
    let mut last = 0;
    while !rest.is_empty() {
        let (view, behind) = MessageView::split(rest).expect("it was just encoded");
        view.verify().expect("it was just encoded");
        (last, rest) = (view.sequence().0, behind);
    }
    last
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(BATCH));
    for size in SIZES {
        group.bench_function(format!("encode messages, {size} B"), |bench| {
            bench.iter(|| batch(black_box(1), size));
        });
        let messages = batch(1, size);
        group.bench_function(format!("verify messages, {size} B"), |bench| {
            bench.iter(|| verify(black_box(&messages)));
        });
        let prefix = Publish::prefix(ProducerHandle(1), Sequence(0), BATCH as u32, messages.len());
        let publish = Bytes::from([&prefix[HEADER_BYTES..], &messages].concat());
        group.bench_function(format!("decode a publish, {size} B"), |bench| {
            bench.iter(|| Publish::decode(black_box(&publish)));
        });
        let deliver = deliver(&messages);
        group.bench_function(format!("take a delivery apart, {size} B"), |bench| {
            bench.iter(|| decode_deliver(black_box(deliver.clone())));
        });
    }
    let runs: Vec<_> = (0..BATCH).map(|nth| run(nth * 2, 1, 1)).collect();
    let mut acks = BytesMut::new();
    encode_acks(&runs, &mut acks);
    group.bench_function("encode acknowledgements", |bench| {
        bench.iter(|| {
            let mut out = BytesMut::new();
            encode_acks(black_box(&runs), &mut out);
            out
        });
    });
    group.bench_function("decode acknowledgements", |bench| {
        bench.iter(|| decode_acks(black_box(&acks[HEADER_BYTES..])));
    });
    group.finish();
}

/// The body of a deliver frame with these messages.
fn deliver(messages: &[u8]) -> Bytes {
    let first = DeliverMeta {
        delivery: Delivery(1),
        attempt: 1,
        ..DeliverMeta::default()
    };
    let lengths = (0..BATCH).map(|_| messages.len() / BATCH as usize);
    let mut head = DeliverHead::default();
    head.push(first, &[], lengths);
    let body = Bytes::from([&head.encode()[HEADER_BYTES..], messages].concat());
    let taken = decode_deliver(&body[..]).expect("it was just encoded");
    assert_eq!(taken.len() as u64, BATCH);
    body
}

fn run(offset: u64, delivery: u32, run: u32) -> AckRun {
    AckRun {
        offset: Offset(offset),
        delivery: Delivery(delivery),
        run,
    }
}

/// Records into a group: an entry without its checksum and its write.
fn entry(criterion: &mut Criterion) {
    let mut log = Log::open(SimStorage::new(1), Options::default())
        .expect("an empty disk")
        .log;
    log.replay(|_, _| Ok::<_, Infallible>(()))
        .expect("nothing to replay");
    let mut group = criterion.benchmark_group("entry");
    group.throughput(Throughput::Elements(BATCH));
    for size in SIZES {
        let body = vec![0x5a; size];
        group.bench_function(format!("put records in, {size} B"), |bench| {
            bench.iter(|| {
                let mut group = log.new_group();
                for stamp in 1..=BATCH {
                    group.push(stamp, 22, &[black_box(&body)]);
                }
                group
            });
        });
    }
    group.finish();
}

/// A queue with a topic, a subscription, a producer and a consumer whose credit never ends.
struct Rig {
    queue: Queue,
    topic: TopicId,
    subscription: SubscriptionId,
    producer: ProducerKey,
    index: u64,
    now: Stamp,
    last: u64,
    effects: Vec<Effect>,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self {
            queue: Queue::new(millpond_queue::Options::default()),
            topic: TopicId::default(),
            subscription: SubscriptionId::default(),
            producer: ProducerKey::default(),
            index: 0,
            now: Stamp(1_000_000_000_000),
            last: 0,
            effects: Vec::new(),
        };
        let config = TopicConfig::default();
        let created = rig.apply(&Record::TopicCreate { name: "t", config });
        let Outcome::TopicCreated(topic) = created else {
            panic!("{created:?}")
        };
        let created = rig.apply(&Record::SubscriptionCreate {
            topic,
            name: "s",
            config: SubscriptionConfig::default(),
            start: StartPosition::Earliest,
        });
        let Outcome::SubscriptionCreated(subscription) = created else {
            panic!("{created:?}")
        };
        let opened = rig.apply(&Record::OpenProducer {
            topic,
            producer_id: Some("p"),
            resume: None,
            owner: 1,
        });
        let Outcome::ProducerOpened { producer, .. } = opened else {
            panic!("{opened:?}")
        };
        rig.apply(&Record::SessionOpen {
            subscription,
            session: SESSION,
            token: 1,
            consumer_name: "c",
        });
        (rig.topic, rig.subscription, rig.producer) = (topic, subscription, producer);
        rig.begun(0);
        rig
    }

    fn apply(&mut self, record: &Record<'_>) -> Outcome {
        self.index += 1;
        self.now = self.now.next();
        self.effects.clear();
        let place = Place {
            index: LogIndex(self.index),
            record: 0,
        };
        self.queue.apply(place, self.now, record, &mut self.effects)
    }

    fn publish(&mut self, payload: usize) -> Duration {
        let messages = batch(self.last + 1, payload);
        let record = Record::Publish {
            topic: self.topic,
            producer: self.producer,
            epoch: Epoch(1),
            previous: Sequence(self.last),
            count: BATCH as u32,
            messages: &messages,
        };
        let began = Instant::now();
        let outcome = self.apply(&record);
        let took = began.elapsed();
        assert!(matches!(outcome, Outcome::Published { .. }), "{outcome:?}");
        self.last += BATCH;
        took
    }

    fn begun(&mut self, begun: u64) {
        let credit = Credit {
            max_messages: u64::MAX,
            max_bytes: u64::MAX,
        };
        let credit = ConsumerCredit { credit, begun };
        self.queue.credit(SESSION, credit, self.now);
    }

    /// Hands out what was published last; the time of proposing it.
    fn hand_out(&mut self) -> Duration {
        let mut proposals = Vec::new();
        let began = Instant::now();
        while self.queue.dispatch(self.now, 8_192, &mut proposals) {}
        let took = began.elapsed();
        assert_eq!(self.lease(proposals), BATCH);
        took
    }

    /// Takes hand-outs in; how many messages they were.
    fn lease(&mut self, proposals: Vec<Proposal>) -> u64 {
        let mut handed_out = 0;
        for proposal in proposals {
            if let Proposal::Lease { record, ranges, .. } = proposal {
                let counts = ranges.iter().map(|range| u64::from(range.count));
                handed_out += counts.sum::<u64>();
                self.apply(&record);
            }
        }
        handed_out
    }

    /// Acknowledges what was published last, each by itself.
    fn settle(&mut self) -> Duration {
        self.begun(self.last);
        let first = self.last - BATCH;
        let acks = (first..self.last).map(|offset| run(offset, 1, 1));
        self.settled(acks.collect(), Vec::new())
    }

    /// Settles, and nothing is refused.
    fn settled(&mut self, acks: Vec<AckRun>, items: Vec<SettleEntry>) -> Duration {
        let record = Record::Settle {
            subscription: self.subscription,
            session: SESSION,
            acks,
            items,
        };
        let began = Instant::now();
        let outcome = self.apply(&record);
        let took = began.elapsed();
        match outcome {
            Outcome::Settled { refused, .. } => assert!(refused.is_empty(), "{refused:?}"),
            other => panic!("{other:?}"),
        }
        took
    }
}

/// What a message costs that fails once, of many that do.
#[derive(Default)]
struct Storm {
    nacks: Duration,
    hand_outs: Duration,
    acks: Duration,
}

impl Storm {
    fn run() -> Self {
        let mut rig = Rig::new();
        let mut storm = Self::default();
        storm.fail(&mut rig);
        rig.now = rig.now.plus_ms(120_000);
        rig.queue.renew(SESSION, rig.now);
        storm.hand_out(&mut rig);
        for first in (0..STORM).step_by(BATCH as usize) {
            let acks = (first..first + BATCH).map(|offset| run(offset, 2, 1));
            storm.acks += rig.settled(acks.collect(), Vec::new());
        }
        storm
    }

    /// All messages wait for their second attempt.
    fn fail(&mut self, rig: &mut Rig) {
        while rig.last < STORM {
            rig.publish(128);
        }
        self.hand_out(rig);
        self.hand_outs = Duration::ZERO;
        for first in (0..STORM).step_by(BATCH as usize) {
            let nack = |offset| SettleEntry {
                lease: LeaseName {
                    offset: Offset(offset),
                    delivery: Delivery(1),
                },
                outcome: Verdict::Nack {
                    delay_ms: Some(60_000),
                    code: 7,
                    reason: String::new(),
                },
                begun_at: Some(rig.now),
                history: Vec::new(),
            };
            let items = (first..first + BATCH).map(nack).collect();
            self.nacks += rig.settled(Vec::new(), items);
        }
    }

    fn hand_out(&mut self, rig: &mut Rig) {
        let mut left = STORM;
        while left > 0 {
            let mut proposals = Vec::new();
            let began = Instant::now();
            rig.queue.dispatch(rig.now, 8_192, &mut proposals);
            left -= rig.lease(proposals);
            self.hand_outs += began.elapsed();
        }
    }
}

type PartOf = fn(&Storm) -> Duration;

fn retries(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("retries");
    group
        .throughput(Throughput::Elements(STORM))
        .sample_size(10);
    let steps: [(&str, PartOf); 3] = [
        ("apply nacks", |storm| storm.nacks),
        ("hand out again", |storm| storm.hand_outs),
        ("apply acknowledgements", |storm| storm.acks),
    ];
    for (name, step) in steps {
        group.bench_function(name, |bench| {
            bench.iter_custom(|rounds| (0..rounds).map(|_| step(&Storm::run())).sum());
        });
    }
    group.bench_function("read back", |bench| {
        let mut rig = Rig::new();
        Storm::default().fail(&mut rig);
        let chunks = rig.queue.snapshot().dirty;
        let read = || {
            let began = Instant::now();
            let read = Queue::restore(millpond_queue::Options::default(), chunks.iter().cloned());
            let took = began.elapsed();
            read.expect("it was just written");
            took
        };
        bench.iter_custom(|rounds| (0..rounds).map(|_| read()).sum());
    });
    group.finish();
}

type Step = fn(&mut Rig) -> Duration;

fn queue(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue");
    group.throughput(Throughput::Elements(BATCH));
    // Every step needs the two others around it, which are not counted.
    let steps: [(&str, Step); 3] = [
        ("apply a publish", |rig| {
            let took = rig.publish(128);
            rig.hand_out();
            rig.settle();
            took
        }),
        ("dispatch", |rig| {
            rig.publish(128);
            let took = rig.hand_out();
            rig.settle();
            took
        }),
        ("apply acknowledgements", |rig| {
            rig.publish(128);
            rig.hand_out();
            rig.settle()
        }),
    ];
    for (name, step) in steps {
        group.bench_function(name, |bench| {
            bench.iter_custom(|rounds| {
                let mut rig = Rig::new();
                (0..rounds).map(|_| step(&mut rig)).sum()
            });
        });
    }
    group.finish();
}
