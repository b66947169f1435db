//! RabbitMQ with publisher confirms. "default": a durable classic queue; "strict": a quorum queue,
//! which syncs before it confirms. There is no delayed redelivery.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::process::Command;

use super::open_to_all;
use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer, answered};

pub struct RabbitMq {
    child: Child,
    connection: Connection,
}

impl Peer for RabbitMq {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        open_to_all(dir)?;
        let (port, names, between_nodes) = (free_port()?, free_port()?, free_port()?);
        let plugins = dir.join("plugins");
        std::fs::write(&plugins, "[].")?;
        let mut command = Command::new("/usr/lib/rabbitmq/bin/rabbitmq-server");
        command
            .env("HOME", dir)
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", port.to_string())
            // By default the port above and 20,000, which there may not be.
            .env("RABBITMQ_DIST_PORT", between_nodes.to_string())
            .env("RABBITMQ_NODENAME", format!("peer{port}@localhost"))
            .env("RABBITMQ_MNESIA_BASE", dir.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", dir.join("log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", &plugins)
            .env("RABBITMQ_PID_FILE", dir.join("pid"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            // A name server of its own, within the node, which ends with it.
            .env("ERL_EPMD_PORT", names.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1");
        let child = Child::start(command, dir, port).await?;
        let connection = connect(port).await?;
        let channel = connection.create_channel().await?;
        let mut arguments = FieldTable::default();
        if durability == Durability::Strict {
            let quorum = AMQPValue::LongString("quorum".into());
            arguments.insert("x-queue-type".into(), quorum);
        }
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        channel
            .queue_declare(QUEUE.into(), options, arguments)
            .await?;
        Ok(Self { child, connection })
    }

    fn pid(&self) -> Option<u32> {
        Some(self.child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let channel = self.connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(Publisher { channel })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        let channel = self.connection.create_channel().await?;
        let most = u16::try_from(prefetch).unwrap_or(u16::MAX);
        channel.basic_qos(most, BasicQosOptions::default()).await?;
        let consumer = channel
            .basic_consume(
                QUEUE.into(),
                "load".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok(Receiver { consumer })
    }

    async fn stop(self) -> Result<()> {
        // The server is ended either way.
        let _ = self.connection.close(200, "done".into()).await;
        self.child.stop().await
    }
}

/// It takes connections before it is ready for them.
async fn connect(port: u16) -> Result<Connection> {
    let address = format!("amqp://127.0.0.1:{port}/%2f");
    let mut tries = 0;
    loop {
        match Connection::connect(&address, ConnectionProperties::default()).await {
            Ok(connection) => return Ok(connection),
            Err(error) if tries == TRIES_MAX => return Err(error.into()),
            Err(_) => tries += 1,
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

pub struct Publisher {
    channel: Channel,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let persistent = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        let confirm = self
            .channel
            .basic_publish("".into(), QUEUE.into(), options, &payload, persistent)
            .await?;
        Ok(Box::pin(async move {
            let confirmed = confirm.await?;
            anyhow::ensure!(confirmed.is_ack(), "it was not confirmed");
            Ok(())
        }))
    }
}

pub struct Receiver {
    consumer: lapin::Consumer,
}

impl Consumer for Receiver {
    type Delivery = Delivery;

    async fn next(&mut self) -> Result<Delivery> {
        Ok(self.consumer.next().await.context("the consumer ended")??)
    }

    fn payload(delivery: &Delivery) -> &[u8] {
        &delivery.data
    }

    /// The protocol has no answer to it.
    async fn ack(&mut self, delivery: Delivery) -> Result<Answer> {
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(answered())
    }

    async fn retry(&mut self, _delivery: Delivery, _wait: Duration) -> Result<Option<Answer>> {
        Ok(None)
    }
}

const QUEUE: &str = "peers";
const TRIES_MAX: u32 = 100;
const TRY_EVERY: Duration = Duration::from_millis(200);
