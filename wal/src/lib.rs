//! The append-only segmented write-ahead log of Millpond.

mod mmap;
pub mod storage;
