//! The simulated machine: files, names, power and the plan of failures.
//!
//! Names are kept like bytes: as seen now, as durable, and the changes between the two, of which a
//! power loss keeps the first few or any of them.

use std::collections::BTreeMap;
use std::io;

use super::fired::Fired;
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
    pub(super) fired: Fired,
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
            fired: Fired::default(),
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
        let fault = self.failures.remove(hit?).fault;
        self.fired.failed(call, fault);
        Some(fault)
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
        let Some(inode) = self.inodes.get_mut(&id) else {
            return;
        };
        inode.opens -= 1;
        if inode.opens == 0 && !self.names.values().any(|named| *named == id) {
            self.forget_unreachable();
        }
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
        let lost = self.keep_some_changes();
        self.fired.failed_syncs_marked_clean += u64::from(lost > 0);
    }

    /// Whether something that has a name, or had one, is not synced.
    pub(super) fn is_at_risk(&self) -> bool {
        let names = self.names.values().chain(self.durable_names.values());
        let mut inodes = names.filter_map(|id| self.inodes.get(id));
        !self.changes.is_empty() || inodes.any(Inode::is_at_risk)
    }

    /// Loses what was not synced, and starts the machine again.
    pub(super) fn lose_power(&mut self) {
        self.fired.power_losses_at_risk += u64::from(self.is_at_risk());
        let lost = self.keep_some_changes();
        self.fired.names_lost += u64::from(lost > 0);
        self.names = self.durable_names.clone();
        let ids: Vec<_> = self.inodes.keys().copied().collect();
        for &id in &ids {
            let donor = ids[self.rng.below(ids.len() as u64) as usize];
            let may_donate = self.rng.percent(50);
            let Some(mut inode) = self.inodes.remove(&id) else {
                continue;
            };
            // Not itself: it is taken out meanwhile.
            let donor = self.inodes.get(&donor).filter(|_| may_donate);
            let loss = inode.lose_power(donor, &mut self.rng);
            self.fired.lost_power(loss);
            self.inodes.insert(id, inode);
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

    /// Whether there is no room for so many bytes more.
    pub(super) fn is_full_for(&self, bytes: u64) -> bool {
        bytes > 0 && bytes > self.free_bytes()
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

    /// Makes some of the changes durable and forgets all; returns how many were lost.
    fn keep_some_changes(&mut self) -> usize {
        let changes = std::mem::take(&mut self.changes);
        let mut kept = 0;
        if self.rng.percent(60) {
            // A journal keeps the order: the first few.
            kept = self.rng.below(changes.len() as u64 + 1) as usize;
            for change in &changes[..kept] {
                change.apply(&mut self.durable_names);
            }
        } else {
            for change in &changes {
                if self.rng.percent(50) {
                    change.apply(&mut self.durable_names);
                    kept += 1;
                }
            }
        }
        changes.len() - kept
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
