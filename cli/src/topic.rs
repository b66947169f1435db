//! `millpond topic …`

use clap::{Args, Subcommand, ValueEnum};
use millpond_client::Client;
use millpond_protocol::control::TopicView;
use millpond_protocol::policy::{OnLimit, TopicConfig, TopicPatch};
use serde_json::{Value, json};

use crate::duration;
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Column, Format};
use crate::size;

#[derive(Debug, Subcommand)]
pub enum TopicCommand {
    /// Create a topic.
    Create {
        name: String,
        #[command(flatten)]
        policy: CreateArgs,
    },
    /// List every topic.
    List,
    /// Show one topic.
    Show { name: String },
    /// Change a topic's policy; what is not named stays.
    Update {
        name: String,
        #[command(flatten)]
        policy: UpdateArgs,
    },
    /// Remove every message of a topic. Offsets go on where they were.
    Purge { name: String },
    /// Delete a topic with its subscriptions.
    Delete {
        name: String,
        /// Also when dead letters of its subscriptions are left.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// How long finished messages are kept for replay [default: not beyond need].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    retention: Option<u64>,
    /// Most bytes of messages kept [default: no limit but the disk].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    max_bytes: Option<u64>,
    /// Most messages kept [default: no limit].
    #[arg(long, value_name = "N")]
    max_messages: Option<u64>,
    /// What happens at the limit [default: refuse-publish].
    #[arg(long, value_name = "WHAT", value_enum)]
    on_limit: Option<OnLimitArg>,
    /// Time to live of a message that names none [default: for ever].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    ttl: Option<u64>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct UpdateArgs {
    /// How long finished messages are kept for replay; 0: not beyond need.
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    retention: Option<u64>,
    /// Most bytes of messages kept, or `none`.
    #[arg(long, value_name = "SIZE|none", value_parser = parse_bytes_limit)]
    max_bytes: Option<Limit>,
    /// Most messages kept, or `none`.
    #[arg(long, value_name = "N|none", value_parser = parse_count_limit)]
    max_messages: Option<Limit>,
    /// What happens at the limit.
    #[arg(long, value_name = "WHAT", value_enum)]
    on_limit: Option<OnLimitArg>,
    /// Time to live of a message that names none, or `none`.
    #[arg(long, value_name = "D|none", value_parser = parse_duration_limit)]
    ttl: Option<Limit>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLimitArg {
    /// Publishes are refused until consumers catch up.
    #[value(alias = "refuse_publish")]
    RefusePublish,
    /// The oldest unfinished messages become dead letters.
    #[value(alias = "dead_letter")]
    DeadLetter,
    /// The oldest messages go, finished or not.
    Drop,
}

impl From<OnLimitArg> for OnLimit {
    fn from(arg: OnLimitArg) -> Self {
        match arg {
            OnLimitArg::RefusePublish => Self::RefusePublish,
            OnLimitArg::DeadLetter => Self::DeadLetter,
            OnLimitArg::Drop => Self::Drop,
        }
    }
}

/// A limit that an update sets or takes away.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    At(u64),
    Unlimited,
}

impl Limit {
    /// As the protocol's patches say it.
    #[must_use]
    pub const fn value(self) -> Option<u64> {
        match self {
            Self::At(limit) => Some(limit),
            Self::Unlimited => None,
        }
    }
}

/// Reads a duration or `none`.
pub fn parse_duration_limit(text: &str) -> Result<Limit, duration::DurationError> {
    limit(text, duration::parse_ms)
}

fn parse_bytes_limit(text: &str) -> Result<Limit, size::SizeError> {
    limit(text, size::parse)
}

fn parse_count_limit(text: &str) -> Result<Limit, std::num::ParseIntError> {
    limit(text, str::parse)
}

fn limit<E>(text: &str, parse: impl FnOnce(&str) -> Result<u64, E>) -> Result<Limit, E> {
    match text {
        "none" => Ok(Limit::Unlimited),
        _ => parse(text).map(Limit::At),
    }
}

impl CreateArgs {
    fn config(&self) -> TopicConfig {
        TopicConfig {
            retention_ms: self.retention.unwrap_or_default(),
            max_bytes: self.max_bytes,
            max_messages: self.max_messages,
            on_limit: self.on_limit.map(OnLimit::from).unwrap_or_default(),
            ttl_ms: self.ttl,
        }
    }
}

impl UpdateArgs {
    fn patch(&self) -> TopicPatch {
        TopicPatch {
            retention_ms: self.retention,
            max_bytes: self.max_bytes.map(Limit::value),
            max_messages: self.max_messages.map(Limit::value),
            on_limit: self.on_limit.map(OnLimit::from),
            ttl_ms: self.ttl.map(Limit::value),
        }
    }
}

/// Does what the command says.
pub async fn run(command: TopicCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        TopicCommand::Create { name, policy } => {
            let config = policy.config();
            config.check()?;
            let view = client.create_topic(&name, config).await?;
            told(format, &view, &format!("created topic {name}"))
        }
        TopicCommand::List => {
            let views = client.list_topics().await?;
            match format {
                Format::Json => output::json(&views.iter().map(to_json).collect()),
                Format::Human => table(&views),
            }
        }
        TopicCommand::Show { name } => {
            let view = client.topic(&name).await?;
            match format {
                Format::Json => output::json(&to_json(&view)),
                Format::Human => show(&view),
            }
        }
        TopicCommand::Update { name, policy } => {
            let view = client.update_topic(&name, policy.patch()).await?;
            told(format, &view, &format!("updated topic {name}"))
        }
        TopicCommand::Purge { name } => {
            client.purge_topic(&name).await?;
            output::done(format, &format!("purged topic {name}"))
        }
        TopicCommand::Delete { name, force } => {
            client.delete_topic(&name, force).await?;
            output::done(format, &format!("deleted topic {name}"))
        }
    }
}

fn told(format: Format, view: &TopicView, sentence: &str) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&to_json(view)),
        Format::Human => output::line(sentence),
    }
}

/// A topic as scripts see it.
#[must_use]
pub fn to_json(view: &TopicView) -> Value {
    json!({
        "name": view.name,
        "first_offset": view.first,
        "next_offset": view.next,
        "bytes": view.bytes,
        "delayed": view.delayed,
        "subscriptions": view.subscriptions,
        "dead_letters": view.dead_letters,
        "created_at": moment::rfc3339(view.created_at),
        "config": view.config,
    })
}

/// Topics as people see them.
pub fn table(views: &[TopicView]) -> Result<(), Failure> {
    let columns = [
        Column::Left("TOPIC"),
        Column::Right("FIRST"),
        Column::Right("NEXT"),
        Column::Right("SIZE"),
        Column::Right("DELAYED"),
        Column::Right("SUBSCRIPTIONS"),
        Column::Right("DEAD LETTERS"),
    ];
    let row = |view: &TopicView| {
        vec![
            view.name.clone(),
            view.first.to_string(),
            view.next.to_string(),
            size::format(view.bytes),
            view.delayed.to_string(),
            view.subscriptions.to_string(),
            view.dead_letters
                .map_or_else(String::new, |n| n.to_string()),
        ]
    };
    output::table(&columns, views.iter().map(row), "no topics")
}

fn show(view: &TopicView) -> Result<(), Failure> {
    let config = &view.config;
    let none = || "none".to_owned();
    let mut facts = vec![
        ("topic", view.name.clone()),
        ("offsets", format!("{} to before {}", view.first, view.next)),
        ("size", size::format(view.bytes)),
        ("delayed", view.delayed.to_string()),
        ("subscriptions", view.subscriptions.to_string()),
        ("created", moment::short(view.created_at)),
        ("retention", duration::format_ms(config.retention_ms)),
        (
            "max bytes",
            config.max_bytes.map_or_else(none, size::format),
        ),
        (
            "max messages",
            config.max_messages.map_or_else(none, |n| n.to_string()),
        ),
        ("on limit", on_limit(config.on_limit).to_owned()),
        ("ttl", config.ttl_ms.map_or_else(none, duration::format_ms)),
    ];
    if let Some(letters) = view.dead_letters {
        facts.push(("dead letters", letters.to_string()));
    }
    output::facts(&facts)
}

const fn on_limit(policy: OnLimit) -> &'static str {
    match policy {
        OnLimit::RefusePublish => "refuse-publish",
        OnLimit::DeadLetter => "dead-letter",
        OnLimit::Drop => "drop",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_takes_a_limit_away() {
        assert_eq!(parse_bytes_limit("none"), Ok(Limit::Unlimited));
        assert_eq!(parse_bytes_limit("1KiB"), Ok(Limit::At(1_024)));
        assert_eq!(parse_duration_limit("1m"), Ok(Limit::At(60_000)));
        assert!(parse_count_limit("several").is_err());
    }
}
