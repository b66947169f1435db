//! `millpond send`: many messages in flight at once, each counted when the broker has answered.
//!
//! The first failure stops reading; what is in flight is still waited for, so that the numbers told
//! at the end are exact.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use futures_util::FutureExt;
use indicatif::{ProgressBar, ProgressStyle};
use millpond_client::{Client, Error, Message, Offset, Producer, Receipt, SendReceipt};
use serde_json::json;

use crate::args::Global;
use crate::connect::connect;
use crate::duration;
use crate::failure::Failure;
use crate::lines::{Lines, Source};
use crate::output::{self, Format};
use crate::signal::Signals;

/// Sends each TEXT, or each line of a file or of standard input, as one message.
#[derive(Debug, Args)]
pub struct SendArgs {
    topic: String,
    /// The messages; `-` alone reads standard input, a message a line.
    #[arg(
        value_name = "TEXT",
        required_unless_present = "file",
        conflicts_with = "file"
    )]
    texts: Vec<String>,
    /// A file with a message a line; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Names this sender, so that the broker recognises what it has already been sent.
    #[arg(long, value_name = "ID")]
    producer_id: Option<String>,
    /// The number of the first message, at least 1 [default: the one after the last accepted]. The
    /// same input with the same first number adds only what is missing.
    #[arg(long, value_name = "N", requires = "producer_id", value_parser = clap::value_parser!(u64).range(1..))]
    first_sequence: Option<u64>,
    /// Deliver not before this long after it is published; at most 30 days.
    #[arg(long, value_name = "D", value_parser = duration::parse_ms, default_value = "0", hide_default_value = true)]
    delay: u64,
    /// A message that is not finished after this long becomes a dead letter; at most 30 days.
    #[arg(long, value_name = "D", value_parser = duration::parse_ms, default_value = "0", hide_default_value = true)]
    ttl: u64,
    /// A header of every message; may be given several times.
    #[arg(long = "header", value_name = "K=V", value_parser = parse_header)]
    headers: Vec<(String, String)>,
    /// The key of every message.
    #[arg(long, value_name = "K", default_value = "", hide_default_value = true)]
    key: String,
}

/// Why a text is no header. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a header is written NAME=VALUE")]
struct HeaderError;

fn parse_header(text: &str) -> Result<(String, String), HeaderError> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(HeaderError),
    }
}

impl SendArgs {
    fn source(&self) -> Source {
        match &self.file {
            Some(file) if file.as_os_str() != "-" => Source::File(file.clone()),
            None if self.texts != ["-"] => Source::Texts(self.texts.clone()),
            _ => Source::Stdin,
        }
    }

    /// Everything of a message but its payload.
    fn template(&self) -> Message {
        let mut message = Message::new(Bytes::new());
        message.key = Bytes::from(self.key.clone());
        message.delay_ms = self.delay;
        message.ttl_ms = self.ttl;
        let header = |(name, value): &(String, String)| (name.clone(), Bytes::from(value.clone()));
        message.headers = self.headers.iter().map(header).collect();
        message
    }

    async fn open(&self, client: &Client) -> Result<Producer, Error> {
        let mut builder = client.producer(&self.topic);
        if let Some(id) = &self.producer_id {
            builder = builder.id(id.clone());
        }
        if let Some(first) = self.first_sequence {
            builder = builder.first_sequence(first);
        }
        builder.open().await
    }
}

/// Sends everything and tells how much was new.
pub async fn run(args: SendArgs, global: &Global) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let template = args.template();
    template.check()?;
    let lines = Lines::open(args.source())?;
    let opened = async {
        let client = connect(global).await?;
        let producer = args.open(&client).await?;
        Ok::<_, Failure>((client, producer))
    };
    let (client, producer) = tokio::select! {
        opened = Box::pin(opened) => opened?,
        stop = signals.asked() => return Err(Failure::Stopped(stop)),
    };
    let mut sending = Sending {
        progress: Progress::new(lines.total_bytes),
        producer,
        template,
        pending: VecDeque::new(),
        tally: Tally::default(),
    };
    let result = sending.all(lines, &mut signals).await;
    sending.progress.clear();
    if sending.pending.is_empty() {
        sending.producer.close().await;
        client.close().await;
    }
    // Else the user wants to leave, and closing would wait for the same answers again.
    finish(&sending.tally, result, global.output)
}

fn finish(tally: &Tally, result: Result<(), Failure>, format: Format) -> Result<(), Failure> {
    let sent = tally.appended + tally.duplicates;
    let told = match &result {
        Err(_) if sent == 0 => Ok(()),
        _ => tally.tell(format),
    };
    match result {
        // What became of the messages is more than what became of the counts.
        Ok(()) => told,
        Err(cause) if sent > 0 && !matches!(cause, Failure::Stopped(_)) => Err(Failure::Partial {
            sent,
            cause: Box::new(cause),
        }),
        other => other,
    }
}

struct Sending {
    producer: Producer,
    template: Message,
    /// Sent and not answered, oldest first; at most [`PENDING_MAX`].
    pending: VecDeque<Receipt>,
    tally: Tally,
    progress: Progress,
}

impl Sending {
    async fn all(&mut self, mut lines: Lines, signals: &mut Signals) -> Result<(), Failure> {
        let sent = self.send(&mut lines, signals).await;
        let answered = self.answers(signals).await;
        sent.and(answered)
    }

    async fn send(&mut self, lines: &mut Lines, signals: &mut Signals) -> Result<(), Failure> {
        loop {
            let batch = tokio::select! {
                biased;
                stop = signals.asked() => return Err(Failure::Stopped(stop)),
                batch = lines.next() => batch.transpose()?,
                answer = first(&mut self.pending) => {
                    self.pending.pop_front();
                    self.tally.add(&answer?);
                    continue;
                }
            };
            let Some(batch) = batch else {
                return Ok(());
            };
            for line in batch.lines {
                let mut message = self.template.clone();
                message.payload = line;
                let receipt = tokio::select! {
                    biased;
                    stop = signals.asked() => return Err(Failure::Stopped(stop)),
                    receipt = self.producer.enqueue(message) => receipt?,
                };
                self.pending.push_back(receipt);
                self.count_answers(signals).await?;
            }
            self.progress.show(batch.input_bytes, &self.tally);
        }
    }

    /// Counts what has been answered, and waits while too many are pending.
    async fn count_answers(&mut self, signals: &mut Signals) -> Result<(), Failure> {
        loop {
            let full = self.pending.len() >= PENDING_MAX;
            let answer = first(&mut self.pending);
            let answer = match full {
                true => tokio::select! {
                    biased;
                    stop = signals.asked() => return Err(Failure::Stopped(stop)),
                    answer = answer => Some(answer),
                },
                false => answer.now_or_never(),
            };
            let Some(answer) = answer else {
                return Ok(());
            };
            self.pending.pop_front();
            self.tally.add(&answer?);
        }
    }

    /// Waits for every answer; the first failure is the result, later messages are still counted.
    /// When the user wants to leave, what is unanswered after a grace is not counted.
    async fn answers(&mut self, signals: &mut Signals) -> Result<(), Failure> {
        let mut result = Ok(());
        let answered = async {
            while !self.pending.is_empty() {
                let answer = first(&mut self.pending).await;
                self.pending.pop_front();
                match answer {
                    Ok(receipt) => self.tally.add(&receipt),
                    Err(error) if result.is_ok() => result = Err(error.into()),
                    Err(_) => {}
                }
                self.progress.show(0, &self.tally);
            }
        };
        let grace = async {
            let stop = signals.asked().await;
            tokio::time::sleep(STOP_GRACE).await;
            stop
        };
        tokio::select! {
            biased;
            () = answered => result,
            stop = grace => result.and(Err(Failure::Stopped(stop))),
        }
    }
}

/// The answer to the oldest message; waits for ever if there is none. Cancel-safe.
async fn first(pending: &mut VecDeque<Receipt>) -> Result<SendReceipt, Error> {
    match pending.front_mut() {
        Some(receipt) => receipt.await,
        None => std::future::pending().await,
    }
}

/// What became of the messages that were answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    appended: u64,
    duplicates: u64,
    first_offset: Option<Offset>,
    last_offset: Option<Offset>,
}

impl Tally {
    fn add(&mut self, receipt: &SendReceipt) {
        if receipt.duplicate {
            self.duplicates += 1;
            return;
        }
        self.appended += 1;
        if let Some(offset) = receipt.offset {
            self.first_offset = Some(self.first_offset.map_or(offset, |first| first.min(offset)));
            self.last_offset = Some(self.last_offset.map_or(offset, |last| last.max(offset)));
        }
    }

    fn tell(&self, format: Format) -> Result<(), Failure> {
        match format {
            Format::Json => output::json(&json!({
                "appended": self.appended,
                "duplicates": self.duplicates,
                "first_offset": self.first_offset,
                "last_offset": self.last_offset,
            })),
            Format::Human => output::line(self.sentence()),
        }
    }

    fn sentence(&self) -> String {
        let counts = format!("appended {}, {} duplicates", self.appended, self.duplicates);
        match (self.first_offset, self.last_offset) {
            (Some(first), Some(last)) => format!("{counts}, offsets {first} to {last}"),
            _ => counts,
        }
    }
}

/// A bar on a terminal, for sends that take longer than a second.
struct Progress {
    bar: Option<ProgressBar>,
    begun: Instant,
    input_bytes: u64,
    total_bytes: Option<u64>,
    wanted: bool,
}

impl Progress {
    fn new(total_bytes: Option<u64>) -> Self {
        Self {
            bar: None,
            begun: Instant::now(),
            input_bytes: 0,
            total_bytes,
            wanted: std::io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, more_bytes: u64, tally: &Tally) {
        self.input_bytes += more_bytes;
        if !self.wanted || self.begun.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| bar(self.total_bytes));
        bar.set_position(self.input_bytes);
        bar.set_message(tally.sentence());
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn bar(total_bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match total_bytes {
        Some(total) => (
            ProgressBar::new(total),
            "{bar:30} {bytes} of {total_bytes}, {eta} left: {msg}",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes}: {msg}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Messages sent and not answered. About 200 bytes each beside the message itself.
const PENDING_MAX: usize = 65_536;
/// How long a send may take without a bar.
const QUIET: Duration = Duration::from_secs(1);
/// How long answers are waited for after Ctrl-C.
const STOP_GRACE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;
    use millpond_client::Sequence;

    fn receipt(offset: u64, duplicate: bool) -> SendReceipt {
        SendReceipt {
            offset: Some(Offset(offset)),
            duplicate,
            sequence: Sequence(offset + 1),
        }
    }

    #[test]
    fn offsets_told_are_those_of_new_messages() {
        let mut tally = Tally::default();
        tally.add(&receipt(3, true));
        assert_eq!(tally.sentence(), "appended 0, 1 duplicates");
        tally.add(&receipt(7, false));
        tally.add(&receipt(8, false));
        assert_eq!(tally.sentence(), "appended 2, 1 duplicates, offsets 7 to 8");
    }

    #[test]
    fn a_header_has_a_name_and_the_rest_is_its_value() {
        assert_eq!(parse_header("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(parse_header("=b"), Err(HeaderError));
        assert_eq!(parse_header("a"), Err(HeaderError));
    }

    #[test]
    fn a_failure_after_some_were_sent_is_partial() {
        let mut tally = Tally::default();
        let failed = || Err(Failure::LineTooLong { line: 2, limit: 1 });
        assert_eq!(
            finish(&tally, failed(), Format::Human)
                .unwrap_err()
                .exit_code(),
            1
        );
        tally.add(&receipt(0, false));
        assert_eq!(
            finish(&tally, failed(), Format::Human)
                .unwrap_err()
                .exit_code(),
            5
        );
    }
}
