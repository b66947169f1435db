//! One simulated file: what its readers see, and what a power loss would leave of it.
//!
//! Two copies of the bytes and of the length: cached (the page cache) and durable (the disk). Dirty
//! sectors are those whose cached bytes may reach the disk at any time and are on it for certain
//! only after a sync. A sector may differ without being dirty: that is what a failed sync leaves.

use std::collections::BTreeMap;

use super::fired::Loss;
use super::pages::{PAGE_BYTES, Pages, SECTORS_PER_PAGE, pieces};
use super::rng::Rng;

#[derive(Clone, Debug, Default)]
pub(super) struct Inode {
    cached: Pages,
    durable: Pages,
    /// page -> one bit per sector; no entry has an empty mask.
    dirty: BTreeMap<u64, u8>,
    cached_len: u64,
    durable_len: u64,
    /// Space that `preallocate` reserved.
    reserved_len: u64,
    pub(super) opens: usize,
}

impl Inode {
    pub(super) fn len(&self) -> u64 {
        self.cached_len
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8], rng: &mut Rng) {
        if data.is_empty() {
            return;
        }
        for piece in pieces(offset, data.len()) {
            let dirty = self.dirty.entry(piece.page).or_insert(0);
            let overwritten = *dirty & piece.sectors();
            *dirty |= piece.sectors();
            // The kernel writes back when it likes: what is overwritten now may be on the disk.
            if overwritten != 0 && rng.percent(WRITEBACK_PERCENT) {
                for sector in bits(overwritten) {
                    self.durable.copy_sector(&self.cached, piece.page, sector);
                }
            }
        }
        self.cached.write(offset, data);
        self.cached_len = self.cached_len.max(offset + data.len() as u64);
    }

    /// Writes whole pages through to the disk; nothing else of the file becomes durable by it.
    pub(super) fn write_durable(&mut self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.cached.write(offset, data);
        for piece in pieces(offset, data.len()) {
            self.durable.copy_page(&self.cached, piece.page);
            self.dirty.remove(&piece.page);
        }
        let end = offset + data.len() as u64;
        self.cached_len = self.cached_len.max(end);
        self.durable_len = self.durable_len.max(end);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        for page in self.cached.pages_from(len / PAGE_BYTES as u64) {
            self.dirty.insert(page, u8::MAX);
        }
        self.cached.cut(len);
        self.cached_len = len;
        self.reserved_len = self.reserved_len.min(len);
    }

    pub(super) fn preallocate(&mut self, bytes: u64) {
        self.reserved_len = self.reserved_len.max(bytes);
        self.cached_len = self.cached_len.max(bytes);
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let bytes = self.readable(offset, buf.len());
        self.cached.read(offset, &mut buf[..bytes]);
        bytes
    }

    /// What the disk holds, once what is dirty has been written back; after a failed sync this is
    /// where the loss shows.
    pub(super) fn read_uncached(&self, offset: u64, buf: &mut [u8]) -> usize {
        let bytes = self.readable(offset, buf.len());
        self.durable.read(offset, &mut buf[..bytes]);
        for piece in pieces(offset, bytes) {
            let Some(&dirty) = self.dirty.get(&piece.page) else {
                continue;
            };
            let mut disk = Pages::default();
            for sector in bits(u8::MAX) {
                let newest = if dirty & (1 << sector) == 0 {
                    &self.durable
                } else {
                    &self.cached
                };
                disk.copy_sector(newest, piece.page, sector);
            }
            disk.read(
                offset + piece.done as u64,
                &mut buf[piece.done..piece.done + piece.bytes],
            );
        }
        bytes
    }

    pub(super) fn sync(&mut self) {
        for (page, sectors) in std::mem::take(&mut self.dirty) {
            if sectors == u8::MAX {
                self.durable.copy_page(&self.cached, page);
            } else {
                for sector in bits(sectors) {
                    self.durable.copy_sector(&self.cached, page, sector);
                }
            }
        }
        self.durable.cut(self.cached_len);
        self.durable_len = self.cached_len;
    }

    /// A sync that reports an error: some sectors made it, the others never will, and all of them
    /// count as clean, so that the next sync has nothing to do and succeeds. Returns how many are lost.
    pub(super) fn sync_failing(&mut self, rng: &mut Rng) -> u64 {
        let mut lost = 0;
        for (page, sectors) in std::mem::take(&mut self.dirty) {
            for sector in bits(sectors) {
                // At least one is lost, or the failure would mean nothing.
                if lost > 0 && rng.percent(50) {
                    self.durable.copy_sector(&self.cached, page, sector);
                } else {
                    lost += 1;
                }
            }
        }
        if rng.percent(50) {
            self.durable.cut(self.cached_len);
            self.durable_len = self.cached_len;
        }
        lost
    }

    pub(super) fn is_at_risk(&self) -> bool {
        !self.dirty.is_empty() || self.durable_len != self.cached_len
    }

    /// The power goes. Of what was not synced some sectors and one of the possible lengths remain;
    /// ground that was never synced may show bytes of `donor`, a file that was there before.
    pub(super) fn lose_power(&mut self, donor: Option<&Inode>, rng: &mut Rng) -> Loss {
        let new_ground = self.durable_len.div_ceil(PAGE_BYTES as u64);
        let fate = Fate::draw(rng);
        let total: u32 = self.dirty.values().map(|mask| mask.count_ones()).sum();
        let cut = rng.below(u64::from(total) + 1);
        let mut loss = Loss::default();
        for (page, sectors) in std::mem::take(&mut self.dirty) {
            for sector in bits(sectors) {
                if fate.keeps(loss.kept + loss.lost, cut, rng) {
                    self.durable.copy_sector(&self.cached, page, sector);
                    loss.kept += 1;
                    loss.hole |= loss.lost > 0;
                    continue;
                }
                loss.lost += 1;
                if page >= new_ground && rng.percent(GARBAGE_PERCENT) {
                    self.leave_garbage(page, sector, donor, rng);
                    loss.stale += u64::from(donor.is_some());
                    loss.noise += u64::from(donor.is_none());
                }
            }
        }
        let (low, high) = (
            self.durable_len.min(self.cached_len),
            self.durable_len.max(self.cached_len),
        );
        self.durable_len = match rng.below(3) {
            0 => self.durable_len,
            1 => self.cached_len,
            _ => low + rng.below(high - low + 1),
        };
        loss.length = self.durable_len != self.cached_len;
        self.durable.cut(self.durable_len);
        self.cached = self.durable.clone();
        self.cached_len = self.durable_len;
        self.reserved_len = self.reserved_len.min(self.durable_len);
        self.opens = 0;
        loss
    }

    /// Bit rot: the same wrong bytes in the cache and on the disk.
    pub(super) fn corrupt(&mut self, offset: u64, bytes: usize) {
        let bytes = self.readable(offset, bytes);
        for pages in [&mut self.cached, &mut self.durable] {
            let mut data = vec![0; bytes];
            pages.read(offset, &mut data);
            data.iter_mut().for_each(|b| *b ^= 0x5a);
            pages.write(offset, &data);
        }
    }

    /// Space taken, in bytes.
    pub(super) fn used_bytes(&self) -> u64 {
        let reserved_pages = self.reserved_len.div_ceil(PAGE_BYTES as u64);
        let beyond = self.cached.pages_from(reserved_pages).count() as u64;
        (reserved_pages + beyond) * PAGE_BYTES as u64
    }

    /// How many bytes of space a write there would take anew.
    pub(super) fn bytes_needed(&self, offset: u64, bytes: usize) -> u64 {
        let reserved_pages = self.reserved_len.div_ceil(PAGE_BYTES as u64);
        let fresh = |page: &u64| {
            *page >= reserved_pages && self.cached.pages_from(*page).next() != Some(*page)
        };
        let pages = pieces(offset, bytes).map(|piece| piece.page).filter(fresh);
        pages.count() as u64 * PAGE_BYTES as u64
    }

    fn leave_garbage(&mut self, page: u64, sector: u32, donor: Option<&Inode>, rng: &mut Rng) {
        match donor {
            // Stale but valid bytes are the worst kind: an old entry at the right place.
            Some(donor) => self.durable.copy_sector(&donor.durable, page, sector),
            None => {
                let noise = rng
                    .next()
                    .to_le_bytes()
                    .repeat(crate::storage::SECTOR_BYTES / 8);
                let at = page * PAGE_BYTES as u64 + u64::from(sector) * noise.len() as u64;
                self.durable.write(at, &noise);
            }
        }
    }

    fn readable(&self, offset: u64, bytes: usize) -> usize {
        let rest = self.cached_len.saturating_sub(offset);
        usize::try_from(rest).map_or(bytes, |rest| rest.min(bytes))
    }
}

/// Which of a file's dirty sectors outlive a power loss.
enum Fate {
    None,
    All,
    /// Those before the cut: the usual torn tail.
    Before,
    /// Those behind the cut: a hole with good bytes after it, as ext4 really leaves.
    Behind,
    Any {
        percent: u64,
    },
}

impl Fate {
    fn draw(rng: &mut Rng) -> Fate {
        match rng.below(8) {
            0 => Fate::None,
            1 => Fate::All,
            2 | 3 => Fate::Before,
            4 => Fate::Behind,
            5 => Fate::Any { percent: 5 },
            6 => Fate::Any { percent: 50 },
            _ => Fate::Any { percent: 95 },
        }
    }

    fn keeps(&self, seen: u64, cut: u64, rng: &mut Rng) -> bool {
        match self {
            Fate::None => false,
            Fate::All => true,
            Fate::Before => seen < cut,
            Fate::Behind => seen >= cut,
            Fate::Any { percent } => rng.percent(*percent),
        }
    }
}

fn bits(mask: u8) -> impl Iterator<Item = u32> {
    (0..SECTORS_PER_PAGE).filter(move |bit| mask & (1 << bit) != 0)
}

const WRITEBACK_PERCENT: u64 = 12;
const GARBAGE_PERCENT: u64 = 25;
