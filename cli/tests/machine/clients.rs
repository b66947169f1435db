//! Producers and consumers that go on whatever happens to the broker, and write down all of it.
//!
//! What is done with a message is a function of its number, so that it is the same in every attempt.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use millpond_client::{
    Client, Delivery, Error, ErrorClass, Message, MessageView, Nack, Offset, Producer, Receipt,
    Reject, Sequence, StreamSubscription, Subscription,
};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use crate::history::{self, How, Identity, Placed, Seen, Sent, SubNo, TopicNo};
use crate::record::{Lasting, Record, settling};

/// Failures after which a message is dead, and the waits before: what the subscription is made with.
pub const ATTEMPTS_MAX: u32 = 3;
pub const WAITS_MS: [u64; 2] = [20, 40];
/// Messages of one producer that are sent and not answered.
const UNANSWERED_MAX: usize = 256;
/// Messages that are read between two commits.
pub const COMMIT_EVERY: u64 = 16;
/// Every so many messages a large one.
const LARGE_EVERY: u64 = 48;

/// A producer as the record knows it, and how it publishes.
#[derive(Clone, Debug)]
pub struct Publisher {
    pub key: u64,
    pub topic: TopicNo,
    pub lasting: Lasting,
    pub burst: u64,
    pub pause: Duration,
}

impl Publisher {
    pub fn id(&self) -> String {
        format!("producer-{}", self.key)
    }

    fn identity(&self) -> Identity {
        Identity {
            key: self.key,
            epoch: 0,
        }
    }

    pub fn sent(&self, sequence: u64) -> Sent {
        Sent {
            sequence,
            digest: self.key << 32 | sequence,
            delay_ms: 0,
            ttl_ms: 0,
        }
    }

    /// Publishes behind the last sequence that it knows to be accepted until it is told to stop, then
    /// waits for all answers.
    pub async fn run(
        self,
        producer: Producer,
        accepted: u64,
        record: Arc<Record>,
        stop: watch::Receiver<bool>,
    ) {
        let (hand, taken) = mpsc::channel(UNANSWERED_MAX);
        let answers = self.clone().hear(taken, record.clone());
        let sending = async {
            let hand = hand;
            let mut sequence = accepted;
            while !*stop.borrow() {
                for _ in 0..self.burst {
                    sequence += 1;
                    if self
                        .send(&producer, &record, sequence, &hand)
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                sleep(self.pause).await;
            }
        };
        tokio::join!(sending, answers);
    }

    /// Sends one, and hands its receipt on. An error: nothing can be sent any more.
    pub async fn send(
        &self,
        producer: &Producer,
        record: &Record,
        sequence: u64,
        hand: &mpsc::Sender<(Sent, Receipt)>,
    ) -> Result<(), ()> {
        let sent = self.sent(sequence);
        let message = Message::new(message_payload(sent.digest));
        // Before it is sent there is room for its receipt, so that what is sent is written down.
        let place = hand.reserve().await.map_err(|_| ())?;
        record.sent(self.identity(), self.topic, sent, self.lasting);
        let queued = producer
            .enqueue_with_sequence(message, Sequence(sequence))
            .await;
        match queued {
            Ok(receipt) => place.send((sent, receipt)),
            Err(error) if error.class() == ErrorClass::Backpressure => record.refused(sent.digest),
            Err(error) => {
                record.fault(format!("{} cannot send: {error}", self.id()));
                return Err(());
            }
        }
        Ok(())
    }

    async fn hear(self, mut taken: mpsc::Receiver<(Sent, Receipt)>, record: Arc<Record>) {
        while let Some((sent, receipt)) = taken.recv().await {
            self.answered(sent, receipt.await, &record);
        }
    }

    fn answered(
        &self,
        sent: Sent,
        answer: Result<millpond_client::SendReceipt, Error>,
        record: &Record,
    ) {
        match answer {
            Ok(receipt) => {
                let placed = Placed {
                    sequence: sent.sequence,
                    digest: sent.digest,
                    offset: receipt.offset.map(|offset| offset.0),
                    is_duplicate: receipt.duplicate,
                };
                record.accepted(self.identity(), self.topic, placed);
            }
            Err(error) if error.class() == ErrorClass::Backpressure => record.refused(sent.digest),
            // Whoever does not send again has no answer when its broker dies.
            Err(_) if self.lasting == Lasting::No => {}
            Err(error) => record.fault(format!("{}, {sent:?}: {error}", self.id())),
        }
    }
}

/// A message's bytes: its number, and what follows from that.
pub fn message_payload(digest: u64) -> Bytes {
    let mixed = mix(digest);
    let length = if digest.is_multiple_of(LARGE_EVERY) {
        20_000 + mixed % 40_000
    } else {
        16 + mixed % 400
    };
    let mut bytes = digest.to_le_bytes().to_vec();
    bytes.resize(length as usize, mixed as u8);
    Bytes::from(bytes)
}

/// The number of a message whose bytes are right.
pub fn digest_of(payload: &[u8]) -> Option<u64> {
    let digest = u64::from_le_bytes(*payload.first_chunk()?);
    (payload == message_payload(digest)).then_some(digest)
}

/// A message as it was found in a topic; a digest that nobody sent where its bytes are wrong.
pub fn seen(offset: Offset, message: &[u8]) -> Seen {
    let view = MessageView::split(message).ok();
    let view = view.and_then(|(view, _)| view.verify().is_ok().then_some(view));
    Seen {
        offset: offset.0,
        sequence: view.map_or(0, |view| view.sequence().0),
        digest: view
            .and_then(|view| digest_of(view.payload()))
            .unwrap_or(u64::MAX),
    }
}

/// What a consumer does with a message.
fn what(digest: u64, attempt: u32, delivery: u32) -> How {
    match mix(digest) % 100 {
        0..10 => How::Nack { delay_ms: None },
        10..18 if attempt == 1 => How::Nack { delay_ms: None },
        18..22 if attempt == 1 => How::Nack { delay_ms: Some(30) },
        22..26 => How::Reject,
        26..32 if delivery == 1 => How::Release { delay_ms: Some(10) },
        _ => How::Ack,
    }
}

/// Some messages take a while.
fn work(digest: u64, attempt: u32) -> Duration {
    match mix(digest ^ u64::from(attempt)) % 16 {
        0 => Duration::from_millis(30),
        1 => Duration::from_millis(5),
        _ => Duration::ZERO,
    }
}

/// A consumer of a queue subscription.
pub struct Consumer {
    pub sub: SubNo,
    pub session: u64,
    pub record: Arc<Record>,
}

impl Consumer {
    /// Takes and settles until it is told to stop.
    pub async fn run(self, mut subscription: Subscription, mut stop: watch::Receiver<bool>) {
        let mut working: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                next = subscription.next() => match next {
                    Some(Ok(delivery)) => {
                        let digest = self.took(&delivery);
                        working.push(Box::pin(self.settle(delivery, digest)));
                    }
                    Some(Err(error)) => {
                        return self.record.fault(format!("consumer {} ended: {error}", self.session));
                    }
                    None => return self.record.fault(format!("consumer {} was closed", self.session)),
                },
                Some(()) = working.next() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        while working.next().await.is_some() {}
        subscription.close().await;
    }

    fn took(&self, delivery: &Delivery) -> u64 {
        let digest = digest_of(delivery.payload());
        self.record.delivered(history::Delivery {
            sub: self.sub,
            session: self.session,
            offset: delivery.offset().0,
            delivery: delivery.delivery(),
            attempt: delivery.attempt(),
            digest,
            at: self.record.now_us(),
        });
        digest.unwrap_or(0)
    }

    async fn settle(&self, delivery: Delivery, digest: u64) {
        let (attempt, number) = (delivery.attempt(), delivery.delivery());
        let wait = work(digest, attempt);
        if wait > Duration::ZERO {
            sleep(wait).await;
        }
        let how = what(digest, attempt, number);
        let item = settling(delivery.offset().0, number, how);
        let breaks = self.record.counts().breaks;
        let id = self.record.settling(self.sub, self.session, item);
        let said = match how {
            How::Ack | How::Extend => delivery.ack().await,
            How::Nack { delay_ms } => {
                let nack = Nack {
                    delay: delay_ms.map(Duration::from_millis),
                    ..Nack::new("no")
                };
                delivery.nack(nack).await
            }
            How::Reject => delivery.reject(Reject::new("never")).await,
            How::Release { delay_ms } => {
                delivery.release(delay_ms.map(Duration::from_millis)).await
            }
        };
        match said {
            Ok(()) => self.record.settled(id, false),
            // On a new connection it is sent again: then the first time may have counted, and another
            // lease have followed.
            Err(Error::LeaseLost { state: Some(_) }) if self.record.counts().breaks != breaks => {}
            Err(Error::LeaseLost { state: Some(_) }) => self.record.settled(id, true),
            // Its session was lost, and whether it counted is not known.
            Err(Error::LeaseLost { state: None } | Error::Ambiguous) => {}
            Err(error) => self
                .record
                .fault(format!("{item:?} was not settled: {error}")),
        }
    }
}

/// A consumer of a stream subscription.
pub struct Reader {
    pub sub: SubNo,
    pub session: u64,
    pub record: Arc<Record>,
}

impl Reader {
    /// Reads and commits until it is told to stop.
    pub async fn run(self, mut stream: StreamSubscription, mut stop: watch::Receiver<bool>) {
        let mut next = None;
        let (mut committed, mut binding) = (0, 0);
        let mut committing = FuturesUnordered::new();
        let mut stops = u64::MAX;
        loop {
            tokio::select! {
                item = stream.next() => {
                    let message = match item {
                        Some(Ok(message)) => message,
                        other => {
                            let what = other.map(|item| item.map(|_| ()));
                            return self.record.fault(format!("reader {} ended: {what:?}", self.session));
                        }
                    };
                    let offset = message.offset().0;
                    let present = self.record.counts().stops;
                    if next != Some(offset) || stops != present {
                        self.jumped(offset, next, binding);
                        self.record.active(self.sub, self.session, offset);
                        stops = present;
                    }
                    next = Some(offset + 1);
                    binding = committed;
                    self.record.delivered(history::Delivery {
                        sub: self.sub,
                        session: self.session,
                        offset,
                        delivery: 0,
                        attempt: 1,
                        digest: digest_of(message.payload()),
                        at: self.record.now_us(),
                    });
                    if (offset + 1).is_multiple_of(COMMIT_EVERY) {
                        let id = self.record.committing(self.sub, offset + 1);
                        let receipt = stream.commit_later(Offset(offset + 1));
                        committing.push(async move { (id, offset + 1, receipt.await) });
                    }
                }
                Some((id, upto, said)) = committing.next() => match said {
                    Ok(()) => {
                        committed = committed.max(upto);
                        self.record.committed(id, false);
                    }
                    Err(Error::LeaseLost { .. } | Error::Ambiguous) => {}
                    Err(error) => self.record.fault(format!("commit of {upto}: {error}")),
                },
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        stream.close().await;
    }

    /// Reading may go on behind what was read, or back at what was committed, nowhere else. What binds is
    /// a commit that was answered before the last message before: whatever is answered later may have been
    /// sent again on a new connection, whose stream had been opened before it.
    fn jumped(&self, offset: u64, next: Option<u64>, binding: u64) {
        let upto = next.unwrap_or(0);
        if offset > upto || offset < binding {
            self.record.fault(format!(
                "I7: the stream goes on at {offset}; it was read up to {upto} and committed up to {binding}"
            ));
        }
    }
}

/// A number that looks like another one.
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// A client of the broker that trusts its CA.
pub async fn connect(url: &str, ca: Vec<u8>, name: &str) -> Result<Client, Error> {
    Client::builder()
        .ca_pem(ca)
        .name(name)
        .send_timeout(Duration::from_secs(300))
        .circuit_breaker(u32::MAX, Duration::from_millis(1))
        .connect(url)
        .await
}
