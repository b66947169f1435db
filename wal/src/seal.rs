//! Sealing: giving a finished segment its directory and footer, for good.
//!
//! Owns the job that writes them, which may run on a background thread. The segment's data are durable
//! before; until the manifest says "sealed" an interrupted job counts for nothing and is repeated.
//! A segment may have two jobs, one that waits for its thread and one that an append could not wait
//! for: whichever comes first writes, the other finds what it wrote.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::buffer::BufferPool;
use crate::directory::Unreadable;
use crate::entry::LogIndex;
use crate::error::JobError;
use crate::retire::Held;
use crate::segment::{Footer, sealed_bytes};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile};
use crate::tables::{Body, SealedBody, Segment};

/// A segment that gets no more entries and waits for being sealed.
pub(crate) struct Ended<F> {
    pub segment: Held<Segment<F>>,
    pub last: LogIndex,
    pub entries_end: u64,
    pub records: u64,
    pub digest: [u8; 16],
    pub last_crc: u32,
    pub written: Written,
}

/// The footer, once it is in the file; locked while somebody writes it.
pub(crate) type Written = Arc<Mutex<Option<Footer>>>;

impl<F> Clone for Ended<F> {
    fn clone(&self) -> Self {
        Ended {
            segment: self.segment.clone(),
            written: self.written.clone(),
            ..*self
        }
    }
}

/// Writes one segment's directory. [`run`](Self::run) may block for as long as the disk takes.
pub struct SealJob<S: Storage> {
    storage: S,
    pool: BufferPool,
    ended: Ended<S::File>,
}

/// What a [`SealJob`] made; for `Log::install_sealed`.
pub struct SealDone<S: Storage> {
    pub(crate) segment: Segment<S::File>,
}

impl<S: Storage> SealJob<S> {
    pub(crate) fn new(storage: S, pool: BufferPool, ended: Ended<S::File>) -> SealJob<S> {
        SealJob {
            storage,
            pool,
            ended,
        }
    }

    pub fn run(self) -> Result<SealDone<S>, JobError> {
        let name = self.ended.segment.name.clone();
        let seal = || {
            let footer = self.write()?;
            open_sealed(&self.storage, &self.ended.segment, footer)
        };
        match seal() {
            Ok(segment) => Ok(SealDone { segment }),
            Err(source) => Err(JobError {
                what: "seal",
                file: name,
                source,
            }),
        }
    }

    fn write(&self) -> io::Result<Footer> {
        let mut written = self.ended.written.lock();
        if let Some(footer) = *written {
            return Ok(footer);
        }
        let Body::Open { file, table } = &self.ended.segment.body else {
            return Err(io::Error::other("the segment is sealed already"));
        };
        let table = table.read();
        let copy = table.encode(self.ended.segment.uuid);
        let footer = Footer {
            uuid: self.ended.segment.uuid,
            first: self.ended.segment.first,
            last: self.ended.last,
            // A file that was cut within a block ends there, if the loss was accepted.
            entries_end: self.ended.entries_end.next_multiple_of(BLOCK_BYTES as u64),
            entries: table.spots.len() as u64,
            records: self.ended.records,
            rows: table.rows as u64,
            topics: table.topics.len() as u64,
            digest: self.ended.digest,
            last_crc: self.ended.last_crc,
            directory_blocks: (copy.len() / BLOCK_BYTES) as u32,
        };
        drop(table);
        write_footer(&**file, &self.pool, &footer, &copy)?;
        *written = Some(footer);
        Ok(footer)
    }
}

/// Writes both copies of directory and footer, and cuts the file behind them.
pub(crate) fn write_footer(
    file: &impl StorageFile,
    pool: &BufferPool,
    footer: &Footer,
    directory: &[u8],
) -> io::Result<()> {
    let mut buf = pool.take(2 * (directory.len() + BLOCK_BYTES));
    for _ in 0..2 {
        buf.extend_from_slice(directory);
        buf.extend_from_slice(&footer.encode());
    }
    file.write_durable_at(footer.entries_end, &buf)?;
    file.set_len(footer.file_bytes())?;
    // A cut that is lost would only keep space: the manifest knows where the file ends.
    file.sync_data()
}

/// Opens what was sealed, as readers will use it.
pub(crate) fn open_sealed<S: Storage>(
    storage: &S,
    open: &Segment<S::File>,
    footer: Footer,
) -> io::Result<Segment<S::File>> {
    let file = storage.open_read(&open.name)?;
    let body = SealedBody::open(file, footer).map_err(|error| match error {
        Unreadable::Damaged => io::Error::other("the directory just written is not there"),
        Unreadable::Io(source) => source,
    })?;
    Ok(Segment {
        id: open.id,
        generation: open.generation,
        uuid: open.uuid,
        epoch: open.epoch,
        first: open.first,
        contents: open.contents,
        name: open.name.clone(),
        body: Body::Sealed(body),
    })
}

/// The room that sealing will need behind `entries_end`, at most.
pub(crate) fn seal_room(topics: u64, entries: u64, rows: u64) -> u64 {
    let blocks = crate::directory::directory_blocks(topics, entries, rows);
    sealed_bytes(0, u32::try_from(blocks).unwrap_or(u32::MAX))
}
