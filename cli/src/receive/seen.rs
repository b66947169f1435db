//! A message as it is shown: raw for people and pipes, one JSON object a line for scripts.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::exec::Job;
use crate::output::Format;
use crate::text;

/// What is shown of a message, whichever way it came.
pub struct Seen<'a> {
    pub offset: u64,
    pub attempt: u32,
    pub published_at: String,
    pub key: &'a [u8],
    pub headers: Vec<(&'a str, &'a [u8])>,
    pub payload: &'a Bytes,
}

impl Seen<'_> {
    /// Appends the message as the format has it.
    pub fn put(&self, format: Format, out: &mut Vec<u8>) {
        match format {
            Format::Human => out.extend_from_slice(self.payload),
            Format::Json => out.extend_from_slice(self.json().to_string().as_bytes()),
        }
        out.push(b'\n');
    }

    fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("offset".to_owned(), json!(self.offset));
        object.insert("attempt".to_owned(), json!(self.attempt));
        object.insert("published_at".to_owned(), json!(self.published_at));
        text::put_key(&mut object, self.key);
        let headers = text::headers(self.headers.iter().copied());
        object.insert("headers".to_owned(), headers);
        text::put(&mut object, "payload", self.payload);
        Value::Object(object)
    }

    /// What a command is told of it.
    pub fn job(&self, topic: &str, subscription: &str) -> Job {
        let header = |(name, value): &(&str, &[u8])| ((*name).to_owned(), value.to_vec());
        Job {
            topic: topic.to_owned(),
            subscription: subscription.to_owned(),
            offset: self.offset,
            attempt: self.attempt,
            key: self.key.to_vec(),
            headers: self.headers.iter().map(header).collect(),
            payload: self.payload.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_fields_that_scripts_rely_on() {
        let payload = Bytes::from_static(b"hello");
        let seen = Seen {
            offset: 7,
            attempt: 2,
            published_at: "2026-01-31T12:00:00Z".into(),
            key: b"k",
            headers: vec![("color", b"red")],
            payload: &payload,
        };
        let mut out = Vec::new();
        seen.put(Format::Json, &mut out);
        let json: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["offset"], 7);
        assert_eq!(json["attempt"], 2);
        assert_eq!(json["key"], "k");
        assert_eq!(json["headers"]["color"], "red");
        assert_eq!(json["payload"], "hello");
        out.clear();
        seen.put(Format::Human, &mut out);
        assert_eq!(out, b"hello\n");
    }
}
