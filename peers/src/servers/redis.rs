//! Redis Streams: XADD, XREADGROUP, XACK. "default": its log synced once a second; "strict": always.
//! There is no delayed redelivery.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamId, StreamReadReply};
use tokio::process::Command;

use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer, asked};

pub struct Redis {
    child: Child,
    client: redis::Client,
}

impl Peer for Redis {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        let port = free_port()?;
        let sync = match durability {
            Durability::Default => "everysec",
            Durability::Strict => "always",
        };
        let mut command = Command::new("redis-server");
        command
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .args(["--port", &port.to_string(), "--appendfsync", sync])
            .arg("--dir")
            .arg(dir);
        let child = Child::start(command, dir, port).await?;
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}"))?;
        let mut connection = connect(&client).await?;
        let made: String = redis::cmd("XGROUP")
            .arg(&["CREATE", STREAM, GROUP, "0", "MKSTREAM"])
            .query_async(&mut connection)
            .await?;
        anyhow::ensure!(made == "OK", "no group: {made}");
        Ok(Self { child, client })
    }

    fn pid(&self) -> Option<u32> {
        Some(self.child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let connection = connect(&self.client).await?;
        Ok(Publisher { connection })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        Ok(Receiver {
            reader: connect(&self.client).await?,
            settler: connect(&self.client).await?,
            prefetch,
            read: VecDeque::new(),
        })
    }

    async fn stop(self) -> Result<()> {
        self.child.stop().await
    }
}

/// Without a limit of its own on an answer: a measurement has one, and a slow sync is no failure.
async fn connect(client: &redis::Client) -> Result<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let connection = client.get_multiplexed_async_connection_with_config(&config);
    Ok(connection.await?)
}

pub struct Publisher {
    connection: MultiplexedConnection,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let mut connection = self.connection.clone();
        Ok(asked(async move {
            let mut command = redis::cmd("XADD");
            command.arg(&[STREAM, "*", "p"]).arg(payload.as_ref());
            let _id: String = command.query_async(&mut connection).await?;
            Ok(())
        }))
    }
}

pub struct Receiver {
    reader: MultiplexedConnection,
    settler: MultiplexedConnection,
    prefetch: u32,
    read: VecDeque<StreamId>,
}

pub struct Delivery {
    id: String,
    payload: Vec<u8>,
}

impl Consumer for Receiver {
    type Delivery = Delivery;

    async fn next(&mut self) -> Result<Delivery> {
        while self.read.is_empty() {
            let mut command = redis::cmd("XREADGROUP");
            command
                .arg(&["GROUP", GROUP, "load", "COUNT"])
                .arg(self.prefetch)
                .arg(&["BLOCK", "100", "STREAMS", STREAM, ">"]);
            let reply: Option<StreamReadReply> = command.query_async(&mut self.reader).await?;
            let keys = reply.map(|reply| reply.keys).unwrap_or_default();
            self.read.extend(keys.into_iter().flat_map(|key| key.ids));
        }
        let message = self.read.pop_front().context("read above")?;
        Ok(Delivery {
            payload: message.get("p").context("a message without its field")?,
            id: message.id,
        })
    }

    fn payload(delivery: &Delivery) -> &[u8] {
        &delivery.payload
    }

    async fn ack(&mut self, delivery: Delivery) -> Result<Answer> {
        let mut connection = self.settler.clone();
        Ok(asked(async move {
            let mut command = redis::cmd("XACK");
            command.arg(&[STREAM, GROUP, &delivery.id]);
            let _acked: u32 = command.query_async(&mut connection).await?;
            Ok(())
        }))
    }

    async fn retry(&mut self, _delivery: Delivery, _wait: Duration) -> Result<Option<Answer>> {
        Ok(None)
    }
}

const STREAM: &str = "peers";
const GROUP: &str = "load";
