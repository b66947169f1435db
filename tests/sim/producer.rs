//! A simulated producer: batches with many in flight, keeps what is not acknowledged, comes back and
//! sends it again, as a real client does; now and then its process dies and forgets.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use millpond_broker::shard::io::Output;
use millpond_protocol::control::{OpenProducer, ProducerResume};
use millpond_protocol::{Epoch, ErrorClass, ErrorCode, Message, ProducerKey, Sequence, TopicId};

use crate::client::Hands;
use crate::history::{Event, Identity, Sent};
use crate::plan::ProducerPlan;
use crate::rng::digest;
use crate::wire::{ConnId, Down, HANDLE, Up};

/// Most messages of one batch.
const BATCH_MAX: u64 = 7;
/// How long it waits before it connects again, in microseconds.
const RECONNECT_US: u64 = 20_000;

#[derive(Debug)]
pub struct Producer {
    plan: ProducerPlan,
    /// Tells this producer's messages from all others'.
    number: u64,
    conn: Option<ConnId>,
    handle: Option<Handle>,
    /// The state of an anonymous producer, and what it knows to be accepted.
    resume: Option<ProducerResume>,
    last_known: u64,
    /// The chain of sequences as it was last written.
    last_made: u64,
    unacked: VecDeque<Unacked>,
    /// How many of them, from the front, were sent on this connection.
    sent: usize,
    /// Batches sent on this connection and not answered, as numbers of messages.
    in_flight: VecDeque<usize>,
    /// A batch was refused: what follows is void until all of it is answered.
    is_resyncing: bool,
    made: u64,
}

#[derive(Copy, Clone, Debug)]
struct Handle {
    topic: TopicId,
    key: ProducerKey,
    epoch: Epoch,
}

#[derive(Debug)]
struct Unacked {
    previous: u64,
    told: Sent,
    bytes: Bytes,
}

impl Producer {
    pub fn new(plan: ProducerPlan, number: u64) -> Self {
        Self {
            plan,
            number,
            conn: None,
            handle: None,
            resume: None,
            last_known: 0,
            last_made: 0,
            unacked: VecDeque::new(),
            sent: 0,
            in_flight: VecDeque::new(),
            is_resyncing: false,
            made: 0,
        }
    }

    pub fn is_done(&self) -> bool {
        self.made == self.plan.messages && self.unacked.is_empty()
    }

    pub fn describe(&self) -> String {
        format!(
            "producer {} made {} of {}, {} unacknowledged, open: {}",
            self.number,
            self.made,
            self.plan.messages,
            self.unacked.len(),
            self.handle.is_some()
        )
    }

    pub fn tick(&mut self, hands: &mut Hands<'_>) {
        match (self.conn, self.handle) {
            (None, _) if hands.is_up && !self.is_done() => self.open(hands),
            (Some(conn), Some(handle)) => self.work(conn, handle, hands),
            _ => {}
        }
        let wait = hands.rng.wait(hands.plan.pace.produce_us);
        hands.tick_after(wait.max(1));
    }

    /// Its connection is gone, if it is still this one.
    pub fn lost(&mut self, conn: ConnId) {
        if self.conn == Some(conn) {
            self.broken();
        }
    }

    fn broken(&mut self) {
        self.conn = None;
        self.handle = None;
        self.in_flight.clear();
        self.is_resyncing = false;
        self.sent = 0;
    }

    pub fn receive(&mut self, conn: ConnId, down: Down, hands: &mut Hands<'_>) {
        if self.conn != Some(conn) {
            return;
        }
        match down {
            Down::Answer(Output::ProducerOpened {
                topic,
                producer,
                epoch,
                last_sequence,
                ..
            }) => self.opened(
                Handle {
                    topic,
                    key: producer,
                    epoch,
                },
                last_sequence,
                hands,
            ),
            Down::Answer(Output::Published { rows, .. }) => {
                let count = self.in_flight.pop_front().unwrap_or(0);
                let told: usize = rows.iter().map(|row| row.count as usize).sum();
                assert_eq!(told, count, "rows tell of every message of the batch");
                for _ in 0..count {
                    let acked = self
                        .unacked
                        .pop_front()
                        .expect("it was sent and not answered");
                    self.last_known = acked.told.sequence;
                }
                self.sent -= count;
            }
            Down::Answer(Output::PublishRefused { error, .. }) => {
                self.refused(conn, error.code, hands)
            }
            Down::Answer(Output::ProducerEnded {
                error: Some(error), ..
            }) => self.ended(error.code, hands),
            _ => {}
        }
    }

    fn open(&mut self, hands: &mut Hands<'_>) {
        if !hands.is_calm && hands.rng.below(RECONNECT_US) > hands.plan.pace.produce_us * 4 {
            return;
        }
        let known = Sequence(self.last_known);
        // A named one has only its last sequence to tell; the broker knows the rest.
        let of_name = ProducerResume {
            producer: ProducerKey(0),
            epoch: Epoch(0),
            last_known: known,
        };
        let resume = match (&self.plan.name, self.resume) {
            (Some(_), _) => (self.last_known > 0).then_some(of_name),
            (None, resume) => resume.map(|resume| ProducerResume {
                last_known: known,
                ..resume
            }),
        };
        let open = OpenProducer {
            handle: HANDLE,
            topic: hands.plan.topics[self.plan.topic].name.clone(),
            producer_id: self.plan.name.clone(),
            resume,
        };
        self.conn = Some(hands.open(Up::OpenProducer(open)));
    }

    fn opened(&mut self, handle: Handle, last: Sequence, hands: &mut Hands<'_>) {
        hands.note(Event::ProducerOpened {
            producer: Identity {
                key: handle.key.0,
                epoch: handle.epoch.0,
            },
            last_sequence: last.0,
            last_known: self.last_known,
        });
        self.handle = Some(handle);
        if self.plan.name.is_none() {
            self.resume = Some(ProducerResume {
                producer: handle.key,
                epoch: handle.epoch,
                last_known: Sequence(self.last_known),
            });
        }
        if self.unacked.is_empty() {
            self.last_made = last.0;
            self.last_known = last.0;
        }
    }

    fn work(&mut self, conn: ConnId, handle: Handle, hands: &mut Hands<'_>) {
        let faults = &hands.plan.faults;
        let (breaks, dies) = (faults.break_permille, faults.client_crash_permille);
        if hands.trouble(dies) {
            hands.mishap(|mishaps| &mut mishaps.producer_crashes);
            self.die(conn, hands);
            // The next one may be there before the last words of this one arrive.
            if hands.is_up && hands.rng.percent(50) {
                self.open(hands);
            }
            return;
        }
        if hands.trouble(breaks) {
            hands.mishap(|mishaps| &mut mishaps.connection_breaks);
            hands.drop_conn(conn);
            self.broken();
            if hands.is_up && hands.rng.percent(50) {
                self.open(hands);
            }
            return;
        }
        if self.is_resyncing {
            if !self.in_flight.is_empty() {
                return;
            }
            self.is_resyncing = false;
            self.sent = 0;
        }
        for _ in 0..hands.rng.between(1, BATCH_MAX) {
            if self.made < self.plan.messages && self.unacked.len() < self.plan.window {
                self.make(hands);
            }
        }
        self.send(conn, handle, hands);
    }

    /// The producer's process dies with all it knows, and another one starts.
    fn die(&mut self, conn: ConnId, hands: &mut Hands<'_>) {
        if self.plan.name.is_none()
            && self.in_flight.is_empty()
            && let Some(handle) = self.handle
        {
            hands.send(
                conn,
                0,
                Up::CloseProducer {
                    producer: handle.key,
                    epoch: handle.epoch,
                },
            );
        }
        hands.drop_conn(conn);
        self.broken();
        self.forget();
    }

    fn forget(&mut self) {
        self.unacked.clear();
        self.resume = None;
        self.last_known = 0;
        self.last_made = 0;
    }

    fn make(&mut self, hands: &mut Hands<'_>) {
        let skip = match hands.rng.percent(self.plan.skip_percent) {
            true => hands.rng.between(1, 5),
            false => 0,
        };
        let sequence = self.last_made + 1 + skip;
        let length = hands.rng.below(self.plan.body_bytes + 1) as usize;
        let mut payload = format!("{} {} ", self.number, self.made).into_bytes();
        payload.resize(payload.len() + length, b'a' + (self.made % 26) as u8);
        let mut message = Message::new(payload);
        if hands.rng.percent(self.plan.delay_percent) {
            message.delay_ms = hands.rng.between(1, 8_000);
        }
        if hands.rng.percent(self.plan.ttl_percent) {
            message.ttl_ms = hands.rng.between(100, 10_000);
        }
        let mut bytes = BytesMut::new();
        message.encode(Sequence(sequence), &mut bytes);
        let told = Sent {
            sequence,
            digest: digest(&bytes),
            delay_ms: message.delay_ms,
            ttl_ms: message.ttl_ms,
        };
        self.unacked.push_back(Unacked {
            previous: self.last_made,
            told,
            bytes: bytes.freeze(),
        });
        self.last_made = sequence;
        self.made += 1;
    }

    fn send(&mut self, conn: ConnId, handle: Handle, hands: &mut Hands<'_>) {
        let count = (self.unacked.len() - self.sent).min(hands.rng.between(1, BATCH_MAX) as usize);
        if count == 0 {
            return;
        }
        let batch = self.unacked.range(self.sent..self.sent + count);
        let told: Vec<_> = batch.clone().map(|message| message.told).collect();
        let previous = Sequence(self.unacked[self.sent].previous);
        let mut messages = BytesMut::new();
        batch.for_each(|message| messages.extend_from_slice(&message.bytes));
        hands.note(Event::Send {
            producer: Identity {
                key: handle.key.0,
                epoch: handle.epoch.0,
            },
            topic: self.plan.topic,
            messages: told.clone(),
        });
        hands.send(
            conn,
            0,
            Up::Publish {
                topic: handle.topic,
                producer: handle.key,
                epoch: handle.epoch,
                previous,
                count: count as u32,
                messages: messages.freeze(),
                told,
            },
        );
        self.sent += count;
        self.in_flight.push_back(count);
    }

    fn refused(&mut self, conn: ConnId, code: ErrorCode, hands: &mut Hands<'_>) {
        self.in_flight.pop_front();
        self.is_resyncing = true;
        let is_passing = matches!(
            code.class(),
            ErrorClass::Retriable | ErrorClass::Backpressure
        );
        if is_passing || code == ErrorCode::SequenceGap {
            return;
        }
        // Fenced by its own next incarnation, or forgotten: nothing more comes on this stream.
        hands.drop_conn(conn);
        self.broken();
        if code == ErrorCode::ProducerStateExpired {
            self.forget();
        }
    }

    fn ended(&mut self, code: ErrorCode, hands: &mut Hands<'_>) {
        if let Some(conn) = self.conn {
            hands.drop_conn(conn);
        }
        self.broken();
        match code {
            ErrorCode::ProducerStateExpired => {
                let producer = self.resume.map_or(0, |resume| resume.producer.0);
                hands.note(Event::Forgotten {
                    producer,
                    last_known: self.last_known,
                });
                self.forget();
            }
            // An anonymous state was taken over by its own later connection that then broke.
            ErrorCode::ProducerFenced => self.forget(),
            _ => {}
        }
    }
}
