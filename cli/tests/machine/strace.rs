//! System calls of the broker: made to fail or to kill by strace, and read from what it wrote down.
//!
//! A call counts here only if the kernel really did it: one whose result strace has made up did nothing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The calls by which the log changes a disk, and those by which answers leave.
const TRACED: &str = "openat,close,write,pwrite64,fdatasync,fsync,rename,unlink,fallocate,ftruncate,\
                      sendmsg,sendmmsg";
/// Bytes of a written buffer that are shown.
const SHOWN_BYTES: &str = "1024";

/// How a broker is traced.
#[derive(Clone, Debug)]
pub struct Strace {
    pub output: PathBuf,
    /// strace's own words for what goes wrong, such as `fdatasync:error=EIO:when=3`.
    pub injected: Vec<String>,
    /// Folders in which the loader looks for the broker's libraries in vain, opening something in each.
    searched: usize,
}

impl Strace {
    pub fn new(output: PathBuf) -> Self {
        Self {
            output,
            injected: Vec::new(),
            searched: 0,
        }
    }

    pub fn search_libraries(mut self, folders: usize) -> Self {
        self.searched = folders;
        self
    }

    pub fn inject(mut self, what: impl Into<String>) -> Self {
        self.injected.push(what.into());
        self
    }

    /// What stands before the broker's own command line. The broker is the child that was started, and
    /// strace a process beside it.
    pub fn words(&self) -> Vec<String> {
        let mut words: Vec<String> = ["strace", "-D", "-f", "-qq", "-ttt", "-T", "-yy"]
            .map(str::to_owned)
            .to_vec();
        // Faster, but it lets no signal be injected (strace 6.1).
        if !self.injected.iter().any(|what| what.contains("signal=")) {
            words.push("--seccomp-bpf".to_owned());
        }
        words.extend(["-s".to_owned(), SHOWN_BYTES.to_owned()]);
        words.extend(["-o".to_owned(), self.output.display().to_string()]);
        words.extend(["-e".to_owned(), format!("trace={TRACED}")]);
        if self.searched > 0 {
            let folders: Vec<String> = (0..self.searched).map(|no| format!("/none/{no}")).collect();
            let path = format!("LD_LIBRARY_PATH={}", folders.join(":"));
            words.extend(["-E".to_owned(), path]);
        }
        for what in &self.injected {
            words.extend(["-e".to_owned(), format!("inject={what}")]);
        }
        words
    }

    pub fn calls(&self) -> Vec<Call> {
        calls(&std::fs::read_to_string(&self.output).unwrap_or_default())
    }

    /// Whether any of these calls was failed or delayed.
    pub fn has_struck(&self, call: &str) -> bool {
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        text.lines().any(|line| {
            line.contains(call) && (line.contains("(INJECTED)") || line.contains("(DELAYED)"))
        })
    }
}

/// One system call.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub thread: u32,
    pub name: String,
    /// Seconds since 1970: when it was begun, and when it had returned.
    pub from: f64,
    pub to: f64,
    pub arguments: String,
    /// The result and what is said of it.
    pub result: String,
}

impl Call {
    /// The kernel did it, and well.
    pub fn is_done(&self) -> bool {
        !self.result.starts_with('-')
            && !self.result.starts_with('?')
            && !self.result.contains("INJECTED")
    }

    /// The file that its first argument, or its result, is open on.
    pub fn file(&self) -> Option<&str> {
        let text = if self.name == "openat" {
            &self.result
        } else {
            &self.arguments
        };
        let from = text.find('<')? + 1;
        let to = from + text[from..].find('>')?;
        Some(&text[from..to])
    }

    /// The number of the descriptor that its first argument, or its result, is.
    fn descriptor(&self) -> Option<u32> {
        let text = if self.name == "openat" {
            &self.result
        } else {
            &self.arguments
        };
        text.split('<').next()?.trim().parse().ok()
    }
}

/// The calls of a trace, by the order in which they were begun.
pub fn calls(trace: &str) -> Vec<Call> {
    let mut begun: HashMap<u32, Call> = HashMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((thread, at, rest)) = split_line(line) else {
            continue;
        };
        if let Some(rest) = rest.strip_prefix("<... ") {
            if let Some(mut call) = begun.remove(&thread) {
                let rest = rest.split_once("resumed>").map_or("", |(_, rest)| rest);
                call.end(rest, at);
                calls.push(call);
            }
            continue;
        }
        let Some((name, rest)) = rest.split_once('(') else {
            continue;
        };
        let mut call = Call {
            thread,
            name: name.to_owned(),
            from: at,
            to: at,
            arguments: String::new(),
            result: String::new(),
        };
        match rest.strip_suffix("<unfinished ...>") {
            Some(arguments) => {
                call.arguments = arguments.to_owned();
                begun.insert(thread, call);
            }
            None => {
                call.end(rest, at);
                calls.push(call);
            }
        }
    }
    calls.sort_by(|a, b| a.from.total_cmp(&b.from));
    calls
}

impl Call {
    /// Takes the rest of its line in: arguments, result, and how long it took.
    fn end(&mut self, rest: &str, at: f64) {
        let (arguments, result) = rest.rsplit_once(" = ").unwrap_or((rest, "?"));
        let arguments = arguments.trim_end();
        self.arguments
            .push_str(arguments.strip_suffix(')').unwrap_or(arguments));
        let (result, took) = match result.rsplit_once(" <") {
            Some((result, took)) => (result, took.trim_end_matches('>').parse().unwrap_or(0.0)),
            None => (result, 0.0),
        };
        self.result = result.trim().to_owned();
        self.to = at.max(self.from + took);
    }
}

fn split_line(line: &str) -> Option<(u32, f64, &str)> {
    let (thread, rest) = line.split_once(' ')?;
    let (at, rest) = rest.trim_start().split_once(' ')?;
    Some((thread.parse().ok()?, at.parse().ok()?, rest))
}

/// When the bytes that hold `marker` became durable: the write's end on a descriptor that syncs what it
/// writes, else the end of the first sync of that file that was begun after the write.
pub fn durable_at(calls: &[Call], marker: &str) -> Result<f64, String> {
    let synced = synced_descriptors(calls);
    let write = calls.iter().enumerate().find(|(_, call)| {
        matches!(call.name.as_str(), "pwrite64" | "write")
            && call.is_done()
            && call.file().is_some_and(is_segment)
            && call.arguments.contains(marker)
    });
    let Some((at, write)) = write else {
        return Err(format!("{marker} was never written to a segment"));
    };
    if synced[at] {
        return Ok(write.to);
    }
    let sync = calls.iter().find(|call| {
        matches!(call.name.as_str(), "fdatasync" | "fsync")
            && call.is_done()
            && call.from >= write.to
            && call.file() == write.file()
    });
    sync.map(|sync| sync.to)
        .ok_or_else(|| format!("{marker} was written and never synced"))
}

fn is_segment(path: &str) -> bool {
    Path::new(path)
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("seg-"))
}

/// For each call, whether its descriptor was opened so that every write is synced.
fn synced_descriptors(calls: &[Call]) -> Vec<bool> {
    let mut open: HashMap<u32, bool> = HashMap::new();
    let mut synced = Vec::with_capacity(calls.len());
    for call in calls {
        let descriptor = call.descriptor();
        if call.name == "openat" && call.is_done() {
            let syncs = call.arguments.contains("O_SYNC") || call.arguments.contains("O_DSYNC");
            descriptor.map(|descriptor| open.insert(descriptor, syncs));
        }
        let known = descriptor.and_then(|descriptor| open.get(&descriptor));
        synced.push(known.copied().unwrap_or(false));
    }
    synced
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: &str = "7 100.0 openat(AT_FDCWD</>, \"log/seg-1.log\", O_RDWR|O_SYNC|O_DIRECT) = 5</d/log/seg-1.log> <0.1>\n";
    const WRITE: &str = "8 101.0 pwrite64(5</d/log/seg-1.log>, \"MPEN marker\", 4096, 0 <unfinished ...>\n\
                         7 101.5 sendmsg(9<UDP:[1]>, {...}, 0) = 80 <0.01>\n\
                         8 102.0 <... pwrite64 resumed>) = 4096 <1.0>\n";

    #[test]
    fn a_write_through_a_syncing_descriptor_is_durable_when_it_returns() {
        assert_eq!(
            durable_at(&calls(&format!("{OPEN}{WRITE}")), "marker"),
            Ok(102.0)
        );
    }

    #[test]
    fn any_other_write_is_durable_when_a_sync_behind_it_has_returned() {
        let plain = OPEN.replace("O_SYNC|", "");
        let sync = "8 103.0 fdatasync(5</d/log/seg-1.log>) = 0 <0.5>\n";
        let trace = format!("{plain}{WRITE}{sync}");
        assert_eq!(durable_at(&calls(&trace), "marker"), Ok(103.5));
        let early = sync.replace("103.0", "101.9");
        assert!(durable_at(&calls(&format!("{plain}{WRITE}{early}")), "marker").is_err());
    }

    #[test]
    fn a_sync_that_was_made_up_is_none() {
        let plain = OPEN.replace("O_SYNC|", "");
        let sync = "8 103.0 fdatasync(5</d/log/seg-1.log>) = 0 (INJECTED) <0.5>\n";
        let found = durable_at(&calls(&format!("{plain}{WRITE}{sync}")), "marker");
        assert_eq!(found, Err("marker was written and never synced".to_owned()));
    }

    #[test]
    fn what_was_never_written_is_named() {
        let found = durable_at(&calls(OPEN), "marker");
        assert!(found.is_err_and(|what| what.contains("never written")));
    }
}
