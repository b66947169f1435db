//! Millpond, as `millpond serve` runs it, in a process of its own. It has no other durability.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use millpond_broker::{Broker, Config};
use millpond_client::{
    Client, Delivery, Message, Nack, StartAt, Subscription, SubscriptionConfig, TopicConfig,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, stdin};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::peer::{Answer, Consumer, Durability, Peer, Producer};

pub struct Millpond {
    process: Child,
    pid: u32,
    address: SocketAddr,
    ca: PathBuf,
}

impl Peer for Millpond {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(_durability: Durability, dir: &Path) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("--serve")
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut address = String::new();
        BufReader::new(output).read_line(&mut address).await?;
        let server = Self {
            pid: process.id().context("it has ended at once")?,
            process,
            address: address.trim().parse().context("it did not start")?,
            ca: dir.join("peer-ca.pem"),
        };
        let client = server.connect().await?;
        client.create_topic(TOPIC, TopicConfig::default()).await?;
        client
            .create_subscription(
                TOPIC,
                SUBSCRIPTION,
                SubscriptionConfig::default(),
                StartAt::Earliest,
            )
            .await?;
        client.close().await;
        Ok(server)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let client = self.connect().await?;
        let producer = client.producer(TOPIC).open().await?;
        Ok(Publisher {
            producer,
            _client: client,
        })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        let client = self.connect().await?;
        let deliveries = client
            .subscribe(TOPIC, SUBSCRIPTION)
            .prefetch(prefetch)
            .open()
            .await?;
        Ok(Receiver {
            deliveries,
            _client: client,
        })
    }

    async fn stop(mut self) -> Result<()> {
        drop(self.process.stdin.take());
        timeout(STOP_MAX, self.process.wait()).await??;
        Ok(())
    }
}

impl Millpond {
    async fn connect(&self) -> Result<Client> {
        let builder = Client::builder().ca_file(&self.ca);
        Ok(builder.connect(&self.address.to_string()).await?)
    }
}

pub struct Publisher {
    producer: millpond_client::Producer,
    _client: Client,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let receipt = self.producer.enqueue(Message::new(payload)).await?;
        Ok(Box::pin(async move {
            receipt.await?;
            Ok(())
        }))
    }
}

pub struct Receiver {
    deliveries: Subscription,
    _client: Client,
}

impl Consumer for Receiver {
    type Delivery = Delivery;

    async fn next(&mut self) -> Result<Delivery> {
        Ok(self
            .deliveries
            .next()
            .await
            .context("the subscription ended")??)
    }

    fn payload(delivery: &Delivery) -> &[u8] {
        delivery.payload()
    }

    async fn ack(&mut self, delivery: Delivery) -> Result<Answer> {
        let receipt = delivery.ack_later();
        Ok(Box::pin(async move { Ok(receipt.await?) }))
    }

    async fn retry(&mut self, delivery: Delivery, wait: Duration) -> Result<Option<Answer>> {
        let receipt = delivery.nack_later(Nack::new("again").delay(wait));
        Ok(Some(Box::pin(async move { Ok(receipt.await?) })))
    }
}

/// What the child process does: serve until its standard input ends.
pub async fn serve(dir: &Path) -> Result<()> {
    let config = Config {
        data: dir.join("data"),
        listen: ([127, 0, 0, 1], 0).into(),
        http: None,
        ..Config::default()
    };
    let broker = Broker::start(config).await?;
    std::fs::write(dir.join("peer-ca.pem"), broker.ca_pem()?)?;
    #[expect(clippy::print_stdout, reason = "the parent reads the address there")]
    {
        println!("{}", broker.listen_addr());
    }
    let mut none = [0; 1];
    while matches!(stdin().read(&mut none).await, Ok(1..)) {}
    timeout(STOP_MAX, broker.shutdown()).await??;
    Ok(())
}

const TOPIC: &str = "peers";
const SUBSCRIPTION: &str = "load";
const STOP_MAX: Duration = Duration::from_secs(20);
