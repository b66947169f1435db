//! `millpond dead-letters …`

use std::time::Duration;

use clap::{Args, Subcommand};
use millpond_client::Client;
use millpond_protocol::control::{
    DeadFilter, DeadLetterView, DeadReason, HistoryView, RedriveTarget, RedriveView,
};
use millpond_protocol::limits::{CONSUMER_NAME_BYTES_MAX, PAGE_ROWS_MAX};
use millpond_protocol::{MessageView, Offset};
use serde_json::{Map, Value, json};

use crate::duration::format_ms;
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Column, Format};
use crate::text;

#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List the dead letters of a subscription, oldest first.
    List {
        topic: String,
        subscription: String,
        /// The dead-letter offset to begin at.
        #[arg(long, value_name = "OFFSET", default_value_t = 0)]
        from: u64,
        /// Most letters to list [default: all].
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
    },
    /// Show one dead letter whole.
    Show {
        topic: String,
        subscription: String,
        /// Its offset among the dead letters.
        offset: u64,
    },
    /// Return dead letters to the subscription that they failed in, with their attempts at zero.
    Redrive {
        topic: String,
        subscription: String,
        #[command(flatten)]
        choice: ChoiceArgs,
        /// Most letters a second: `100` or `100/s`.
        #[arg(long, value_name = "N/s", value_parser = parse_rate)]
        rate: Option<u32>,
        /// Publish to the topic instead, where every subscription sees them as new messages.
        #[arg(long)]
        to_topic: bool,
        /// Wait until all of them are returned.
        #[arg(long)]
        wait: bool,
    },
    /// Throw dead letters away for good.
    #[command(mut_group("choice", |group| group.required(true)))]
    Purge {
        topic: String,
        subscription: String,
        #[command(flatten)]
        choice: ChoiceArgs,
    },
}

/// Which dead letters are meant; conditions add up.
#[derive(Clone, Debug, Args)]
#[group(id = "choice", multiple = true)]
pub struct ChoiceArgs {
    /// All of them.
    #[arg(long, conflicts_with_all = ["offset", "reason", "limit"])]
    all: bool,
    /// Only the one at this offset among the dead letters; may be given up to 1,000 times.
    #[arg(long, value_name = "N")]
    offset: Vec<u64>,
    /// Only those that died of this: max_attempts, rejected, max_deliveries, max_age, expired,
    /// undecodable, damaged.
    #[arg(long, value_name = "REASON", value_parser = parse_reason)]
    reason: Option<DeadReason>,
    /// At most so many, oldest first.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

impl ChoiceArgs {
    fn filter(&self) -> DeadFilter {
        DeadFilter {
            offsets: self.offset.iter().copied().map(Offset).collect(),
            reason: self.reason,
            limit: self.limit,
        }
    }
}

/// Why a text is no rate or reason. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum ChoiceError {
    #[error("a rate is letters a second, at least 1: write 100 or 100/s")]
    Rate,
    #[error(
        "{0:?} is no reason: use max_attempts, rejected, max_deliveries, max_age, expired, undecodable or damaged"
    )]
    Reason(String),
}

fn parse_rate(text: &str) -> Result<u32, ChoiceError> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    match number.parse() {
        Ok(0) | Err(_) => Err(ChoiceError::Rate),
        Ok(rate) => Ok(rate),
    }
}

fn parse_reason(text: &str) -> Result<DeadReason, ChoiceError> {
    let wanted = text.replace('-', "_");
    let found = DeadReason::ALL
        .into_iter()
        .find(|reason| reason.as_str() == wanted);
    found.ok_or_else(|| ChoiceError::Reason(text.to_owned()))
}

/// Does what the command says.
pub async fn run(
    command: DeadLettersCommand,
    client: &Client,
    format: Format,
) -> Result<(), Failure> {
    match command {
        DeadLettersCommand::List {
            topic,
            subscription,
            from,
            limit,
        } => {
            let limit = limit.unwrap_or(u64::MAX);
            list(client, &topic, &subscription, Offset(from), limit, format).await
        }
        DeadLettersCommand::Show {
            topic,
            subscription,
            offset,
        } => {
            let letter = find(client, &topic, &subscription, Offset(offset)).await?;
            match format {
                Format::Json => output::json(&to_json(&letter)),
                Format::Human => show(&letter),
            }
        }
        DeadLettersCommand::Redrive {
            topic,
            subscription,
            choice,
            rate,
            to_topic,
            wait,
        } => {
            let target = if to_topic {
                RedriveTarget::Topic
            } else {
                RedriveTarget::Subscription
            };
            let mut job = client
                .redrive(&topic, &subscription, choice.filter(), rate, target)
                .await?;
            if wait {
                job = finished(client, job).await?;
            }
            tell_redrive(&job, format)
        }
        DeadLettersCommand::Purge {
            topic,
            subscription,
            choice,
        } => {
            let filter = choice.filter();
            let count = client
                .purge_dead_letters(&topic, &subscription, filter)
                .await?;
            match format {
                Format::Json => output::json(&json!({ "purged": count })),
                Format::Human => output::line(format!("purged {count} dead letters")),
            }
        }
    }
}

/// Lists page by page, so that a million letters need no more memory than a thousand.
async fn list(
    client: &Client,
    topic: &str,
    subscription: &str,
    from: Offset,
    limit: u64,
    format: Format,
) -> Result<(), Failure> {
    let (mut from, mut left) = (from, limit);
    // A page without rows may have more behind it.
    let mut begun = false;
    loop {
        let rows = u32::try_from(left).unwrap_or(u32::MAX).min(PAGE_ROWS_MAX);
        let page = client.dead_letters(topic, subscription, from, rows).await?;
        left = left.saturating_sub(page.letters.len() as u64);
        let last = !page.more || left == 0;
        match format {
            Format::Json => output::bytes(page_json(&page.letters, begun, last).as_bytes())?,
            Format::Human if !page.letters.is_empty() || (last && !begun) => table(&page.letters)?,
            Format::Human => {}
        }
        if last {
            return Ok(());
        }
        begun |= !page.letters.is_empty();
        from = page.next;
    }
}

/// One array over all pages; `begun` once a letter of it is written.
fn page_json(letters: &[DeadLetterView], mut begun: bool, last: bool) -> String {
    let mut text = String::new();
    for letter in letters {
        text.push_str(if begun { ",\n" } else { "[" });
        text.push_str(&to_json(letter).to_string());
        begun = true;
    }
    match (last, begun) {
        (true, true) => text.push_str("]\n"),
        (true, false) => text.push_str("[]\n"),
        (false, _) => {}
    }
    text
}

async fn find(
    client: &Client,
    topic: &str,
    subscription: &str,
    offset: Offset,
) -> Result<DeadLetterView, Failure> {
    let page = client.dead_letters(topic, subscription, offset, 1).await?;
    page.letters
        .into_iter()
        .find(|letter| letter.offset == offset)
        .ok_or(Failure::NoSuchLetter(offset.0))
}

async fn finished(client: &Client, mut job: RedriveView) -> Result<RedriveView, Failure> {
    while !job.finished && !job.cancelled {
        tokio::time::sleep(REDRIVE_POLL).await;
        job = client.redrive_status(job.job).await?;
    }
    Ok(job)
}

fn tell_redrive(job: &RedriveView, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&json!({
            "job": job.job,
            "total": job.total,
            "done": job.done,
            "finished": job.finished,
            "cancelled": job.cancelled,
        })),
        Format::Human if job.finished => output::line(format!(
            "redrove {} of {} dead letters",
            job.done, job.total
        )),
        Format::Human => output::line(format!(
            "redriving {} dead letters (job {}, {} done)",
            job.total, job.job, job.done
        )),
    }
}

/// A dead letter as scripts see it.
fn to_json(letter: &DeadLetterView) -> Value {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
    put("offset", json!(letter.offset));
    put("source_topic", json!(letter.source_topic));
    put("source_offset", json!(letter.source_offset));
    put("subscription", json!(letter.subscription));
    put("attempts", json!(letter.failures));
    put("deliveries", json!(letter.deliveries));
    put("releases", json!(letter.releases));
    put("redrives", json!(letter.redrives));
    put("reason", json!(letter.reason));
    put("error", json!(letter.error));
    put("error_code", json!(letter.error_code));
    put("consumer", json!(letter.consumer));
    put("published_at", json!(moment::rfc3339(letter.published_at)));
    let first = letter.first_attempt_at.map(moment::rfc3339);
    put("first_attempt_at", json!(first));
    put("dead_at", json!(moment::rfc3339(letter.dead_at)));
    put("history", letter.history.iter().map(history_json).collect());
    text::put_message(&mut object, &letter.message);
    Value::Object(object)
}

fn history_json(item: &HistoryView) -> Value {
    json!({
        "at": moment::rfc3339(item.at),
        "duration_ms": item.duration_ms,
        "consumer": item.consumer,
        "outcome": item.outcome,
        "code": item.code,
    })
}

fn table(letters: &[DeadLetterView]) -> Result<(), Failure> {
    let columns = [
        Column::Right("OFFSET"),
        Column::Right("SOURCE"),
        Column::Right("ATTEMPTS"),
        Column::Right("DELIVERIES"),
        Column::Left("REASON"),
        Column::Left("ERROR"),
        Column::Left("FIRST ATTEMPT"),
        Column::Left("DEAD AT"),
        Column::Left("PAYLOAD"),
    ];
    let row = |letter: &DeadLetterView| {
        vec![
            letter.offset.to_string(),
            letter.source_offset.to_string(),
            letter.failures.to_string(),
            letter.deliveries.to_string(),
            letter.reason.as_str().to_owned(),
            text::short(letter.error.as_bytes(), 40),
            letter
                .first_attempt_at
                .map_or_else(String::new, moment::short),
            moment::short(letter.dead_at),
            payload(&letter.message, 24),
        ]
    };
    output::table(&columns, letters.iter().map(row), "no dead letters")
}

fn payload(message: &[u8], most: usize) -> String {
    match MessageView::split(message) {
        Ok((view, _)) => text::short(view.payload(), most),
        Err(_) => "(damaged)".to_owned(),
    }
}

fn show(letter: &DeadLetterView) -> Result<(), Failure> {
    output::facts(&facts(letter))?;
    if letter.history.is_empty() {
        return Ok(());
    }
    output::line("")?;
    history_table(&letter.history)
}

fn facts(letter: &DeadLetterView) -> Vec<(&'static str, String)> {
    let source = format!("{} offset {}", letter.source_topic, letter.source_offset);
    let mut facts = vec![
        ("offset", letter.offset.to_string()),
        ("source", source),
        ("subscription", letter.subscription.clone()),
        ("reason", letter.reason.as_str().to_owned()),
        ("error", text::short(letter.error.as_bytes(), 1_024)),
        ("error code", letter.error_code.to_string()),
        ("failed attempts", letter.failures.to_string()),
        ("deliveries", letter.deliveries.to_string()),
        ("releases", letter.releases.to_string()),
        ("redrives", letter.redrives.to_string()),
        ("published", moment::rfc3339(letter.published_at)),
    ];
    if let Some(at) = letter.first_attempt_at {
        facts.push(("first attempt", moment::rfc3339(at)));
    }
    facts.push(("dead", moment::rfc3339(letter.dead_at)));
    facts.push(("consumer", consumer(&letter.consumer)));
    if let Ok((view, _)) = MessageView::split(&letter.message) {
        facts.push(("key", text::short(view.key(), 1_024)));
        for (name, value) in view.headers().flatten() {
            let shown = format!(
                "{}={}",
                text::short(name.as_bytes(), 200),
                text::short(value, 200)
            );
            facts.push(("header", shown));
        }
    }
    facts.push(("payload", payload(&letter.message, 1_024)));
    facts
}

fn history_table(history: &[HistoryView]) -> Result<(), Failure> {
    let columns = [
        Column::Left("FAILED AT"),
        Column::Right("AFTER"),
        Column::Left("OUTCOME"),
        Column::Right("CODE"),
        Column::Left("CONSUMER"),
    ];
    output::table(&columns, history.iter().map(history_row), "no failures")
}

fn history_row(item: &HistoryView) -> Vec<String> {
    vec![
        moment::rfc3339(item.at),
        format_ms(item.duration_ms),
        item.outcome.clone(),
        item.code.to_string(),
        consumer(&item.consumer),
    ]
}

/// A consumer's name, which is any text that its client chose.
fn consumer(name: &str) -> String {
    text::short(name.as_bytes(), CONSUMER_NAME_BYTES_MAX)
}

/// How often a redrive that is waited for is asked about.
const REDRIVE_POLL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{Bytes, BytesMut};
    use millpond_protocol::{Message, Sequence, Stamp};

    fn letter(payload: &'static [u8]) -> DeadLetterView {
        let mut message = BytesMut::new();
        Message::new(payload).encode(Sequence(1), &mut message);
        DeadLetterView {
            offset: Offset(3),
            source_topic: "orders".into(),
            source_offset: Offset(17),
            subscription: "work".into(),
            reason: DeadReason::MaxAttempts,
            error_code: 1,
            error: "boom".into(),
            failures: 4,
            deliveries: 5,
            releases: 1,
            redrives: 0,
            published_at: Stamp(1_000_000),
            first_attempt_at: Some(Stamp(2_000_000)),
            dead_at: Stamp(3_000_000),
            consumer: "c".into(),
            history: vec![HistoryView {
                at: Stamp(3_000_000),
                duration_ms: 5,
                consumer: "c".into(),
                outcome: "nack".into(),
                code: 1,
            }],
            message: message.freeze(),
        }
    }

    #[test]
    fn a_dead_letter_has_the_fields_that_scripts_rely_on() {
        let json = to_json(&letter(b"hello"));
        assert_eq!(json["offset"], 3);
        assert_eq!(json["source_offset"], 17);
        assert_eq!(json["attempts"], 4);
        assert_eq!(json["deliveries"], 5);
        assert_eq!(json["reason"], "max_attempts");
        assert_eq!(json["error"], "boom");
        assert_eq!(json["first_attempt_at"], "1970-01-01T00:00:02Z");
        assert_eq!(json["dead_at"], "1970-01-01T00:00:03Z");
        assert_eq!(json["history"][0]["outcome"], "nack");
        assert_eq!(json["key"], Value::Null);
        assert_eq!(json["payload"], "hello");
    }

    #[test]
    fn pages_make_one_array_whichever_of_them_are_empty() {
        let page = |count| vec![letter(b"hello"); count];
        for counts in [&[0][..], &[2], &[0, 1], &[1, 0, 2, 0], &[0, 0]] {
            let (mut text, mut sum) = (String::new(), 0);
            for (nth, &count) in counts.iter().enumerate() {
                text += &page_json(&page(count), sum > 0, nth + 1 == counts.len());
                sum += count;
            }
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value.as_array().unwrap().len(), sum, "{text}");
        }
    }

    #[test]
    fn a_damaged_letter_says_so() {
        let mut damaged = letter(b"");
        damaged.message = Bytes::new();
        assert_eq!(to_json(&damaged)["payload"], Value::Null);
        assert_eq!(payload(&damaged.message, 9), "(damaged)");
    }

    #[test]
    fn a_consumers_name_cannot_steer_the_terminal() {
        let mut letter = letter(b"hello");
        letter.consumer = "c\x1b[2J".into();
        letter.history[0].consumer.clone_from(&letter.consumer);
        let facts = facts(&letter).into_iter().map(|(_, value)| value);
        let shown: Vec<String> = facts.chain(history_row(&letter.history[0])).collect();
        assert_eq!(shown.iter().filter(|text| *text == "c [2J").count(), 2);
        assert!(!shown.concat().contains(char::is_control), "{shown:?}");
    }

    #[test]
    fn rates_and_reasons_are_read() {
        assert_eq!(parse_rate("100/s"), Ok(100));
        assert_eq!(parse_rate("0"), Err(ChoiceError::Rate));
        assert_eq!(parse_reason("max-age"), Ok(DeadReason::MaxAge));
        assert!(parse_reason("boredom").is_err());
    }
}
