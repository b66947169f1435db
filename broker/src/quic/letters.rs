//! What a dead letter tells: headers made when it is read, from its state and from the record that
//! holds its last settlement. The message itself stays untouched.

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{DeadLetterView, DeadReason, HistoryView, Outcome, cut_reason};
use millpond_protocol::limits::HISTORY_MAX;
use millpond_protocol::message::put_header;
use millpond_protocol::{Offset, Stamp};
use millpond_queue::{Expired, HistoryItem, Letter, Record, SettleEntry};
use millpond_wal::RecordBytes;
use millpond_wal::storage::Storage;

use crate::bodies::{Bodies, Run};

/// The last settlement's own words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Story {
    pub code: u32,
    pub text: String,
    pub history: Vec<HistoryItem>,
}

/// Reads the record that made a message dead. If it cannot be read, the letter is told without it.
pub async fn story<S: Storage>(bodies: &Bodies<S>, letter: &Letter) -> Story {
    match bodies.record(letter.place).await {
        Ok(RecordBytes { kind, stamp, body }) => match Record::decode(kind, &body) {
            Ok(record) => or_why(from_record(&record, Stamp(stamp), letter), letter),
            Err(error) => unreadable(&error),
        },
        Err(error) => unreadable(&error),
    }
}

fn unreadable(error: &dyn std::fmt::Display) -> Story {
    Story {
        text: format!("(the record of the last settlement cannot be read: {error})"),
        ..Story::default()
    }
}

fn from_record(record: &Record<'_>, stamp: Stamp, letter: &Letter) -> Story {
    let offset = letter.source_offset;
    match record {
        Record::Settle { items, .. } => match items.iter().find(|item| item.lease.offset == offset)
        {
            Some(item) => settled(item, stamp),
            None => Story::default(),
        },
        Record::Expire(Expired::Processing { items, .. }) => {
            let item = items.iter().find(|item| item.lease.offset == offset);
            let history = item
                .map(|item| item.story.history.clone())
                .unwrap_or_default();
            Story {
                text: "the handler took longer than the processing timeout".to_owned(),
                code: 0,
                history,
            }
        }
        Record::Expire(Expired::Ttl { .. } | Expired::TopicTtl { .. }) => {
            words("its time to live was over")
        }
        Record::Expire(Expired::MaxAge { .. }) => {
            words("it became older than the subscription's max age")
        }
        Record::SessionEnd {
            story: Some(story), ..
        } => Story {
            text: "its consumer's connection was lost and did not come back".to_owned(),
            code: 0,
            history: story.history.clone(),
        },
        Record::Damaged { .. } => words("its bytes are damaged on disk"),
        Record::Trim { .. } => words("the topic reached its limit"),
        _ => Story::default(),
    }
}

/// Who hands a message back has no words for it, and may have done so once too often.
fn or_why(story: Story, letter: &Letter) -> Story {
    if story.text.is_empty() && letter.reason == DeadReason::MaxDeliveries {
        let text = "it was handed out too often without being finished".to_owned();
        return Story { text, ..story };
    }
    story
}

/// The settlement itself is the last of its history; its record's stamp says when it was.
fn settled(item: &SettleEntry, stamp: Stamp) -> Story {
    let (code, text) = match &item.outcome {
        Outcome::Nack { code, reason, .. } | Outcome::Reject { code, reason, .. } => {
            (*code, reason.clone())
        }
        Outcome::Release { .. } | Outcome::Extend => (0, String::new()),
    };
    let mut history = item.history.clone();
    if let Some(last) = history.last_mut() {
        last.at = stamp;
        last.duration_ms = item.begun_at.map_or(0, |begun| stamp.ms_since(begun));
    }
    Story {
        code,
        text,
        history,
    }
}

fn words(text: &str) -> Story {
    Story {
        text: text.to_owned(),
        ..Story::default()
    }
}

/// The `mp-dead-*` headers of a letter, in the message's header layout, at most `EXTRA_BYTES_MAX`.
/// `published_at` is unknown when the body is damaged.
#[must_use]
pub fn headers(letter: &Letter, story: &Story, published_at: Option<Stamp>) -> Bytes {
    let mut out = BytesMut::new();
    let mut put = |name: &str, value: String| put_header(&mut out, name, value.as_bytes());
    put("mp-dead-reason", letter.reason.as_str().to_owned());
    put("mp-dead-error-code", story.code.to_string());
    put("mp-dead-error", cut_reason(story.text.clone()));
    put("mp-dead-topic", letter.source_topic.to_string());
    put("mp-dead-offset", letter.source_offset.to_string());
    put("mp-dead-subscription", letter.subscription.to_string());
    put("mp-dead-failures", letter.failures.to_string());
    put("mp-dead-deliveries", letter.deliveries.to_string());
    put("mp-dead-releases", letter.releases.to_string());
    put("mp-dead-redrives", letter.redrives.to_string());
    if let Some(at) = published_at {
        put("mp-dead-published-at", at.to_string());
    }
    if let Some(at) = letter.first_attempt_at {
        put("mp-dead-first-attempt-at", at.to_string());
    }
    put("mp-dead-dead-at", letter.dead_at.to_string());
    put("mp-dead-consumer", consumer(story));
    put("mp-dead-history", history_text(&story.history));
    out.freeze()
}

/// A line for each failure: time in µs, duration in ms, consumer, outcome, code; tabs between.
fn history_text(history: &[HistoryItem]) -> String {
    let mut out = String::new();
    for item in last(history) {
        let HistoryItem {
            at,
            duration_ms,
            consumer,
            outcome,
            code,
        } = item;
        out.push_str(&format!(
            "{at}\t{duration_ms}\t{consumer}\t{}\t{code}\n",
            outcome.as_str()
        ));
    }
    out
}

fn last(history: &[HistoryItem]) -> &[HistoryItem] {
    &history[history.len().saturating_sub(HISTORY_MAX)..]
}

fn consumer(story: &Story) -> String {
    story
        .history
        .last()
        .map(|item| item.consumer.clone())
        .unwrap_or_default()
}

/// A letter for a listing.
#[must_use]
pub fn view(offset: Offset, letter: &Letter, story: Story, body: Option<&Run>) -> DeadLetterView {
    let history = last(&story.history).iter().map(|item| HistoryView {
        at: item.at,
        duration_ms: item.duration_ms,
        consumer: item.consumer.clone(),
        outcome: item.outcome.as_str().to_owned(),
        code: item.code,
    });
    DeadLetterView {
        offset,
        source_topic: letter.source_topic.to_string(),
        source_offset: letter.source_offset,
        subscription: letter.subscription.to_string(),
        reason: letter.reason,
        error_code: story.code,
        failures: letter.failures,
        deliveries: letter.deliveries,
        releases: letter.releases,
        redrives: letter.redrives,
        published_at: body.map_or(Stamp(0), |run| run.stamp),
        first_attempt_at: letter.first_attempt_at,
        dead_at: letter.dead_at,
        consumer: consumer(&story),
        history: history.collect(),
        error: cut_reason(story.text),
        message: body.map(|run| run.messages.clone()).unwrap_or_default(),
    }
}

/// About the bytes that a letter takes in an answer.
#[must_use]
pub fn view_bytes(view: &DeadLetterView) -> usize {
    let names = view.source_topic.len() + view.subscription.len() + view.consumer.len();
    let words = |item: &HistoryView| item.consumer.len() + item.outcome.len() + FIXED_BYTES;
    let history: usize = view.history.iter().map(words).sum();
    FIXED_BYTES + names + view.error.len() + history + view.message.len()
}

/// More than the numbers of a letter, or of one line of its history, take.
const FIXED_BYTES: usize = 128;
