//! Why a command did not do what it was asked, and the exit code that tells a script so.

use std::io;
use std::path::PathBuf;

use millpond_client::{Error, ErrorClass};
use millpond_protocol::message::MessageError;
use millpond_protocol::policy::PolicyError;
use serde_json::{Value, json};

use crate::output::{self, Format};
use crate::signal::Stop;

/// Every way in which a command fails.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Client(#[from] Error),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(
        "no CA certificate at {}: start the broker with `millpond serve`, or name its data folder with --data DIR or its CA with --ca FILE", .0.display()
    )]
    NoCa(PathBuf),
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),
    #[error("{what}: {error}")]
    System {
        what: &'static str,
        error: io::Error,
    },
    #[error("line {line} is longer than {limit} bytes, the most that a message can have")]
    LineTooLong { line: u64, limit: usize },
    #[error("{sent} messages were sent, not all of them: {cause}")]
    Partial { sent: u64, cause: Box<Self> },
    #[error(
        "there is no dead letter at offset {0}: `millpond dead-letters list` shows those there are"
    )]
    NoSuchLetter(u64),
    #[error(
        "a stream subscription is read in order by one command: it has no nack and no concurrency"
    )]
    StreamMode,
    #[error("the command failed at offset {offset}, which is not committed: {reason}")]
    Command { offset: u64, reason: String },
    #[error(transparent)]
    Start(#[from] millpond_broker::StartError),
    #[error(transparent)]
    Config(#[from] millpond_broker::ConfigError),
    #[error(transparent)]
    Broker(#[from] millpond_broker::BrokerError),
    #[error("{count} things are damaged; see above")]
    Damage { count: usize },
    #[error(transparent)]
    Folder(#[from] millpond_wal::storage::FolderError),
    #[error(transparent)]
    Log(#[from] millpond_wal::OpenError),
    #[error("interrupted")]
    Stopped(Stop),
}

impl Failure {
    /// What the process exits with; see [`crate::args`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) if error.class() == ErrorClass::Corrupt => DAMAGE,
            Self::Client(_) | Self::NoCa(_) if self.is_retriable() => RETRY,
            Self::Policy(_) | Self::StreamMode | Self::Client(Error::InvalidUrl { .. }) => USAGE,
            Self::Stdout(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Partial { .. } => PARTIAL,
            Self::Damage { .. } => DAMAGE,
            Self::Log(error) if error.is_damage() => DAMAGE,
            Self::Stopped(stop) => stop.exit_code(),
            _ => FAILED,
        }
    }

    /// Whether the same command may succeed later.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        match self {
            Self::Client(error) => error.is_retriable() || error.class() == ErrorClass::Ambiguous,
            Self::NoCa(_) => true,
            Self::Partial { cause, .. } => cause.is_retriable(),
            _ => false,
        }
    }

    /// Tells the user on standard error, unless it was the user who left.
    pub fn report(&self, format: Format) {
        let left = matches!(self, Self::Stdout(error) if error.kind() == io::ErrorKind::BrokenPipe);
        if left || (matches!(self, Self::Stopped(_)) && format == Format::Human) {
            return;
        }
        match format {
            Format::Json => output::note(self.json().to_string()),
            Format::Human => output::note(format!("error: {self}")),
        }
    }

    fn json(&self) -> Value {
        let code = match self.root() {
            Self::Client(error) => error.code().map(u16::from),
            _ => None,
        };
        json!({"error": {
            "code": code,
            "class": self.class(),
            "message": self.to_string(),
            "retriable": self.is_retriable(),
        }})
    }

    /// The wire's class where there is one, else who must act.
    fn class(&self) -> Value {
        match self.root() {
            Self::Client(error) => json!(error.class()),
            Self::NoCa(_) => json!("connect"),
            Self::Policy(_) | Self::StreamMode => json!("usage"),
            Self::Damage { .. } => json!("corrupt"),
            Self::Log(error) if error.is_damage() => json!("corrupt"),
            Self::Stopped(_) => json!("interrupted"),
            Self::Message(_) | Self::LineTooLong { .. } | Self::NoSuchLetter(_) => {
                json!(ErrorClass::RequestFatal)
            }
            _ => json!("local"),
        }
    }

    fn root(&self) -> &Self {
        match self {
            Self::Partial { cause, .. } => cause.root(),
            other => other,
        }
    }
}

/// A command line that cannot be understood, told as every other failure.
pub fn report_usage(error: &clap::Error, format: Format) -> u8 {
    let text = error.to_string();
    let asked_for = !error.use_stderr();
    let told = match (asked_for, format) {
        (false, Format::Json) => {
            let message = sentence(&text);
            output::note(
                json!({"error": {"code": null, "class": "usage", "message": message, "retriable": false}})
                    .to_string(),
            );
            Ok(())
        }
        _ => error.print(),
    };
    match (asked_for, told) {
        (true, _) => 0,
        (false, _) => USAGE,
    }
}

/// What clap says before it repeats the usage, on one line.
fn sentence(text: &str) -> String {
    let said = text.split("\n\n").next().unwrap_or_default();
    let said = said.strip_prefix("error: ").unwrap_or(said);
    let words: Vec<&str> = said.split_whitespace().collect();
    words.join(" ")
}

/// The request failed and will fail again.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;
/// The broker cannot be reached or has no room now.
const RETRY: u8 = 3;
/// Stored bytes are damaged.
const DAMAGE: u8 = 4;
/// Some messages were sent and some were not.
const PARTIAL: u8 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_standard_output_is_no_error_of_the_users() {
        let closed = Failure::Stdout(io::ErrorKind::BrokenPipe.into());
        assert_eq!(closed.exit_code(), 0);
        let full = Failure::Stdout(io::ErrorKind::StorageFull.into());
        assert_eq!(full.exit_code(), FAILED);
    }

    #[test]
    fn a_partial_send_is_as_retriable_as_its_cause() {
        let cause = Box::new(Failure::LineTooLong { line: 3, limit: 5 });
        let partial = Failure::Partial { sent: 2, cause };
        assert_eq!(partial.exit_code(), PARTIAL);
        assert!(!partial.is_retriable());
        assert_eq!(partial.json()["error"]["class"], "request_fatal");
    }

    #[test]
    fn a_usage_error_fits_on_a_line() {
        let text = "error: these were not provided:\n  <TEXT>...\n\nUsage: millpond send";
        assert_eq!(sentence(text), "these were not provided: <TEXT>...");
    }

    #[test]
    fn no_ca_means_try_again_once_the_broker_has_made_one() {
        assert_eq!(Failure::NoCa("ca.pem".into()).exit_code(), RETRY);
    }
}
