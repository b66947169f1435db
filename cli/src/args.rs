//! The command line as a whole: options that every command takes, and the list of commands. Each
//! command's own options stand in its own file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::output::Format;
use crate::{dead_letters, log, peek, receive, send, serve, subscription, token, topic};

/// Where a broker on this machine listens unless told otherwise.
pub const DEFAULT_SERVER: &str = "millpond://127.0.0.1:7400";
/// The data folder unless told otherwise.
pub const DEFAULT_DATA: &str = "./millpond-data";

/// Millpond, a durable message queue with retry semantics: the broker and its client commands.
#[derive(Debug, Parser)]
#[command(name = "millpond", version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes, before or behind its name.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Common options")]
pub struct Global {
    /// The broker's address.
    #[arg(long, global = true, value_name = "URL", env = "MILLPOND_SERVER", default_value = DEFAULT_SERVER)]
    pub server: String,
    /// The broker's data folder; client commands find its CA there [default: ./millpond-data].
    #[arg(long, global = true, value_name = "DIR", env = "MILLPOND_DATA")]
    pub data: Option<PathBuf>,
    /// The certificate (PEM) of the authority that signed the broker's certificate.
    #[arg(long, global = true, value_name = "FILE", env = "MILLPOND_CA")]
    pub ca: Option<PathBuf>,
    /// The API token, where the broker wants one.
    #[arg(
        long,
        global = true,
        value_name = "TOKEN",
        env = "MILLPOND_TOKEN",
        hide_env_values = true
    )]
    pub token: Option<String>,
    /// Tables for people, or JSON for scripts.
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        value_enum,
        default_value_t
    )]
    pub output: Format,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the broker.
    Serve(serve::ServeArgs),
    /// Send messages.
    Send(send::SendArgs),
    /// Receive messages, or run a command for each.
    Receive(receive::ReceiveArgs),
    #[command(flatten)]
    Request(RequestCommand),
    /// Check, print and repair the log of a broker that is not running.
    #[command(subcommand)]
    Log(log::LogCommand),
}

/// Commands that ask the broker something, print the answer, and end.
#[derive(Debug, Subcommand)]
pub enum RequestCommand {
    /// Create, look at, change and delete topics.
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Create, look at, change and delete subscriptions.
    #[command(subcommand)]
    Subscription(subscription::SubscriptionCommand),
    /// Look at dead letters, send them back, or throw them away.
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersCommand),
    /// Look at messages of a topic; takes nothing.
    Peek(peek::PeekArgs),
    /// Make, list and revoke API tokens.
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Show how the broker is: topics, subscriptions, log, disk.
    Status,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    success
  1    the request failed and will fail again: unknown topic, refused, bad file
  2    the command line is wrong
  3    the broker cannot be reached, is too busy, or did not answer: try again later
  4    damage was found
  5    only a part of the messages was sent; the output says how many
  130  ended by Ctrl-C; `serve` ends in order, with 0
  143  ended by SIGTERM; `serve` and `receive` end in order, with 0

Durations are written 500ms, 10s, 5m, 2h30m; sizes 4096, 10MiB, 1.5GB; times
2026-01-31T09:30:00Z or `10m ago`.";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("millpond").chain(line.split(' ')))
    }

    #[test]
    fn the_definition_has_no_contradictions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_options_stand_before_or_behind_the_command() {
        let before = parse("--output json --server h:1 status").unwrap();
        let behind = parse("status --output json --server h:1").unwrap();
        assert_eq!(before.global.output, Format::Json);
        assert_eq!(behind.global.output, Format::Json);
        assert_eq!(behind.global.server, "h:1");
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for line in [
            "send orders",
            "send orders text --file f",
            "send orders text --first-sequence 1",
            "send orders text --producer-id p --first-sequence 0",
            "send orders text --header novalue",
            "receive orders work --ack --nack",
            "receive orders work --exec true --ack",
            "receive orders work --concurrency 2",
            "receive orders work --count 0",
            "receive orders work --from latest",
            "subscription create orders work --backoff-list 1s --backoff-max 2s",
            "subscription create orders work --mode heap",
            "subscription update orders work",
            "topic update orders",
            "topic create orders --max-bytes none",
            "dead-letters redrive orders work --all --limit 3",
            "dead-letters purge orders work",
            "peek orders --count many",
        ] {
            assert!(parse(line).is_err(), "{line} must be refused");
        }
    }

    #[test]
    fn every_documented_line_is_understood() {
        for line in [
            "serve --config f --data d --listen 127.0.0.1:0 --http off",
            "topic create orders --retention 7d --max-bytes 10GiB --max-messages 5 --on-limit dead-letter",
            "topic update orders --max-bytes none --on-limit refuse_publish",
            "topic delete orders --force",
            "subscription create orders work --mode queue --max-attempts 3 --max-deliveries 9 --lease 10s --backoff-initial 1s --backoff-multiplier 1.5 --backoff-max 1m --jitter none --dead-letter dead --from earliest",
            "subscription create orders work --mode stream --backoff-list 1s,5s,1m --from 10",
            "subscription seek orders work 2026-01-31T09:30:00Z",
            "subscription pause orders work",
            "send orders a b --producer-id p --first-sequence 7 --delay 1s --ttl 1h --header a=b --header c=d=e --key k",
            "send orders -",
            "send orders --file -",
            "receive orders work --count 3 --timeout 2s --nack --create --from latest",
            "receive orders work --exec cat --concurrency 4",
            "dead-letters redrive orders work --offset 1 --offset 2 --rate 10/s --wait",
            "dead-letters redrive orders work --reason max_attempts --to-topic",
            "dead-letters purge orders work --all",
            "peek orders --offset 3 --count 4",
            "token new ci",
            "token list",
            "token revoke ci",
            "status",
            "log verify d",
            "log dump d",
            "log salvage d --accept-loss",
        ] {
            let parsed = parse(line);
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
    }
}
