//! Reading a segment that was not sealed: which of its bytes are entries.
//!
//! Owns the walk, past the page cache, over the entries and behind the first bad one. Judging what a
//! bad stretch means (torn or damaged) is recovery's business.
//!
//! Invariants: what is returned as good passed every check, and its index is above the good ones before
//! it. Behind bad bytes every block is tried, because a later entry may be whole, and its header vouches
//! for what came before.

use std::io;

use xxhash_rust::xxh3::Xxh3;

use crate::buffer::{AlignedBuf, BufferPool};
use crate::directory::{Spot, is_directory_block};
use crate::entry::{Defect, EntryHeader, HEADER_BYTES, LogIndex, check_payload};
use crate::planted::{self, Bug};
use crate::segment::{ENTRIES_START, is_footer};
use crate::storage::{BLOCK_BYTES, StorageFile, is_zero};

/// What a walk over one segment found.
pub(crate) struct Scan {
    pub spots: Vec<Spot>,
    pub records: u64,
    /// Over the good entries' headers; see the footer.
    pub digest: Xxh3,
    pub last_crc: u32,
    /// The highest durable index of any header that is whole, even where its payload is not.
    pub vouched: LogIndex,
    /// Where the unbroken run of entries from the start ends, and the index expected there.
    pub run_end: u64,
    pub run_next: LogIndex,
    /// What is wrong there; `None` if zeros or an interrupted sealing follow and nothing else.
    pub defect: Option<Defect>,
    /// Behind the last entry or the last byte that is not zero.
    pub used_end: u64,
    /// Behind the last good entry.
    pub entries_end: u64,
    /// How far the file was looked at.
    pub file_bytes: u64,
    /// The format of the first entry that a newer version wrote.
    pub newer: Option<u16>,
}

/// Which segment is walked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expect {
    pub uuid: [u8; 16],
    pub epoch: u32,
    pub first: LogIndex,
    /// Nothing at or behind this position is looked at.
    pub end: Option<u64>,
}

/// Walks the segment. Every header with the right checksum is handed to `visit` with the entry's bytes
/// if they are good.
pub(crate) fn scan<F: StorageFile>(file: &F, expect: Expect) -> io::Result<Scan> {
    // A cut behind the end of the file has nothing to walk over there.
    let end = file.len()?.min(expect.end.unwrap_or(u64::MAX));
    let mut window = Window::new(file, end);
    let mut scan = Scan {
        spots: Vec::new(),
        records: 0,
        digest: Xxh3::new(),
        last_crc: 0,
        vouched: LogIndex::NONE,
        run_end: ENTRIES_START,
        run_next: expect.first,
        defect: None,
        used_end: ENTRIES_START,
        entries_end: ENTRIES_START,
        file_bytes: end,
        newer: None,
    };
    let mut at = ENTRIES_START;
    while at < end {
        at = scan.step(&mut window, expect, at)?;
    }
    Ok(scan)
}

impl Scan {
    /// Judges what stands at `at`; returns where to go on.
    fn step<F: StorageFile>(
        &mut self,
        window: &mut Window<'_, F>,
        expect: Expect,
        at: u64,
    ) -> io::Result<u64> {
        let block = window.get(at, BLOCK_BYTES)?;
        if is_zero(block) {
            return Ok(at + BLOCK_BYTES as u64);
        }
        let (header, crc) = match header_at(block, expect, at) {
            Ok(found) => found,
            Err(defect) => {
                if self.newer.is_none() {
                    self.newer = EntryHeader::newer(block, expect.uuid, expect.epoch, at);
                }
                let sealing = is_directory_block(block, expect.uuid) || is_footer(block);
                if !sealing {
                    self.used_end = at + block.len() as u64;
                    self.defect.get_or_insert(defect);
                }
                return Ok(at + BLOCK_BYTES as u64);
            }
        };
        self.vouched = self.vouched.max(header.durable);
        let disk_bytes = header.disk_bytes();
        let next = at + disk_bytes as u64;
        self.used_end = next.min(window.end);
        let judged = check_payload(&header, window.get(at, disk_bytes)?)
            .and_then(|()| self.check_order(&header, at));
        match judged {
            Ok(()) => self.take(&header, crc, at),
            Err(defect) => {
                self.defect.get_or_insert(defect);
            }
        }
        Ok(next)
    }

    fn check_order(&self, header: &EntryHeader, at: u64) -> Result<(), Defect> {
        let last = self.spots.last().map(|spot| spot.index);
        let in_run = at == self.run_end;
        if in_run && header.index != self.run_next {
            return Err(Defect::Index);
        }
        // Behind bad bytes; those stand where `run_next` should be.
        if !in_run
            && (header.index <= self.run_next || last.is_some_and(|last| header.index <= last))
        {
            return Err(Defect::Index);
        }
        if in_run && last.is_some() && header.previous_crc != self.last_crc {
            return Err(Defect::Chain);
        }
        Ok(())
    }

    fn take(&mut self, header: &EntryHeader, crc: u32, at: u64) {
        let blocks = header.disk_bytes() / BLOCK_BYTES;
        self.spots.push(Spot {
            index: header.index,
            block: (at / BLOCK_BYTES as u64) as u32,
            blocks: blocks as u32,
        });
        self.records += u64::from(header.records);
        self.digest.update(&header.encode().0);
        self.last_crc = crc;
        self.entries_end = at + header.disk_bytes() as u64;
        if at == self.run_end {
            self.run_end = self.entries_end;
            self.run_next = header.index.next();
        }
    }
}

fn header_at(block: &[u8], expect: Expect, at: u64) -> Result<(EntryHeader, u32), Defect> {
    let (header, crc) = EntryHeader::decode(block.get(..HEADER_BYTES).ok_or(Defect::Length)?)?;
    let here =
        header.segment == expect.uuid && header.epoch == expect.epoch && header.position == at;
    if here {
        Ok((header, crc))
    } else {
        Err(Defect::Foreign)
    }
}

/// Reads ahead, so that small entries cost no call each.
pub(crate) struct Window<'a, F> {
    file: &'a F,
    bytes: AlignedBuf,
    start: u64,
    end: u64,
}

impl<'a, F: StorageFile> Window<'a, F> {
    pub fn new(file: &'a F, end: u64) -> Window<'a, F> {
        let bytes_max = usize::try_from(end).map_or(WINDOW_BYTES, |end| end.min(WINDOW_BYTES));
        Window {
            file,
            bytes: BufferPool::new(0).take(bytes_max),
            start: 0,
            end,
        }
    }

    /// The bytes at a position; fewer at the end.
    pub fn get(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let wanted = (len as u64).min(self.end.saturating_sub(at));
        let held_to = self.start + self.bytes.len() as u64;
        if at < self.start || at + wanted > held_to {
            let left = self.end.saturating_sub(at);
            let ahead = wanted.max(WINDOW_BYTES as u64).min(left);
            let ahead = usize::try_from(ahead).map_err(io::Error::other)?;
            // Whole blocks are read without a copy, also over the end.
            self.bytes.resize(ahead.next_multiple_of(BLOCK_BYTES));
            self.start = at;
            let read = match planted::is(Bug::TrustPageCache) {
                true => self.file.read_at(at, &mut self.bytes)?,
                false => self.file.read_uncached_at(at, &mut self.bytes)?,
            };
            self.bytes.resize(read.min(ahead));
        }
        let from = ((at - self.start) as usize).min(self.bytes.len());
        let to = (from + wanted as usize).min(self.bytes.len());
        Ok(&self.bytes[from..to])
    }
}

/// A huge page is filled from the disk in half the time that as many small ones take (`buffer`).
const WINDOW_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimStorage;
    use crate::storage::Storage;

    #[test]
    fn an_end_far_behind_the_file_ends_the_walk_with_the_file() {
        let file = SimStorage::new(1).create("seg").unwrap();
        file.set_len(64 << 10).unwrap();
        let expect = Expect {
            uuid: [1; 16],
            epoch: 1,
            first: LogIndex(1),
            // A walk of this many blocks would take days.
            end: Some(1 << 60),
        };
        let scan = scan(&file, expect).unwrap();
        assert!(scan.spots.is_empty());
        assert_eq!((scan.defect, scan.used_end), (None, ENTRIES_START));
    }
}
