//! beanstalkd with a binlog. "default": synced every 50 ms; "strict": for each write. Its protocol is a
//! few lines of text, spoken here: its crates wait for each answer before they ask again.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};

use crate::child::{Child, free_port};
use crate::peer::{Answer, Consumer, Durability, Peer, Producer};

pub struct Beanstalkd {
    child: Child,
    port: u16,
}

impl Peer for Beanstalkd {
    type Producer = Publisher;
    type Consumer = Receiver;

    async fn start(durability: Durability, dir: &Path) -> Result<Self> {
        let port = free_port()?;
        let sync_ms = match durability {
            Durability::Default => "50",
            Durability::Strict => "0",
        };
        let mut command = Command::new("beanstalkd");
        command
            .args([
                "-l",
                "127.0.0.1",
                "-p",
                &port.to_string(),
                "-f",
                sync_ms,
                "-b",
            ])
            .arg(dir);
        let child = Child::start(command, dir, port).await?;
        Ok(Self { child, port })
    }

    fn pid(&self) -> Option<u32> {
        Some(self.child.pid)
    }

    async fn producer(&self) -> Result<Publisher> {
        Ok(Publisher {
            line: Line::connect(self.port).await?,
        })
    }

    async fn consumer(&self, _prefetch: u32) -> Result<Receiver> {
        Ok(Receiver {
            reserving: Line::connect(self.port).await?,
        })
    }

    async fn stop(self) -> Result<()> {
        self.child.stop().await
    }
}

/// A connection whose answers come in the order of the questions.
struct Line {
    write: OwnedWriteHalf,
    questions: mpsc::UnboundedSender<oneshot::Sender<Result<Reply>>>,
}

struct Reply {
    words: Vec<String>,
    body: Vec<u8>,
}

impl Line {
    async fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        let (questions, mut waiting) = mpsc::unbounded_channel::<oneshot::Sender<_>>();
        tokio::spawn(async move {
            let mut read = BufReader::new(read);
            while let Some(tell) = waiting.recv().await {
                let reply = reply(&mut read).await;
                // Whoever asked may have gone.
                let _ = tell.send(reply);
            }
        });
        Ok(Self { write, questions })
    }

    async fn ask(&mut self, question: &[u8]) -> Result<oneshot::Receiver<Result<Reply>>> {
        let (tell, told) = oneshot::channel();
        self.questions
            .send(tell)
            .ok()
            .context("the connection has ended")?;
        self.write.write_all(question).await?;
        Ok(told)
    }

    async fn ask_for(&mut self, question: &[u8], word: &'static str) -> Result<Answer> {
        let told = self.ask(question).await?;
        Ok(Box::pin(async move {
            let reply = told.await??;
            ensure!(
                reply.words.first().is_some_and(|w| w == word),
                "it said {:?}",
                reply.words
            );
            Ok(())
        }))
    }
}

async fn reply(read: &mut BufReader<OwnedReadHalf>) -> Result<Reply> {
    let mut line = String::new();
    ensure!(read.read_line(&mut line).await? > 0, "the server has gone");
    let words: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
    let mut body = Vec::new();
    if words.first().is_some_and(|word| word == "RESERVED") {
        let bytes: usize = words.get(2).context("a size")?.parse()?;
        body.resize(bytes + 2, 0);
        read.read_exact(&mut body).await?;
        body.truncate(bytes);
    }
    Ok(Reply { words, body })
}

pub struct Publisher {
    line: Line,
}

impl Producer for Publisher {
    async fn send(&mut self, payload: Bytes) -> Result<Answer> {
        let mut question = format!("put 0 0 {RUN_SECONDS} {}\r\n", payload.len()).into_bytes();
        question.extend_from_slice(&payload);
        question.extend_from_slice(b"\r\n");
        self.line.ask_for(&question, "INSERTED").await
    }
}

/// A job belongs to the connection that reserved it, so that one connection does both.
pub struct Receiver {
    reserving: Line,
}

pub struct Job {
    id: String,
    body: Vec<u8>,
}

impl Consumer for Receiver {
    type Delivery = Job;

    async fn next(&mut self) -> Result<Job> {
        let reply = self.reserving.ask(b"reserve\r\n").await?.await??;
        match reply.words.as_slice() {
            [word, id, ..] if word == "RESERVED" => Ok(Job {
                id: id.clone(),
                body: reply.body,
            }),
            other => bail!("it said {other:?}"),
        }
    }

    fn payload(delivery: &Job) -> &[u8] {
        &delivery.body
    }

    async fn ack(&mut self, delivery: Job) -> Result<Answer> {
        let question = format!("delete {}\r\n", delivery.id);
        self.reserving.ask_for(question.as_bytes(), "DELETED").await
    }

    /// It knows whole seconds only.
    async fn retry(&mut self, delivery: Job, wait: Duration) -> Result<Option<Answer>> {
        let question = format!("release {} 0 {}\r\n", delivery.id, wait.as_secs());
        self.reserving
            .ask_for(question.as_bytes(), "RELEASED")
            .await
            .map(Some)
    }
}

const RUN_SECONDS: u32 = 300;
