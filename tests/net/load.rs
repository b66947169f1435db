//! Producers and consumers that go on whatever the network does, and write down what they see.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millpond_client::{
    Backoff, Client, Delivery, Error, Jitter, Message, Nack, StartAt, SubscriptionConfig,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::oracle::{Event, Id};
use crate::rng::Rng;

pub const TOPIC: &str = "orders";
pub const QUEUE: &str = "billing";
pub const STREAM: &str = "audit";
/// A subscription that nobody reads, so that nothing is cleaned away before it is judged.
pub const KEEP: &str = "keep";
/// The wait after a nack.
pub const BACKOFF: Duration = Duration::from_millis(300);
/// The producer that gives messages up after 2 s: refused before they are sent, unknown afterwards.
const IMPATIENT: u32 = 3;
/// Messages between two commits of the stream's consumer.
const COMMIT_EVERY: u64 = 20;
/// How long a consumer waits for a message before it looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(100);

/// What everybody saw. Clones are the same.
#[derive(Clone)]
pub struct Seen(Arc<Mutex<Vec<Event>>>);

impl Seen {
    pub fn new() -> Seen {
        Seen(Arc::new(Mutex::new(Vec::new())))
    }

    pub fn write(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }

    pub fn all(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }

    /// One above the highest offset that the stream's consumer has read.
    pub fn read_until(&self) -> u64 {
        let seen = self.0.lock().unwrap();
        let read = seen.iter().filter_map(|event| match event {
            Event::Read { offset, .. } => Some(offset + 1),
            _ => None,
        });
        read.max().unwrap_or(0)
    }

    pub fn count(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|event| wanted(event))
            .count()
    }
}

/// True once it is time to stop.
pub type Stop = watch::Receiver<bool>;

pub fn retries() -> SubscriptionConfig {
    SubscriptionConfig {
        backoff: Backoff::Fixed {
            wait_ms: BACKOFF.as_millis() as u64,
        },
        jitter: Jitter::None,
        // Lost sessions may cost attempts; nothing is to die of the network.
        max_attempts: 1_000,
        max_deliveries: 10_000,
        ..SubscriptionConfig::default()
    }
}

fn text(id: Id, filler: usize) -> Vec<u8> {
    format!("{} {} {:.<filler$}", id.producer, id.sequence, "").into_bytes()
}

/// Reads what [`text`] has written.
pub fn id_of(payload: &[u8]) -> Id {
    let text = std::str::from_utf8(payload).expect("payloads arrive as they were sent");
    let mut parts = text.split(' ');
    let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
    let (producer, sequence) = (number(), number());
    Id {
        producer: producer.expect("a producer") as u32,
        sequence: sequence.expect("a sequence"),
    }
}

/// Publishes until it is told to stop, then waits for every outcome.
pub async fn produce(client: Client, number: u32, every: Duration, seen: Seen, mut stop: Stop) {
    let mut producer = client.producer(TOPIC).id(format!("producer-{number}"));
    if number == IMPATIENT {
        producer = producer.send_timeout(Duration::from_secs(2));
    }
    let producer = producer.open().await.expect("the network is good at first");
    let mut rng = Rng::new(u64::from(number));
    let mut outcomes = JoinSet::new();
    for sequence in 1.. {
        if *stop.borrow() {
            break;
        }
        let id = Id {
            producer: number,
            sequence,
        };
        // Mostly small, now and then more than one packet.
        let filler = if rng.permille(50) { 6_000 } else { 40 };
        let sent = tokio::select! {
            sent = producer.enqueue(Message::new(text(id, filler))) => sent,
            // Not begun, or begun and dropped: it may be on its way.
            Ok(()) = stop.changed() => break,
        };
        let seen = seen.clone();
        outcomes.spawn(async move {
            let outcome = match sent {
                Ok(receipt) => {
                    assert_eq!(receipt.sequence().0, id.sequence);
                    receipt.await
                }
                Err(error) => Err(error),
            };
            seen.write(match outcome {
                Ok(receipt) => Event::Published {
                    id,
                    offset: receipt.offset.map(|offset| offset.0),
                },
                Err(Error::Ambiguous) => Event::Published { id, offset: None },
                Err(_) => Event::Refused { id },
            });
        });
        sleep(every).await;
    }
    while let Some(outcome) = outcomes.join_next().await {
        outcome.expect("no task panics");
    }
    producer.close().await;
}

/// Takes and settles until it is told to stop; opens its session again if it ends.
pub async fn consume(client: Client, number: u64, seen: Seen, stop: Stop) {
    let mut rng = Rng::new(number ^ 0xC0);
    let mut settling = JoinSet::new();
    while !*stop.borrow() {
        let subscribe = client.subscribe(TOPIC, QUEUE).prefetch(200);
        let Ok(mut consumer) = subscribe.open().await else {
            sleep(LOOK).await;
            continue;
        };
        while !*stop.borrow() {
            match timeout(LOOK, consumer.next()).await {
                Ok(Some(Ok(delivery))) => {
                    let work = rng.below(20);
                    settling.spawn(settle(delivery, work, seen.clone()));
                }
                Ok(Some(Err(_)) | None) => break,
                Err(_) => {}
            }
            while settling.try_join_next().is_some_and(|settled| {
                settled.expect("no task panics");
                true
            }) {}
        }
        if *stop.borrow() {
            consumer.close().await;
        }
    }
    settling.shutdown().await;
}

async fn settle(delivery: Delivery, work_ms: u64, seen: Seen) {
    let (offset, number) = (delivery.offset().0, delivery.delivery());
    seen.write(Event::Delivered {
        id: id_of(delivery.payload()),
        offset,
        delivery: number,
        at: Instant::now(),
    });
    sleep(Duration::from_millis(work_ms)).await;
    let at = Instant::now();
    if delivery.attempt() == 1 && offset % 8 == 3 {
        if delivery.nack(Nack::new("again")).await.is_ok() {
            seen.write(Event::Nacked {
                offset,
                delivery: number,
                at,
            });
        }
    } else if delivery.ack().await.is_ok() {
        seen.write(Event::Acked {
            offset,
            delivery: number,
        });
    }
}

/// Reads the stream and commits now and then, until it is told to stop.
pub async fn follow(client: Client, seen: Seen, stop: Stop) {
    while !*stop.borrow() {
        let subscribe = client.subscribe(TOPIC, STREAM).prefetch(200);
        let Ok(mut stream) = subscribe.open_stream().await else {
            sleep(LOOK).await;
            continue;
        };
        while !*stop.borrow() {
            match timeout(LOOK, stream.next()).await {
                Ok(Some(Ok(message))) => {
                    let offset = message.offset();
                    seen.write(Event::Read {
                        id: id_of(message.payload()),
                        offset: offset.0,
                    });
                    if offset.0 % COMMIT_EVERY == 0 {
                        // Whether it got there shows in where a later stream begins.
                        drop(stream.commit_later(offset.next()));
                    }
                }
                Ok(Some(Err(_)) | None) => break,
                Err(_) => {}
            }
        }
        if *stop.borrow() {
            stream.close().await;
        }
    }
}

/// The topic and its subscriptions, made by a client whose network is good.
pub async fn prepare(client: &Client) {
    client
        .create_topic(TOPIC, Default::default())
        .await
        .expect("a new topic");
    let stream = SubscriptionConfig {
        mode: millpond_client::SubscriptionMode::Stream,
        ..SubscriptionConfig::default()
    };
    for (name, config) in [
        (QUEUE, retries()),
        (STREAM, stream),
        (KEEP, SubscriptionConfig::default()),
    ] {
        client
            .create_subscription(TOPIC, name, config, StartAt::Earliest)
            .await
            .expect("a new subscription");
    }
}
