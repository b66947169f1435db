//! Sparse bytes of a simulated file: pages that were never written read as zero.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use crate::storage::SECTOR_BYTES;

pub(super) const PAGE_BYTES: usize = 4096;
pub(super) const SECTORS_PER_PAGE: u32 = (PAGE_BYTES / SECTOR_BYTES) as u32;

// One bit per sector in a byte is how dirty sectors are remembered.
const _: () = assert!(SECTORS_PER_PAGE == u8::BITS);

/// Clones share their pages until one of them is written.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages(BTreeMap<u64, Page>);

type Page = Arc<[u8; PAGE_BYTES]>;

/// Files are filled with zeros far more often than with anything else.
static ZEROS: LazyLock<Page> = LazyLock::new(|| Arc::new([0; PAGE_BYTES]));

impl Pages {
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for piece in pieces(offset, data.len()) {
            let part = &data[piece.done..piece.done + piece.bytes];
            match <&[u8; PAGE_BYTES]>::try_from(part) {
                Ok(zeros) if *zeros == **ZEROS => self.0.insert(piece.page, ZEROS.clone()),
                Ok(whole) => self.0.insert(piece.page, Arc::new(*whole)),
                Err(_) => {
                    let page = self.page_mut(piece.page);
                    page[piece.start..piece.start + piece.bytes].copy_from_slice(part);
                    continue;
                }
            };
        }
    }

    /// Takes a whole page over from `other`, zeros included.
    pub(super) fn copy_page(&mut self, other: &Pages, page: u64) {
        match other.0.get(&page) {
            Some(from) => self.0.insert(page, from.clone()),
            None => self.0.remove(&page),
        };
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        for piece in pieces(offset, buf.len()) {
            let part = &mut buf[piece.done..piece.done + piece.bytes];
            match self.0.get(&piece.page) {
                Some(page) => part.copy_from_slice(&page[piece.start..piece.start + piece.bytes]),
                None => part.fill(0),
            }
        }
    }

    /// Takes one sector over from `other`, zeros included.
    pub(super) fn copy_sector(&mut self, other: &Pages, page: u64, sector: u32) {
        let start = sector as usize * SECTOR_BYTES;
        let range = start..start + SECTOR_BYTES;
        match other.0.get(&page) {
            Some(from) => self.page_mut(page)[range.clone()].copy_from_slice(&from[range]),
            None => {
                if let Some(page) = self.0.get_mut(&page) {
                    Arc::make_mut(page)[range].fill(0);
                }
            }
        }
    }

    /// Everything from `len` on reads as zero again.
    pub(super) fn cut(&mut self, len: u64) {
        let whole = len.div_ceil(PAGE_BYTES as u64);
        self.0.split_off(&whole);
        let rest = (len % PAGE_BYTES as u64) as usize;
        if rest > 0
            && let Some(page) = self.0.get_mut(&(len / PAGE_BYTES as u64))
        {
            Arc::make_mut(page)[rest..].fill(0);
        }
    }

    pub(super) fn pages_from(&self, first: u64) -> impl Iterator<Item = u64> + '_ {
        self.0.range(first..).map(|(&page, _)| page)
    }

    fn page_mut(&mut self, page: u64) -> &mut [u8; PAGE_BYTES] {
        Arc::make_mut(self.0.entry(page).or_insert_with(|| ZEROS.clone()))
    }
}

/// A stretch of bytes within one page.
pub(super) struct Piece {
    pub(super) page: u64,
    pub(super) start: usize,
    pub(super) bytes: usize,
    /// How many bytes of the whole stretch lie before this piece.
    pub(super) done: usize,
}

impl Piece {
    /// The sectors it touches, one bit each.
    pub(super) fn sectors(&self) -> u8 {
        let first = self.start / SECTOR_BYTES;
        let last = (self.start + self.bytes - 1) / SECTOR_BYTES;
        (first..=last).fold(0, |mask, sector| mask | 1 << sector)
    }
}

pub(super) fn pieces(offset: u64, bytes: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == bytes {
            return None;
        }
        let at = offset + done as u64;
        let start = (at % PAGE_BYTES as u64) as usize;
        let piece = Piece {
            page: at / PAGE_BYTES as u64,
            start,
            bytes: (PAGE_BYTES - start).min(bytes - done),
            done,
        };
        done += piece.bytes;
        Some(piece)
    })
}
