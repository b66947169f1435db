//! `millpond subscription …`

use clap::Subcommand;
use millpond_client::Client;
use millpond_protocol::StartAt;
use millpond_protocol::control::SubscriptionView;
use millpond_protocol::policy::{Backoff, Jitter, SubscriptionConfig, SubscriptionMode};
use serde_json::{Value, json};

use crate::duration::format_ms;
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Column, Format};
use crate::policy_args::{ModeArg, PolicyArgs};
use crate::size;

#[derive(Debug, Subcommand)]
pub enum SubscriptionCommand {
    /// Create a subscription.
    Create {
        topic: String,
        name: String,
        /// How messages are handed out.
        #[arg(long, value_enum, default_value_t)]
        mode: ModeArg,
        /// Where it begins: `earliest`, `latest`, an offset, or a time.
        #[arg(long, value_name = "WHERE", value_parser = moment::parse_start, default_value = "earliest")]
        from: StartAt,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// List the subscriptions of a topic.
    List { topic: String },
    /// Show one subscription.
    Show { topic: String, name: String },
    /// Change a subscription's policy; what is not named stays.
    #[command(mut_group("policy", |group| group.required(true)))]
    Update {
        topic: String,
        name: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Hand nothing out until it is resumed. Charges no attempt.
    Pause { topic: String, name: String },
    /// Hand messages out again.
    Resume { topic: String, name: String },
    /// Move to another place: messages below it count as finished, those from it on come again.
    Seek {
        topic: String,
        name: String,
        /// `earliest`, `latest`, an offset, or a time.
        #[arg(value_name = "WHERE", value_parser = moment::parse_start)]
        to: StartAt,
    },
    /// Delete a subscription. Its dead letters stay.
    Delete { topic: String, name: String },
}

/// Does what the command says.
pub async fn run(
    command: SubscriptionCommand,
    client: &Client,
    format: Format,
) -> Result<(), Failure> {
    match command {
        SubscriptionCommand::Create {
            topic,
            name,
            mode,
            from,
            policy,
        } => {
            let config = policy.config(mode);
            config.check()?;
            let view = client
                .create_subscription(&topic, &name, config, from)
                .await?;
            told(format, &view, "created")
        }
        SubscriptionCommand::List { topic } => {
            let views = client.subscriptions(&topic).await?;
            match format {
                Format::Json => output::json(&views.iter().map(to_json).collect()),
                Format::Human => table(&views),
            }
        }
        SubscriptionCommand::Show { topic, name } => {
            let view = client.subscription(&topic, &name).await?;
            match format {
                Format::Json => output::json(&to_json(&view)),
                Format::Human => show(&view),
            }
        }
        SubscriptionCommand::Update {
            topic,
            name,
            policy,
        } => {
            let view = update(client, &topic, &name, &policy).await?;
            told(format, &view, "updated")
        }
        SubscriptionCommand::Pause { topic, name } => {
            client.pause_subscription(&topic, &name).await?;
            output::done(format, &format!("paused subscription {topic}/{name}"))
        }
        SubscriptionCommand::Resume { topic, name } => {
            client.resume_subscription(&topic, &name).await?;
            output::done(format, &format!("resumed subscription {topic}/{name}"))
        }
        SubscriptionCommand::Seek { topic, name, to } => {
            client.seek(&topic, &name, to).await?;
            output::done(format, &format!("moved subscription {topic}/{name}"))
        }
        SubscriptionCommand::Delete { topic, name } => {
            client.delete_subscription(&topic, &name).await?;
            output::done(format, &format!("deleted subscription {topic}/{name}"))
        }
    }
}

async fn update(
    client: &Client,
    topic: &str,
    name: &str,
    policy: &PolicyArgs,
) -> Result<SubscriptionView, Failure> {
    let backoff = if policy.changes_part_of_backoff() {
        client.subscription(topic, name).await?.config.backoff
    } else {
        Backoff::default()
    };
    let patch = policy.patch(&backoff);
    Ok(client.update_subscription(topic, name, patch).await?)
}

fn told(format: Format, view: &SubscriptionView, what: &str) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&to_json(view)),
        Format::Human => output::line(format!("{what} subscription {}/{}", view.topic, view.name)),
    }
}

/// A subscription as scripts see it.
#[must_use]
pub fn to_json(view: &SubscriptionView) -> Value {
    json!({
        "topic": view.topic,
        "name": view.name,
        "mode": view.config.mode,
        "paused": view.paused,
        "floor": view.floor,
        "backlog": view.backlog,
        "ready": view.ready,
        "in_flight": view.in_flight,
        "scheduled": view.scheduled,
        "dead": view.dead,
        "consumers": view.consumers,
        "oldest_ready_ms": view.oldest_ready_ms,
        "next_due": view.next_due.map(moment::rfc3339),
        "pinned_bytes": view.pinned_bytes,
        "stalled": view.stalled,
        "dead_letter": view.dead_letter,
        "config": view.config,
    })
}

/// Subscriptions as people see them.
pub fn table(views: &[SubscriptionView]) -> Result<(), Failure> {
    let columns = [
        Column::Left("SUBSCRIPTION"),
        Column::Left("MODE"),
        Column::Right("BACKLOG"),
        Column::Right("READY"),
        Column::Right("IN FLIGHT"),
        Column::Right("SCHEDULED"),
        Column::Right("DEAD"),
        Column::Right("OLDEST"),
        Column::Right("CONSUMERS"),
    ];
    let row = |view: &SubscriptionView| {
        vec![
            format!("{}/{}", view.topic, view.name),
            mode(view).to_owned(),
            view.backlog.to_string(),
            view.ready.to_string(),
            view.in_flight.to_string(),
            view.scheduled.to_string(),
            view.dead.to_string(),
            view.oldest_ready_ms.map_or_else(String::new, format_ms),
            view.consumers.to_string(),
        ]
    };
    output::table(&columns, views.iter().map(row), "no subscriptions")
}

const fn mode(view: &SubscriptionView) -> &'static str {
    match (view.paused, view.config.mode) {
        (true, _) => "paused",
        (false, SubscriptionMode::Queue) => "queue",
        (false, SubscriptionMode::Stream) => "stream",
    }
}

fn show(view: &SubscriptionView) -> Result<(), Failure> {
    let none = || "none".to_owned();
    let mut facts = vec![
        ("subscription", format!("{}/{}", view.topic, view.name)),
        ("mode", mode(view).to_owned()),
        ("finished below", view.floor.to_string()),
        ("backlog", view.backlog.to_string()),
        ("ready", view.ready.to_string()),
        ("in flight", view.in_flight.to_string()),
        ("scheduled", view.scheduled.to_string()),
        ("next due", view.next_due.map_or_else(none, moment::short)),
        ("dead", view.dead.to_string()),
        ("dead letters in", view.dead_letter.clone()),
        ("consumers", view.consumers.to_string()),
        (
            "oldest ready",
            view.oldest_ready_ms.map_or_else(none, format_ms),
        ),
        ("pinned", size::format(view.pinned_bytes)),
    ];
    facts.extend(policy(&view.config));
    if let Some(reason) = &view.stalled {
        facts.push(("stalled", reason.clone()));
    }
    output::facts(&facts)
}

fn policy(config: &SubscriptionConfig) -> [(&'static str, String); 9] {
    let none = || "none".to_owned();
    [
        ("max attempts", config.max_attempts.to_string()),
        ("max deliveries", config.max_deliveries.to_string()),
        ("max age", config.max_age_ms.map_or_else(none, format_ms)),
        ("max in flight", config.max_in_flight.to_string()),
        ("lease", format_ms(config.lease_ms)),
        (
            "processing timeout",
            format_ms(config.processing_timeout_ms),
        ),
        ("hold max", format_ms(config.hold_max_ms)),
        ("backoff", backoff(&config.backoff)),
        ("jitter", jitter(config.jitter).to_owned()),
    ]
}

fn backoff(backoff: &Backoff) -> String {
    match backoff {
        Backoff::Exponential {
            initial_ms,
            multiplier_milli,
            max_ms,
        } => format!(
            "{}, times {}, at most {}",
            format_ms(*initial_ms),
            f64::from(*multiplier_milli) / 1_000.0,
            format_ms(*max_ms)
        ),
        Backoff::Fixed { wait_ms } => format!("always {}", format_ms(*wait_ms)),
        Backoff::List { waits_ms } => {
            let waits: Vec<String> = waits_ms.iter().map(|&ms| format_ms(ms)).collect();
            waits.join(", then ")
        }
    }
}

const fn jitter(jitter: Jitter) -> &'static str {
    match jitter {
        Jitter::Equal => "equal",
        Jitter::Full => "full",
        Jitter::None => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backoff_is_told_in_words() {
        assert_eq!(backoff(&Backoff::default()), "1s, times 2, at most 10m");
        let list = Backoff::List {
            waits_ms: vec![1_000, 60_000],
        };
        assert_eq!(backoff(&list), "1s, then 1m");
    }
}
