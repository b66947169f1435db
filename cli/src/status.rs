//! `millpond status`: how the broker, its topics and its subscriptions are.

use millpond_client::Client;
use millpond_protocol::control::StatusView;
use serde_json::{Value, json};

use crate::duration::format_ms;
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Format};
use crate::{size, subscription, topic};

/// Asks and prints.
pub async fn run(client: &Client, format: Format) -> Result<(), Failure> {
    let view = client.status().await?;
    match format {
        Format::Json => output::json(&to_json(&view)),
        Format::Human => show(&view),
    }
}

fn to_json(view: &StatusView) -> Value {
    json!({
        "version": view.broker_version,
        "store_id": output::hex(&view.store_id),
        "recovery_epoch": view.recovery_epoch,
        "ready": view.ready,
        "remarks": view.remarks,
        "now": moment::rfc3339(view.now),
        "uptime_ms": view.uptime_ms,
        "connections": view.connections,
        "log": {
            "bytes": view.log_bytes,
            "segments": view.segments,
            "appended": view.appended,
            "durable": view.durable,
        },
        "memory": {"used": view.memory_used, "budget": view.memory_budget},
        "disk": {"free": view.disk_free, "total": view.disk_total},
        "topics": view.topics.iter().map(topic::to_json).collect::<Value>(),
        "subscriptions": view.subscriptions.iter().map(subscription::to_json).collect::<Value>(),
    })
}

fn show(view: &StatusView) -> Result<(), Failure> {
    output::facts(&facts(view))?;
    output::line("")?;
    topic::table(&view.topics)?;
    output::line("")?;
    subscription::table(&view.subscriptions)?;
    let stalled = view.subscriptions.iter().filter_map(|view| {
        let reason = view.stalled.as_ref()?;
        Some(format!(
            "{}/{} is held back: {reason}",
            view.topic, view.name
        ))
    });
    let mut remarks = view.remarks.iter().cloned().chain(stalled).peekable();
    if remarks.peek().is_some() {
        output::line("")?;
    }
    remarks.try_for_each(|remark| output::line(format!("! {remark}")))
}

fn facts(view: &StatusView) -> [(&'static str, String); 7] {
    let ready = if view.ready { "ready" } else { "not ready" };
    [
        (
            "broker",
            format!(
                "{ready}, version {}, up {}",
                view.broker_version,
                format_ms(view.uptime_ms)
            ),
        ),
        (
            "store",
            format!(
                "{}, epoch {}",
                output::hex(&view.store_id),
                view.recovery_epoch
            ),
        ),
        ("connections", view.connections.to_string()),
        (
            "log",
            format!(
                "{} in {} segments",
                size::format(view.log_bytes),
                view.segments
            ),
        ),
        (
            "watermark",
            format!("durable {} of {} appended", view.durable, view.appended),
        ),
        ("memory", share(view.memory_used, view.memory_budget)),
        (
            "disk",
            format!(
                "{} free of {}",
                size::format(view.disk_free),
                size::format(view.disk_total)
            ),
        ),
    ]
}

fn share(used: u64, budget: u64) -> String {
    format!("{} of {}", size::format(used), size::format(budget))
}
