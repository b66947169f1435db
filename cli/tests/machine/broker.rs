//! One process of the broker: how it is started, how it ends, and what it says.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest that a broker may take to say that it is ready, or to end.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The binary that is tried.
pub fn binary() -> PathBuf {
    match std::env::var_os("MILLPOND_BINARY") {
        Some(path) => PathBuf::from(path).canonicalize().expect("the binary"),
        None => PathBuf::from(env!("CARGO_BIN_EXE_millpond")),
    }
}

/// What starts a broker, every time in the same way.
#[derive(Clone, Debug)]
pub struct Launch {
    pub data: PathBuf,
    pub config: PathBuf,
    pub listen: SocketAddr,
    /// Where its standard error goes; it is not on the disk that is tried.
    pub stderr: PathBuf,
}

/// How a process ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// None: by a signal.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stderr: String,
}

/// A broker that is ready.
pub struct Process {
    child: Child,
    pub listen: SocketAddr,
    pub http: SocketAddr,
    stderr: PathBuf,
}

impl Launch {
    /// Starts it behind these words (strace's, or none); returns when it is ready, or how it ended.
    pub fn start(&self, before: &[String]) -> Result<Process, Ended> {
        let mut words = before.to_vec();
        words.push(binary().display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["serve", "--output", "json", "--http", "127.0.0.1:0"])
            .arg("--listen")
            .arg(self.listen.to_string())
            .arg("--data")
            .arg(&self.data)
            .arg("--config")
            .arg(&self.config)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&self.stderr).expect("a file for standard error"));
        let mut child = command.spawn().expect("the broker's process");
        let line = first_line(&mut child);
        let mut process = Process {
            child,
            listen: self.listen,
            http: self.listen,
            stderr: self.stderr.clone(),
        };
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            return Err(process.ended());
        };
        let address = |name: &str| ready[name].as_str().and_then(|text| text.parse().ok());
        process.listen = address("listen").expect("where it listens");
        process.http = address("http").expect("where it answers");
        Ok(process)
    }
}

impl Process {
    /// SIGKILL; returns when it is gone.
    pub fn kill(mut self) -> Ended {
        self.signal(Signal::KILL);
        self.ended()
    }

    /// Asks it to end and waits until it has.
    pub fn terminate(mut self) -> Ended {
        self.signal(Signal::TERM);
        self.ended()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the broker's process is there");
    }

    /// True once it has ended by itself.
    pub fn is_gone(&mut self) -> bool {
        self.child.try_wait().expect("its own child").is_some()
    }

    /// Waits until it ends by itself.
    pub fn ended(&mut self) -> Ended {
        let deadline = Instant::now() + WAIT_MAX;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("its own child") {
                break status;
            }
            assert!(Instant::now() < deadline, "the broker does not end");
            std::thread::sleep(Duration::from_millis(1));
        };
        Ended {
            code: status.code(),
            signal: status.signal(),
            stderr: std::fs::read_to_string(&self.stderr).unwrap_or_default(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line with which a broker says that it is ready; empty if it ended without.
fn first_line(child: &mut Child) -> String {
    let out = child.stdout.take().expect("a pipe");
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        // What cannot be read is no ready line.
        let _ = BufReader::new(out).read_line(&mut line);
        let _ = tell.send(line);
    });
    told.recv_timeout(WAIT_MAX).expect("a ready line in time")
}

/// The small settings under which everything happens often: segments, snapshots, cleaning.
pub fn write_config(path: &Path) {
    let text = "[log]\nsegment_bytes = 1048576\nsnapshot_every_bytes = 1048576\nspare_segments = 2\n\
                [disk]\nreserve_bytes = 4194304\n[memory]\nbudget_bytes = 201326592\n";
    std::fs::write(path, text).expect("the configuration");
}
