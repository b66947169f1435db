//! A folder of the operating system, held by one process.
//!
//! Owns the folder lock, the choice of the durable write path and nothing of the log's formats.
//!
//! - The lock is `flock` on `LOCK`, so it ends with the process however that ends; the file also
//!   names the holder's pid, for the error message only.
//! - Durable writes go through a second descriptor with `O_DIRECT | O_DSYNC` where the file system
//!   takes it: one call and one device write, no page cache, and an error is reported to this very
//!   call. On ext4 this was as fast as or faster than write + `fdatasync` at every size from 4 KiB
//!   to 1 MiB (fallocated: 126 against 133 us at 4 KiB, 244 against 360 at 256 KiB). Where the probe
//!   at opening fails, write + `fdatasync` is used.
//! - Errors are never retried; only an interrupted call is resumed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use parking_lot::Mutex;
use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags};
use thiserror::Error;

use super::{BLOCK_BYTES, Map, Space, Storage, StorageFile, check_aligned, check_name};
use crate::buffer::BufferPool;

/// Whether sealed files are mapped, or read by calls that return typed errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    On,
    Off,
}

/// Why the folder could not be taken.
#[derive(Debug, Error)]
pub enum FolderError {
    #[error(
        "another broker (pid {}) holds {}; stop it, or choose another folder",
        pid_text(*pid), path.display()
    )]
    Held { path: PathBuf, pid: Option<u32> },
    #[error("{} cannot be written by this user; grant write permission, or choose another folder", path.display())]
    ReadOnly { path: PathBuf },
    #[error("cannot open the folder {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A locked folder. The lock is held until the last clone and the last file of it are gone.
#[derive(Clone, Debug)]
pub struct FolderStorage {
    folder: Arc<Folder>,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    handle: File,
    /// Closing it gives the lock up.
    _lock: File,
    mapping: Mapping,
    durable: DurablePath,
    bounce: BufferPool,
}

/// How bytes are made durable in this folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DurablePath {
    Direct,
    WriteThenSync,
}

impl FolderStorage {
    /// Makes the folder if it is missing (readable by its owner only), locks it, and finds out how
    /// its file system is written best.
    pub fn open(path: impl AsRef<Path>, mapping: Mapping) -> Result<FolderStorage, FolderError> {
        let path = path.as_ref();
        let fail = |source: io::Error| FolderError::of(path, source);
        make_folder(path).map_err(fail)?;
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(path.join(LOCK_NAME))
            .map_err(fail)?;
        if let Err(e) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            return Err(match e {
                rustix::io::Errno::WOULDBLOCK => FolderError::Held {
                    path: path.to_owned(),
                    pid: read_pid(&lock),
                },
                e => fail(e.into()),
            });
        }
        let bounce = BufferPool::new(BOUNCE_IDLE_BYTES_MAX);
        let durable = sign_lock(path, &lock, &bounce).map_err(fail)?;
        let handle = File::open(path).map_err(fail)?;
        Ok(FolderStorage {
            folder: Arc::new(Folder {
                path: path.to_owned(),
                handle,
                _lock: lock,
                mapping,
                durable,
                bounce,
            }),
        })
    }

    pub fn path(&self) -> &Path {
        &self.folder.path
    }

    fn path_of(&self, name: &str) -> io::Result<PathBuf> {
        check_name(name)?;
        Ok(self.folder.path.join(name))
    }

    fn writable(&self, file: File, path: &Path) -> io::Result<FolderFile> {
        let direct = match self.folder.durable {
            DurablePath::Direct => Some(open_direct(path)?),
            DurablePath::WriteThenSync => None,
        };
        Ok(FolderFile {
            file,
            direct,
            path: path.to_owned(),
            access: Access::ReadWrite,
            folder: self.folder.clone(),
        })
    }
}

impl Storage for FolderStorage {
    type File = FolderFile;

    fn create(&self, name: &str) -> io::Result<FolderFile> {
        let path = self.path_of(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(&path)?;
        self.writable(file, &path)
    }

    fn open(&self, name: &str) -> io::Result<FolderFile> {
        let path = self.path_of(name)?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        self.writable(file, &path)
    }

    fn open_read(&self, name: &str) -> io::Result<FolderFile> {
        let path = self.path_of(name)?;
        Ok(FolderFile {
            file: File::open(&path)?,
            direct: None,
            path,
            access: Access::Read,
            folder: self.folder.clone(),
        })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.folder.path)? {
            let entry = entry?;
            let name = entry.file_name();
            // Anything else in the folder, the lock included, is not the log's.
            if let Some(name) = name.to_str()
                && check_name(name).is_ok()
                && entry.file_type()?.is_file()
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path_of(from)?, self.path_of(to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path_of(name)?)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.folder.handle.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::fstatvfs(&self.folder.handle)?;
        Ok(Space {
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    /// At the same time, one of them on a thread of its own.
    fn both<A: Send, B: Send>(
        &self,
        one: impl FnOnce() -> A + Send,
        other: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        let one = Mutex::new(Some(one));
        let do_one = || {
            let one = one.lock().take();
            one.map(|one| one())
        };
        std::thread::scope(|scope| {
            // Without a thread it is done afterwards.
            let thread = std::thread::Builder::new().spawn_scoped(scope, do_one);
            let other = other();
            let one = match thread.map(ScopedJoinHandle::join) {
                Ok(Ok(one)) => one,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(_) => do_one(),
            };
            (one.expect("it is done once, there or here"), other)
        })
    }
}

/// An open file of a [`FolderStorage`].
#[derive(Debug)]
pub struct FolderFile {
    file: File,
    /// The same file with `O_DIRECT | O_DSYNC`; none for read-only files and where not supported.
    direct: Option<File>,
    /// Where it was opened.
    path: PathBuf,
    access: Access,
    /// Keeps the folder locked for as long as anything in it is open.
    folder: Arc<Folder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
}

impl StorageFile for FolderFile {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_aligned(offset, data.len())?;
        match &self.direct {
            Some(direct) if data.as_ptr().addr().is_multiple_of(BLOCK_BYTES) => {
                direct.write_all_at(data, offset)
            }
            _ => {
                self.file.write_all_at(data, offset)?;
                self.file.sync_data()
            }
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        read_full_at(&self.file, offset, buf)
    }

    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let is_aligned = check_aligned(offset, buf.len()).is_ok()
            && buf.as_ptr().addr().is_multiple_of(BLOCK_BYTES);
        match &self.direct {
            Some(direct) if is_aligned => read_full_at(direct, offset, buf),
            Some(direct) => self.read_direct_at(direct, offset, buf),
            None => {
                self.forget_cached(offset, buf.len())?;
                read_full_at(&self.file, offset, buf)
            }
        }
    }

    /// A file that is not written is opened for the one read, or all sealed files would hold two
    /// descriptors each. One that has lost its name meanwhile is read as any other.
    fn read_past_cache_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        check_aligned(offset, buf.len())?;
        let own = match (self.folder.durable, self.access) {
            (DurablePath::Direct, Access::Read) => open_direct_to_read(&self.path).ok(),
            _ => None,
        };
        let direct = own.as_ref().or(self.direct.as_ref());
        let is_aligned = buf.as_ptr().addr().is_multiple_of(BLOCK_BYTES);
        let file = direct.filter(|_| is_aligned).unwrap_or(&self.file);
        read_full_at(file, offset, buf)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn preallocate(&self, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeros_up_to(bytes),
            done => Ok(done?),
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn map(&self) -> io::Result<Option<Map>> {
        match (self.folder.mapping, self.access) {
            (Mapping::On, Access::Read) => Map::of(&self.file).map(Some),
            // A file that can be written is not sealed, and only what is sealed may be mapped.
            (Mapping::Off, _) | (_, Access::ReadWrite) => Ok(None),
        }
    }
}

impl FolderFile {
    /// Direct reads need aligned memory, offset and length; the caller has none of them.
    fn read_direct_at(&self, direct: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let lead = (at % BLOCK_BYTES as u64) as usize;
            let wanted = (lead + buf.len() - done).min(BOUNCE_BYTES);
            let mut bounce = self.folder.bounce.take(BOUNCE_BYTES);
            bounce.resize(wanted.next_multiple_of(BLOCK_BYTES));
            let read = read_full_at(direct, at - lead as u64, &mut bounce)?;
            let Some(got) = bounce[..read.min(wanted)].get(lead..) else {
                return Ok(done);
            };
            buf[done..done + got.len()].copy_from_slice(got);
            done += got.len();
            if read < bounce.len() {
                return Ok(done);
            }
        }
        Ok(done)
    }

    fn forget_cached(&self, offset: u64, bytes: usize) -> io::Result<()> {
        let Some(bytes) = NonZeroU64::new(bytes as u64) else {
            return Ok(());
        };
        Ok(rustix::fs::fadvise(
            &self.file,
            offset,
            Some(bytes),
            Advice::DontNeed,
        )?)
    }

    fn write_zeros_up_to(&self, bytes: u64) -> io::Result<()> {
        let zeros = vec![0; ZERO_FILL_BYTES];
        let mut at = self.len()?;
        while at < bytes {
            let step = (bytes - at).min(ZERO_FILL_BYTES as u64);
            self.file.write_all_at(&zeros[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }
}

impl FolderError {
    fn of(path: &Path, source: io::Error) -> FolderError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                FolderError::ReadOnly { path }
            }
            _ => FolderError::Io { path, source },
        }
    }
}

/// Makes the folder and its name durable; what is synced inside would else vanish with it.
fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(path)?;
    let path = path.canonicalize()?;
    for ancestor in path.ancestors().skip(1) {
        // Folders above, of other owners, may not be readable; those were not made here.
        let Ok(folder) = File::open(ancestor) else {
            break;
        };
        folder.sync_all()?;
    }
    Ok(())
}

/// Writes the pid into the lock file, which is one block long, by the direct path if that works:
/// so the probe needs no new file, and after the first start no new space.
fn sign_lock(folder: &Path, lock: &File, pool: &BufferPool) -> io::Result<DurablePath> {
    let mut block = pool.take(BLOCK_BYTES);
    block.extend_from_slice(std::process::id().to_string().as_bytes());
    block.extend_from_slice(b"\n");
    block.pad_to_block();
    let direct = open_direct(&folder.join(LOCK_NAME));
    if direct.is_ok_and(|direct| direct.write_all_at(&block, 0).is_ok()) {
        return Ok(DurablePath::Direct);
    }
    lock.write_all_at(&block, 0)?;
    Ok(DurablePath::WriteThenSync)
}

fn read_pid(lock: &File) -> Option<u32> {
    let mut text = [0; 16];
    let read = read_full_at(lock, 0, &mut text).ok()?;
    let line = text.get(..read)?.split(|&b| b == b'\n').next()?;
    std::str::from_utf8(line).ok()?.parse().ok()
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

fn open_direct(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECT | OFlags::DSYNC;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
}

fn open_direct_to_read(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
}

fn read_full_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Not in the alphabet of the log's names, so it is never listed, renamed or removed.
const LOCK_NAME: &str = "LOCK";
/// The folder holds what users sent; nobody else reads it.
const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// One step of a direct read.
const BOUNCE_BYTES: usize = 256 << 10;
/// Keeps one bounce buffer idle (each size class gets a fifth of it).
const BOUNCE_IDLE_BYTES_MAX: usize = 5 * BOUNCE_BYTES;
const ZERO_FILL_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
