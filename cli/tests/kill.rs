//! The broker is killed in the middle of publishing, of acknowledging and of dead-lettering; then
//! everything that was acknowledged is compared with everything that is found.
//!
//! `MILLPOND_KILL_ROUNDS` says how often each test kills; the default keeps the suite short.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;
use std::process::Stdio;

use common::{Broker, Running};
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
    assert_eq!(seen, (0..total).collect());
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
    assert_eq!(seen, (0..total).collect());
    let letters = broker.json("dead-letters list orders work");
    let letters = letters.as_array().unwrap();
    let sources: Vec<u64> = letters
        .iter()
        .map(|letter| letter["source_offset"].as_u64().unwrap())
        .collect();
    assert_eq!(sources.len() as u64, total);
    assert_eq!(sources.into_iter().collect::<BTreeSet<_>>(), seen);
    for letter in letters {
        assert_eq!(letter["attempts"], 3, "{letter}");
        assert_eq!(letter["reason"], "max_attempts", "{letter}");
    }
    let left = broker.json("subscription show orders work");
    assert_eq!(
        (&left["backlog"], &left["dead"]),
        (&json!(0), &json!(total))
    );
}

/// Reads what a receiver prints, kills the broker after each `every` messages, and returns the
/// offsets that were seen once the receiver has nothing more to come.
fn receive_and_kill(
    command: std::process::Command,
    broker: &mut Broker,
    every: u64,
) -> BTreeSet<u64> {
    let mut receiver = Running::start(command);
    let (mut seen, mut printed, mut kills) = (BTreeSet::new(), 0, 0);
    while let Some(line) = receiver.line() {
        let message: Value = serde_json::from_str(&line).unwrap();
        seen.insert(message["offset"].as_u64().unwrap());
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
