//! Read-only maps of sealed files. The only file of the project that holds `unsafe`.
//!
//! A mapped file must never change or shrink while the map lives: a store to it would be a data race
//! with the reader's slice, and a page behind the new end is `SIGBUS`. What keeps that promise:
//! - only files opened by `open_read` are mapped, and the log opens so only what is sealed;
//! - a sealed file is never written, truncated or renamed onto while its segment, which owns the only
//!   map of it, is there; it may be unlinked, and keeps its pages until the map is gone (see `unlink`);
//! - the folder lock keeps a second broker out.
//!
//! A disk error under a map kills the process, because there is no call that could return it.
//! Who prefers typed errors switches maps off ([`crate::storage::Mapping::Off`]). Touching a map may
//! block on the disk, so neither the shard thread nor an async worker may do it.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; this file is the only place for it"
)]

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct Map(memmap2::Mmap);

impl Map {
    /// Maps all of `file`, which must be sealed (see the module). A fault reads its page and no more: where
    /// the disk reads ahead by megabytes, as in many virtual machines, a single record would else cost
    /// all of them, and every sync behind them its time. Who needs more says so with `will_need`.
    pub(crate) fn of(file: &File) -> io::Result<Map> {
        // SAFETY: `FolderFile::map` hands in only descriptors from `open_read`, and those exist only
        // for sealed files, which nobody writes, and nobody truncates before the map is dropped, while
        // the folder lock is held.
        let map = unsafe { memmap2::Mmap::map(file) }?;
        // Only advice: without it, reading is slower and as right.
        let _ = map.advise(memmap2::Advice::Random);
        Ok(Map(map))
    }

    /// Asks for a part to be read from the disk in the background. Only advice: nothing follows if it
    /// is not taken, and a part behind the end is none.
    pub(crate) fn will_need(&self, range: Range<usize>) {
        let range = range.start..range.end.min(self.0.len());
        if !range.is_empty() {
            let _ = self
                .0
                .advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
