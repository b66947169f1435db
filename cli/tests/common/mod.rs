//! A real broker process on free ports, and client commands that talk to it.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]
#![allow(dead_code, reason = "each test file uses its own part of the harness")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The binary that is tried: the debug build, or what `MILLPOND_BINARY` names.
fn binary() -> PathBuf {
    match std::env::var_os("MILLPOND_BINARY") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_millpond").into(),
    }
}

/// A broker's configuration file, beside its data folder.
pub const CONFIG: &str = "millpond.toml";
/// Longest wait for something that must come.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// The command without anything of the surroundings that could change what it does.
pub fn millpond() -> Command {
    let mut command = Command::new(binary());
    for name in ["SERVER", "DATA", "CA", "TOKEN"] {
        command.env_remove(format!("MILLPOND_{name}"));
    }
    command
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its standard output as one JSON value.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    /// Its standard output as a JSON value a line.
    pub fn json_lines(&self) -> Vec<Value> {
        let value = |line| serde_json::from_str(line).unwrap();
        self.out.lines().map(value).collect()
    }
}

pub fn run(mut command: Command) -> Run {
    Run::of(&command.output().unwrap())
}

/// A broker in its own process; killed when dropped.
pub struct Broker {
    child: Child,
    pub listen: String,
    pub http: String,
    pub data: PathBuf,
    _folder: Option<TempDir>,
}

impl Broker {
    /// Starts one on a fresh folder and free ports.
    pub fn fresh() -> Self {
        Self::with("")
    }

    /// As `fresh`, with this in its configuration file.
    pub fn with(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        Self::of(folder)
    }

    /// As `fresh`, with much to log and this for a standard error.
    pub fn logging_to(stderr: impl Into<Stdio>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = serve_command(&folder.path().join("data"), "127.0.0.1:0");
        command.env("RUST_LOG", "debug").stderr(stderr);
        Self::started(folder, command)
    }

    /// Starts one on the `data` in this folder, with the configuration file beside it.
    pub fn of(folder: TempDir) -> Self {
        let command = configured(&folder.path().join("data"), "127.0.0.1:0");
        Self::started(folder, command)
    }

    fn started(folder: TempDir, command: Command) -> Self {
        let data = folder.path().join("data");
        let (child, ready) = serve(command);
        Self {
            child,
            listen: text(&ready["listen"]),
            http: text(&ready["http"]),
            data,
            _folder: Some(folder),
        }
    }

    /// Ends it as a power cut would, but for the disk.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same folder and address.
    pub fn restart(&mut self) {
        let (child, ready) = serve(configured(&self.data, &self.listen));
        self.child = child;
        self.http = text(&ready["http"]);
    }

    /// Asks it to end and waits until it has; its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        signal(self.child.id(), "TERM");
        self.child.wait().unwrap().code()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client command for this broker, its words parted by single spaces.
    pub fn command(&self, line: &str) -> Command {
        let mut command = millpond();
        command
            .args(line.split(' '))
            .arg("--server")
            .arg(format!("millpond://{}", self.listen))
            .arg("--data")
            .arg(&self.data);
        command
    }

    pub fn run(&self, line: &str) -> Run {
        run(self.command(line))
    }

    /// Runs a command that must succeed; its JSON.
    pub fn json(&self, line: &str) -> Value {
        let run = self.good(&format!("{line} --output json"));
        run.json()
    }

    pub fn good(&self, line: &str) -> Run {
        let run = self.run(line);
        assert_eq!(run.code, 0, "{line}: {run:?}");
        run
    }

    /// Waits until the topic has a message at this offset.
    pub fn wait_for_offset(&self, topic: &str, offset: u64) {
        let deadline = Instant::now() + WAIT_MAX;
        while self.json(&format!("topic show {topic}"))["next_offset"].as_u64() <= Some(offset) {
            assert!(Instant::now() < deadline, "no message at offset {offset}");
        }
    }

    /// Waits until a subscription has nothing more to do; how it looks then.
    pub fn wait_for_empty(&self, topic: &str, name: &str) -> Value {
        self.wait_for(topic, name, |view| view["backlog"] == 0)
    }

    /// Waits until a subscription has so many consumers.
    pub fn wait_for_consumers(&self, topic: &str, name: &str, count: u64) {
        self.wait_for(topic, name, |view| view["consumers"] == count);
    }

    /// Waits until a subscription looks like this.
    fn wait_for(&self, topic: &str, name: &str, looks: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let view = self.json(&format!("subscription show {topic} {name}"));
            if looks(&view) {
                return view;
            }
            assert!(Instant::now() < deadline, "it stays {view}");
        }
    }

    /// Every message that the topic keeps, as (offset, payload).
    pub fn messages(&self, topic: &str) -> Vec<(u64, String)> {
        let run = self.good(&format!("peek {topic} --count 1000000 --output json"));
        let message = |value: &Value| (value["offset"].as_u64().unwrap(), text(&value["payload"]));
        run.json_lines().iter().map(message).collect()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command that serves a folder on free ports.
pub fn serve_command(data: &Path, listen: &str) -> Command {
    let mut command = millpond();
    command
        .args(["serve", "--output", "json", "--http", "127.0.0.1:0"])
        .args(["--listen", listen])
        .arg("--data")
        .arg(data);
    command
}

/// As `serve_command`, with the configuration file beside the folder, and its log among the test's.
fn configured(data: &Path, listen: &str) -> Command {
    let mut command = serve_command(data, listen);
    let config = data.with_file_name(CONFIG);
    if config.exists() {
        command.arg("--config").arg(config);
    }
    command.stderr(Stdio::inherit());
    command
}

fn serve(mut command: Command) -> (Child, Value) {
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let ready = serde_json::from_str(&line)
        .unwrap_or_else(|e| panic!("{e}: no ready line from the broker but {line:?}"));
    (child, ready)
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

pub fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

/// A client command that runs while the test does something else.
pub struct Running {
    pub child: Child,
    pub out: BufReader<ChildStdout>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// Its next line; `None` at its end.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.out.read_line(&mut line).unwrap();
        (read > 0).then(|| line.trim_end().to_owned())
    }

    /// Waits for its end: its exit code and the rest of its output.
    pub fn end(mut self) -> (i32, String) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code().unwrap_or(-1), rest)
    }
}
