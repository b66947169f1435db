//! A table in Postgres, taken with SKIP LOCKED: what many people really use. "default": commits are not
//! synced (`synchronous_commit = off`); "strict": they are, as Postgres is shipped.
//!
//! A message is a row. Taking some sets them aside in one statement, acknowledging deletes one, handing
//! back gives it a time. Who finds nothing looks again after a short while.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::process::Command;
use tokio_postgres::{Client, NoTls, Statement};

use super::open_to_all;
use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer, asked};

pub struct Postgres {
    child: Child,
    port: u16,
}

impl Peer for Postgres {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        open_to_all(dir)?;
        let (port, data) = (free_port()?, dir.join("data"));
        let initdb = binary("initdb").context("initdb is not installed")?;
        let mut command = as_its_user(&initdb);
        command
            .arg("-D")
            .arg(&data)
            .args(["-A", "trust", "-U", "postgres"]);
        let made = command.output().await?;
        anyhow::ensure!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let commit = match durability {
            Durability::Default => "synchronous_commit=off",
            Durability::Strict => "synchronous_commit=on",
        };
        let mut command = as_its_user(&binary("postgres").context("postgres is not installed")?);
        command
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", commit])
            .args(["-c", "listen_addresses=127.0.0.1", "-c"])
            .arg(format!("unix_socket_directories={}", dir.display()));
        let child = Child::start(command, dir, port).await?;
        let server = Self { child, port };
        let client = server.connect().await?;
        client.batch_execute(SCHEMA).await?;
        Ok(server)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        let client = self.connect().await?;
        let insert = client
            .prepare("INSERT INTO peers (body) VALUES ($1)")
            .await?;
        Ok(Publisher { client, insert })
    }

    async fn consumer(&self, prefetch: u32) -> Result<Receiver> {
        let taker = self.connect().await?;
        let settler = self.connect().await?;
        Ok(Receiver {
            take: taker.prepare(TAKE).await?,
            delete: settler.prepare("DELETE FROM peers WHERE id = $1").await?,
            later: settler.prepare(LATER).await?,
            taker,
            settler,
            prefetch: i64::from(prefetch),
            taken: VecDeque::new(),
        })
    }

    async fn stop(self) -> Result<()> {
        self.child.stop().await
    }
}

impl Postgres {
    async fn connect(&self) -> Result<Arc<Client>> {
        let settings = format!("host=127.0.0.1 port={} user=postgres", self.port);
        let mut tries = 0;
        let (client, connection) = loop {
            match tokio_postgres::connect(&settings, NoTls).await {
                Ok(pair) => break pair,
                Err(error) if tries == TRIES_MAX => return Err(error.into()),
                Err(_) => tries += 1,
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        // Its end is the server's, which the next question finds out.
        tokio::spawn(async move { connection.await.ok() });
        Ok(Arc::new(client))
    }
}

/// A program of the newest installed version.
pub fn binary(name: &str) -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut found: Vec<PathBuf> = versions
        .filter_map(|version| Some(version.ok()?.path().join("bin").join(name)))
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found.pop()
}

/// It refuses to run as root.
fn as_its_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(program);
    command
}

pub struct Publisher {
    client: Arc<Client>,
    insert: Statement,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let (client, insert) = (Arc::clone(&self.client), self.insert.clone());
        Ok(asked(async move {
            client.execute(&insert, &[&payload.as_ref()]).await?;
            Ok(())
        }))
    }
}

pub struct Receiver {
    taker: Arc<Client>,
    settler: Arc<Client>,
    take: Statement,
    delete: Statement,
    later: Statement,
    prefetch: i64,
    taken: VecDeque<Row>,
}

pub struct Row {
    id: i64,
    body: Vec<u8>,
}

impl Consumer for Receiver {
    type Delivery = Row;

    async fn next(&mut self) -> Result<Row> {
        loop {
            if let Some(row) = self.taken.pop_front() {
                return Ok(row);
            }
            let rows = self.taker.query(&self.take, &[&self.prefetch]).await?;
            self.taken.extend(rows.iter().map(|row| Row {
                id: row.get(0),
                body: row.get(1),
            }));
            if rows.is_empty() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    fn payload(delivery: &Row) -> &[u8] {
        &delivery.body
    }

    async fn ack(&mut self, delivery: Row) -> Result<Answer> {
        let (client, delete) = (Arc::clone(&self.settler), self.delete.clone());
        Ok(asked(async move {
            client.execute(&delete, &[&delivery.id]).await?;
            Ok(())
        }))
    }

    async fn retry(&mut self, delivery: Row, wait: Duration) -> Result<Option<Answer>> {
        let (client, later) = (Arc::clone(&self.settler), self.later.clone());
        let seconds = wait.as_secs_f64();
        Ok(Some(asked(async move {
            client.execute(&later, &[&delivery.id, &seconds]).await?;
            Ok(())
        })))
    }
}

const SCHEMA: &str = "
    CREATE TABLE peers (
        id bigserial PRIMARY KEY,
        body bytea NOT NULL,
        due timestamptz NOT NULL DEFAULT '-infinity'
    );
    CREATE INDEX peers_due ON peers (due, id);";
/// Whoever takes a row has it for half a minute.
const TAKE: &str = "
    UPDATE peers SET due = clock_timestamp() + interval '30 s'
    WHERE id IN (
        SELECT id FROM peers WHERE due <= clock_timestamp()
        ORDER BY due, id LIMIT $1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id, body";
const LATER: &str = "
    UPDATE peers SET due = clock_timestamp() + $2 * interval '1 s' WHERE id = $1";
const TRIES_MAX: u32 = 500;
const LOOK_EVERY: Duration = Duration::from_millis(10);
