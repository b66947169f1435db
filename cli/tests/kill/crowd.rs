//! Several producers and several consumers at once while the broker is killed and stopped in turn.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{ChildStdin, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::common::{Broker, Running, signal};
use crate::rounds;

const PRODUCERS: u64 = 3;
const CONSUMERS: u64 = 3;
/// Messages of one producer between two kills, and after the last.
const CHUNK: u64 = 400;

#[test]
fn killed_and_stopped_under_several_producers_and_consumers_everything_is_there_once_and_done() {
    let mut broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    // Nobody reads this one, so that everything is kept.
    broker.good("subscription create orders keep");
    let mut senders: Vec<_> = (0..PRODUCERS).map(|id| sender(&broker, id)).collect();
    let receivers: Vec<_> = (0..CONSUMERS).map(|_| receiver(&broker)).collect();
    broker.wait_for_consumers("orders", "work", CONSUMERS);
    for round in 0..=rounds() {
        let sent = round * CHUNK;
        for (id, (_, input)) in (0..).zip(&mut senders) {
            write(input, id, sent, sent + CHUNK);
        }
        if round < rounds() {
            // Each time at another point of the chunk; at first when everybody has come.
            let point = match round {
                0 => PRODUCERS * CHUNK - 1,
                _ => 1 + 211 * (round % 5),
            };
            broker.wait_for_offset("orders", PRODUCERS * sent + point);
            match round % 3 {
                2 => assert_eq!(broker.terminate(), Some(0)),
                _ => broker.kill(),
            }
            broker.restart();
        }
    }
    let each = CHUNK * (rounds() + 1);
    for (running, input) in senders {
        drop(input);
        let (code, out) = running.end();
        assert_eq!(code, 0, "{out}");
        let told: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(
            (&told["appended"], &told["duplicates"]),
            (&json!(each), &json!(0))
        );
    }
    let left = broker.wait_for_empty("orders", "work");
    assert_eq!(
        (&left["dead"], &left["floor"]),
        (&json!(0), &json!(PRODUCERS * each))
    );
    let seen: BTreeSet<u64> = receivers.into_iter().flat_map(stopped).collect();
    assert!(
        seen.into_iter().eq(0..PRODUCERS * each),
        "a message was never handed out"
    );
    once_in_order(&broker.messages("orders"), each);
}

/// Every producer's messages are there once, in the order in which it sent them.
fn once_in_order(messages: &[(u64, String)], each: u64) {
    assert!(
        messages
            .iter()
            .map(|(offset, _)| *offset)
            .eq(0..PRODUCERS * each)
    );
    let mut next = BTreeMap::new();
    for (offset, payload) in messages {
        let (id, number) = payload.split_once(' ').unwrap();
        let next = next.entry(id.to_owned()).or_insert(0_u64);
        assert_eq!(number, next.to_string(), "offset {offset} of producer {id}");
        *next += 1;
    }
    assert_eq!(next.len() as u64, PRODUCERS);
}

/// The first producer has no id: the broker names it, and knows it again after a restart.
fn sender(broker: &Broker, id: u64) -> (Running, ChildStdin) {
    let line = match id {
        0 => "send orders - --output json".to_owned(),
        _ => format!("send orders - --producer-id p{id} --output json"),
    };
    let mut command = broker.command(&line);
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    let input = running.child.stdin.take().unwrap();
    (running, input)
}

fn write(input: &mut ChildStdin, id: u64, from: u64, to: u64) {
    let lines: String = (from..to)
        .map(|number| format!("{id} {number}\n"))
        .collect();
    input.write_all(lines.as_bytes()).unwrap();
}

/// A receiver whose lines are read by a thread, which returns its exit code and the offsets.
struct Receiver {
    pid: u32,
    reading: JoinHandle<(i32, Vec<u64>)>,
}

fn receiver(broker: &Broker) -> Receiver {
    let command = broker.command("receive orders work --output json");
    let mut running = Running::start(command);
    let pid = running.child.id();
    let reading = std::thread::spawn(move || {
        let mut offsets = Vec::new();
        while let Some(line) = running.line() {
            let message: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(message["attempt"], 1, "a kill charges nothing: {message}");
            offsets.push(message["offset"].as_u64().unwrap());
        }
        (running.end().0, offsets)
    });
    Receiver { pid, reading }
}

fn stopped(receiver: Receiver) -> Vec<u64> {
    signal(receiver.pid, "TERM");
    let (code, offsets) = receiver.reading.join().unwrap();
    assert_eq!(code, 0, "a receiver that is asked to end");
    offsets
}
