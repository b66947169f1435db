//! What people do on a command line while their broker is killed and started again.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Broker, Running, WAIT_MAX, signal, text};
use crate::{lines, rounds};

#[test]
fn a_file_whose_sender_and_broker_were_killed_is_sent_again_and_is_there_once() {
    let total = 4_000 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    let path = input.path().display();
    let send =
        format!("send orders --file {path} --producer-id p --first-sequence 1 --output json");
    for round in 0..rounds() {
        // The beginning of the same file, by a pipe that shows how far it is.
        let mut command = broker.command(&send.replace(&format!("--file {path}"), "-"));
        command.stdin(Stdio::piped());
        let mut sender = Running::start(command);
        let mut pipe = sender.child.stdin.take().unwrap();
        let (alive, dead) = (4_000 * round + 2_500, 4_000 * round + 4_000);
        pipe.write_all(lines(0, alive).as_bytes()).unwrap();
        broker.wait_for_offset("orders", 4_000 * round + 500 * (round % 5));
        broker.kill();
        pipe.write_all(lines(alive, dead).as_bytes()).unwrap();
        sender.child.kill().unwrap();
        drop(pipe);
        sender.end();
        broker.restart();
    }
    let kept = broker.json("topic show orders")["next_offset"].clone();
    let told = broker.good(&send).json();
    assert_eq!(told["duplicates"], kept, "what was there is recognised");
    assert_eq!(told["appended"], json!(total - kept.as_u64().unwrap()));
    let expected: Vec<(u64, String)> = (0..total).map(|n| (n, format!("message {n}"))).collect();
    assert!(
        broker.messages("orders") == expected,
        "gaps, losses or copies"
    );
}

#[test]
fn commands_that_run_while_the_broker_is_killed_are_charged_nothing() {
    let total = 60 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    broker.good(&format!("send orders --file {}", input.path().display()));
    let mut command = broker.command("receive orders work --concurrency 4");
    // Each runs long enough that some are always in the middle of it.
    let script = "echo $MILLPOND_OFFSET $MILLPOND_ATTEMPT; sleep 0.02";
    command.args(["--exec", script, "--count", &total.to_string()]);
    let mut receiver = Running::start(command);
    let mut runs = BTreeMap::<u64, u64>::new();
    let (mut started, mut kills) = (0, 0);
    while let Some(line) = receiver.line() {
        let (offset, attempt) = line.split_once(' ').unwrap();
        assert_eq!(attempt, "1", "offset {offset} was charged for a kill");
        *runs.entry(offset.parse().unwrap()).or_default() += 1;
        started += 1;
        if started % 50 == 0 && kills < rounds() {
            kills += 1;
            broker.kill();
            broker.restart();
        }
    }
    assert_eq!((receiver.end().0, kills), (0, rounds()));
    // A message whose hand-out died with the broker has run twice, and another is left for that.
    let again: u64 = runs.values().map(|times| times - 1).sum();
    assert_eq!(started, total);
    let left = broker.json("subscription show orders work");
    assert!(left["backlog"].as_u64().unwrap() <= again, "{left}");
    assert_eq!(left["in_flight"], 0, "the receiver has closed: {left}");
    assert_eq!(left["dead"], 0, "{left}");
}

#[test]
fn a_redrive_that_is_killed_half_way_goes_on_and_loses_and_doubles_nothing() {
    let total = 200 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders work --max-attempts 1");
    broker.good(&format!("send orders --file {}", input.path().display()));
    broker.good(&format!("receive orders work --nack --count {total}"));
    assert_eq!(
        broker.wait_for_empty("orders", "work")["dead"],
        json!(total)
    );
    let redrive = "dead-letters redrive orders work --all --rate 100 --wait --output json";
    let mut waiting = Running::start(broker.command(redrive));
    let (mut kills, mut dead, mut half_way) = (0, total, 0);
    while kills < rounds() && dead > 0 {
        dead = wait_for_dead_below(&broker, total, dead);
        broker.kill();
        broker.restart();
        kills += 1;
        half_way += u64::from(dead > 0);
    }
    assert!(half_way > 0, "the redrive was over before the first kill");
    let job: Value = serde_json::from_str(&waiting.line().unwrap()).unwrap();
    assert_eq!(
        (&job["done"], &job["finished"]),
        (&json!(total), &json!(true))
    );
    assert_eq!(waiting.end().0, 0);
    wait_for_dead_below(&broker, total, 1);
    let receive = format!("receive orders work --count {total} --timeout 10s --output json");
    let messages = broker.good(&receive).json_lines();
    let mut offsets: Vec<u64> = messages
        .iter()
        .map(|message| message["offset"].as_u64().unwrap())
        .collect();
    offsets.sort_unstable();
    assert!(offsets.into_iter().eq(0..total), "lost or doubled");
    assert!(messages.iter().all(|message| message["attempt"] == 1));
    assert_eq!(broker.json("dead-letters list orders work"), json!([]));
    assert_eq!(
        broker.wait_for_empty("orders", "work")["floor"],
        json!(total)
    );
}

/// Waits until fewer letters than `below` are dead; every message is dead or waits, never both.
fn wait_for_dead_below(broker: &Broker, total: u64, below: u64) -> u64 {
    let (mut least, mut deadline) = (u64::MAX, Instant::now() + WAIT_MAX);
    loop {
        let view = broker.json("subscription show orders work");
        let (dead, backlog) = (view["dead"].as_u64(), view["backlog"].as_u64());
        let (dead, backlog) = (dead.unwrap(), backlog.unwrap());
        assert_eq!(dead + backlog, total, "{view}");
        if dead < below {
            return dead;
        }
        if dead < least {
            (least, deadline) = (dead, Instant::now() + WAIT_MAX);
        }
        assert!(
            Instant::now() < deadline,
            "the redrive stands still: {view}"
        );
    }
}

#[test]
fn a_stream_read_over_kills_leaves_nothing_out_and_steps_back_only_to_its_commit() {
    let total = 300 * (rounds() + 1);
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders audit --mode stream");
    broker.good(&format!("send orders --file {}", input.path().display()));
    let mut receiver = Running::start(broker.command("receive orders audit --output json"));
    let (mut next, mut back, mut printed, mut kills) = (0, 0, 0, 0);
    while next < total {
        let line = receiver
            .line()
            .expect("it reads on until it is told to end");
        let message: Value = serde_json::from_str(&line).unwrap();
        let offset = message["offset"].as_u64().unwrap();
        assert_eq!(text(&message["payload"]), format!("message {offset}"));
        assert!(offset <= next, "{next} to before {offset} were left out");
        // Every message is committed before the next one is printed.
        assert!(offset + 1 >= next, "{offset} came again, {next} was next");
        back += u64::from(offset < next);
        next = offset + 1;
        printed += 1;
        if printed % 250 == 0 && kills < rounds() {
            kills += 1;
            broker.kill();
            broker.restart();
        }
    }
    assert_eq!(
        broker.wait_for_empty("orders", "audit")["floor"],
        json!(total)
    );
    signal(receiver.child.id(), "TERM");
    assert_eq!((receiver.end().0, kills), (0, rounds()));
    assert!(back <= kills, "{back} steps back for {kills} kills");
}

#[test]
fn delayed_messages_come_when_they_are_due_however_often_the_broker_was_killed() {
    const DELAY: Duration = Duration::from_secs(4);
    let total = 100;
    let (mut broker, input) = (Broker::fresh(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(input.path(), lines(0, total)).unwrap();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    let sent_at = Instant::now();
    let path = input.path().display();
    broker.good(&format!("send orders --file {path} --delay 4s"));
    let mut receiver =
        Running::start(broker.command(&format!("receive orders work --count {total}")));
    broker.wait_for_consumers("orders", "work", 1);
    for _ in 0..rounds() {
        broker.kill();
        broker.restart();
    }
    for _ in 0..total {
        receiver.line().expect("every message comes");
        assert!(sent_at.elapsed() >= DELAY, "early: {:?}", sent_at.elapsed());
    }
    assert_eq!(receiver.end().0, 0);
    assert_eq!(
        broker.wait_for_empty("orders", "work")["floor"],
        json!(total)
    );
}
