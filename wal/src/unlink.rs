//! Deleting the files of segments that are out of use.
//!
//! Owns the job that does it. Giving back a segment's pages and blocks takes the kernel tens of
//! milliseconds, and a commit must not wait for that, so the job runs on a background thread. The manifest
//! has forgotten the segments before: a file that is still there after a crash, whole or in part, goes at the
//! next opening.

use std::io;

use crate::retire::Freed;
use crate::storage::{Storage, StorageFile};
use crate::tables::Segment;

/// Deletes what nobody reads any more. [`run`](Self::run) may block for as long as the disk takes.
pub struct UnlinkJob<S: Storage> {
    storage: S,
    segments: Vec<Freed<Segment<S::File>>>,
}

impl<S: Storage> UnlinkJob<S> {
    pub(crate) fn new(storage: S, segments: Vec<Freed<Segment<S::File>>>) -> UnlinkJob<S> {
        UnlinkJob { storage, segments }
    }

    /// The space is free when it returns: maps and descriptors go here too.
    pub fn run(self) {
        for segment in self.segments {
            let name = segment.name.clone();
            // A shorter file is a trap for who still has a map of it.
            if let Some(segment) = segment.into_inner() {
                drop(segment);
                // What cannot be given back by and by goes at once.
                let _ = give_back(&self.storage, &name);
            }
            // A file that cannot be deleted keeps its space until the next opening tries again.
            let _ = self.storage.remove(&name);
        }
    }
}

/// Shortens a file step by step, so that a sync can come between. Where the file system tells the disk at once
/// what is free (`discard`), the disk does nothing else before it has taken note of all of it: 11 to
/// 17 ms for 64 MiB.
fn give_back<S: Storage>(storage: &S, name: &str) -> io::Result<()> {
    let file = storage.open(name)?;
    let mut bytes = file.len()?;
    while bytes > STEP_BYTES {
        bytes -= STEP_BYTES;
        file.set_len(bytes)?;
    }
    Ok(())
}

/// What one call gives back: about a millisecond of such a disk.
const STEP_BYTES: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimStorage;

    #[test]
    fn a_file_is_given_back_from_its_end() {
        let storage = SimStorage::new(1);
        let file = storage.create("large").unwrap();
        file.preallocate(3 * STEP_BYTES + 1).unwrap();
        give_back(&storage, "large").unwrap();
        assert_eq!(file.len().unwrap(), 1);
        give_back(&storage, "large").unwrap();
        assert_eq!(file.len().unwrap(), 1);
    }
}
