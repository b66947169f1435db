//! The append-only segmented write-ahead log of Millpond.

pub mod buffer;
mod mmap;
pub mod storage;

pub use storage::sim;
