//! Message bytes as text: whole in JSON, short and harmless in tables.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use millpond_protocol::MessageView;
use serde_json::{Map, Value, json};

/// Puts bytes under `name` where they are UTF-8, else in base64 under `name_base64`.
pub fn put(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), json!(text)),
        Err(_) => object.insert(format!("{name}_base64"), json!(STANDARD.encode(bytes))),
    };
}

/// As [`put`], with no bytes told as null: a message has no key rather than an empty one.
pub fn put_key(object: &mut Map<String, Value>, key: &[u8]) {
    if key.is_empty() {
        object.insert("key".to_owned(), Value::Null);
    } else {
        put(object, "key", key);
    }
}

/// Headers as an object. A name that stands twice has its last value.
pub fn headers<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> Value {
    let mut object = Map::new();
    for (name, value) in headers {
        put(&mut object, name, value);
    }
    Value::Object(object)
}

/// Puts key, headers and payload of a message as published; null where its bytes are damaged.
pub fn put_message(object: &mut Map<String, Value>, message: &[u8]) {
    let Ok((view, _)) = MessageView::split(message) else {
        for name in ["key", "headers", "payload"] {
            object.insert(name.to_owned(), Value::Null);
        }
        return;
    };
    put_key(object, view.key());
    object.insert("headers".to_owned(), headers(view.headers().flatten()));
    put(object, "payload", view.payload());
}

/// At most `most` characters on one line, without control characters.
#[must_use]
pub fn short(bytes: &[u8], most: usize) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * most + 4)]);
    let harmless = |c: char| if c.is_control() { ' ' } else { c };
    let mut shown: String = text.chars().map(harmless).take(most).collect();
    if text.chars().count() > most {
        shown.pop();
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_go_out_in_base64() {
        let mut object = Map::new();
        put(&mut object, "payload", b"caf\xc3\xa9");
        assert_eq!(object["payload"], "café");
        let mut object = Map::new();
        put(&mut object, "payload", b"\xff\x00");
        assert_eq!(object.get("payload"), None);
        assert_eq!(object["payload_base64"], "/wA=");
    }

    #[test]
    fn no_key_is_null() {
        let mut object = Map::new();
        put_key(&mut object, b"");
        assert_eq!(object["key"], Value::Null);
    }

    #[test]
    fn a_short_text_cannot_steer_the_terminal() {
        assert_eq!(short(b"a\x1b[2Jb\nc", 20), "a [2Jb c");
        assert_eq!(short(b"abcdef", 4), "abc…");
        assert_eq!(short("ääää".as_bytes(), 4), "ääää");
        assert_eq!(short("ääääö".as_bytes(), 4), "äää…");
    }
}
