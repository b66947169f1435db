//! `millpond log dump`: every record in the order in which it changed the state.

use std::ops::ControlFlow;

use millpond_protocol::{MessageView, Stamp};
use millpond_queue::Record;
use millpond_wal::storage::FolderStorage;
use millpond_wal::{Contents, Dumped, EntryHeader, LogIndex};
use serde_json::{Map, Value, json};

use super::DumpArgs;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::{moment, text};

/// Prints what is there; with JSON one object a line.
pub fn run(args: &DumpArgs, storage: &FolderStorage, format: Format) -> Result<(), Failure> {
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut result = Ok(());
    millpond_wal::dump(storage, LogIndex(args.from), |dumped| {
        if matches!(dumped, Dumped::Entry { .. }) {
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
        }
        result = show(dumped, format);
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    result
}

fn show(dumped: Dumped<'_>, format: Format) -> Result<(), Failure> {
    match dumped {
        Dumped::Segment {
            id,
            file,
            range,
            contents,
        } => {
            let sparse = contents == Contents::Sparse;
            match format {
                Format::Json => output::json(&json!({
                    "type": "segment",
                    "segment": id.0,
                    "file": file,
                    "first_index": range.first.0,
                    "last_index": range.last.0,
                    "sparse": sparse,
                })),
                Format::Human => {
                    let cleaned = if sparse { ", cleaned" } else { "" };
                    output::line(format!("segment {id} in {file}: entries {range}{cleaned}"))
                }
            }
        }
        Dumped::Damaged(range) => match format {
            Format::Json => output::json(&json!({
                "type": "damaged",
                "first_index": range.first.0,
                "last_index": range.last.0,
            })),
            Format::Human => output::line(format!("entries {range} are damaged")),
        },
        Dumped::Entry {
            header,
            records,
            position,
        } => {
            entry(&header, position, format)?;
            for record in records {
                show_record(&header, &record, format)?;
            }
            Ok(())
        }
    }
}

fn entry(header: &EntryHeader, position: u64, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&json!({
            "type": "entry",
            "index": header.index.0,
            "position": position,
            "epoch": header.epoch,
            "durable": header.durable.0,
            "records": header.records,
            "payload_bytes": header.payload_bytes,
        })),
        Format::Human => output::line(format!(
            "entry {} at byte {position}: {} records, {} bytes, epoch {}, durable {}",
            header.index, header.records, header.payload_bytes, header.epoch, header.durable
        )),
    }
}

fn show_record(
    header: &EntryHeader,
    record: &millpond_wal::Record<'_>,
    format: Format,
) -> Result<(), Failure> {
    let stamp = moment::rfc3339(Stamp(record.stamp));
    let decoded = Record::decode(record.kind, record.body);
    let (name, detail) = match &decoded {
        Ok(decoded) => describe(decoded),
        Err(error) => ("Unknown".to_owned(), error.to_string()),
    };
    match format {
        Format::Json => {
            let mut object = Map::new();
            let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
            put("type", json!("record"));
            put("index", json!(header.index.0));
            put("record", json!(record.number));
            put("stamp", json!(stamp));
            put("kind", json!(name));
            put("bytes", json!(record.body.len()));
            put("detail", json!(detail));
            if let Ok(Record::Publish { messages, .. }) = decoded {
                put("messages", message_values(messages));
            }
            output::json(&Value::Object(object))
        }
        Format::Human => {
            output::line(format!(
                "  {}.{} {stamp} {detail}",
                header.index, record.number
            ))?;
            match decoded {
                Ok(Record::Publish { messages, .. }) => print_messages(messages),
                _ => Ok(()),
            }
        }
    }
}

/// The record's name, and all of it but message bodies.
fn describe(record: &Record<'_>) -> (String, String) {
    let detail = match record {
        Record::Publish {
            topic,
            producer,
            epoch,
            previous,
            count,
            messages,
        } => format!(
            "Publish {{ topic: {topic}, producer: {producer}, epoch: {epoch}, previous: {previous}, \
             count: {count}, bytes: {} }}",
            messages.len()
        ),
        other => format!("{other:?}"),
    };
    let name = detail
        .split(|c: char| !c.is_ascii_alphanumeric())
        .next()
        .unwrap_or_default();
    (name.to_owned(), detail)
}

fn message_values(bytes: &[u8]) -> Value {
    views(bytes)
        .map(|view| {
            let mut object = Map::new();
            object.insert("sequence".to_owned(), json!(view.sequence()));
            text::put_message(&mut object, view.bytes());
            Value::Object(object)
        })
        .collect()
}

fn print_messages(bytes: &[u8]) -> Result<(), Failure> {
    views(bytes).into_iter().try_for_each(|view| {
        let payload = view.payload();
        output::line(format!(
            "    sequence {}, {} bytes: {}",
            view.sequence(),
            payload.len(),
            text::short(payload, 60)
        ))
    })
}

/// The messages of a batch, up to the first that cannot be read.
fn views(bytes: &[u8]) -> impl Iterator<Item = MessageView<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (view, behind) = MessageView::split(rest).ok()?;
        rest = behind;
        Some(view)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use millpond_protocol::{Epoch, Message, ProducerKey, Sequence, TopicId};

    #[test]
    fn a_publish_is_described_without_its_bodies() {
        let mut messages = BytesMut::new();
        Message::new("one").encode(Sequence(1), &mut messages);
        Message::new("two").encode(Sequence(2), &mut messages);
        let record = Record::Publish {
            topic: TopicId(1),
            producer: ProducerKey(2),
            epoch: Epoch(3),
            previous: Sequence(0),
            count: 2,
            messages: &messages,
        };
        let (name, detail) = describe(&record);
        assert_eq!(name, "Publish");
        assert!(detail.contains("count: 2"));
        let values = message_values(&messages);
        assert_eq!(values[1]["payload"], "two");
        assert_eq!(values[1]["sequence"], 2);
    }
}
