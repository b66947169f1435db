//! A small store of the log, made once, to be damaged in copies.
//!
//! It has a sealed segment, one that was cut off in the middle of being written, a manifest and a snapshot
//! of two chunks. Record bodies tell which record they belong to, so that a target can say whether what
//! was read is what was written.

use std::sync::OnceLock;

use millpond_wal::sim::SimStorage;
use millpond_wal::storage::{Storage, StorageFile};
use millpond_wal::{ChunkId, Log, LogIndex, Options, Place, Row};

use crate::Cut;
use crate::reseal::{BLOCK_BYTES, reseal};

pub const STORE: [u8; 16] = [0xAB; 16];
pub const TOPIC: u32 = 7;
/// Entries that are appended before the store is left behind, of two records each.
pub const ENTRIES: u64 = 6;

pub fn options() -> Options {
    Options {
        segment_bytes: 64 << 10,
        entry_bytes_max: 64 << 10,
        spare_segments: 1,
        buffer_bytes_idle: 1 << 20,
        manifest_bytes: 64 << 10,
        fresh_store_id: STORE,
    }
}

/// A file without the zeros at its end.
pub struct File {
    pub name: String,
    pub bytes: Vec<u8>,
    pub length: u64,
}

/// The store's files as they were left behind.
pub fn files() -> &'static [File] {
    static FILES: OnceLock<Vec<File>> = OnceLock::new();
    FILES.get_or_init(|| read_all(&written()))
}

pub fn body(place: Place) -> Vec<u8> {
    format!("entry {} record {} of the store", place.index, place.record).into_bytes()
}

pub fn stamp(place: Place) -> u64 {
    place.index.0 * 1_000 + u64::from(place.record)
}

pub fn row(place: Place) -> Row {
    Row {
        topic: TOPIC,
        base: place.index.0 * 2 + u64::from(place.record),
        count: 1,
        skip: 0,
        place,
        stamp: stamp(place),
    }
}

fn written() -> SimStorage {
    let storage = SimStorage::new(1);
    let mut log = Log::open(storage.clone(), options())
        .expect("an empty folder")
        .log;
    log.replay(|_, _| Ok::<(), std::convert::Infallible>(()))
        .expect("nothing to replay");
    for nth in 0..ENTRIES {
        append(&mut log);
        if nth == 2 {
            let state = vec![
                (ChunkId(3), b"the state".as_slice().into()),
                (ChunkId(5), vec![5; 300].into()),
            ];
            let job = log
                .snapshot_job(log.applied(), state, vec![])
                .expect("applied");
            log.install_snapshot(job.run().expect("no fault is planned"))
                .expect("just written");
            log.roll().expect("no fault is planned");
        }
        while let Some(job) = log.seal_job() {
            let done = job.run().expect("no fault is planned");
            log.install_sealed(done).expect("just sealed");
        }
    }
    log.vouch().expect("no fault is planned");
    storage
}

fn append(log: &mut Log<SimStorage>) {
    let mut group = log.new_group();
    let index = LogIndex(log.appended().0 + 1);
    let places = [0, 1].map(|record| Place { index, record });
    for place in places {
        group.push(stamp(place), 1, &[&body(place)]);
    }
    log.append_durable(group).expect("no fault is planned");
    for place in places {
        log.add_row(row(place));
    }
    log.set_applied(index);
}

fn read_all(storage: &SimStorage) -> Vec<File> {
    let names = storage.list().expect("no fault is planned");
    let read = |name: String| {
        let file = storage.open_read(&name).expect("it was listed");
        let length = file.len().expect("it is open");
        let mut bytes = vec![0; length as usize];
        file.read_at(0, &mut bytes).expect("it is open");
        let used = bytes
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |at| at + 1);
        bytes.truncate(used.next_multiple_of(BLOCK_BYTES).min(bytes.len()));
        File {
            name,
            bytes,
            length,
        }
    };
    names.into_iter().map(read).collect()
}

/// Whether checksums are put right behind the damage.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Seals {
    Broken,
    Mended,
}

/// A copy of the store with the edits that `input` asks for: a file, a place in its used part, bytes.
pub fn damaged(input: &mut Cut<'_>, seals: Seals) -> SimStorage {
    let storage = SimStorage::new(1);
    let originals = files();
    let mut copies: Vec<_> = originals.iter().map(|file| file.bytes.clone()).collect();
    let mut lengths: Vec<_> = originals.iter().map(|file| file.length).collect();
    while !input.is_empty() {
        let (what, nth) = (input.u8(), usize::from(input.u8()) % copies.len());
        let at = usize::from(input.u16());
        match what % 8 {
            // Its end is lost.
            0 => {
                lengths[nth] = lengths[nth].min(at as u64 * 16);
                copies[nth].truncate(at * 16);
            }
            // A block is overwritten by another, of any file.
            1 => {
                let from = &originals[usize::from(input.u8()) % originals.len()].bytes;
                let block = usize::from(input.u8()) * BLOCK_BYTES;
                let to = at / BLOCK_BYTES * BLOCK_BYTES;
                let source = from.get(block..block + BLOCK_BYTES);
                if let Some((source, to)) = source.zip(copies[nth].get_mut(to..to + BLOCK_BYTES)) {
                    to.copy_from_slice(source);
                }
            }
            _ => {
                let bytes = input.u8();
                let bytes = input.bytes((bytes % 32).into());
                let end = copies[nth].len().min(at + bytes.len());
                if at < end {
                    copies[nth][at..end].copy_from_slice(&bytes[..end - at]);
                }
            }
        }
    }
    for ((original, mut bytes), length) in originals.iter().zip(copies).zip(lengths) {
        if seals == Seals::Mended {
            reseal(&mut bytes);
        }
        put_file(&storage, &original.name, &bytes, length);
    }
    storage
}

pub fn put_file(storage: &SimStorage, name: &str, bytes: &[u8], length: u64) {
    let file = storage.create(name).expect("each name once");
    file.write_at(0, bytes).expect("no fault is planned");
    file.set_len(length).expect("no fault is planned");
}
