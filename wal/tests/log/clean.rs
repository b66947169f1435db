//! Cleaning and truncating: what is live keeps its place, what is cut is gone.

use millpond_wal::sim::SimStorage;
use millpond_wal::{Contents, IndexRange, LogError, LogIndex, ReadError, verify};

use crate::support::{TOPIC, append, cover, expect_record, files, open, place, reopen, stamp_of};

const BYTES: usize = 3000;

#[test]
fn live_records_keep_their_place_in_a_cleaned_segment() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..12 {
        append(&mut log, 3, 800).unwrap();
    }
    cover(&mut log);
    let before = log.segments()[0].clone();
    let (dead, live) = (place(3, 1), place(3, 2));
    // Besides one live row, a record without one that something still points to.
    let job = log
        .clean_plan(before.id, [place(5, 0)], |row| row.place == live)
        .unwrap();
    assert_eq!(job.live_rows(), (1, 3 * before.last.0));
    let done = job.run().unwrap();
    assert_eq!(done.damaged(), None);
    let reader = log.reader();
    let freed = log.install_cleaned(done).unwrap();
    let after = log.segments()[0].clone();
    assert_eq!((after.contents, after.generation), (Contents::Sparse, 1));
    assert_eq!((after.first, after.last), (before.first, before.last));
    assert_eq!(freed, before.bytes - after.bytes);
    assert!(freed > 0);

    let check = |reader: &millpond_wal::LogReader<SimStorage>| {
        expect_record(reader, live, 800);
        expect_record(reader, place(5, 0), 800);
        assert!(matches!(reader.record(dead), Err(ReadError::NotFound(_))));
        assert!(matches!(
            reader.record(place(4, 0)),
            Err(ReadError::NotFound(_))
        ));
        let found = reader.find(TOPIC, stamp_of(1, 0)).unwrap().unwrap();
        assert_eq!(found.place, live);
        let behind = reader.find(TOPIC, stamp_of(3, 3)).unwrap().unwrap();
        assert_eq!(behind.place, place(before.last.0 + 1, 0));
    };
    check(&reader);
    log.close().unwrap();
    assert!(verify(&storage).unwrap().is_good());
    let (log, _) = open(&storage);
    check(&log.reader());
}

#[test]
fn a_plan_is_outdated_once_the_segment_was_cleaned() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..12 {
        append(&mut log, 1, BYTES).unwrap();
    }
    let id = log.segments()[0].id;
    assert!(matches!(
        log.clean_plan(id, [], |_| true),
        Err(LogError::NotSealed(_))
    ));
    cover(&mut log);
    let first = log
        .clean_plan(id, [], |row| row.place.index > LogIndex(5))
        .unwrap()
        .run()
        .unwrap();
    log.install_cleaned(first).unwrap();
    let second = log
        .clean_plan(id, [], |row| row.place.index > LogIndex(9))
        .unwrap();
    let stale = log
        .clean_plan(id, [], |row| row.place.index > LogIndex(9))
        .unwrap();
    let second = second.run().unwrap();
    log.install_cleaned(second).unwrap();
    let stale = stale.run().unwrap();
    assert!(matches!(
        log.install_cleaned(stale),
        Err(LogError::Outdated(_))
    ));
    log.unlink_job().unwrap().run();
    assert_eq!(files(&storage, "seg-").len(), log.segments().len());
    expect_record(&log.reader(), place(10, 0), BYTES);
}

#[test]
fn a_cleaning_of_a_segment_that_is_removed_meanwhile_leaves_no_file() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..12 {
        append(&mut log, 1, BYTES).unwrap();
    }
    cover(&mut log);
    let id = log.segments()[0].id;
    let live = |row: &millpond_wal::Row| row.place.index > LogIndex(5);
    let done = log.clean_plan(id, [], live).unwrap().run().unwrap();
    log.remove_segments(&[id]).unwrap();
    let overtaken = log.install_cleaned(done).map(drop);
    assert!(matches!(overtaken, Err(LogError::UnknownSegment(gone)) if gone == id));
    log.unlink_job().unwrap().run();
    assert_eq!(files(&storage, "seg-").len(), log.segments().len());
}

#[test]
fn a_segment_with_damage_in_what_is_kept_is_not_cleaned() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..12 {
        append(&mut log, 1, BYTES).unwrap();
    }
    cover(&mut log);
    let name = files(&storage, "seg-").remove(0);
    storage.corrupt(&name, 3 * 4096 + 200, 4).unwrap();
    let id = log.segments()[0].id;
    let before = files(&storage, "");
    let done = log.clean_plan(id, [], |_| true).unwrap().run().unwrap();
    let damaged = IndexRange {
        first: LogIndex(3),
        last: LogIndex(3),
    };
    assert_eq!(done.damaged(), Some(damaged));
    assert_eq!(log.install_cleaned(done).unwrap(), 0);
    assert!(log.segments()[0].damaged);
    assert_eq!(
        files(&storage, ""),
        before,
        "nothing is made, nothing is deleted"
    );
    expect_record(&log.reader(), place(4, 0), BYTES);
    let kept = log.reader().record(place(3, 0));
    assert!(matches!(kept, Err(ReadError::Damaged(range)) if range == damaged));
    // What nobody needs may be damaged.
    let live = |row: &millpond_wal::Row| row.place.index > LogIndex(5);
    let done = log.clean_plan(id, [], live).unwrap().run().unwrap();
    assert_eq!(done.damaged(), None);
}

#[test]
fn a_cut_suffix_is_gone_for_good() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..40 {
        append(&mut log, 1, 9000).unwrap();
    }
    let epoch = log.recovery_epoch();
    let sealed = log
        .segments()
        .iter()
        .filter(|s| s.stage == millpond_wal::Stage::Sealed)
        .count();
    assert!(sealed > 0);
    let covered = log.truncate_suffix(LogIndex(1));
    assert!(matches!(covered, Err(LogError::TruncateCovered { .. })));
    log.truncate_suffix(LogIndex(39)).unwrap();
    assert_eq!(
        (log.durable(), log.watermark().durable()),
        (LogIndex(38), LogIndex(38))
    );
    assert_eq!(log.recovery_epoch(), epoch + 1);
    assert!(matches!(
        log.reader().record(place(39, 0)),
        Err(ReadError::NotFound(_))
    ));
    assert_eq!(log.reader().find(TOPIC, stamp_of(39, 0)).unwrap(), None);
    assert_eq!(append(&mut log, 2, 10).unwrap().index, LogIndex(39));
    drop(log);
    storage.restart();
    let (opened, replayed, _) = reopen(&storage).unwrap();
    assert_eq!(opened.log.durable(), LogIndex(39));
    assert_eq!(replayed[&place(39, 1)], crate::support::body(39, 1, 10));
    assert_eq!(
        opened
            .log
            .reader()
            .rows(TOPIC, stamp_of(38, 0), 10)
            .unwrap()
            .len(),
        3
    );
}
