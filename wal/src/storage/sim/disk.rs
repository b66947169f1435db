//! The simulated machine: files, names, power and the plan of failures.
//!
//! Names are kept like bytes: as seen now, as durable, and the changes between the two, of which a
//! power loss keeps the first few or any of them.

use std::collections::BTreeMap;
use std::io;

use super::inode::Inode;
use super::rng::Rng;
use super::{Call, Failure, Fault};

#[derive(Debug)]
pub(super) struct Disk {
    rng: Rng,
    inodes: BTreeMap<InodeId, Inode>,
    next_inode: u64,
    names: BTreeMap<String, InodeId>,
    durable_names: BTreeMap<String, InodeId>,
    /// What changed in `names` since the last `sync_dir`.
    changes: Vec<NameChange>,
    power: Power,
    boot: Boot,
    /// Changing calls so far.
    pub(super) calls: u64,
    pub(super) calls_left: Option<u64>,
    pub(super) failures: Vec<Failure>,
    pub(super) capacity_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct InodeId(u64);

/// Which start of the process a file handle belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Boot(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    On,
    Off,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create {
        name: String,
        inode: InodeId,
    },
    Rename {
        from: String,
        to: String,
        inode: InodeId,
    },
    Remove {
        name: String,
    },
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Go,
    Fail(Fault),
    /// The power goes during this call: it may have worked, half or wholly.
    Stop,
}

impl Disk {
    pub(super) fn new(seed: u64) -> Disk {
        Disk {
            rng: Rng::new(seed),
            inodes: BTreeMap::new(),
            next_inode: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            changes: Vec::new(),
            power: Power::On,
            boot: Boot(0),
            calls: 0,
            calls_left: None,
            failures: Vec::new(),
            capacity_bytes: CAPACITY_BYTES,
        }
    }

    /// Every call begins here.
    pub(super) fn enter(&mut self, call: Call) -> io::Result<Verdict> {
        if self.power == Power::Off {
            return Err(off());
        }
        if call.changes_the_disk() {
            self.calls += 1;
            match &mut self.calls_left {
                Some(0) => {
                    self.power = Power::Off;
                    return Ok(Verdict::Stop);
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        Ok(self.planned(call).map_or(Verdict::Go, Verdict::Fail))
    }

    fn planned(&mut self, call: Call) -> Option<Fault> {
        let mut hit = None;
        for (at, failure) in self.failures.iter_mut().enumerate() {
            if failure.call.is_some_and(|planned| planned != call) {
                continue;
            }
            if failure.skip > 0 {
                failure.skip -= 1;
            } else if hit.is_none() {
                hit = Some(at);
            }
        }
        hit.map(|at| self.failures.remove(at).fault)
    }

    pub(super) fn boot(&self) -> Boot {
        self.boot
    }

    pub(super) fn file(&mut self, id: InodeId, boot: Boot) -> io::Result<(&mut Inode, &mut Rng)> {
        if boot != self.boot {
            return Err(io::Error::other("the file was opened before the restart"));
        }
        let inode = self.inodes.get_mut(&id);
        let inode = inode.expect("an open file is never forgotten");
        Ok((inode, &mut self.rng))
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    pub(super) fn create(&mut self, name: &str) -> io::Result<InodeId> {
        if self.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = InodeId(self.next_inode);
        self.next_inode += 1;
        self.inodes.insert(inode, Inode::default());
        self.change(NameChange::Create {
            name: name.to_owned(),
            inode,
        });
        Ok(inode)
    }

    pub(super) fn find(&self, name: &str) -> io::Result<InodeId> {
        let found = self.names.get(name).copied();
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn opened(&mut self, id: InodeId) {
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.opens += 1;
        }
    }

    pub(super) fn closed(&mut self, id: InodeId, boot: Boot) {
        if boot != self.boot {
            return;
        }
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.opens -= 1;
        }
        self.forget_unreachable();
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let inode = self.find(from)?;
        self.change(NameChange::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
            inode,
        });
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        self.find(name)?;
        self.change(NameChange::Remove {
            name: name.to_owned(),
        });
        Ok(())
    }

    pub(super) fn sync_names(&mut self) {
        self.durable_names = self.names.clone();
        self.changes.clear();
        self.forget_unreachable();
    }

    /// A sync of the folder that reports an error: some changes made it, the others never will.
    pub(super) fn sync_names_failing(&mut self) {
        self.keep_some_changes();
    }

    /// Loses what was not synced, and starts the machine again.
    pub(super) fn lose_power(&mut self) {
        self.keep_some_changes();
        self.names = self.durable_names.clone();
        let ids: Vec<_> = self.inodes.keys().copied().collect();
        for &id in &ids {
            let donor = ids[self.rng.below(ids.len() as u64) as usize];
            let donor = (donor != id && self.rng.percent(50)).then(|| self.inodes[&donor].clone());
            if let Some(inode) = self.inodes.get_mut(&id) {
                inode.lose_power(donor.as_ref(), &mut self.rng);
            }
        }
        self.start();
    }

    /// A new process on the same machine: handles are gone, the page cache is not.
    pub(super) fn start(&mut self) {
        self.power = Power::On;
        self.boot.0 += 1;
        self.calls_left = None;
        self.failures.clear();
        for inode in self.inodes.values_mut() {
            inode.opens = 0;
        }
        self.forget_unreachable();
    }

    pub(super) fn corrupt(&mut self, name: &str, offset: u64, bytes: usize) -> io::Result<()> {
        let id = self.find(name)?;
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.corrupt(offset, bytes);
        }
        Ok(())
    }

    /// Unlinked files take space for as long as they are open.
    pub(super) fn free_bytes(&self) -> u64 {
        let counts = |id: &InodeId, inode: &Inode| {
            inode.opens > 0 || self.names.values().any(|named| named == id)
        };
        let used = self
            .inodes
            .iter()
            .filter(|(id, inode)| counts(id, inode))
            .map(|(_, inode)| inode.used_bytes())
            .sum();
        self.capacity_bytes.saturating_sub(used)
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.changes.push(change);
    }

    fn keep_some_changes(&mut self) {
        let changes = std::mem::take(&mut self.changes);
        if self.rng.percent(60) {
            // A journal keeps the order: the first few.
            let kept = self.rng.below(changes.len() as u64 + 1) as usize;
            for change in &changes[..kept] {
                change.apply(&mut self.durable_names);
            }
        } else {
            for change in &changes {
                if self.rng.percent(50) {
                    change.apply(&mut self.durable_names);
                }
            }
        }
    }

    fn forget_unreachable(&mut self) {
        let changed = |id: &InodeId| {
            self.changes
                .iter()
                .any(|change| change.inode() == Some(*id))
        };
        let named = |id: &InodeId| {
            let names = self.names.values().chain(self.durable_names.values());
            names.into_iter().any(|named| named == id)
        };
        let gone: Vec<_> = self
            .inodes
            .iter()
            .filter(|(id, inode)| inode.opens == 0 && !named(id) && !changed(id))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.inodes.remove(&id);
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, InodeId>) {
        match self {
            NameChange::Create { name, inode } => {
                names.insert(name.clone(), *inode);
            }
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
            NameChange::Remove { name } => {
                names.remove(name);
            }
        }
    }

    fn inode(&self) -> Option<InodeId> {
        match self {
            NameChange::Create { inode, .. } | NameChange::Rename { inode, .. } => Some(*inode),
            NameChange::Remove { .. } => None,
        }
    }
}

pub(super) fn off() -> io::Error {
    io::Error::other("the machine is off")
}

/// As much as a disk has unless a test says otherwise: 1 TiB.
const CAPACITY_BYTES: u64 = 1 << 40;
