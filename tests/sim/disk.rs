//! The simulated disk with an eye on it: what failed.
//!
//! Owns nothing of the crash model, which is `SimStorage`'s; it only sees every call go by, so that
//! the world knows whether a process that died had a reason, and whether a sync failed before an
//! answer left (I9).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use millpond_wal::sim::{Failure, Fired, SimFile, SimStorage};
use millpond_wal::storage::{BLOCK_BYTES, Map, Space, Storage, StorageFile, read_exact_at};

use crate::rng::Rng;

/// Clones share the disk.
#[derive(Clone, Debug)]
pub struct Disk {
    sim: SimStorage,
    watch: Arc<Mutex<Watch>>,
}

/// What was seen since the last start of the process.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// A call failed for another reason than that the file is or is not there.
    pub failed_calls: u64,
    /// The last of them, for people.
    pub last_failure: String,
    /// A write or a sync failed, not for want of space: what the disk holds is unknown.
    pub is_unknown: bool,
    /// The power went during a call.
    pub is_off: bool,
}

#[derive(Debug)]
pub struct File {
    file: SimFile,
    name: String,
    watch: Arc<Mutex<Watch>>,
}

impl Disk {
    pub fn new(seed: u64) -> Self {
        Self {
            sim: SimStorage::new(seed),
            watch: Arc::default(),
        }
    }

    /// The power goes, and comes back.
    pub fn lose_power(&self) {
        self.sim.restart();
        *self.watch() = Watch::default();
    }

    /// Only the process dies; what it wrote stays in the page cache.
    pub fn kill_process(&self) {
        self.sim.restart_process();
        *self.watch() = Watch::default();
    }

    pub fn lose_power_after(&self, calls: u64) {
        self.sim.crash_after(calls);
    }

    pub fn fail(&self, failure: Failure) {
        self.sim.plan(failure);
    }

    /// What was planned and has not happened will not happen.
    pub fn forget_plans(&self) {
        self.sim.forget_plans();
    }

    /// Damages a block in the first copy of a sealed segment's directory; the second stays good. False:
    /// there is no such segment.
    pub fn rot(&self, rng: &mut Rng) -> io::Result<bool> {
        let mut names = self.sim.list()?;
        names.retain(|name| name.starts_with("seg-"));
        if names.is_empty() {
            return Ok(false);
        }
        let name = rng.pick(&names).clone();
        let file = self.sim.open_read(&name)?;
        let block = BLOCK_BYTES as u64;
        let blocks = file.len()? / block;
        let is_directory = |nth: u64| -> io::Result<bool> {
            let mut magic = [0; 4];
            read_exact_at(&file, nth * block + 4, &mut magic)?;
            Ok(magic == *b"MPDR")
        };
        // Entries, directory, footer, directory, footer.
        let mut of_copy = 0;
        while 2 * of_copy + 4 <= blocks && is_directory(blocks - 2 - of_copy)? {
            of_copy += 1;
        }
        let first = blocks.saturating_sub(2 * of_copy + 2);
        if of_copy == 0 || !is_directory(first)? {
            return Ok(false);
        }
        // Most of a block is empty; the low byte of a number makes it wrong, and not absurd.
        let at = (first + rng.below(of_copy)) * block + rng.below(128) * 4;
        self.sim.corrupt(&name, at, 1)?;
        Ok(true)
    }

    /// All faults so far.
    pub fn fired(&self) -> Fired {
        self.sim.fired()
    }

    /// What has been seen so far.
    pub fn seen(&self) -> Watch {
        self.watch().clone()
    }

    /// Whether a power loss now could take something.
    pub fn is_at_risk(&self) -> bool {
        self.sim.is_at_risk()
    }

    pub fn is_unknown(&self) -> bool {
        self.watch().is_unknown
    }

    pub fn is_off(&self) -> bool {
        self.watch().is_off
    }

    /// Whether a sync has failed since the last call, which forgets it.
    pub fn take_unknown(&self) -> bool {
        std::mem::take(&mut self.watch().is_unknown)
    }

    pub fn set_unknown(&self) {
        self.watch().is_unknown = true;
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        lock(&self.watch)
    }

    fn open_file(&self, name: &str, file: io::Result<SimFile>) -> io::Result<File> {
        let file = saw(&self.watch, "open", name, Kind::Other, file)?;
        Ok(File {
            file,
            name: name.to_owned(),
            watch: self.watch.clone(),
        })
    }

    fn names<T>(&self, what: &str, name: &str, result: io::Result<T>) -> io::Result<T> {
        saw(&self.watch, what, name, Kind::Change, result)
    }
}

impl Storage for Disk {
    type File = File;

    fn create(&self, name: &str) -> io::Result<File> {
        let file = self.names("create", name, self.sim.create(name));
        self.open_file(name, file)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        self.open_file(name, self.sim.open(name))
    }

    fn open_read(&self, name: &str) -> io::Result<File> {
        self.open_file(name, self.sim.open_read(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        saw(&self.watch, "list", "", Kind::Other, self.sim.list())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.names("rename", from, self.sim.rename(from, to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.names("remove", name, self.sim.remove(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.names("sync", "folder", self.sim.sync_dir())
    }

    fn space(&self) -> io::Result<Space> {
        saw(&self.watch, "space", "", Kind::Other, self.sim.space())
    }
}

impl File {
    fn change(&self, what: &str, result: io::Result<()>) -> io::Result<()> {
        saw(&self.watch, what, &self.name, Kind::Change, result)
    }

    fn read<T>(&self, result: io::Result<T>) -> io::Result<T> {
        saw(&self.watch, "read", &self.name, Kind::Other, result)
    }
}

impl StorageFile for File {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change("write", self.file.write_at(offset, data))
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change("write durably", self.file.write_durable_at(offset, data))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read(self.file.read_at(offset, buf))
    }

    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read(self.file.read_uncached_at(offset, buf))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.change("sync", self.file.sync_data())
    }

    fn preallocate(&self, bytes: u64) -> io::Result<()> {
        self.change("preallocate", self.file.preallocate(bytes))
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change("cut", self.file.set_len(bytes))
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn map(&self) -> io::Result<Option<Map>> {
        self.file.map()
    }
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Kind {
    Change,
    Other,
}

fn saw<T>(
    watch: &Mutex<Watch>,
    what: &str,
    name: &str,
    kind: Kind,
    result: io::Result<T>,
) -> io::Result<T> {
    if let Err(error) = &result
        && !matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
        )
    {
        let mut watch = lock(watch);
        watch.failed_calls += 1;
        watch.is_off |= error.to_string() == "the machine is off";
        watch.last_failure = format!("{what} {name}: {error}");
        let is_sync = what == "sync" || what == "write durably";
        watch.is_unknown |=
            kind == Kind::Change && is_sync && error.kind() != io::ErrorKind::StorageFull;
    }
    result
}

fn lock(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
    watch.lock().expect("nothing panics while it looks")
}
