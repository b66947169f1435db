//! The broker is killed in the middle of publishing, of acknowledging, of retrying, of dead-lettering, and
//! under all of it at once; then everything that was acknowledged is compared with what is found.
//!
//! `MILLPOND_KILL_ROUNDS` says how often each test kills; the default keeps the suite short.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod restarts;
mod retries;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write;
use std::process::Stdio;

use common::{Broker, Running, text};
use jiff::Timestamp;
use serde_json::{Value, json};

fn rounds() -> u64 {
    let given = std::env::var("MILLPOND_KILL_ROUNDS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(3)
}

fn lines(from: u64, to: u64) -> String {
    (from..to).fold(String::new(), |mut text, number| {
        writeln!(text, "message {number}").unwrap();
        text
    })
}

#[test]
fn killed_while_publishing_nothing_is_lost_or_doubled() {
    let mut broker = Broker::fresh();
    broker.good("topic create orders");
    let mut command = broker.command("send orders - --producer-id p --output json");
    command.stdin(Stdio::piped());
    let mut send = Running::start(command);
    let mut input = send.child.stdin.take().unwrap();
    let mut total = 0;
    for round in 0..rounds() {
        let (before, after) = (1_000 + 700 * (round % 5), 300);
        input
            .write_all(lines(total, total + before).as_bytes())
            .unwrap();
        broker.wait_for_offset("orders", total);
        broker.kill();
        total += before;
        input
            .write_all(lines(total, total + after).as_bytes())
            .unwrap();
        broker.restart();
        total += after;
    }
    drop(input);
    let (code, out) = send.end();
    assert_eq!(code, 0, "{out}");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&told["appended"], &told["duplicates"]),
        (&json!(total), &json!(0))
    );
    let expected: Vec<(u64, String)> = (0..total).map(|n| (n, format!("message {n}"))).collect();
    assert!(
        broker.messages("orders") == expected,
        "gaps, losses or copies"
    );
}

#[test]
fn killed_while_acknowledging_every_message_is_seen_and_none_is_left() {
    let total = 500 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    broker.good(&format!("send orders --file {}", input.path().display()));
    let command = broker.command("receive orders work --timeout 12s --output json");
    let seen = receive_and_kill(command, &mut broker, 400);
    assert!(seen.keys().copied().eq(0..total));
    let attempts = seen.values().flatten();
    assert!(attempts.copied().all(|attempt| attempt == 1), "charged");
    let left = broker.json("subscription show orders work");
    let counts = ["backlog", "in_flight", "scheduled", "dead"].map(|name| left[name].clone());
    assert_eq!(counts, [json!(0), json!(0), json!(0), json!(0)]);
    assert_eq!(left["floor"], json!(total));
}

#[test]
fn killed_while_dead_lettering_each_message_is_dead_exactly_once() {
    let total = 300 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker
        .good("subscription create orders work --max-attempts 3 --backoff-list 10ms --jitter none");
    broker.good(&format!("send orders --file {}", input.path().display()));
    let command = broker.command("receive orders work --nack --timeout 12s --output json");
    let seen = receive_and_kill(command, &mut broker, 500);
    assert!(seen.keys().copied().eq(0..total));
    for (offset, attempts) in &seen {
        // One is seen twice if its nack was lost with the broker; none is left out.
        let steps: BTreeSet<u64> = attempts.iter().copied().collect();
        assert!(
            attempts.is_sorted() && steps.into_iter().eq(1..=3),
            "{offset}: {attempts:?}"
        );
    }
    let letters = broker.json("dead-letters list orders work");
    let letters = letters.as_array().unwrap();
    let sources: Vec<u64> = letters
        .iter()
        .map(|letter| letter["source_offset"].as_u64().unwrap())
        .collect();
    assert_eq!(sources.len() as u64, total);
    let sources: BTreeSet<u64> = sources.into_iter().collect();
    assert!(sources.iter().eq(seen.keys()));
    for letter in letters {
        assert_eq!(letter["attempts"], 3, "{letter}");
        assert_eq!(letter["reason"], "max_attempts", "{letter}");
        let history = letter["history"].as_array().unwrap();
        let at = |item: &Value| text(&item["at"]).parse::<Timestamp>().unwrap();
        let times: Vec<Timestamp> = history.iter().map(at).collect();
        let waits: Vec<i64> = times
            .windows(2)
            .map(|two| wait_us(two[0], two[1]))
            .collect();
        assert_eq!(waits.len(), 2, "{letter}");
        assert!(waits.iter().all(|us| *us >= BACKOFF_US), "early: {letter}");
    }
    let left = broker.json("subscription show orders work");
    assert_eq!(
        (&left["backlog"], &left["dead"]),
        (&json!(0), &json!(total))
    );
}

/// The backoff of the dead-lettering test.
const BACKOFF_US: i64 = 10_000;

fn wait_us(from: Timestamp, to: Timestamp) -> i64 {
    to.as_microsecond() - from.as_microsecond()
}

/// Offset by offset, the attempts that were seen.
type Seen = BTreeMap<u64, Vec<u64>>;

/// Reads what a receiver prints, kills the broker after each `every` messages, and returns what was
/// seen once the receiver has nothing more to come.
fn receive_and_kill(command: std::process::Command, broker: &mut Broker, every: u64) -> Seen {
    let mut receiver = Running::start(command);
    let (mut seen, mut printed, mut kills) = (Seen::new(), 0, 0);
    while let Some(line) = receiver.line() {
        let message: Value = serde_json::from_str(&line).unwrap();
        let attempts = seen.entry(message["offset"].as_u64().unwrap()).or_default();
        attempts.push(message["attempt"].as_u64().unwrap());
        printed += 1;
        if printed % every == 0 && kills < rounds() {
            kills += 1;
            broker.kill();
            broker.restart();
        }
    }
    let (code, _) = receiver.end();
    assert_eq!((code, kills), (0, rounds()));
    seen
}
