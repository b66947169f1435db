//! NATS JetStream with a file store. "default": synced every two minutes; "strict": always.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::{Config, StorageType};
use async_nats::jetstream::{self, AckKind, Context, Message};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::process::Command;

use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer, asked};

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Which nats-server is started.
pub fn choose(program: &Path) {
    PROGRAM.get_or_init(|| program.to_owned());
}

pub struct Nats {
    child: Child,
    port: u16,
}

impl Peer for Nats {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        let port = free_port()?;
        let sync = match durability {
            Durability::Default => "2m",
            Durability::Strict => "always",
        };
        let config = dir.join("nats.conf");
        let store = dir.join("store");
        let text = format!(
            "listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: \"{}\", sync_interval: {sync} }}\n",
            store.display()
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(PROGRAM.get().context("chosen at the start")?);
        command.arg("-c").arg(&config);
        let child = Child::start(command, dir, port).await?;
        let server = Self { child, port };
        let config = Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            storage: StorageType::File,
            ..Config::default()
        };
        server.context().await?.create_stream(config).await?;
        Ok(server)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let context = self.context().await?;
        Ok(Publisher { context })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        let stream = self.context().await?.get_stream(STREAM).await?;
        let consumer: PullConsumer = stream
            .create_consumer(pull::Config {
                durable_name: Some("load".to_owned()),
                ack_policy: AckPolicy::Explicit,
                max_ack_pending: ACK_PENDING_MAX,
                ..pull::Config::default()
            })
            .await?;
        let messages = consumer
            .stream()
            .max_messages_per_batch(prefetch as usize)
            .messages()
            .await?;
        Ok(Receiver { messages })
    }

    async fn stop(self) -> Result<()> {
        self.child.stop().await
    }
}

impl Nats {
    async fn context(&self) -> Result<Context> {
        let client = async_nats::connect(format!("127.0.0.1:{}", self.port)).await?;
        Ok(jetstream::new(client))
    }
}

pub struct Publisher {
    context: Context,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let answer = self.context.publish(SUBJECT, payload).await?;
        Ok(Box::pin(async move {
            answer.await?;
            Ok(())
        }))
    }
}

pub struct Receiver {
    messages: pull::Stream,
}

impl Consumer for Receiver {
    type Delivery = Message;

    async fn next(&mut self) -> Result<Message> {
        Ok(self.messages.next().await.context("the consumer ended")??)
    }

    fn payload(delivery: &Message) -> &[u8] {
        &delivery.payload
    }

    /// Sent and forgotten, as its users do it: an answer to each is a request of its own.
    async fn ack(&mut self, delivery: Message) -> Result<Answer> {
        Ok(asked(async move {
            delivery.ack().await.map_err(anyhow::Error::msg)
        }))
    }

    async fn retry(&mut self, delivery: Message, wait: Duration) -> Result<Option<Answer>> {
        Ok(Some(asked(async move {
            let nak = delivery.ack_with(AckKind::Nak(Some(wait))).await;
            nak.map_err(anyhow::Error::msg)
        })))
    }
}

const STREAM: &str = "peers";
const SUBJECT: &str = "peers.load";
const ACK_PENDING_MAX: i64 = 100_000;
