//! Runs one command for one message: the payload on its standard input, what else is known in its
//! environment, its standard output passed through.
//!
//! Each command is the head of a process group, so that a Ctrl-C on the terminal does not reach it
//! and a command that outlives its grace goes with everything that it has started.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use millpond_protocol::limits::REASON_BYTES_MAX;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// What a command is told of its message.
#[derive(Clone, Debug)]
pub struct Job {
    pub topic: String,
    pub subscription: String,
    pub offset: u64,
    pub attempt: u32,
    pub key: Vec<u8>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub payload: Bytes,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With exit status 0.
    Well,
    /// With another, or by a signal; the reason is the last line of its standard error.
    Badly { code: u32, reason: String },
}

/// The process groups of all commands that run. [`exit`] needs them, because it drops nothing; they
/// are as many as the caller runs at once.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Pid>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends this process at once, and with it every command that it runs.
pub fn exit(code: u8) -> ! {
    // Held to the end, so that no other command begins.
    let running = running();
    for &group in running.iter() {
        kill(group);
    }
    std::process::exit(i32::from(code))
}

/// The process group of a command that runs; killed when dropped.
struct Group(Option<Pid>);

impl Group {
    /// Starts a command as the head of a group.
    fn spawn(command: &mut Command) -> io::Result<(Child, Self)> {
        let mut running = running();
        let child = command.process_group(0).spawn()?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let group = id.and_then(Pid::from_raw);
        running.extend(group);
        Ok((child, Self(group)))
    }

    /// The command has ended; what it has left running goes on.
    fn leave(mut self) {
        if let Some(group) = self.0.take() {
            running().retain(|&other| other != group);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            kill(group);
            running().retain(|&other| other != group);
        }
    }
}

fn kill(group: Pid) {
    // It may have ended by itself just now.
    let _ = kill_process_group(group, Signal::KILL);
}

/// Runs `command` by `sh -c` and waits for its end. Dropping the future kills the command.
pub async fn run(command: &str, job: Job) -> Ended {
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(command)
        .envs(environment(&job))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    match Group::spawn(&mut shell) {
        Ok((child, group)) => attend(child, group, job.payload).await,
        Err(error) => Ended::Badly {
            code: 0,
            reason: format!("cannot run sh: {error}"),
        },
    }
}

async fn attend(mut child: Child, group: Group, payload: Bytes) -> Ended {
    let (input, errors) = (child.stdin.take(), child.stderr.take());
    let mut last = LastLine::default();
    let status = {
        let feed = async {
            if let Some(mut input) = input {
                // A command need not read its input; the pipe is closed before all is written.
                let _ = input.write_all(&payload).await;
            }
        };
        let listen = async {
            if let Some(errors) = errors {
                pass_through(errors, &mut last).await;
            }
        };
        let mut talk = std::pin::pin!(async { tokio::join!(feed, listen) });
        let (status, talked) = tokio::select! {
            _ = &mut talk => (child.wait().await, true),
            status = child.wait() => (status, false),
        };
        if !talked {
            // What it left running in the background may hold the pipes open for ever.
            let _ = tokio::time::timeout(LAST_WORDS, talk).await;
        }
        status
    };
    group.leave();
    ended(status, last)
}

fn ended(status: io::Result<ExitStatus>, last: LastLine) -> Ended {
    let (code, how) = match status {
        Ok(status) if status.success() => return Ended::Well,
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => (code, format!("exit status {code}")),
            (None, Some(signal)) => (128 + signal, format!("killed by signal {signal}")),
            (None, None) => (0, "ended in an unknown way".to_owned()),
        },
        Err(error) => (0, format!("cannot tell how the command ended: {error}")),
    };
    Ended::Badly {
        code: u32::try_from(code).unwrap_or_default(),
        reason: last.text().unwrap_or(how),
    }
}

/// Copies a command's standard error to ours and keeps its last line.
async fn pass_through(mut errors: impl AsyncRead + Unpin, last: &mut LastLine) {
    let mut buffer = [0; 4_096];
    while let Ok(read) = errors.read(&mut buffer).await {
        if read == 0 {
            return;
        }
        last.push(&buffer[..read]);
        // That nobody reads our standard error is no reason to fail a message.
        let _ = io::stderr().write_all(&buffer[..read]);
    }
}

/// The last line with anything on it, at most [`REASON_BYTES_MAX`] bytes of it.
#[derive(Debug, Default)]
struct LastLine {
    line: Vec<u8>,
    ended: bool,
}

impl LastLine {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                self.ended = true;
                continue;
            }
            if self.ended {
                if byte.is_ascii_whitespace() {
                    continue;
                }
                self.line.clear();
                self.ended = false;
            }
            if self.line.len() < REASON_BYTES_MAX {
                self.line.push(byte);
            }
        }
    }

    fn text(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.line);
        let mut text = text.trim().to_owned();
        while text.len() > REASON_BYTES_MAX {
            text.pop();
        }
        (!text.is_empty()).then_some(text)
    }
}

fn environment(job: &Job) -> Vec<(String, OsString)> {
    let mut variables = Vec::with_capacity(job.headers.len() + 5);
    for (name, value) in &job.headers {
        let name = format!("MILLPOND_HEADER_{}", variable(name));
        variables.push((name, os_string(value)));
    }
    variables.extend([
        ("MILLPOND_TOPIC".to_owned(), job.topic.clone().into()),
        (
            "MILLPOND_SUBSCRIPTION".to_owned(),
            job.subscription.clone().into(),
        ),
        ("MILLPOND_OFFSET".to_owned(), job.offset.to_string().into()),
        (
            "MILLPOND_ATTEMPT".to_owned(),
            job.attempt.to_string().into(),
        ),
        ("MILLPOND_KEY".to_owned(), os_string(&job.key)),
    ]);
    variables
}

/// A header's name as shells can read it.
fn variable(name: &str) -> String {
    let letter = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    };
    name.chars().map(letter).collect()
}

/// Bytes as an environment can hold them: without zeros.
fn os_string(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.iter().copied().filter(|&byte| byte != 0).collect())
}

/// How long the pipes of a command that has ended are still read.
const LAST_WORDS: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    fn job(payload: impl Into<Bytes>) -> Job {
        Job {
            topic: "orders".into(),
            subscription: "work".into(),
            offset: 7,
            attempt: 2,
            key: b"k\0".to_vec(),
            headers: vec![("content-type".into(), b"text".to_vec())],
            payload: payload.into(),
        }
    }

    #[tokio::test]
    async fn the_message_reaches_the_command() {
        let check = r#"test "$(cat)" = hello &&
            test "$MILLPOND_TOPIC/$MILLPOND_SUBSCRIPTION" = orders/work &&
            test "$MILLPOND_OFFSET.$MILLPOND_ATTEMPT.$MILLPOND_KEY" = 7.2.k &&
            test "$MILLPOND_HEADER_CONTENT_TYPE" = text"#;
        assert_eq!(run(check, job("hello")).await, Ended::Well);
    }

    #[tokio::test]
    async fn the_last_line_of_standard_error_is_the_reason() {
        let ended = run("printf 'one\ntwo\n\n' >&2; exit 3", job("")).await;
        let reason = "two".to_owned();
        assert_eq!(ended, Ended::Badly { code: 3, reason });
    }

    #[tokio::test]
    async fn a_command_that_says_nothing_has_its_status_as_the_reason() {
        let ended = run("exit 3", job("")).await;
        let reason = "exit status 3".to_owned();
        assert_eq!(ended, Ended::Badly { code: 3, reason });
        let ended = run("kill -9 $$", job("")).await;
        let reason = "killed by signal 9".to_owned();
        assert_eq!(ended, Ended::Badly { code: 137, reason });
    }

    #[tokio::test]
    async fn a_command_need_not_read_its_input() {
        assert_eq!(run("true", job(vec![b'x'; 1 << 20])).await, Ended::Well);
    }

    #[tokio::test]
    async fn what_a_command_leaves_behind_does_not_hold_it_up() {
        let running = run("sleep 30 & echo bad >&2; exit 1", job(""));
        let ended = tokio::time::timeout(Duration::from_secs(10), running).await;
        let reason = "bad".to_owned();
        assert_eq!(ended, Ok(Ended::Badly { code: 1, reason }));
    }

    #[test]
    fn a_long_last_line_is_cut_at_a_character() {
        let mut last = LastLine::default();
        last.push("ä".repeat(REASON_BYTES_MAX).as_bytes());
        let text = last.text().unwrap();
        assert!(text.len() <= REASON_BYTES_MAX && text.starts_with("ää"));
    }
}
