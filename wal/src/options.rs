//! The bounds of a log, with what they cost.

use std::hash::{BuildHasher, RandomState};

use crate::error::OpenError;
use crate::manifest::MANIFEST_BYTES_MIN;

/// How a log is laid out. Changing a value affects what is written from then on.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of a segment file in bytes; default 256 MiB, at least 64 KiB. A larger entry gets a segment
    /// of its own, and a log's first segment is 8 MiB at most. Replay after a crash reads at least one whole
    /// segment.
    pub segment_bytes: u64,
    /// Largest entry in bytes, header included; default 16 MiB, at least 4 KiB. A group of this size
    /// is held in memory.
    pub entry_bytes_max: usize,
    /// Segments kept ready, filled with zeros; default 2. Each takes `segment_bytes` of disk.
    pub spare_segments: usize,
    /// Idle memory kept for building entries, in bytes; default 64 MiB.
    pub buffer_bytes_idle: usize,
    /// Size of the manifest before it is begun anew, in bytes; default 1 MiB, at least 64 KiB.
    pub manifest_bytes: u64,
    /// The uuid of the store, if it is made by this opening. Random by default.
    pub fresh_store_id: [u8; 16],
}

impl Default for Options {
    fn default() -> Options {
        Options {
            segment_bytes: 256 << 20,
            entry_bytes_max: 16 << 20,
            spare_segments: 2,
            buffer_bytes_idle: 64 << 20,
            manifest_bytes: 1 << 20,
            fresh_store_id: random_id(),
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), OpenError> {
        let at_least = |name, value, min| {
            if value < min {
                Err(OpenError::Option { name, value, min })
            } else {
                Ok(())
            }
        };
        at_least("segment_bytes", self.segment_bytes, SEGMENT_BYTES_MIN)?;
        at_least(
            "entry_bytes_max",
            self.entry_bytes_max as u64,
            ENTRY_BYTES_MIN,
        )?;
        at_least("manifest_bytes", self.manifest_bytes, MANIFEST_BYTES_MIN)
    }
}

/// The standard library's hasher keys are random for each process and differ at each call.
fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    for half in id.chunks_mut(8) {
        half.copy_from_slice(&RandomState::new().hash_one(half.len()).to_le_bytes());
    }
    id
}

const SEGMENT_BYTES_MIN: u64 = 64 << 10;
const ENTRY_BYTES_MIN: u64 = 4 << 10;
