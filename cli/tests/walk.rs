//! The way of a message from a file to a failing worker, to the dead letters and back.

mod common;

use std::fs;

use common::{Broker, Run, text};
use serde_json::{Value, json};

#[test]
fn a_failing_message_is_tried_ever_later_then_dead_then_redriven() {
    let broker = Broker::fresh();
    let folder = tempfile::tempdir().unwrap();
    let (input, tries) = (folder.path().join("input"), folder.path().join("tries"));
    fs::write(&input, "good\nbad\nfine\n").unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders work --max-attempts 4 --backoff-initial 100ms --backoff-multiplier 2 --jitter none");
    let sent = broker.json(&format!("send orders --key k --file {}", input.display()));
    assert_eq!(
        sent,
        json!({"appended": 3, "duplicates": 0, "first_offset": 0, "last_offset": 2})
    );

    let worker = format!(
        "read -r line; test $line != bad && exit 0; date +%s%N >> {}; echo no luck >&2; exit 9",
        tries.display()
    );
    let mut command = broker.command("receive orders work --timeout 3s --concurrency 2");
    let done = Run::of(&command.arg("--exec").arg(worker).output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let at: Vec<u64> = fs::read_to_string(&tries)
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    let waits_ms: Vec<u64> = at
        .windows(2)
        .map(|two| (two[1] - two[0]) / 1_000_000)
        .collect();
    assert_eq!(waits_ms.len(), 3, "four attempts");
    for (wait_ms, least_ms) in waits_ms.iter().zip([100, 200, 400]) {
        assert!(*wait_ms >= least_ms, "{waits_ms:?}");
    }

    let letters = broker.json("dead-letters list orders work");
    assert_eq!(letters.as_array().unwrap().len(), 1);
    let letter = &letters[0];
    assert_eq!(letter["source_offset"], 1);
    assert_eq!(letter["attempts"], 4);
    assert_eq!(letter["deliveries"], 4);
    assert_eq!(letter["reason"], "max_attempts");
    assert_eq!(letter["error"], "no luck");
    assert_eq!(letter["key"], "k");
    assert_eq!(letter["payload"], "bad");
    assert!(text(&letter["first_attempt_at"]) < text(&letter["dead_at"]));
    assert!(!letter["history"].as_array().unwrap().is_empty());

    let redrive = broker.json("dead-letters redrive orders work --all --wait");
    assert_eq!(
        (&redrive["done"], &redrive["finished"]),
        (&json!(1), &json!(true))
    );
    let again = broker.good("receive orders work --timeout 500ms --output json");
    let again = again.json_lines();
    assert_eq!(again.len(), 1);
    assert_eq!(
        (&again[0]["offset"], &again[0]["attempt"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(broker.json("dead-letters list orders work"), json!([]));
}

#[test]
fn what_stands_behind_many_gaps_is_shown_as_if_there_were_none() {
    let broker = Broker::fresh();
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("input");
    // More than a page of dead letters looks through.
    let total = 10_001;
    fs::write(&input, "x\n".repeat(total)).unwrap();
    broker.good("topic create orders");
    for name in ["work", "audit"] {
        let shared = "--max-attempts 1 --dead-letter dead";
        broker.good(&format!("subscription create orders {name} {shared}"));
    }
    broker.good(&format!("send orders --file {}", input.display()));
    broker.good(&format!("receive orders work --nack --count {total}"));
    broker.good("receive orders audit --nack --count 1");

    let letters = broker.json("dead-letters list orders audit");
    assert_eq!(letters.as_array().unwrap().len(), 1);
    assert_eq!(letters[0]["offset"], total);
    let table = broker.good("dead-letters list orders audit").out;
    assert!(table.starts_with("OFFSET"), "{table}");

    broker.good("dead-letters purge orders work --all");
    let table = broker.good("peek dead").out;
    assert!(table.starts_with("OFFSET"), "{table}");
    broker.good("dead-letters purge orders audit --all");
    assert_eq!(broker.good("peek dead").out, "no messages\n");
    let none = broker.good("dead-letters list orders audit").out;
    assert_eq!(none, "no dead letters\n");
    let none = broker.json("dead-letters list orders audit");
    assert_eq!(none, json!([]));
}

#[test]
fn sending_the_same_file_twice_adds_only_what_is_missing() {
    let broker = Broker::fresh();
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("input");
    broker.good("topic create orders");
    let send = format!(
        "send orders --producer-id loader --first-sequence 1 --file {}",
        input.display()
    );
    fs::write(&input, "a\nb\nc\n").unwrap();
    assert_eq!(broker.json(&send)["appended"], 3);
    fs::write(&input, "a\nb\nc\nd\n").unwrap();
    let second = broker.json(&send);
    assert_eq!(
        second,
        json!({"appended": 1, "duplicates": 3, "first_offset": 3, "last_offset": 3})
    );
    let third = broker.json("send orders e --producer-id loader");
    assert_eq!(
        (&third["appended"], &third["first_offset"]),
        (&json!(1), &json!(4))
    );
    let payloads: Vec<String> = broker.messages("orders").into_iter().map(|m| m.1).collect();
    assert_eq!(payloads, ["a", "b", "c", "d", "e"]);
}

#[test]
fn a_received_message_has_what_scripts_rely_on() {
    let broker = Broker::fresh();
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("input");
    fs::write(&input, b"text\n\xff\xfe\n").unwrap();
    broker.good("topic create orders");
    broker.good(&format!(
        "send orders --key k --header color=red --file {}",
        input.display()
    ));
    let received = broker
        .good("receive orders work --create --count 2 --output json")
        .json_lines();
    assert_eq!(received[0]["offset"], 0);
    assert_eq!(received[0]["attempt"], 1);
    assert_eq!(received[0]["key"], "k");
    assert_eq!(received[0]["headers"]["color"], "red");
    assert_eq!(received[0]["payload"], "text");
    assert_eq!(received[1].get("payload"), None);
    assert_eq!(received[1]["payload_base64"], "//4=");
}

#[test]
fn released_messages_come_again_and_nacked_ones_later() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work --backoff-initial 300ms --jitter none");
    broker.good("send orders a");
    let attempt = |how: &str| -> Value {
        let run = broker.good(&format!(
            "receive orders work --count 1 {how} --output json"
        ));
        run.json_lines()[0]["attempt"].clone()
    };
    assert_eq!(attempt("--release"), 1);
    assert_eq!(attempt("--nack"), 1);
    assert_eq!(attempt("--ack"), 2);
    let left = broker.json("subscription show orders work");
    assert_eq!((&left["backlog"], &left["dead"]), (&json!(0), &json!(0)));
}

#[test]
fn receiving_a_count_takes_no_message_more() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work --max-attempts 1");
    broker.good("send orders a b c d e f");
    assert_eq!(broker.good("receive orders work --count 2").out, "a\nb\n");
    broker.good("receive orders work --exec true --count 1");
    // What was handed back would have been delivered twice.
    broker.good("receive orders work --nack --count 3");
    let letters = broker.json("dead-letters list orders work");
    let letters = letters.as_array().unwrap();
    assert_eq!(letters.len(), 3);
    assert!(
        letters.iter().all(|letter| letter["deliveries"] == 1),
        "{letters:?}"
    );
}

#[test]
fn a_stream_is_read_in_order_and_goes_on_where_it_was_committed() {
    let broker = Broker::fresh();
    broker.good("topic create events");
    broker.good("subscription create events audit --mode stream");
    broker.good("send events a b c d");
    assert_eq!(broker.good("receive events audit --count 2").out, "a\nb\n");
    assert_eq!(
        broker.good("receive events audit --timeout 500ms").out,
        "c\nd\n"
    );
}

#[test]
fn status_fits_a_terminal_and_tells_scripts_everything() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    broker.good("send orders a b");
    let status = broker.json("status");
    assert_eq!(status["ready"], true);
    assert_eq!(status["topics"][0]["name"], "orders");
    assert_eq!(status["subscriptions"][0]["backlog"], 2);
    assert!(status["log"]["durable"].as_u64().unwrap() > 0);
    let human = broker.good("status").out;
    assert!(human.contains("orders/work"), "{human}");
    assert!(
        human.lines().all(|line| line.chars().count() <= 100),
        "{human}"
    );
}

#[test]
fn a_clean_end_leaves_a_log_that_verifies_and_dumps() {
    let mut broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("send orders hello");
    assert_eq!(broker.terminate(), Some(0));
    let verify = broker.json(&format!("log verify {}", broker.data.display()));
    assert_eq!(
        (&verify["good"], &verify["findings"]),
        (&json!(true), &json!([]))
    );
    let dump = broker
        .good(&format!("log dump {}", broker.data.display()))
        .out;
    assert!(
        dump.contains("TopicCreate") && dump.contains("hello"),
        "{dump}"
    );
}
