//! The simulated disk with an eye on it: what failed, and what a power loss could take.
//!
//! Owns nothing of the crash model, which is `SimStorage`'s; it only sees every call go by, so that
//! the world knows whether a process that died had a reason, whether a sync failed before an answer
//! left (I9), and whether unsynced bytes or names were at risk when the power went.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use millpond_wal::sim::{Failure, SimFile, SimStorage};
use millpond_wal::storage::{Map, Space, Storage, StorageFile};

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
    /// Files with writes that no sync covers.
    unsynced: BTreeSet<String>,
    unsynced_names: bool,
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
        let mut watch = self.watch();
        watch.failed_calls = 0;
        watch.is_unknown = false;
        watch.is_off = false;
    }

    pub fn lose_power_after(&self, calls: u64) {
        self.sim.crash_after(calls);
    }

    pub fn fail(&self, failure: Failure) {
        self.sim.plan(failure);
    }

    /// What has been seen so far.
    pub fn seen(&self) -> Watch {
        self.watch().clone()
    }

    /// Whether a power loss now could take something.
    pub fn is_at_risk(&self) -> bool {
        let watch = self.watch();
        watch.unsynced_names || !watch.unsynced.is_empty()
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
        self.watch().unsynced_names = true;
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
        let renamed = self.names("rename", from, self.sim.rename(from, to));
        let mut watch = self.watch();
        if renamed.is_ok() && watch.unsynced.remove(from) {
            watch.unsynced.insert(to.to_owned());
        }
        renamed
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.names("remove", name, self.sim.remove(name));
        if removed.is_ok() {
            self.watch().unsynced.remove(name);
        }
        removed
    }

    fn sync_dir(&self) -> io::Result<()> {
        let synced = saw(
            &self.watch,
            "sync",
            "folder",
            Kind::Change,
            self.sim.sync_dir(),
        );
        if synced.is_ok() {
            self.watch().unsynced_names = false;
        }
        synced
    }

    fn space(&self) -> io::Result<Space> {
        saw(&self.watch, "space", "", Kind::Other, self.sim.space())
    }
}

impl File {
    fn change(&self, what: &str, result: io::Result<()>) -> io::Result<()> {
        lock(&self.watch).unsynced.insert(self.name.clone());
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
        let written = self.file.write_durable_at(offset, data);
        if written.is_err() {
            lock(&self.watch).unsynced.insert(self.name.clone());
        }
        saw(
            &self.watch,
            "write durably",
            &self.name,
            Kind::Change,
            written,
        )
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read(self.file.read_at(offset, buf))
    }

    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read(self.file.read_uncached_at(offset, buf))
    }

    fn sync_data(&self) -> io::Result<()> {
        let synced = saw(
            &self.watch,
            "sync",
            &self.name,
            Kind::Change,
            self.file.sync_data(),
        );
        if synced.is_ok() {
            lock(&self.watch).unsynced.remove(&self.name);
        }
        synced
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
