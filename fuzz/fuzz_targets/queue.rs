//! The state machine under any records in any order: none of them panics, the invariants hold, and what a
//! snapshot restores is the same state.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use millpond_fuzz::Cut;
use millpond_protocol::hot::{ConsumerCredit, Credit};
use millpond_protocol::{
    Epoch, LogIndex, Message, ProducerKey, Sequence, SessionId, Stamp, SubscriptionConfig,
    TopicConfig, TopicId,
};
use millpond_queue::{Options, Place, Proposal, Queue, Record, StartPosition};

/// Rounds of proposals in one step; more would be a loop without end.
const ROUNDS_MAX: usize = 64;

fuzz_target!(|input: &[u8]| {
    let mut world = World::new();
    let mut input = Cut(input);
    while !input.is_empty() {
        world.step(&mut input);
    }
    world.queue.check_invariants();
    world.restored_is_the_same();
});

struct World {
    queue: Queue,
    now: Stamp,
    index: u64,
    sequence: u64,
}

impl World {
    /// A topic with a subscription, a producer and a session, so that small numbers name something.
    fn new() -> World {
        let mut world = World {
            queue: Queue::new(Options::default()),
            now: Stamp(1_000_000_000),
            index: 0,
            sequence: 0,
        };
        world.apply(&Record::Start { recovery_epoch: 1 });
        world.apply(&Record::TopicCreate {
            name: "t",
            config: TopicConfig::default(),
        });
        world.apply(&Record::SubscriptionCreate {
            topic: TopicId(1),
            name: "s",
            config: SubscriptionConfig::default(),
            start: StartPosition::Earliest,
        });
        world.apply(&Record::OpenProducer {
            topic: TopicId(1),
            producer_id: Some("p"),
            resume: None,
            owner: 7,
        });
        world.apply(&Record::SessionOpen {
            subscription: world
                .queue
                .subscription_id(TopicId(1), "s")
                .expect("made above"),
            session: SessionId(1),
            token: 9,
            consumer_name: "c",
        });
        world
    }

    fn apply(&mut self, record: &Record<'_>) {
        self.now = self.now.next();
        self.index += 1;
        let place = Place {
            index: LogIndex(self.index),
            record: 0,
        };
        self.queue.apply(place, self.now, record, &mut Vec::new());
    }

    fn step(&mut self, input: &mut Cut<'_>) {
        match input.u8() {
            0 => self.now = self.now.plus_ms(input.u32().into()),
            1 => self.dispatch(),
            2 => self.publish(input),
            3 => {
                let id = SessionId(input.u8().into());
                let credit = Credit {
                    max_messages: input.u8().into(),
                    max_bytes: u64::MAX,
                };
                let begun = input.u8().into();
                self.queue
                    .credit(id, ConsumerCredit { credit, begun }, self.now);
            }
            4 => {
                let id = SessionId(input.u8().into());
                self.queue.attach(id, input.u8().into(), self.now);
            }
            5 => self.queue.detach(SessionId(input.u8().into()), self.now),
            kind => {
                // Kinds begin at 1: these are moved up so that every one can be told.
                let body = input.piece();
                if let Ok(record) = Record::decode(kind - 6, body) {
                    self.apply(&record);
                }
            }
        }
    }

    fn publish(&mut self, input: &mut Cut<'_>) {
        let mut messages = BytesMut::new();
        let (count, previous) = (u32::from(input.u8() % 16) + 1, self.sequence);
        for _ in 0..count {
            self.sequence += 1;
            let mut message = Message::new("m");
            message.delay_ms = u64::from(input.u8()) * 100;
            message.ttl_ms = u64::from(input.u8()) * 1_000;
            message.encode(Sequence(self.sequence), &mut messages);
        }
        self.apply(&Record::Publish {
            topic: TopicId(1),
            producer: ProducerKey(1),
            epoch: Epoch(1),
            previous: Sequence(previous),
            count,
            messages: &messages,
        });
    }

    fn dispatch(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut proposals = Vec::new();
            self.queue.dispatch(self.now, 1_000, &mut proposals);
            if proposals.is_empty() {
                return;
            }
            for proposal in proposals {
                if let Proposal::Lease { record, .. } | Proposal::Log(record) = &proposal {
                    self.apply(record);
                }
            }
        }
    }

    fn restored_is_the_same(&mut self) {
        let chunks = self.queue.snapshot().dirty;
        let restored = Queue::restore(Options::default(), chunks.iter().cloned());
        let mut restored = restored.expect("it was just written");
        // All of its chunks anew: a restored state writes only what has changed.
        let ids: Vec<u64> = chunks.iter().map(|(id, _)| *id).collect();
        restored.snapshot_lost(&ids);
        assert_eq!(restored.snapshot().dirty, chunks);
    }
}
