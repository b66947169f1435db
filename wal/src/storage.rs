//! The seam between the log and the disk: a flat folder of named files.
//!
//! Owns the traits and the words of the contract; [`FolderStorage`] is a folder of the operating
//! system, [`sim::SimStorage`] a simulated one that crashes and fails on demand. Everything the log
//! does to a disk goes through here, so a test can stop the machine at any of these calls.
//!
//! What a caller may rely on, and nothing beyond:
//! - bytes are durable after `sync_data` or `write_durable_at` returned `Ok`, for the file's bytes
//!   and its length, not for its name;
//! - names (`create`, `rename`, `remove`) are durable after the next `sync_dir` returned `Ok`;
//! - what was not synced may be lost, kept, or torn in any 512-byte sector, in any order;
//! - after a failed sync nothing is known about what it covered, and a second sync that succeeds
//!   proves nothing. The caller stops for good.
//!
//! It deliberately has no append, no cursor and no retry: offsets are the log's business, and an
//! interrupted call is resumed inside.

use std::io;

mod real;
pub mod sim;

pub use real::{FolderError, FolderFile, FolderStorage, Mapping};

pub use crate::mmap::Map;

/// Direct and durable writes are aligned to this many bytes, in memory and in the file.
pub const BLOCK_BYTES: usize = 4096;

/// The smallest unit that a disk writes as a whole.
pub const SECTOR_BYTES: usize = 512;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(SECTOR_BYTES));

/// What the file system below the folder has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// What this process may still use, without the share kept for root.
    pub free_bytes: u64,
}

/// A flat folder of files, named by `[a-z0-9.-]`. Clones share the folder.
pub trait Storage: Clone + Send + Sync + 'static {
    type File: StorageFile;

    /// Makes a new file and opens it for reading and writing; `AlreadyExists` if there is one.
    fn create(&self, name: &str) -> io::Result<Self::File>;

    /// Opens an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Self::File>;

    /// Opens an existing file for reading; for maps, only sealed files may be opened so.
    fn open_read(&self, name: &str) -> io::Result<Self::File>;

    /// The names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Gives a file another name, replacing whatever had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Unlinks a name; open handles and maps of the file stay good.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes every `create`, `rename` and `remove` before it durable.
    fn sync_dir(&self) -> io::Result<()>;

    fn space(&self) -> io::Result<Space>;

    /// Does both and returns when both are done. Not at the same time, unless the storage says so: where its
    /// calls come in the same order each time, they must.
    fn both<A: Send, B: Send>(
        &self,
        one: impl FnOnce() -> A + Send,
        other: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        (one(), other())
    }
}

/// One open file. All calls take `&self` and may be made from several threads.
pub trait StorageFile: Send + Sync + 'static {
    /// Writes all of `data` at `offset`, growing the file if needed.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Writes all of `data` and returns when it is durable. Offset and length must be multiples of
    /// [`BLOCK_BYTES`], else `InvalidInput`; `data` should begin on such an address, else the slower
    /// way (write, then sync) is taken.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Fills `buf` from `offset`; short only at the end of the file.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Like `read_at`, but from the disk rather than the page cache, so that recovery judges what
    /// would be there after a power loss. Fastest where offset, length and the address of `buf` are
    /// multiples of [`BLOCK_BYTES`]: nothing is copied then.
    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Like `read_at`, past the page cache if that can be done: for much that is not soon read again.
    /// Offset and length must be multiples of [`BLOCK_BYTES`], and `buf` should begin on such an address.
    fn read_past_cache_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read_at(offset, buf)
    }

    /// Makes the file's bytes and length durable.
    fn sync_data(&self) -> io::Result<()>;

    /// Reserves space and makes the file `bytes` long if it is shorter; new bytes read as zero.
    fn preallocate(&self, bytes: u64) -> io::Result<()>;

    /// Cuts or extends the file; new bytes read as zero.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// A read-only map of the whole file; `None` where the storage has none or maps are off.
    fn map(&self) -> io::Result<Option<Map>>;
}

/// Fills all of `buf`, or `UnexpectedEof`.
pub fn read_exact_at(file: &impl StorageFile, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let read = file.read_at(offset, buf)?;
    if read == buf.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Whether a call failed because there is no room left: on the disk, or in what its owner may use of it.
pub fn is_full(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Whether there is nothing but zeros, compared by the block rather than by the byte: recovery asks this of
/// every block that nobody has written yet.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK_BYTES)
        .all(|block| *block == ZEROS[..block.len()])
}

static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

fn check_name(name: &str) -> io::Result<()> {
    let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-';
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || name.starts_with('.')
        || !name.bytes().all(known)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "file names are 1 to 100 of [a-z0-9.-] and do not begin with a dot",
        ));
    }
    Ok(())
}

fn check_aligned(offset: u64, bytes: usize) -> io::Result<()> {
    if !offset.is_multiple_of(BLOCK_BYTES as u64) || !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "durable writes begin and end on 4 KiB boundaries",
        ));
    }
    Ok(())
}

const NAME_BYTES_MAX: usize = 100;
