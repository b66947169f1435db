//! A shard that is driven by hand: inputs in, everything committed, answers out.

use millpond_broker::clock::ManualClock;
use millpond_broker::shard::io::{
    Answer, Fresh, Handout, Input, Output, ResolvedRequest, StreamId,
};
use millpond_broker::shard::{OpenShardError, Outbox, Recovered, Shard, ShardOptions};
use millpond_protocol::control::{LeaseName, OpenConsumer, OpenProducer, SettleItem};
use millpond_protocol::hot::{AckRun, ConsumerCredit, Credit};
use millpond_protocol::{
    Epoch, Message, Offset, ProducerHandle, ProducerKey, Sequence, SessionId, TopicId,
};
use millpond_queue::StartPosition;

use crate::disk::Disk;

pub type TestShard = Shard<Disk, ManualClock>;

/// 2026-01-01; every life begins a minute after the one before.
const WALL_US: u64 = 1_767_225_600_000_000;
const MINUTE_US: u64 = 60_000_000;
/// Its answers are told apart by who asks, one at a time.
const HANDLE: ProducerHandle = ProducerHandle(1);

/// One process.
pub struct Life {
    pub shard: TestShard,
    clock: ManualClock,
    next_stream: u64,
    /// Everything that was acknowledged, with its place.
    pub accepted: Vec<Fresh>,
}

pub struct Producer {
    pub topic: TopicId,
    key: ProducerKey,
    epoch: Epoch,
    pub last: Sequence,
}

/// A consumer and what it holds.
pub struct Consumer {
    pub session: SessionId,
    pub held: Vec<LeaseName>,
    stream: StreamId,
    settlements: StreamId,
}

/// The smallest segments and manifest there are. Snapshots are taken when there is enough to cover.
pub fn options(snapshot_every_bytes: u64) -> ShardOptions {
    let log = millpond_wal::Options {
        segment_bytes: 64 << 10,
        entry_bytes_max: 256 << 10,
        spare_segments: 0,
        buffer_bytes_idle: 0,
        manifest_bytes: 64 << 10,
        fresh_store_id: *b"the golden store",
    };
    ShardOptions {
        log,
        snapshot_every_bytes,
    }
}

/// Never.
pub const NO_SNAPSHOT: u64 = u64::MAX;

/// Opens the disk as the broker does, in minute `minute`.
pub fn open(
    disk: &Disk,
    minute: u64,
    snapshot_every_bytes: u64,
) -> Result<(TestShard, Recovered, ManualClock), OpenShardError> {
    let clock = ManualClock::new(WALL_US + minute * MINUTE_US);
    let (shard, recovered) = Shard::open(
        disk.clone(),
        clock.clone(),
        None,
        options(snapshot_every_bytes),
    )?;
    Ok((shard, recovered, clock))
}

impl Life {
    pub fn begin(disk: &Disk, minute: u64, snapshot_every_bytes: u64) -> Self {
        let (shard, _, clock) =
            open(disk, minute, snapshot_every_bytes).expect("nothing is damaged");
        Self {
            shard,
            clock,
            next_stream: 1,
            accepted: Vec::new(),
        }
    }

    /// Lets time pass, and everything happen that is due by then but vouching.
    pub fn pass(&mut self, us: u64) -> Vec<(StreamId, Output)> {
        self.clock.advance_us(us);
        self.take(Vec::new())
    }

    pub fn vouch(&mut self) {
        self.clock.advance_us(20_000);
        self.shard.vouch_if_due().expect("the disk takes it");
    }

    /// Asks for several things in one entry of the log.
    pub fn ask(&mut self, requests: Vec<ResolvedRequest>) {
        let asked = requests.len();
        let inputs = requests.into_iter().map(|request| Input::Request {
            stream: StreamId(1),
            id: 1,
            request,
        });
        let outputs = self.take(inputs.collect());
        let done = outputs.iter().filter(|(_, output)| {
            matches!(output, Output::Response { answer, .. }
                if matches!(&**answer, Answer::Ready(result) if result.is_ok()))
        });
        assert_eq!(done.count(), asked, "{outputs:?}");
    }

    pub fn producers<const N: usize>(&mut self, of: [(&str, &str); N]) -> [Producer; N] {
        let open = of.map(|(topic, id)| Input::OpenProducer {
            stream: StreamId(1),
            open: OpenProducer {
                topic: topic.to_owned(),
                producer_id: Some(id.to_owned()),
                resume: None,
                handle: HANDLE,
            },
            owner: 1,
        });
        let outputs = self.take(open.into()).into_iter();
        let opened: Vec<_> = outputs
            .filter_map(|(_, output)| match output {
                Output::ProducerOpened {
                    topic,
                    producer,
                    epoch,
                    last_sequence,
                    ..
                } => Some(Producer {
                    topic,
                    key: producer,
                    epoch,
                    last: last_sequence,
                }),
                _ => None,
            })
            .collect();
        opened.try_into().ok().expect("each was opened")
    }

    /// Publishes messages as one batch, and so as one entry of the log.
    pub fn publish(&mut self, producer: &mut Producer, messages: &[Message]) {
        let previous = producer.last;
        self.publish_from(producer, previous, messages);
        producer.last = Sequence(previous.0 + messages.len() as u64);
    }

    /// As if `previous` had been the last; what was accepted before is a duplicate.
    pub fn publish_from(&mut self, producer: &Producer, previous: Sequence, messages: &[Message]) {
        let mut bytes = bytes::BytesMut::new();
        for (sequence, message) in (previous.0 + 1..).zip(messages) {
            message.encode(Sequence(sequence), &mut bytes);
        }
        let outputs = self.take(vec![Input::Publish {
            stream: StreamId(1),
            handle: HANDLE,
            topic: producer.topic,
            producer: producer.key,
            epoch: producer.epoch,
            previous,
            count: messages.len() as u32,
            messages: bytes.freeze(),
            keep: (),
        }]);
        let acknowledged = outputs
            .iter()
            .any(|(_, output)| matches!(output, Output::Published { .. }));
        assert!(acknowledged, "{outputs:?}");
    }

    /// A consumer that takes up to `messages` at once.
    pub fn consumer(&mut self, topic: &str, subscription: &str, messages: u64) -> Consumer {
        let (stream, settlements) = (self.stream(), self.stream());
        let open = OpenConsumer {
            topic: topic.to_owned(),
            subscription: subscription.to_owned(),
            create: None,
            resume: None,
            consumer_name: "a worker".to_owned(),
        };
        let outputs = self.take(vec![Input::OpenConsumer {
            stream,
            open,
            token: 5,
            start: StartPosition::Earliest,
        }]);
        let session = outputs.iter().find_map(|(_, output)| match output {
            Output::ConsumerOpened(opened) => Some(opened.session),
            _ => None,
        });
        let session = session.expect("it was opened");
        self.take(vec![Input::OpenSettlements {
            stream: settlements,
            session,
            token: 5,
        }]);
        let mut consumer = Consumer {
            session,
            held: Vec::new(),
            stream,
            settlements,
        };
        let credit = ConsumerCredit {
            credit: Credit {
                max_messages: messages,
                max_bytes: 1 << 30,
            },
            begun: messages,
        };
        let outputs = self.take(vec![Input::Credit {
            session,
            stream,
            credit,
        }]);
        consumer.receive(&outputs);
        consumer
    }

    pub fn ack(&mut self, consumer: &mut Consumer, leases: Vec<LeaseName>) {
        let run = |lease: &LeaseName| AckRun {
            offset: lease.offset,
            delivery: lease.delivery,
            run: 1,
        };
        let acks = leases.iter().map(run).collect();
        self.settle(consumer, acks, Vec::new());
    }

    pub fn settle(&mut self, consumer: &mut Consumer, acks: Vec<AckRun>, items: Vec<SettleItem>) {
        let outputs = self.take(vec![Input::Settle {
            stream: consumer.settlements,
            session: consumer.session,
            acks,
            items,
        }]);
        let refused = outputs.iter().any(
            |(_, output)| matches!(output, Output::Settled { refused, .. } if !refused.is_empty()),
        );
        assert!(!refused, "{outputs:?}");
        consumer.receive(&outputs);
    }

    pub fn commit(&mut self, consumer: &Consumer, next: u64) {
        self.take(vec![Input::Commit {
            stream: consumer.settlements,
            session: consumer.session,
            next: Offset(next),
        }]);
    }

    /// Rounds of the shard's thread, the first with these inputs, until nothing is left to do now.
    fn take(&mut self, mut inputs: Vec<Input<()>>) -> Vec<(StreamId, Output)> {
        let mut outputs = Vec::new();
        loop {
            let mut out = Outbox::default();
            for input in inputs.drain(..) {
                self.shard.input(input, &mut out);
            }
            self.shard.commit(&mut out).expect("the disk takes it");
            self.shard.dispatch(&mut out);
            self.shard.commit(&mut out).expect("the disk takes it");
            self.shard.upkeep(&mut out).expect("the disk takes it");
            let idle = out.replies.is_empty() && out.jobs.is_empty();
            for job in out.jobs {
                self.shard.job_done(job.run()).expect("the disk takes it");
            }
            self.accepted.append(&mut out.fresh);
            outputs.append(&mut out.replies);
            if idle {
                return outputs;
            }
        }
    }

    fn stream(&mut self) -> StreamId {
        self.next_stream += 1;
        StreamId(self.next_stream)
    }
}

impl Consumer {
    fn receive(&mut self, outputs: &[(StreamId, Output)]) {
        for (stream, output) in outputs {
            if *stream != self.stream {
                continue;
            }
            if let Output::Deliver(Handout {
                offset,
                count,
                delivery,
                ..
            }) = output
            {
                let offsets = (offset.0..).take(*count as usize);
                self.held.extend(offsets.map(|at| LeaseName {
                    offset: Offset(at),
                    delivery: *delivery,
                }));
            }
        }
    }

    /// Takes what it holds of these offsets.
    pub fn take(&mut self, offsets: impl Fn(u64) -> bool) -> Vec<LeaseName> {
        let (taken, left) = self
            .held
            .drain(..)
            .partition(|lease| offsets(lease.offset.0));
        self.held = left;
        taken
    }
}
