//! Entries that are read at once, on a real folder and a simulated one.

use millpond_wal::sim::SimStorage;
use millpond_wal::storage::{FolderStorage, Mapping, Storage};
use millpond_wal::{LogIndex, LogReader, SideBySide, Stage};

use crate::support::{append, body, files, open, place, reopen};

/// Bytes of a test record; an entry of three takes one block.
const BYTES: usize = 1000;
const ENTRY_BYTES: usize = 4096;

/// The entries of the first segment and none other.
fn first_segment<S: Storage>(reader: &LogReader<S>, last: LogIndex) -> SideBySide<S> {
    let all = reader.side_by_side(LogIndex(1), LogIndex(40), usize::MAX, usize::MAX);
    let all = all.unwrap();
    assert_eq!(all.last(), last, "a stretch ends with its segment");
    all
}

fn records_come_back_at_once<S: Storage>(storage: &S) {
    let (mut log, _) = open(storage);
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    let reader = log.reader();
    let segments = log.segments();
    assert_eq!(segments[0].stage, Stage::Sealed);
    let last = segments[1].first.previous();
    let stretch = first_segment(&reader, last).read().unwrap();
    for index in 1..=last.0 {
        for record in 0..3 {
            let read = stretch.record(place(index, record)).unwrap();
            assert_eq!(read.body, body(index, record, BYTES));
        }
        assert!(stretch.record(place(index, 3)).is_none());
    }
    assert!(stretch.record(place(last.0 + 1, 0)).is_none());
}

#[test]
fn records_come_back_at_once_on_a_simulated_disk() {
    records_come_back_at_once(&SimStorage::new(1));
}

#[test]
fn records_come_back_at_once_on_a_real_folder_mapped_or_not() {
    for mapping in [Mapping::On, Mapping::Off] {
        let folder = tempfile::tempdir().unwrap();
        records_come_back_at_once(&FolderStorage::open(folder.path(), mapping).unwrap());
    }
}

#[test]
fn a_stretch_ends_where_it_has_enough_or_would_have_too_much() {
    let (mut log, _) = open(&SimStorage::new(1));
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    let reader = log.reader();
    let last_of = |last, bytes, bytes_max| {
        let found = reader.side_by_side(LogIndex(2), LogIndex(last), bytes, bytes_max);
        found.map(|found| (found.last().0, found.bytes()))
    };
    assert_eq!(last_of(40, 1, usize::MAX), Some((2, ENTRY_BYTES)));
    assert_eq!(
        last_of(40, ENTRY_BYTES + 1, usize::MAX),
        Some((3, 2 * ENTRY_BYTES))
    );
    assert_eq!(
        last_of(40, usize::MAX, 2 * ENTRY_BYTES + 1),
        Some((3, 2 * ENTRY_BYTES))
    );
    assert_eq!(last_of(2, usize::MAX, usize::MAX), Some((2, ENTRY_BYTES)));
    assert_eq!(last_of(40, usize::MAX, ENTRY_BYTES - 1), None, "too large");
    let open = log.durable();
    assert!(
        reader.side_by_side(open, open, 1, usize::MAX).is_none(),
        "its segment is not sealed"
    );
}

#[test]
fn a_damaged_record_is_not_handed_out_and_its_neighbours_are() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    log.close().unwrap();
    let segment = files(&storage, "seg-").remove(0);
    // The segment's header, one entry, and then the middle of the second one's first record.
    storage
        .corrupt(&segment, 4096 + ENTRY_BYTES as u64 + 500, 8)
        .unwrap();
    let (opened, ..) = reopen(&storage).unwrap();
    let reader = opened.log.reader();
    let all = reader.side_by_side(LogIndex(1), LogIndex(3), usize::MAX, usize::MAX);
    let stretch = all.unwrap().read().unwrap();
    assert!(stretch.record(place(2, 0)).is_none());
    for (index, record) in [(1, 2), (2, 1), (2, 2), (3, 0)] {
        let read = stretch.record(place(index, record)).unwrap();
        assert_eq!(read.body, body(index, record, BYTES));
    }
}

#[test]
fn what_pays_for_the_memory_is_kept_until_the_last_slice_is_gone() {
    let (mut log, _) = open(&SimStorage::new(1));
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    let paid = std::sync::Arc::new(());
    let all = log
        .reader()
        .side_by_side(LogIndex(1), LogIndex(2), usize::MAX, usize::MAX);
    let stretch = all.unwrap().read().unwrap().keeping(paid.clone());
    let record = stretch.record(place(2, 1)).unwrap();
    drop(stretch);
    assert_eq!(std::sync::Arc::strong_count(&paid), 2);
    drop(record);
    assert_eq!(std::sync::Arc::strong_count(&paid), 1);
}
