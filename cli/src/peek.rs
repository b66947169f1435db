//! `millpond peek`: looks at messages and takes nothing.

use clap::Args;
use millpond_client::Client;
use millpond_protocol::control::PeekedMessage;
use millpond_protocol::limits::PAGE_ROWS_MAX;
use millpond_protocol::{MessageView, Offset};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Column, Format};
use crate::{size, text};

#[derive(Debug, Args)]
pub struct PeekArgs {
    topic: String,
    /// The offset to begin at [default: the earliest message kept].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    offset: u64,
    /// Most messages to show.
    #[arg(long, value_name = "N", default_value_t = 10)]
    count: u64,
}

/// Prints what is there; with JSON one object a line.
pub async fn run(args: &PeekArgs, client: &Client, format: Format) -> Result<(), Failure> {
    let (mut from, mut left) = (Offset(args.offset), args.count);
    // A page without rows may have more behind it.
    let mut begun = false;
    while left > 0 {
        let rows = u32::try_from(left).unwrap_or(u32::MAX).min(PAGE_ROWS_MAX);
        let page = client.peek(&args.topic, from, rows).await?;
        left = left.saturating_sub(page.messages.len() as u64);
        match format {
            Format::Json => page
                .messages
                .iter()
                .try_for_each(|message| output::json(&to_json(message)))?,
            Format::Human if !page.messages.is_empty() || !(page.more || begun) => {
                table(&page.messages)?;
            }
            Format::Human => {}
        }
        if !page.more {
            return Ok(());
        }
        begun |= !page.messages.is_empty();
        from = page.next;
    }
    Ok(())
}

fn to_json(message: &PeekedMessage) -> Value {
    let mut object = Map::new();
    object.insert("offset".to_owned(), json!(message.offset));
    let published_at = moment::rfc3339(message.published_at);
    object.insert("published_at".to_owned(), json!(published_at));
    text::put_message(&mut object, &message.message);
    if MessageView::split(&message.message).is_err() {
        object.insert("damaged".to_owned(), json!(true));
    }
    Value::Object(object)
}

fn table(messages: &[PeekedMessage]) -> Result<(), Failure> {
    let columns = [
        Column::Right("OFFSET"),
        Column::Left("PUBLISHED"),
        Column::Left("KEY"),
        Column::Right("SIZE"),
        Column::Left("PAYLOAD"),
    ];
    output::table(&columns, messages.iter().map(row), "no messages")
}

fn row(message: &PeekedMessage) -> Vec<String> {
    let (key, bytes, payload) = match MessageView::split(&message.message) {
        Ok((view, _)) => (
            text::short(view.key(), 20),
            size::format(view.payload().len() as u64),
            text::short(view.payload(), 40),
        ),
        Err(_) => (String::new(), String::new(), "(damaged)".to_owned()),
    };
    vec![
        message.offset.to_string(),
        moment::short(message.published_at),
        key,
        bytes,
        payload,
    ]
}
