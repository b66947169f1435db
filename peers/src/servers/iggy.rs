//! Apache Iggy, by TCP: a topic of one partition. "default": an answer comes from memory, and the file is
//! written after 1,024 messages or 1 MiB, and not synced; "strict": written and synced before the answer.
//!
//! Its client has one request on a connection at a time, and its protocol has no other answer than to a
//! request. So whatever is to be sent meanwhile goes together, as its users send: each message's answer is
//! that of the request it went with.
//!
//! It is a log, not a queue. Acknowledging is storing an offset, which is all that lies before it too; here a
//! request for each message, in their order. The server writes it to a file that it never syncs, "strict" or
//! not. Who finds nothing asks again after a short while. There is no redelivery.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use iggy::prelude::{
    Client, CompressionAlgorithm, Consumer as ConsumerId, ConsumerOffsetClient,
    DEFAULT_ROOT_PASSWORD, DEFAULT_ROOT_USERNAME, Identifier, IggyError, IggyExpiry, IggyMessage,
    MaxTopicSize, MessageClient, Partitioning, PollingStrategy, StreamClient, TcpClient,
    TcpClientConfig, TcpClientReconnectionConfig, TopicClient, UserClient,
};
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};

use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer};

static SERVER: OnceLock<Server> = OnceLock::new();

/// Which server is measured.
pub enum Server {
    /// A program, started for each measurement.
    Program(PathBuf),
    /// One that runs already, by its address: in the durability that it has, and its process is not known.
    Address(String),
}

pub fn choose(server: Server) {
    SERVER.get_or_init(|| server);
}

pub struct Iggy {
    /// Where it was started here.
    child: Option<Child>,
    address: String,
    place: Place,
}

/// The names, parsed once.
#[derive(Clone)]
struct Place {
    stream: Identifier,
    topic: Identifier,
    consumer: ConsumerId,
}

impl Peer for Iggy {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        let (child, address) = match SERVER.get().context("chosen at the start")? {
            Server::Program(program) => {
                let (child, port) = start(program, durability, dir).await?;
                (Some(child), format!("127.0.0.1:{port}"))
            }
            Server::Address(address) => (None, address.clone()),
        };
        // What another run left behind in a server that went on is not this one's.
        let stream = format!("{NAME}-{}", std::process::id());
        let place = Place {
            stream: Identifier::named(&stream)?,
            topic: Identifier::named(NAME)?,
            consumer: ConsumerId::new(Identifier::named(NAME)?),
        };
        let server = Self {
            child,
            address,
            place,
        };
        let client = server.connect().await?;
        client.create_stream(&stream).await?;
        client
            .create_topic(
                &server.place.stream,
                NAME,
                PARTITIONS,
                CompressionAlgorithm::None,
                None,
                IggyExpiry::ServerDefault,
                MaxTopicSize::ServerDefault,
            )
            .await?;
        Ok(server)
    }

    fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(|child| child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let (client, place) = (self.connect().await?, self.place.clone());
        let (queue, asked) = mpsc::channel(UNANSWERED_MAX);
        tokio::spawn(send_all(client, place, asked));
        Ok(Publisher { queue })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        let (settler, place) = (self.connect().await?, self.place.clone());
        let (queue, asked) = mpsc::channel(UNANSWERED_MAX);
        tokio::spawn(store_all(settler, place, asked));
        Ok(Receiver {
            client: self.connect().await?,
            place: self.place.clone(),
            prefetch,
            offset: 0,
            polled: VecDeque::new(),
            queue,
        })
    }

    async fn stop(self) -> Result<()> {
        match self.child {
            Some(child) => child.stop().await,
            None => {
                let client = self.connect().await?;
                Ok(client.delete_stream(&self.place.stream).await?)
            }
        }
    }
}

impl Iggy {
    /// A connection that ends is a failure: a new one would go on as if nothing had happened.
    async fn connect(&self) -> Result<TcpClient> {
        let config = TcpClientConfig {
            server_address: self.address.clone(),
            reconnection: TcpClientReconnectionConfig {
                enabled: false,
                ..TcpClientReconnectionConfig::default()
            },
            // A large request is two writes, of which the second would wait for the first one's acknowledgement.
            nodelay: true,
            ..TcpClientConfig::default()
        };
        let client = TcpClient::create(Arc::new(config))?;
        Client::connect(&client).await?;
        let (user, password) = credentials();
        client.login_user(&user, &password).await?;
        Ok(client)
    }
}

/// Starts a server as it is commonly run, or such that everything is synced; its port.
async fn start(program: &Path, durability: Durability, dir: &Path) -> Result<(Child, u16)> {
    let port = free_port()?;
    let (user, password) = credentials();
    let mut command = Command::new(program);
    command
        .env("IGGY_SYSTEM_PATH", dir.join("data"))
        .env("IGGY_TCP_ADDRESS", format!("127.0.0.1:{port}"))
        .env(USER, user)
        .env(PASSWORD, password);
    // Their ports are not free for certain, and nobody speaks to them.
    for other in ["HTTP", "QUIC", "WEBSOCKET"] {
        command.env(format!("IGGY_{other}_ENABLED"), "false");
    }
    if durability == Durability::Strict {
        command
            .env("IGGY_SYSTEM_PARTITION_ENFORCE_FSYNC", "true")
            .env("IGGY_SYSTEM_PARTITION_MESSAGES_REQUIRED_TO_SAVE", "1");
    }
    let child = Child::start(command, dir, port).await?;
    Ok((child, port))
}

/// From where the server itself takes them when it starts for the first time.
fn credentials() -> (String, String) {
    let user = std::env::var(USER).unwrap_or_else(|_| DEFAULT_ROOT_USERNAME.to_owned());
    let password = std::env::var(PASSWORD).unwrap_or_else(|_| DEFAULT_ROOT_PASSWORD.to_owned());
    (user, password)
}

/// What is asked for, and where its answer goes.
type Asked<T> = (T, oneshot::Sender<Result<(), IggyError>>);

/// Asks for something; the answer is awaited later.
async fn ask<T: Send + Sync + 'static>(queue: &mpsc::Sender<Asked<T>>, what: T) -> Result<Answer> {
    let (sender, answer) = oneshot::channel();
    let sent = queue.send((what, sender)).await;
    sent.ok().context("the connection's task has ended")?;
    Ok(Box::pin(async move {
        Ok(answer.await.context("the connection's task has ended")??)
    }))
}

/// Sends what waits, all of it as one request, until nobody asks any more.
async fn send_all(client: TcpClient, place: Place, mut asked: mpsc::Receiver<Asked<IggyMessage>>) {
    let partition = Partitioning::partition_id(PARTITION);
    let mut batch = Vec::with_capacity(UNANSWERED_MAX);
    while asked.recv_many(&mut batch, UNANSWERED_MAX).await > 0 {
        let (mut messages, answers): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        let result = client
            .send_messages(&place.stream, &place.topic, &partition, &mut messages)
            .await;
        for answer in answers {
            // Who has stopped waiting for it does not miss it.
            let _ = answer.send(result.clone());
        }
    }
}

/// Stores offsets one after the other: two at once might end with the lower one.
async fn store_all(client: TcpClient, place: Place, mut asked: mpsc::Receiver<Asked<u64>>) {
    while let Some((offset, answer)) = asked.recv().await {
        let (stream, topic) = (&place.stream, &place.topic);
        let result = client
            .store_consumer_offset(&place.consumer, stream, topic, Some(PARTITION), offset)
            .await;
        let _ = answer.send(result);
    }
}

pub struct Publisher {
    queue: mpsc::Sender<Asked<IggyMessage>>,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let message = IggyMessage::builder().payload(payload).build()?;
        ask(&self.queue, message).await
    }
}

pub struct Receiver {
    client: TcpClient,
    place: Place,
    prefetch: u32,
    /// The first that was not polled yet. What was stored lags behind it by what is held.
    offset: u64,
    polled: VecDeque<IggyMessage>,
    queue: mpsc::Sender<Asked<u64>>,
}

impl Consumer for Receiver {
    type Delivery = IggyMessage;

    async fn next(&mut self) -> Result<IggyMessage> {
        loop {
            if let Some(message) = self.polled.pop_front() {
                return Ok(message);
            }
            let polled = self
                .client
                .poll_messages(
                    &self.place.stream,
                    &self.place.topic,
                    Some(PARTITION),
                    &self.place.consumer,
                    &PollingStrategy::offset(self.offset),
                    self.prefetch,
                    false,
                )
                .await?;
            let Some(last) = polled.messages.last() else {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            };
            self.offset = last.header.offset.checked_add(1).context("an offset")?;
            self.polled.extend(polled.messages);
        }
    }

    fn payload(delivery: &IggyMessage) -> &[u8] {
        &delivery.payload
    }

    async fn ack(&mut self, delivery: IggyMessage) -> Result<Answer> {
        ask(&self.queue, delivery.header.offset).await
    }

    async fn retry(&mut self, _delivery: IggyMessage, _wait: Duration) -> Result<Option<Answer>> {
        Ok(None)
    }
}

const USER: &str = "IGGY_ROOT_USERNAME";
const PASSWORD: &str = "IGGY_ROOT_PASSWORD";
const NAME: &str = "millpond-peers";
const PARTITIONS: u32 = 1;
/// They are counted from zero.
const PARTITION: u32 = 0;
/// As many as the load has without an answer, and so the most that go as one request: 256 KiB of messages.
const UNANSWERED_MAX: usize = 256;
/// As in its own examples.
const LOOK_EVERY: Duration = Duration::from_millis(1);
