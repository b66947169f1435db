//! A disk in memory that loses power, tears writes and fails on demand, the same way for the same seed.
//!
//! Owns the simulated counterpart of [`super::FolderStorage`] and its controls. It is as unkind as a
//! disk may be under the promises of [`super`], and never more:
//! - a power loss keeps any of the 512-byte sectors that were not synced, in one of several patterns
//!   (none, all, a torn tail, a hole with good bytes behind it, any); a dirty sector that is written
//!   again may already have been on the disk;
//! - ground that was never synced may show noise, or what another file holds at the same place;
//! - of the unsynced length any value between the durable and the current one remains, and of the
//!   unsynced name changes the first few or any; a rename is kept or lost as a whole;
//! - `write_durable_at` makes its own bytes durable and nothing else;
//! - a failed sync drops some of its sectors and marks all clean: reads still show them, the next
//!   sync succeeds, `read_uncached_at` and a power loss show the truth.
//!
//! It deliberately has no clock and no latency, and its calls never block.

mod disk;
mod fired;
mod inode;
mod pages;
mod rng;

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use self::disk::{Boot, Disk, InodeId, Verdict, off};
pub use self::fired::Fired;
use self::rng::Rng;
use super::{Map, SECTOR_BYTES, Space, Storage, StorageFile, check_aligned, check_name};

/// The calls of the storage traits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Create,
    Open,
    OpenRead,
    List,
    Rename,
    Remove,
    SyncDir,
    Space,
    Write,
    WriteDurable,
    Read,
    ReadUncached,
    Sync,
    Preallocate,
    SetLen,
}

impl Call {
    fn changes_the_disk(self) -> bool {
        !matches!(
            self,
            Call::Open
                | Call::OpenRead
                | Call::List
                | Call::Space
                | Call::Read
                | Call::ReadUncached
        )
    }

    fn is_write(self) -> bool {
        matches!(self, Call::Write | Call::WriteDurable)
    }
}

/// How a planned call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// EIO; a durable write or a sync leaves any part of its bytes behind.
    Io,
    /// ENOSPC; a write leaves a first part of its bytes behind.
    NoSpace,
    /// EDQUOT; the same otherwise.
    Quota,
    /// The device took only a first part of a write; for any other call the same as `Io`.
    Short,
}

/// A call that shall fail, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which kind of call; `None` for any.
    pub call: Option<Call>,
    /// How many such calls pass before.
    pub skip: u64,
    pub fault: Fault,
}

/// A simulated folder. Clones share the machine.
#[derive(Clone, Debug)]
pub struct SimStorage {
    disk: Arc<Mutex<Disk>>,
}

impl SimStorage {
    pub fn new(seed: u64) -> SimStorage {
        SimStorage {
            disk: Arc::new(Mutex::new(Disk::new(seed))),
        }
    }

    /// The power goes now and comes back: what was not synced is kept or lost as the seed has it,
    /// open files are dead, all plans are forgotten.
    pub fn crash(&self) {
        self.disk().lose_power();
    }

    /// After `calls` more calls that change the disk, the power goes in the middle of the next one.
    /// It and every later call fails until [`Self::restart`] or [`Self::restart_process`].
    pub fn crash_after(&self, calls: u64) {
        self.disk().calls_left = Some(calls);
    }

    /// The machine starts after a power loss; the same as [`Self::crash`] if it was still on.
    pub fn restart(&self) {
        self.crash();
    }

    /// Only the process died, at the same point: open files are dead and plans forgotten, but the
    /// page cache is whole, so a read shows bytes that a later power loss may still take.
    pub fn restart_process(&self) {
        self.disk().start();
    }

    pub fn plan(&self, failure: Failure) {
        self.disk().failures.push(failure);
    }

    /// What was planned and has not happened will not happen.
    pub fn forget_plans(&self) {
        self.disk().failures.clear();
    }

    /// How many calls that change the disk were made since the beginning.
    pub fn calls(&self) -> u64 {
        self.disk().calls
    }

    /// What has gone wrong since the beginning.
    pub fn fired(&self) -> Fired {
        self.disk().fired
    }

    /// Whether a power loss now could take something.
    pub fn is_at_risk(&self) -> bool {
        self.disk().is_at_risk()
    }

    /// How much the disk holds, 1 TiB at first; a write beyond it is refused with ENOSPC.
    pub fn set_capacity(&self, bytes: u64) {
        self.disk().capacity_bytes = bytes;
    }

    /// Flips bits in a stretch of a file, in the cache and on the disk; what lies past its end stays.
    pub fn corrupt(&self, name: &str, offset: u64, bytes: usize) -> io::Result<()> {
        self.disk().corrupt(name, offset, bytes)
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock()
    }

    fn handle(&self, disk: &mut Disk, inode: InodeId, access: Access) -> SimFile {
        disk.opened(inode);
        SimFile {
            storage: self.clone(),
            inode,
            boot: disk.boot(),
            access,
        }
    }

    fn open_existing(&self, name: &str, call: Call, access: Access) -> io::Result<SimFile> {
        check_name(name)?;
        let mut disk = self.disk();
        no_fault(disk.enter(call)?)?;
        let inode = disk.find(name)?;
        Ok(self.handle(&mut disk, inode, access))
    }
}

impl Storage for SimStorage {
    type File = SimFile;

    fn create(&self, name: &str) -> io::Result<SimFile> {
        check_name(name)?;
        let mut disk = self.disk();
        let verdict = disk.enter(Call::Create)?;
        refused(verdict)?;
        let inode = disk.create(name)?;
        no_fault(verdict)?;
        Ok(self.handle(&mut disk, inode, Access::ReadWrite))
    }

    fn open(&self, name: &str) -> io::Result<SimFile> {
        self.open_existing(name, Call::Open, Access::ReadWrite)
    }

    fn open_read(&self, name: &str) -> io::Result<SimFile> {
        self.open_existing(name, Call::OpenRead, Access::Read)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut disk = self.disk();
        no_fault(disk.enter(Call::List)?)?;
        Ok(disk.names())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        let mut disk = self.disk();
        let verdict = disk.enter(Call::Rename)?;
        refused(verdict)?;
        disk.rename(from, to)?;
        no_fault(verdict)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        let mut disk = self.disk();
        let verdict = disk.enter(Call::Remove)?;
        refused(verdict)?;
        disk.remove(name)?;
        no_fault(verdict)
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut disk = self.disk();
        let verdict = disk.enter(Call::SyncDir)?;
        match verdict {
            Verdict::Go => disk.sync_names(),
            Verdict::Fail(_) => disk.sync_names_failing(),
            // The power loss decides how far it came.
            Verdict::Stop => {}
        }
        no_fault(verdict)
    }

    fn space(&self) -> io::Result<Space> {
        let mut disk = self.disk();
        no_fault(disk.enter(Call::Space)?)?;
        Ok(Space {
            total_bytes: disk.capacity_bytes,
            free_bytes: disk.free_bytes(),
        })
    }
}

/// An open file of a [`SimStorage`].
#[derive(Debug)]
pub struct SimFile {
    storage: SimStorage,
    inode: InodeId,
    boot: Boot,
    access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
}

impl StorageFile for SimFile {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.storage.disk();
        let verdict = self.enter_write(&mut disk, Call::Write, offset, data.len())?;
        let (inode, rng) = disk.file(self.inode, self.boot)?;
        match verdict {
            Verdict::Go | Verdict::Stop => inode.write(offset, data, rng),
            Verdict::Fail(_) => inode.write(offset, first_part(data, rng), rng),
        }
        no_fault(verdict)
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_aligned(offset, data.len())?;
        let mut disk = self.storage.disk();
        let verdict = self.enter_write(&mut disk, Call::WriteDurable, offset, data.len())?;
        let (inode, rng) = disk.file(self.inode, self.boot)?;
        match verdict {
            Verdict::Go => inode.write_durable(offset, data),
            // The power loss chooses among the dirty sectors.
            Verdict::Stop => inode.write(offset, data, rng),
            Verdict::Fail(Fault::Io) => {
                inode.write(offset, data, rng);
                let lost = inode.sync_failing(rng);
                disk.fired.failed_syncs_marked_clean += u64::from(lost > 0);
            }
            Verdict::Fail(Fault::NoSpace | Fault::Quota | Fault::Short) => {
                inode.write(offset, first_part(data, rng), rng);
            }
        }
        no_fault(verdict)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut disk = self.storage.disk();
        no_fault(disk.enter(Call::Read)?)?;
        let (inode, _) = disk.file(self.inode, self.boot)?;
        Ok(inode.read(offset, buf))
    }

    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut disk = self.storage.disk();
        no_fault(disk.enter(Call::ReadUncached)?)?;
        let (inode, _) = disk.file(self.inode, self.boot)?;
        Ok(inode.read_uncached(offset, buf))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.storage.disk();
        let verdict = disk.enter(Call::Sync)?;
        let (inode, rng) = disk.file(self.inode, self.boot)?;
        match verdict {
            Verdict::Go => inode.sync(),
            Verdict::Fail(_) => {
                let lost = inode.sync_failing(rng);
                disk.fired.failed_syncs_marked_clean += u64::from(lost > 0);
            }
            // The power loss decides how far it came.
            Verdict::Stop => {}
        }
        no_fault(verdict)
    }

    fn preallocate(&self, bytes: u64) -> io::Result<()> {
        let mut disk = self.storage.disk();
        let verdict = self.enter_change(&mut disk, Call::Preallocate)?;
        let (inode, _) = disk.file(self.inode, self.boot)?;
        let needed = bytes.saturating_sub(inode.used_bytes());
        if disk.is_full_for(needed) {
            disk.fired.failed(Call::Preallocate, Fault::NoSpace);
            return Err(no_space());
        }
        let (inode, _) = disk.file(self.inode, self.boot)?;
        inode.preallocate(bytes);
        no_fault(verdict)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut disk = self.storage.disk();
        let verdict = self.enter_change(&mut disk, Call::SetLen)?;
        let (inode, _) = disk.file(self.inode, self.boot)?;
        inode.set_len(bytes);
        no_fault(verdict)
    }

    fn len(&self) -> io::Result<u64> {
        let mut disk = self.storage.disk();
        let (inode, _) = disk.file(self.inode, self.boot)?;
        Ok(inode.len())
    }

    fn map(&self) -> io::Result<Option<Map>> {
        Ok(None)
    }
}

impl SimFile {
    fn enter_change(&self, disk: &mut Disk, call: Call) -> io::Result<Verdict> {
        if self.access == Access::Read {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let verdict = disk.enter(call)?;
        match verdict {
            Verdict::Fail(fault) if !call.is_write() => Err(fault.error()),
            _ => Ok(verdict),
        }
    }

    fn enter_write(
        &self,
        disk: &mut Disk,
        call: Call,
        offset: u64,
        bytes: usize,
    ) -> io::Result<Verdict> {
        let verdict = self.enter_change(disk, call)?;
        let (inode, _) = disk.file(self.inode, self.boot)?;
        let needed = inode.bytes_needed(offset, bytes);
        if disk.is_full_for(needed) {
            disk.fired.failed(call, Fault::NoSpace);
            return Ok(Verdict::Fail(Fault::NoSpace));
        }
        Ok(verdict)
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.storage.disk().closed(self.inode, self.boot);
    }
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Fault::Io => io::Error::from_raw_os_error(EIO),
            Fault::NoSpace => no_space(),
            Fault::Quota => io::Error::from_raw_os_error(EDQUOT),
            Fault::Short => io::ErrorKind::WriteZero.into(),
        }
    }
}

/// For calls that, refused by plan, do nothing.
fn refused(verdict: Verdict) -> io::Result<()> {
    match verdict {
        Verdict::Fail(fault) => Err(fault.error()),
        Verdict::Go | Verdict::Stop => Ok(()),
    }
}

/// The answer of a call whose effect has been settled.
fn no_fault(verdict: Verdict) -> io::Result<()> {
    match verdict {
        Verdict::Go => Ok(()),
        Verdict::Fail(fault) => Err(fault.error()),
        Verdict::Stop => Err(off()),
    }
}

/// What of a write that ended early was taken: whole sectors, never all of it.
fn first_part<'a>(data: &'a [u8], rng: &mut Rng) -> &'a [u8] {
    let sectors = data.len().div_ceil(SECTOR_BYTES).max(1);
    &data[..rng.below(sectors as u64) as usize * SECTOR_BYTES]
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(ENOSPC)
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

#[cfg(test)]
mod tests;
