//! What a user does wrong, or meets at a bad time: each case has its exit code and a sentence that
//! says what to do.

mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Broker, Running, WAIT_MAX, millpond, run, serve_command, signal};
use serde_json::{Value, json};

#[test]
fn what_does_not_exist_is_refused_for_good() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    for (line, said) in [
        ("send nope hello", "topic create nope"),
        ("receive nope work --create", "nope"),
        ("receive orders nope", "subscription create orders nope"),
        ("topic show nope", "nope"),
        ("dead-letters list orders nope", "nope"),
        ("peek nope", "nope"),
        ("token revoke nope", "no token"),
        ("topic create orders", "exists"),
        ("topic create a/b", "letters, digits"),
        ("send orders hello --header mp-x=1", "reserved"),
    ] {
        let run = broker.run(line);
        assert_eq!(run.code, 1, "{line}: {run:?}");
        assert!(run.err.contains(said), "{line}: {run:?}");
        assert_eq!(run.out, "", "{line}");
    }
}

#[test]
fn a_wrong_command_line_is_told_apart_from_a_refusal() {
    let broker = Broker::fresh();
    for line in [
        "sned orders hello",
        "send orders",
        "send orders hello --delay soon",
        "topic create orders --max-bytes big",
        "subscription create orders work --lease 1ms",
        "status --server no-scheme-no-port",
    ] {
        let run = broker.run(line);
        assert_eq!(run.code, 2, "{line}: {run:?}");
        assert_ne!(run.err, "", "{line}");
    }
    let mut command = broker.command("send orders");
    command.arg(OsStr::from_bytes(b"\xff"));
    let run = run(command);
    assert_eq!(run.code, 2, "{run:?}");
}

#[test]
fn errors_are_json_where_json_is_wanted() {
    let broker = Broker::fresh();
    let refused: Value =
        serde_json::from_str(&broker.run("send nope x --output json").err).unwrap();
    assert_eq!(refused["error"]["code"], 40);
    assert_eq!(refused["error"]["class"], "request_fatal");
    assert_eq!(refused["error"]["retriable"], false);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nope")
    );
    let usage: Value = serde_json::from_str(&broker.run("send --output json").err).unwrap();
    assert_eq!(usage["error"]["class"], "usage");
}

#[test]
fn a_message_of_100_mib_is_refused_and_what_came_before_it_counts() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    let mut file = File::create(&path).unwrap();
    file.write_all(&vec![b'x'; 100 << 20]).unwrap();
    let send = format!("send orders --output json --file {}", path.display());
    let whole = broker.run(&send);
    assert_eq!(whole.code, 1, "{}", whole.err);
    assert!(whole.err.contains("line 1 is longer"), "{}", whole.err);

    let mut file = File::create(&path).unwrap();
    file.write_all(b"small\n").unwrap();
    file.write_all(&vec![b'x'; 17 << 20]).unwrap();
    let part = broker.run(&send);
    assert_eq!(part.code, 5, "{}", part.err);
    assert_eq!(part.json()["appended"], 1);
    assert!(part.err.contains("1 messages were sent"), "{}", part.err);
}

#[test]
fn a_send_in_part_is_told_though_nobody_reads_the_counts() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"small\n").unwrap();
    file.write_all(&vec![b'x'; 17 << 20]).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = broker.command(&format!("send orders --file {}", path.display()));
    command.stdout(writer);
    let part = run(command);
    assert_eq!(part.code, 5, "{part:?}");
    assert!(part.err.contains("1 messages were sent"), "{part:?}");
}

#[test]
fn a_broker_with_another_certificate_is_not_trusted() {
    let (broker, other) = (Broker::fresh(), Broker::fresh());
    let mut command = broker.command("status");
    command.arg("--ca").arg(other.data.join("tls/ca.pem"));
    let run = run(command);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.err.contains("certificate"), "{run:?}");
}

#[test]
fn no_broker_and_no_ca_are_worth_another_try() {
    let mut broker = Broker::fresh();
    broker.kill();
    let run = broker.run("status");
    assert_eq!(run.code, 3, "{run:?}");
    assert!(run.err.contains("is the broker running"), "{run:?}");
    let mut command = millpond();
    let folder = tempfile::tempdir().unwrap();
    command.arg("status").arg("--data").arg(folder.path());
    let run = common::run(command);
    assert_eq!(run.code, 3, "{run:?}");
    assert!(run.err.contains("millpond serve"), "{run:?}");
}

#[test]
fn a_broker_that_cannot_start_says_why() {
    let broker = Broker::fresh();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");

    let held = run(serve_command(&broker.data, "127.0.0.1:0"));
    assert_eq!(held.code, 1, "{held:?}");
    let pid = broker.pid().to_string();
    assert!(
        held.err.contains("another broker") && held.err.contains(&pid),
        "{held:?}"
    );

    let taken = run(serve_command(&data, &broker.listen));
    assert_eq!(taken.code, 1, "{taken:?}");
    assert!(taken.err.contains("--listen"), "{taken:?}");

    let closed = run({
        let path = folder.path().join("closed.toml");
        std::fs::write(&path, "require_tokens = true\n").unwrap();
        let mut command = serve_command(&folder.path().join("closed"), "127.0.0.1:0");
        command.arg("--config").arg(path);
        command
    });
    assert_eq!(closed.code, 1, "{closed:?}");
    let told = closed.err.contains("require_tokens") && closed.err.contains("--first-token");
    assert!(told && !closed.err.contains("others"), "{closed:?}");

    let unwritable = run(serve_command("/proc/millpond".as_ref(), "127.0.0.1:0"));
    assert_eq!(unwritable.code, 1, "{unwritable:?}");
    assert!(unwritable.err.contains("/proc/millpond"), "{unwritable:?}");

    let mut command = serve_command(&data, "127.0.0.1:0");
    let misspelt = run({
        let path = folder.path().join("config.toml");
        std::fs::write(&path, "lisen = \"127.0.0.1:0\"\n").unwrap();
        command.arg("--config").arg(path);
        command
    });
    assert_eq!(misspelt.code, 1, "{misspelt:?}");
    assert!(misspelt.err.contains("lisen"), "{misspelt:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_broker_takes_as_many_descriptors_as_it_may_have() {
    let folder = tempfile::tempdir().unwrap();
    let serve = common::serve_command(&folder.path().join("data"), "127.0.0.1:0");
    let mut limited = std::process::Command::new("sh");
    limited
        .args([
            "-c",
            "ulimit -S -n 100 && ulimit -H -n 200 && exec \"$0\" \"$@\"",
        ])
        .arg(serve.get_program())
        .args(serve.get_args())
        .stdout(std::process::Stdio::piped());
    let mut broker = common::Running::start(limited);
    assert!(broker.line().is_some(), "it is ready");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", broker.child.id())).unwrap();
    common::signal(broker.child.id(), "TERM");
    assert_eq!(broker.end().0, 0);
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let files: Vec<_> = files.unwrap().split_whitespace().collect();
    assert_eq!(files[3..5], ["200", "200"]);
}

#[test]
fn a_broker_that_cannot_log_goes_on_serving() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut broker = Broker::logging_to(full);
    broker.good("topic create orders");
    broker.good("send orders a");
    assert_eq!(broker.messages("orders"), [(0, "a".to_owned())]);
    assert_eq!(broker.terminate(), Some(0));
}

#[test]
fn a_broker_that_cannot_say_that_it_is_ready_serves() {
    let mut broker = Broker::fresh();
    broker.kill();
    let mut command = serve_command(&broker.data, &broker.listen);
    let full = File::options().write(true).open("/dev/full").unwrap();
    command.stdout(full);
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + WAIT_MAX;
    while broker.run("status").code != 0 && Instant::now() < deadline {}
    let status = broker.run("status");
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(status.code, 0, "{status:?} {output:?}");
}

#[test]
fn the_log_tools_leave_a_running_broker_alone() {
    let broker = Broker::fresh();
    let run = broker.run(&format!("log verify {}", broker.data.display()));
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.err.contains(&broker.pid().to_string()), "{run:?}");
    let nothing = broker.run("log verify /nonexistent");
    assert_eq!(nothing.code, 1, "{nothing:?}");
    assert!(!std::path::Path::new("/nonexistent").exists());
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly_and_loses_nothing() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    let mut command = broker.command("receive orders work --count 1");
    command.stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    broker.good("send orders precious");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    assert_eq!(
        broker.good("receive orders work --count 1").out,
        "precious\n"
    );
}

#[test]
fn a_worker_told_to_end_finishes_what_it_runs_and_hands_back_the_rest() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    broker.good("send orders a b c");
    let mut command = broker.command("receive orders work");
    command
        .arg("--exec")
        .arg("echo begun; read -r go < \"$GATE\"; echo done");
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let made = std::process::Command::new("mkfifo").arg(&gate).status();
    assert!(made.unwrap().success());
    command.env("GATE", &gate);
    let mut worker = Running::start(command);
    assert_eq!(worker.line().as_deref(), Some("begun"));
    signal(worker.child.id(), "TERM");
    std::fs::write(&gate, "go\n").unwrap();
    let (code, rest) = worker.end();
    assert_eq!((code, rest.as_str()), (0, "done\n"));
    let left = broker.json("subscription show orders work");
    let counts = ["backlog", "ready", "in_flight", "scheduled"].map(|name| left[name].clone());
    assert_eq!(counts, [json!(2), json!(2), json!(0), json!(0)]);
}

#[test]
fn a_second_interrupt_takes_the_commands_along() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    broker.good("subscription create orders work");
    broker.good("subscription create orders audit --mode stream");
    broker.good("send orders a");
    for subscription in ["work", "audit"] {
        let mut command = broker.command(&format!("receive orders {subscription}"));
        command.arg("--exec").arg("echo begun; sleep 60; true");
        let mut worker = Running::start(command);
        assert_eq!(worker.line().as_deref(), Some("begun"));
        let begun = Instant::now();
        // Two that come together count as one.
        while worker.child.try_wait().unwrap().is_none() {
            signal(worker.child.id(), "INT");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Its output ends when nobody is left who could write to it.
        assert_eq!(worker.end(), (130, String::new()));
        assert!(begun.elapsed() < WAIT_MAX, "{subscription}");
    }
}

#[test]
fn a_send_told_to_end_does_not_wait_for_a_broker_that_hangs() {
    let broker = Broker::fresh();
    broker.good("topic create orders");
    let mut command = broker.command("send orders -");
    command.stdin(Stdio::piped());
    let mut sender = Running::start(command);
    let mut input = sender.child.stdin.take().unwrap();
    input.write_all(b"a\n").unwrap();
    broker.wait_for_offset("orders", 0);
    signal(broker.pid(), "STOP");
    input.write_all(b"b\n").unwrap();
    drop(input);
    // Time to read the end; all that is left is to wait for the answer.
    std::thread::sleep(Duration::from_secs(1));
    signal(sender.child.id(), "INT");
    let asked = Instant::now();
    let (code, out) = sender.end();
    assert_eq!(code, 130, "{out}");
    assert!(out.starts_with("appended 1,"), "{out}");
    assert!(asked.elapsed() < Duration::from_secs(10));
}
