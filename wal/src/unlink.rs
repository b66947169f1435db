//! Deleting the files of segments that are out of use.
//!
//! Owns the job that does it. Giving back a segment's pages and blocks takes the kernel tens of
//! milliseconds, and a commit must not wait for that, so the job runs on a background thread. The manifest
//! has forgotten the segments before: a file that is still there after a crash goes at the next opening.

use crate::retire::Freed;
use crate::storage::Storage;
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
            // A file that cannot be deleted keeps its space until the next opening tries again.
            let _ = self.storage.remove(&segment.name);
        }
    }
}
