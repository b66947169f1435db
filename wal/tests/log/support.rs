//! A log under test and what it is expected to hold.

use std::collections::BTreeMap;

use millpond_wal::storage::Storage;
use millpond_wal::{
    Appended, ChunkId, Log, LogError, LogIndex, LogReader, OpenError, Opened, Options, Place,
    ReadError, ReplayEnd, ReplayError, Row,
};

pub const TOPIC: u32 = 7;

/// The smallest segments, so that few entries fill one.
pub fn options() -> Options {
    Options {
        segment_bytes: 64 << 10,
        entry_bytes_max: 256 << 10,
        spare_segments: 1,
        buffer_bytes_idle: 4 << 20,
        manifest_bytes: 64 << 10,
        fresh_store_id: [0xAB; 16],
    }
}

/// A body that tells which record it belongs to.
pub fn body(index: u64, record: u32, bytes: usize) -> Vec<u8> {
    let mut body = format!("entry {index} record {record} ").into_bytes();
    let mut state = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(record);
    while body.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        body.extend_from_slice(&state.to_le_bytes());
    }
    body
}

/// What a record with one message becomes: topic offsets count the records.
pub fn row(place: Place, offset: u64, stamp: u64) -> Row {
    Row {
        topic: TOPIC,
        base: offset,
        count: 1,
        skip: 0,
        place,
        stamp,
    }
}

/// Every record that replay hands out.
pub type Replayed = BTreeMap<Place, Vec<u8>>;

/// Opens and replays; the rows are made from the stamps, which the tests use as offsets.
pub fn reopen<S: Storage>(storage: &S) -> Result<(Opened<S>, Replayed, ReplayEnd), OpenError> {
    let mut opened = Log::open(storage.clone(), options())?;
    let mut replayed = Replayed::new();
    let end = opened
        .log
        .replay(|step, rows| {
            let millpond_wal::Replayed::Entry(entry) = step else {
                return Ok(());
            };
            for record in entry.records() {
                replayed.insert(record.place, record.body.to_vec());
                rows.add(row(record.place, record.stamp, record.stamp));
            }
            Ok::<(), std::convert::Infallible>(())
        })
        .map_err(|error| match error {
            ReplayError::Start(error) => error,
            ReplayError::Apply(never) => match never {},
            ReplayError::Log(LogError::Disk { what, file, source }) => {
                OpenError::Io { what, file, source }
            }
            ReplayError::Log(LogError::Read(ReadError::Io { file, source })) => OpenError::Io {
                what: "read",
                file,
                source,
            },
            ReplayError::Log(other) => panic!(
                "replay: {other} {:?} {:#?}",
                opened.log.report(),
                opened.log.segments()
            ),
        })?;
    Ok((opened, replayed, end))
}

/// Opens a log that is expected to be whole.
pub fn open<S: Storage>(storage: &S) -> (Log<S>, Replayed) {
    let (opened, replayed, end) = reopen(storage).expect("the log opens");
    assert_eq!(end, ReplayEnd::Healthy);
    (opened.log, replayed)
}

/// Appends one entry with `records` records of about `bytes` each and applies it.
pub fn append<S: Storage>(
    log: &mut Log<S>,
    records: u32,
    bytes: usize,
) -> Result<Appended, LogError> {
    let index = log.appended().0 + 1;
    let mut group = log.new_group();
    for record in 0..records {
        let stamp = stamp_of(index, record);
        group.push(stamp, 1, &[&body(index, record, bytes)]);
    }
    let appended = log.append_durable(group)?;
    apply(log, &appended, records);
    Ok(appended)
}

pub fn apply<S: Storage>(log: &mut Log<S>, appended: &Appended, records: u32) {
    for record in 0..records {
        let place = Place {
            index: appended.index,
            record,
        };
        let stamp = stamp_of(appended.index.0, record);
        log.add_row(row(place, stamp, stamp));
    }
    log.set_applied(appended.index);
}

/// Stamp and offset of a record: they ascend with the place and leave holes.
pub fn stamp_of(index: u64, record: u32) -> u64 {
    index * 1000 + u64::from(record)
}

pub fn place(index: u64, record: u32) -> Place {
    Place {
        index: LogIndex(index),
        record,
    }
}

/// Reads a record and compares it with what was appended there.
pub fn expect_record<S: Storage>(reader: &LogReader<S>, at: Place, bytes: usize) {
    let read = reader
        .record(at)
        .unwrap_or_else(|error| panic!("{at:?}: {error}"));
    assert_eq!(read.body, body(at.index.0, at.record, bytes), "{at:?}");
    assert_eq!(read.stamp, stamp_of(at.index.0, at.record));
}

/// Only the names with this beginning.
pub fn files<S: Storage>(storage: &S, prefix: &str) -> Vec<String> {
    let names = storage.list().expect("a folder can be listed");
    names
        .into_iter()
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Takes a snapshot with one chunk of everything that is applied.
pub fn snapshot<S: Storage>(log: &mut Log<S>, state: &[u8]) {
    let chunk = (ChunkId(1), state.to_vec().into());
    let job = log.snapshot_job(log.applied(), vec![chunk], vec![]);
    let done = job.expect("all is applied").run().expect("there is room");
    log.install_snapshot(done).expect("the log takes writes");
}

/// Two of them, so that what they cover may go.
pub fn cover<S: Storage>(log: &mut Log<S>) {
    snapshot(log, b"state");
    snapshot(log, b"state");
}
