//! Append, read, roll, seal, reopen; on a real folder and a simulated one.

use std::convert::Infallible;

use millpond_wal::sim::{Call, Failure, Fault, SimStorage};
use millpond_wal::storage::{FolderStorage, Mapping, Storage, StorageFile};
use millpond_wal::{ChunkId, Log, LogError, LogIndex, OpenError, Options, ReadError, Stage};

use crate::support::{
    TOPIC, append, body, expect_record, files, open, options, place, reopen, row, snapshot,
    stamp_of,
};

/// Bytes of a test record.
const BYTES: usize = 3000;

fn writes_and_reads_back<S: Storage>(storage: &S) {
    let (mut log, replayed) = open(storage);
    assert!(replayed.is_empty());
    assert_eq!(log.recovery_epoch(), 1);
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    assert_eq!(log.durable(), LogIndex(40));
    assert!(log.segments().len() > 4, "small segments roll");
    let reader = log.reader();
    for index in 1..=40 {
        for record in 0..3 {
            expect_record(&reader, place(index, record), BYTES);
        }
    }
    log.close().unwrap();
    drop(reader);

    let (opened, replayed, _) = reopen(storage).unwrap();
    assert!(opened.log.report().is_clean(), "{:?}", opened.log.report());
    assert_eq!(replayed.len(), 120);
    assert_eq!(replayed[&place(40, 2)], body(40, 2, BYTES));
    let log = opened.log;
    assert_eq!(log.recovery_epoch(), 2);
    assert!(
        log.segments()
            .iter()
            .all(|segment| segment.stage == Stage::Sealed)
    );
    let reader = log.reader();
    for index in 1..=40 {
        expect_record(&reader, place(index, 1), BYTES);
    }
    finds_rows(&log);
}

/// Rows stand at the stamps; every segment holds some.
fn finds_rows<S: Storage>(log: &Log<S>) {
    let reader = log.reader();
    let at = stamp_of(17, 1);
    let expected = row(place(17, 1), at, at);
    assert_eq!(reader.find(TOPIC, at).unwrap(), Some(expected));
    assert_eq!(
        reader.find(TOPIC, stamp_of(17, 0) + 1).unwrap(),
        Some(expected)
    );
    let next = reader.find(TOPIC, stamp_of(17, 2) + 1).unwrap().unwrap();
    assert_eq!(next.place, place(18, 0), "the next row behind a hole");
    assert_eq!(reader.find(TOPIC, stamp_of(40, 3)).unwrap(), None);
    assert_eq!(reader.find(TOPIC + 1, 0).unwrap(), None);
    assert_eq!(reader.rows(TOPIC, 0, 1000).unwrap().len(), 120);
    let some = reader.rows(TOPIC, stamp_of(5, 0), 50).unwrap();
    assert_eq!(
        (some.len(), some[0].place, some[49].place),
        (50, place(5, 0), place(21, 1))
    );
    assert_eq!(
        reader.offset_at_stamp(TOPIC, stamp_of(9, 2)).unwrap(),
        Some(stamp_of(9, 2))
    );
    assert_eq!(
        reader.offset_at_stamp(TOPIC, stamp_of(9, 3)).unwrap(),
        Some(stamp_of(10, 0))
    );
    assert_eq!(reader.offset_at_stamp(TOPIC, u64::MAX).unwrap(), None);
}

#[test]
fn what_is_appended_is_read_back_from_a_simulated_folder() {
    writes_and_reads_back(&SimStorage::new(1));
}

#[test]
fn what_is_appended_is_read_back_from_a_mapped_folder() {
    let folder = tempfile::tempdir().unwrap();
    writes_and_reads_back(&FolderStorage::open(folder.path(), Mapping::On).unwrap());
}

#[test]
fn what_is_appended_is_read_back_from_a_folder_without_maps() {
    let folder = tempfile::tempdir().unwrap();
    writes_and_reads_back(&FolderStorage::open(folder.path(), Mapping::Off).unwrap());
}

#[test]
fn rows_are_found_in_open_and_sealed_segments_alike() {
    let (mut log, _) = open(&SimStorage::new(1));
    for _ in 0..40 {
        append(&mut log, 3, BYTES).unwrap();
    }
    assert!(
        log.segments()
            .iter()
            .any(|segment| segment.stage == Stage::Open)
    );
    finds_rows(&log);
    while let Some(job) = log.seal_job() {
        log.install_sealed(job.run().unwrap()).unwrap();
    }
    finds_rows(&log);
}

#[test]
fn a_job_whose_segment_an_append_has_sealed_writes_nothing() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    let late = loop {
        append(&mut log, 3, BYTES).unwrap();
        if let Some(job) = log.seal_job() {
            break job;
        }
    };
    while !log.segments().iter().any(|one| one.stage == Stage::Sealed) {
        append(&mut log, 3, BYTES).unwrap();
    }
    let before = storage.calls();
    let done = late.run().unwrap();
    assert_eq!(storage.calls(), before, "the file is final");
    let overtaken = log.install_sealed(done);
    assert!(matches!(overtaken, Err(LogError::Outdated(_))));
    while log.appended() < LogIndex(40) {
        append(&mut log, 3, BYTES).unwrap();
    }
    finds_rows(&log);
}

#[test]
fn a_record_shares_the_memory_of_its_entry() {
    let (mut log, _) = open(&SimStorage::new(1));
    let appended = append(&mut log, 3, 100).unwrap();
    let slice = appended.record_body(2).unwrap();
    assert_eq!(slice, body(1, 2, 100));
    let whole = appended.bytes.as_ptr_range();
    assert!(whole.contains(&slice.as_ptr()));
    assert_eq!(appended.record_body(3), None);
}

#[test]
fn an_entry_larger_than_a_segment_gets_one_of_its_own() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    append(&mut log, 1, 200_000).unwrap();
    append(&mut log, 1, 10).unwrap();
    assert_eq!(log.segments().len(), 3);
    log.close().unwrap();
    let (_, replayed) = open(&storage);
    assert_eq!(replayed[&place(2, 0)], body(2, 0, 200_000));
}

#[test]
fn groups_out_of_bounds_are_refused_and_harm_nothing() {
    let (mut log, _) = open(&SimStorage::new(1));
    let empty = log.new_group();
    assert!(matches!(
        log.append_durable(empty),
        Err(LogError::EmptyGroup)
    ));
    assert!(matches!(
        append(&mut log, 1, 300_000),
        Err(LogError::GroupTooLarge { .. })
    ));
    assert_eq!(append(&mut log, 1, 10).unwrap().index, LogIndex(1));
}

#[test]
fn nothing_is_appended_before_replay() {
    let storage = SimStorage::new(1);
    open(&storage).0.close().unwrap();
    let mut opened = Log::open(storage, options()).unwrap();
    let mut group = opened.log.new_group();
    group.push(1, 1, &[b"x"]);
    assert!(matches!(
        opened.log.append_durable(group),
        Err(LogError::NotReplayed)
    ));
}

#[test]
fn one_entry_is_vouched_for_once() {
    let (mut log, _) = open(&SimStorage::new(1));
    append(&mut log, 1, 10).unwrap();
    assert!(log.wants_vouching());
    log.vouch().unwrap();
    log.vouch().unwrap();
    assert!(!log.wants_vouching());
    assert_eq!((log.durable(), log.applied()), (LogIndex(2), LogIndex(2)));
    let reader = log.reader();
    assert!(matches!(
        reader.record(place(2, 0)),
        Err(ReadError::NotFound(_))
    ));
    assert!(matches!(
        reader.record(place(3, 0)),
        Err(ReadError::NotFound(_))
    ));
    assert!(matches!(
        reader.record(place(1, 1)),
        Err(ReadError::NotFound(_))
    ));
}

#[test]
fn replay_begins_behind_the_snapshot() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..10 {
        append(&mut log, 2, BYTES).unwrap();
    }
    let state = vec![(ChunkId(1), b"state at ten".as_slice().into())];
    let done = log
        .snapshot_job(LogIndex(10), state, vec![])
        .unwrap()
        .run()
        .unwrap();
    log.install_snapshot(done).unwrap();
    for _ in 0..3 {
        append(&mut log, 2, BYTES).unwrap();
    }
    drop(log);
    storage.restart();
    let (opened, replayed, _) = reopen(&storage).unwrap();
    let snapshot = opened.snapshot.unwrap();
    assert_eq!(snapshot.index(), LogIndex(10));
    let chunks: Vec<_> = snapshot.chunks().map(Result::unwrap).collect();
    assert_eq!(chunks, [(ChunkId(1), b"state at ten".as_slice().into())]);
    assert_eq!(replayed.len(), 6);
    assert_eq!(opened.log.reader().rows(TOPIC, 0, 100).unwrap().len(), 26);
}

#[test]
fn covered_segments_can_be_removed_and_others_not() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for _ in 0..40 {
        append(&mut log, 2, BYTES).unwrap();
    }
    let first = log.segments()[0].id;
    assert!(matches!(
        log.remove_segments(&[first]),
        Err(LogError::NotCovered(_))
    ));
    snapshot(&mut log, b"state");
    assert!(
        matches!(log.remove_segments(&[first]), Err(LogError::NotCovered(_))),
        "were the only snapshot damaged, nothing could take its place"
    );
    snapshot(&mut log, b"state");
    let reader = log.reader();
    assert!(log.remove_segments(&[first]).unwrap() > 0);
    assert!(matches!(
        log.remove_segments(&[first]),
        Err(LogError::UnknownSegment(_))
    ));
    assert!(matches!(
        reader.record(place(1, 0)),
        Err(ReadError::NotFound(_))
    ));
    let left = reader.find(TOPIC, 0).unwrap().unwrap();
    assert!(left.place.index > LogIndex(1));
    append(&mut log, 1, 10).unwrap();
    log.close().unwrap();
    let (log, replayed) = open(&storage);
    assert_eq!(replayed.len(), 1);
    assert_eq!(log.reader().find(TOPIC, 0).unwrap(), Some(left));
    assert_eq!(files(&storage, "seg-").len(), log.segments().len());
}

#[test]
fn reading_on_at_the_end_of_a_segment_asks_for_nothing_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let storage = FolderStorage::open(folder.path(), Mapping::On).unwrap();
    let (mut log, _) = open(&storage);
    for _ in 0..12 {
        append(&mut log, 1, 20_000).unwrap();
    }
    let reader = log.reader();
    for index in 1..=12 {
        reader.reads_on(place(index, 0), usize::MAX);
        let read = reader.record(place(index, 0)).unwrap();
        assert_eq!(read.body, body(index, 0, 20_000));
    }
}

#[test]
fn spares_are_used_and_survive_a_restart() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    log.install_spare(log.spare_job().unwrap().run().unwrap());
    assert!(log.spare_job().is_none());
    log.close().unwrap();
    let (mut log, _) = open(&storage);
    assert_eq!(log.stats().spares, 1);
    append(&mut log, 1, 10).unwrap();
    assert_eq!(log.stats().spares, 0);
    assert!(files(&storage, "spare-").is_empty());
    expect_record(&log.reader(), place(1, 0), 10);
}

/// A start of a folder with so many spares and one that was not finished; the log, and the name of that one.
fn starts_beside_an_unfinished_spare(
    storage: &SimStorage,
    ready: usize,
) -> (Log<SimStorage>, String) {
    let two = Options {
        spare_segments: 2,
        ..options()
    };
    let start = || {
        let mut log = Log::open(storage.clone(), two.clone()).unwrap().log;
        log.replay(|_, _| Ok::<(), Infallible>(())).unwrap();
        log
    };
    let mut log = start();
    for _ in 0..ready {
        log.install_spare(log.spare_job().unwrap().run().unwrap());
    }
    log.close().unwrap();
    let name = format!("spare-{ready:016x}.new");
    let begun = storage.create(&name).unwrap();
    begun.write_at(0, &[7; 200_000]).unwrap();
    begun.sync_data().unwrap();
    (start(), name)
}

#[test]
fn a_spare_that_was_not_finished_is_finished_after_the_next_start() {
    let storage = SimStorage::new(1);
    let (mut log, unfinished) = starts_beside_an_unfinished_spare(&storage, 1);
    assert!(files(&storage, "spare-").contains(&unfinished));
    log.install_spare(log.spare_job().unwrap().run().unwrap());
    assert!(!files(&storage, "spare-").contains(&unfinished));
    assert_eq!(log.stats().spares, 2);
    let name = unfinished.trim_end_matches(".new");
    let mut bytes = vec![1; 300_000];
    let read = storage.open(name).unwrap().read_at(0, &mut bytes).unwrap();
    assert_eq!(read as u64, options().segment_bytes);
    assert!(bytes[..read].iter().all(|byte| *byte == 0));
    append(&mut log, 1, 10).unwrap();
    log.close().unwrap();
}

#[test]
fn a_spare_that_was_not_finished_is_deleted_if_the_start_may_need_its_space_or_has_no_use_for_it() {
    for ready in [0, 2] {
        let storage = SimStorage::new(1);
        let (log, unfinished) = starts_beside_an_unfinished_spare(&storage, ready);
        assert!(!files(&storage, "spare-").contains(&unfinished));
        assert_eq!(log.stats().spares, ready);
    }
}

#[test]
fn a_start_leaves_sealing_to_a_job() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 3, BYTES).unwrap();
    log.install_spare(log.spare_job().unwrap().run().unwrap());
    drop(log);
    let (mut log, _) = open(&storage);
    assert_eq!(stages(&log), [Stage::Open]);
    append(&mut log, 3, BYTES).unwrap();
    let job = log.seal_job().expect("it waits");
    log.install_sealed(job.run().unwrap()).unwrap();
    assert_eq!(stages(&log), [Stage::Sealed, Stage::Open]);
    expect_record(&log.reader(), place(1, 2), BYTES);
    expect_record(&log.reader(), place(2, 2), BYTES);
}

#[test]
fn a_start_without_a_spare_seals_because_that_gives_space_back() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    drop(log);
    let (log, _) = open(&storage);
    assert_eq!(stages(&log), [Stage::Sealed]);
}

fn stages(log: &Log<SimStorage>) -> Vec<Stage> {
    log.segments().iter().map(|segment| segment.stage).collect()
}

#[test]
fn the_first_segment_is_small_and_its_blocks_were_written_before() {
    let storage = SimStorage::new(1);
    let large = Options {
        segment_bytes: 32 << 20,
        ..options()
    };
    let mut log = Log::open(storage.clone(), large).unwrap().log;
    log.replay(|_, _| Ok::<(), Infallible>(())).unwrap();
    let mut calls = Vec::new();
    while log.segments().len() < 2 {
        let before = storage.calls();
        append(&mut log, 1, 250_000).unwrap();
        calls.push(storage.calls() - before);
    }
    let name = files(&storage, "seg-").pop().unwrap();
    let bytes = storage.open(&name).unwrap().len().unwrap();
    assert_eq!(bytes, 32 << 20, "as configured");
    assert_eq!(calls.len(), 33, "8 MiB in the first");
    // A call for each MiB of zeros; the one that begins the next segment reserves it only.
    assert!(calls[0] >= 8 + calls[32], "{calls:?}");
}

/// A fresh log whose next durable write fails: one of zeros.
fn unable_to_fill(fault: Fault) -> (SimStorage, Log<SimStorage>) {
    let storage = SimStorage::new(1);
    let (log, _) = open(&storage);
    storage.plan(Failure {
        call: Some(Call::WriteDurable),
        skip: 0,
        fault,
    });
    (storage, log)
}

#[test]
fn a_disk_that_is_full_while_the_first_segment_is_filled_leaves_the_log_as_it_was() {
    for fault in [Fault::NoSpace, Fault::Quota] {
        let (storage, mut log) = unable_to_fill(fault);
        let full = append(&mut log, 1, 10).map(drop);
        assert!(matches!(full, Err(LogError::DiskFull)), "{full:?}");
        assert!(files(&storage, "seg-").is_empty());
        assert_eq!(append(&mut log, 1, 10).unwrap().index, LogIndex(1));
    }
}

#[test]
fn a_first_segment_that_cannot_be_filled_stops_the_log_and_is_gone_at_the_next_start() {
    let (storage, mut log) = unable_to_fill(Fault::Io);
    let failed = append(&mut log, 1, 10).map(drop);
    assert!(matches!(failed, Err(LogError::Disk { .. })), "{failed:?}");
    drop(log);
    storage.restart_process();
    let (mut log, replayed) = open(&storage);
    assert!(replayed.is_empty());
    append(&mut log, 1, 10).unwrap();
    assert_eq!(files(&storage, "seg-").len(), 1);
}

#[test]
fn on_a_full_disk_the_last_spare_is_left_for_the_next_start() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    log.install_spare(log.spare_job().unwrap().run().unwrap());
    let space = storage.space().unwrap();
    storage.set_capacity(space.total_bytes - space.free_bytes);
    let mut appended = 1;
    let full = loop {
        match append(&mut log, 1, 10) {
            Ok(_) => appended += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, LogError::DiskFull), "{full}");
    assert_eq!(log.stats().spares, 1);
    drop(log);
    storage.restart_process();
    let (mut log, replayed) = open(&storage);
    assert_eq!(replayed.len(), appended);
    append(&mut log, 1, 10).unwrap();
}

#[test]
fn segments_without_a_manifest_are_damage() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    log.close().unwrap();
    storage.remove("manifest").unwrap();
    let refused = Log::open(storage, options()).map(drop);
    assert!(matches!(refused, Err(OpenError::ManifestMissing { .. })));
}

#[test]
fn a_failed_write_poisons_the_log_for_good() {
    use millpond_wal::sim::{Call, Failure, Fault};
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    storage.plan(Failure {
        call: Some(Call::WriteDurable),
        skip: 0,
        fault: Fault::Io,
    });
    assert!(matches!(
        append(&mut log, 1, 10),
        Err(LogError::Disk { .. })
    ));
    assert!(matches!(append(&mut log, 1, 10), Err(LogError::Poisoned)));
    assert!(matches!(log.vouch(), Err(LogError::Poisoned)));
    assert!(matches!(log.close(), Err(LogError::Poisoned)));
}

#[test]
fn a_full_disk_refuses_and_recovers() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    storage.set_capacity(140 << 10);
    let refused = (0..40).find_map(|_| append(&mut log, 1, BYTES).err());
    assert!(matches!(refused, Some(LogError::DiskFull)), "{refused:?}");
    let durable = log.durable();
    storage.set_capacity(10 << 20);
    assert_eq!(append(&mut log, 1, BYTES).unwrap().index, durable.next());
}

#[test]
fn a_snapshot_that_the_disk_fails_to_read_is_not_given_up() {
    let storage = SimStorage::new(0);
    let (mut log, _) = open(&storage);
    for _ in 0..10 {
        append(&mut log, 1, 100).unwrap();
    }
    let chunk = (ChunkId(1), b"state".as_slice().into());
    let job = log.snapshot_job(log.applied(), vec![chunk], vec![]);
    let done = job.unwrap().run().unwrap();
    log.install_snapshot(done).unwrap();
    let index = log.snapshot_index();
    log.close().unwrap();
    let open_but = |failing: &[u64]| {
        for &skip in failing {
            storage.plan(Failure {
                call: Some(Call::Read),
                skip,
                fault: Fault::Io,
            });
        }
        let opened = Log::open(storage.clone(), options()).map(drop);
        storage.restart_process();
        opened
    };
    // Both copies of its header, both of its table, its chunk.
    for failing in [&[0, 1][..], &[1, 2], &[2]] {
        let opened = open_but(failing);
        assert!(matches!(opened, Err(OpenError::Io { .. })), "{failing:?}");
    }
    // Of anything else there is a second copy.
    for skip in (0..20).filter(|skip| *skip != 2) {
        open_but(&[skip]).unwrap_or_else(|error| panic!("read {skip}: {error}"));
    }
    let (log, _) = open(&storage);
    assert_eq!(log.snapshot_index(), index);
}

#[test]
fn a_snapshot_waits_until_its_segment_can_be_sealed() {
    use millpond_wal::sim::{Call, Failure, Fault};
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
    storage.plan(Failure {
        call: Some(Call::WriteDurable),
        skip: 0,
        fault: Fault::NoSpace,
    });
    let refused = log.snapshot_job(LogIndex(1), vec![], vec![]).map(drop);
    assert!(matches!(refused, Err(LogError::SnapshotTooNew { .. })));
    append(&mut log, 1, 10).unwrap();
    assert!(log.snapshot_job(LogIndex(2), vec![], vec![]).is_ok());
}

#[test]
fn files_of_snapshots_that_are_not_kept_are_deleted() {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    for round in 0..6_u8 {
        append(&mut log, 1, 10).unwrap();
        let chunk = (ChunkId(1), vec![round; 100].into());
        let done = log
            .snapshot_job(log.applied(), vec![chunk], vec![])
            .unwrap()
            .run()
            .unwrap();
        log.install_snapshot(done).unwrap();
    }
    assert_eq!(files(&storage, "snapshot-").len(), 2);
    assert_eq!(log.snapshot_index(), Some(log.applied()));
}
