//! The voucher rule: torn bytes above what anything vouches for are cut, damage below is never.

use std::ops::ControlFlow;

use millpond_wal::sim::SimStorage;
use millpond_wal::storage::{Storage, StorageFile};
use millpond_wal::{
    ChunkId, Defect, Dumped, Harm, IndexRange, Log, LogError, LogIndex, Options, ReadError,
    ReplayEnd, Replayed, SegmentDefect, Stage, Wrong, dump, salvage_accept_loss, verify,
};

use crate::support::{TOPIC, append, expect_record, files, open, options, place, reopen};

/// Bytes of a test record; an entry of one such record takes one block.
const BYTES: usize = 3000;
const BLOCK: u64 = 4096;

fn range(first: u64, last: u64) -> IndexRange {
    IndexRange {
        first: LogIndex(first),
        last: LogIndex(last),
    }
}

/// A log that died with `entries` one-block entries in its first segment.
fn died_with(entries: u64) -> (SimStorage, String) {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    for _ in 0..entries {
        append(&mut log, 1, BYTES).unwrap();
    }
    drop(log);
    storage.restart();
    let segment = files(&storage, "seg-").pop().unwrap();
    (storage, segment)
}

/// Where the nth entry of a segment of one-block entries stands.
fn at(nth: u64) -> u64 {
    nth * BLOCK
}

#[test]
fn a_bad_last_entry_that_nothing_vouches_for_is_saved_and_cut() {
    let (storage, segment) = died_with(5);
    storage.corrupt(&segment, at(5) + 500, 8).unwrap();
    let (opened, replayed, end) = reopen(&storage).unwrap();
    assert_eq!(end, ReplayEnd::Healthy);
    assert_eq!(replayed.len(), 4);
    assert_eq!(opened.log.durable(), LogIndex(4));
    let [torn] = &opened.log.report().torn[..] else {
        panic!("{:?}", opened.log.report());
    };
    assert_eq!(
        (torn.index, torn.position, torn.bytes),
        (LogIndex(5), at(5), BLOCK)
    );
    assert_eq!(torn.defect, Some(Defect::RecordCrc));
    let saved = storage.open_read(torn.saved_as.as_ref().unwrap()).unwrap();
    assert_eq!(saved.len().unwrap(), BLOCK);
}

#[test]
fn what_was_cut_does_not_come_back_after_a_second_crash() {
    let (storage, segment) = died_with(5);
    storage.corrupt(&segment, at(5) + 500, 8).unwrap();
    drop(reopen(&storage).unwrap());
    storage.restart();
    // The same bits again: the entry is whole, as if the disk had only been slow.
    storage.corrupt(&segment, at(5) + 500, 8).unwrap();
    let (mut log, replayed) = open(&storage);
    assert_eq!((log.durable(), replayed.len()), (LogIndex(4), 4));
    append(&mut log, 2, 50).unwrap();
    drop(log);
    storage.restart();
    let (_, replayed) = open(&storage);
    assert_eq!(replayed[&place(5, 1)], crate::support::body(5, 1, 50));
    assert_eq!(replayed.len(), 6);
}

#[test]
fn a_bad_last_entry_with_a_voucher_is_damage() {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    for _ in 0..5 {
        append(&mut log, 1, BYTES).unwrap();
    }
    log.vouch().unwrap();
    drop(log);
    storage.restart();
    let segment = files(&storage, "seg-").pop().unwrap();
    storage.corrupt(&segment, at(5) + 500, 8).unwrap();
    expect_damaged(&storage, range(5, 5), 4);
}

#[test]
fn a_bad_entry_below_a_good_one_is_damage() {
    let (storage, segment) = died_with(5);
    storage.corrupt(&segment, at(2), 8).unwrap();
    expect_damaged(&storage, range(2, 2), 1);
}

#[test]
fn a_bad_entry_in_an_earlier_segment_is_damage() {
    let (storage, _) = died_with(30);
    let first = files(&storage, "seg-").remove(0);
    let (log, _) = open(&storage);
    let last = log.segments()[0].last;
    drop(log);
    storage.restart();
    storage.corrupt(&first, at(last.0) + 9, 8).unwrap();
    expect_damaged(
        &storage,
        IndexRange { first: last, last },
        last.0 as usize - 1,
    );
}

/// Everything before the damage is there and is served; nothing is written, cut or deleted.
fn expect_damaged(storage: &SimStorage, damaged: IndexRange, replays: usize) {
    let before = contents(storage);
    let (mut opened, replayed, end) = reopen(storage).unwrap();
    assert_eq!(
        end,
        ReplayEnd::Damaged { range: damaged },
        "{:?}",
        opened.log.report()
    );
    assert_eq!(replayed.len(), replays);
    let refused = append(&mut opened.log, 1, 10).map(drop);
    assert!(matches!(refused, Err(LogError::ReadOnly { damaged: d }) if d == damaged));
    let reader = opened.log.reader();
    for index in 1..=replays as u64 {
        expect_record(&reader, place(index, 0), BYTES);
    }
    let lost = reader.record(place(damaged.first.0, 0));
    assert!(
        matches!(lost, Err(ReadError::Damaged(d)) if d == damaged),
        "{lost:?}"
    );
    opened.log.close().unwrap();
    for (name, bytes) in before {
        if name.starts_with("seg-") {
            assert_eq!(contents(storage)[&name], bytes, "{name} was changed");
        }
    }
    let report = verify(storage).unwrap();
    assert_eq!(report.harm(), Harm::State);
    assert!(
        report
            .findings
            .iter()
            .any(|finding| finding.what == Wrong::Entries(damaged))
    );

    assert_eq!(salvage_accept_loss(storage, &options()).unwrap(), [damaged]);
    assert_eq!(salvage_accept_loss(storage, &options()).unwrap(), []);
    let (mut log, replayed) = open(storage);
    assert!(replayed.len() >= replays);
    assert!(replayed.keys().all(|place| !damaged.contains(place.index)));
    append(&mut log, 1, 10).unwrap();
    log.close().unwrap();
    let (_, again) = open(storage);
    assert_eq!(again.len(), replayed.len() + 1, "the skip is durable");
}

fn contents(storage: &SimStorage) -> std::collections::BTreeMap<String, Vec<u8>> {
    let names = storage.list().unwrap().into_iter();
    names
        .map(|name| {
            let file = storage.open_read(&name).unwrap();
            let mut bytes = vec![0; file.len().unwrap() as usize];
            file.read_at(0, &mut bytes).unwrap();
            (name, bytes)
        })
        .collect()
}

/// Thirty entries, all sealed, a snapshot over them, and five more.
fn covered() -> (SimStorage, String) {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    for _ in 0..30 {
        append(&mut log, 1, BYTES).unwrap();
    }
    let chunk = (ChunkId(1), b"state".as_slice().into());
    let done = log
        .snapshot_job(log.applied(), vec![chunk], vec![])
        .unwrap()
        .run()
        .unwrap();
    log.install_snapshot(done).unwrap();
    for _ in 0..5 {
        append(&mut log, 1, BYTES).unwrap();
    }
    log.close().unwrap();
    let first = files(&storage, "seg-").remove(0);
    (storage, first)
}

#[test]
fn damage_below_the_snapshot_costs_only_its_bodies() {
    let (storage, segment) = covered();
    storage.corrupt(&segment, at(2) + 300, 4).unwrap();
    let report = verify(&storage).unwrap();
    assert_eq!(report.harm(), Harm::Bodies);
    assert_eq!(report.findings[0].what, Wrong::Entries(range(2, 2)));
    let (mut log, replayed) = open(&storage);
    assert_eq!(replayed.len(), 5);
    let reader = log.reader();
    assert!(matches!(reader.record(place(2, 0)), Err(ReadError::Damaged(d)) if d == range(2, 2)));
    expect_record(&reader, place(1, 0), BYTES);
    expect_record(&reader, place(3, 0), BYTES);
    append(&mut log, 1, 10).unwrap();
    assert_eq!(salvage_accept_loss(&storage, &options()).unwrap(), []);
}

#[test]
fn a_missing_segment_below_the_snapshot_is_noticed_and_the_rest_is_served() {
    let (storage, segment) = covered();
    storage.remove(&segment).unwrap();
    let (opened, _, end) = reopen(&storage).unwrap();
    assert_eq!(end, ReplayEnd::Healthy);
    let lost = opened.log.report().lost[0];
    assert_eq!(lost.range.first, LogIndex(1));
    let reader = opened.log.reader();
    let read = reader.record(place(1, 0));
    assert!(
        matches!(read, Err(ReadError::Damaged(d)) if d == lost.range),
        "{read:?}"
    );
    let next = lost.range.last.0 + 1;
    expect_record(&reader, place(next, 0), BYTES);
    assert_eq!(
        reader.find(TOPIC, 0).unwrap().unwrap().place,
        place(next, 0)
    );
}

#[test]
fn a_missing_segment_above_the_snapshot_stops_the_fold() {
    let (storage, _) = covered();
    let last = files(&storage, "seg-").pop().unwrap();
    storage.remove(&last).unwrap();
    let (opened, replayed, end) = reopen(&storage).unwrap();
    // Closing wrote one blank entry behind the five.
    assert_eq!(
        end,
        ReplayEnd::Damaged {
            range: range(31, 36)
        }
    );
    assert!(replayed.is_empty());
    expect_record(&opened.log.reader(), place(30, 0), BYTES);
    drop(opened);
    assert_eq!(
        salvage_accept_loss(&storage, &options()).unwrap(),
        [range(31, 36)]
    );
    assert_eq!(verify(&storage).unwrap().harm(), Harm::Bodies);
    let (mut log, _) = open(&storage);
    assert_eq!(append(&mut log, 1, 10).unwrap().index, LogIndex(37));
}

#[test]
fn a_missing_segment_that_was_written_last_is_damage() {
    let (storage, segment) = died_with(5);
    storage.remove(&segment).unwrap();
    let (opened, replayed, end) = reopen(&storage).unwrap();
    // How far it reached nobody knows any more.
    assert_eq!(end, ReplayEnd::Damaged { range: range(1, 1) });
    assert!(replayed.is_empty());
    drop(opened);
    assert_eq!(
        salvage_accept_loss(&storage, &options()).unwrap(),
        [range(1, 1)]
    );
    let (mut log, _) = open(&storage);
    append(&mut log, 1, 10).unwrap();
}

#[test]
fn a_segment_that_lost_its_end_is_damage_unless_zeros_follow_what_is_left() {
    let (_, segment) = died_with(5);
    for bytes in 0..=(16 * BLOCK) {
        let boundary = |at: u64| bytes % BLOCK <= at || bytes % BLOCK >= BLOCK - at;
        if !boundary(1) {
            continue;
        }
        let (storage, _) = died_with(5);
        storage.open(&segment).unwrap().set_len(bytes).unwrap();
        let (opened, replayed, end) = reopen(&storage).unwrap();
        let whole = (bytes / BLOCK).clamp(1, 6) - 1;
        assert_eq!(replayed.len() as u64, whole, "{bytes} bytes");
        if bytes < 7 * BLOCK {
            let next = range(whole + 1, whole + 1);
            assert_eq!(end, ReplayEnd::Damaged { range: next }, "{bytes} bytes");
            let left = storage.open_read(&segment).unwrap().len().unwrap();
            assert_eq!(left, bytes, "nothing is written");
        } else {
            assert_eq!(end, ReplayEnd::Healthy, "{bytes} bytes");
            assert!(opened.log.report().torn.is_empty());
        }
    }
}

#[test]
fn a_segment_that_was_cut_within_a_block_is_sealed_once_the_loss_is_accepted() {
    for bytes in [3 * BLOCK + 1, 3 * BLOCK + 50, 3 * BLOCK + 1000] {
        let (storage, segment) = died_with(5);
        storage.open(&segment).unwrap().set_len(bytes).unwrap();
        let lost = range(3, 3);
        assert_eq!(salvage_accept_loss(&storage, &options()).unwrap(), [lost]);
        let (mut log, replayed) = open(&storage);
        assert_eq!(replayed.len(), 2);
        assert_eq!(log.segments()[0].stage, Stage::Sealed);
        assert_eq!(append(&mut log, 1, BYTES).unwrap().index, LogIndex(4));
        log.close().unwrap();
        assert_eq!(verify(&storage).unwrap().harm(), Harm::None);
        let (log, replayed) = open(&storage);
        assert_eq!(replayed.len(), 3);
        expect_record(&log.reader(), place(2, 0), BYTES);
    }
}

/// The losses that a start tells, with the bytes that they had at most.
fn told_losses(storage: &SimStorage, options: Options) -> Vec<(IndexRange, u64)> {
    let mut told = Vec::new();
    let mut opened = Log::open(storage.clone(), options).unwrap();
    let end = opened.log.replay(|step, _| {
        if let Replayed::Lost(lost) = step {
            told.push((lost.range, lost.bytes_max));
        }
        Ok::<(), std::convert::Infallible>(())
    });
    assert_eq!(end.unwrap(), ReplayEnd::Healthy);
    told
}

#[test]
fn a_lost_end_of_a_segment_had_at_most_what_stood_behind_it() {
    for left in [1, 3] {
        let (storage, _) = died_with(20);
        let segment = files(&storage, "seg-").remove(0);
        storage.open(&segment).unwrap().set_len(at(left)).unwrap();
        let lost = salvage_accept_loss(&storage, &options()).unwrap()[0];
        assert_eq!(lost.first, LogIndex(left));
        let entries = lost.last.0 - lost.first.0 + 1;
        assert!(entries > 3);
        for start in 1..=2 {
            let told = told_losses(&storage, options());
            assert_eq!(told.len(), 1, "{told:?}");
            assert_eq!(told[0].0, lost);
            assert!(told[0].1 >= entries * BLOCK, "start {start}: {told:?}");
        }
    }
}

#[test]
fn a_lost_end_of_the_last_segment_had_at_most_what_stood_behind_it() {
    let options = Options {
        entry_bytes_max: 2 * BLOCK as usize,
        ..options()
    };
    let (storage, segment) = died_with(6);
    storage.open(&segment).unwrap().set_len(at(2)).unwrap();
    // How many there were nobody knows any more.
    let lost = range(2, 2);
    assert_eq!(salvage_accept_loss(&storage, &options).unwrap(), [lost]);
    for start in 1..=2 {
        let told = told_losses(&storage, options.clone());
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].0, lost);
        assert!(told[0].1 >= 5 * BLOCK, "start {start}: {told:?}");
    }
}

#[test]
fn a_lost_end_before_a_lost_segment_is_told_too() {
    let (storage, _) = died_with(20);
    let segments = files(&storage, "seg-");
    storage.open(&segments[0]).unwrap().set_len(at(3)).unwrap();
    storage.remove(&segments[1]).unwrap();
    let lost = salvage_accept_loss(&storage, &options()).unwrap();
    assert_eq!(lost.len(), 2, "{lost:?}");
    let told = told_losses(&storage, options());
    let ranges: Vec<_> = told.iter().map(|(range, _)| *range).collect();
    assert_eq!(ranges, lost);
    let entries = lost[0].last.0 - lost[0].first.0 + 1;
    assert!(told[0].1 >= entries * BLOCK, "{told:?}");
}

/// A block as sealing writes it, but of this format.
fn footer_of(format: u8, mut block: Vec<u8>) -> Vec<u8> {
    block[..8].copy_from_slice(b"MPFOOTR1");
    block[8] = format;
    block[12..16].fill(0);
    let crc = crc32fast::hash(&block[..112]);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    block
}

#[test]
fn only_a_footer_of_the_segment_itself_says_that_a_newer_version_wrote_it() {
    use millpond_wal::OpenError;
    for is_payload in [true, false] {
        let storage = SimStorage::new(3);
        let (mut log, _) = open(&storage);
        let mut group = log.new_group();
        // On a block of its own.
        let lead = vec![1; BLOCK as usize - 96 - 24];
        let payload = footer_of(2, vec![0; BLOCK as usize]);
        group.push(1, 1, &[&lead, &payload]);
        let appended = log.append_durable(group).unwrap();
        log.set_applied(appended.index);
        log.close().unwrap();
        let segment = files(&storage, "seg-").remove(0);
        let file = storage.open(&segment).unwrap();
        let mut footers = 0;
        for at in (0..file.len().unwrap()).step_by(BLOCK as usize) {
            let mut block = vec![0; BLOCK as usize];
            file.read_at(at, &mut block).unwrap();
            if block.starts_with(b"MPFOOTR1\x01") {
                let damaged = match is_payload {
                    true => vec![7; BLOCK as usize],
                    false => footer_of(2, block),
                };
                file.write_at(at, &damaged).unwrap();
                footers += 1;
            }
        }
        assert_eq!(footers, 2);
        match reopen(&storage) {
            Ok((opened, ..)) => {
                let lost = opened.log.report().lost[0];
                assert!(is_payload && lost.defect == SegmentDefect::Footer);
            }
            Err(OpenError::NewerFormat { found: 2, .. }) => assert!(!is_payload),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_a_newer_version_wrote_is_refused_before_a_byte_is_written() {
    use millpond_wal::OpenError;
    let (storage, segment) = died_with(5);
    let file = storage.open(&segment).unwrap();
    let mut block = vec![0; 96];
    file.read_at(at(5), &mut block).unwrap();
    block[4] = 2;
    block[8..12].fill(0);
    let crc = crc32fast::hash(&block);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
    file.write_at(at(5), &block).unwrap();
    let before = contents(&storage);
    let refused = reopen(&storage).map(drop);
    let newer = |error| matches!(error, OpenError::NewerFormat { file, found: 2, known: 1 } if file == segment);
    assert!(refused.is_err_and(newer));
    assert_eq!(contents(&storage), before);
}

#[test]
fn an_error_of_apply_leaves_the_folder_as_it_was() {
    use millpond_wal::ReplayError;
    let (storage, segment) = died_with(5);
    storage.corrupt(&segment, at(5) + 500, 8).unwrap();
    let before = contents(&storage);
    let mut opened = Log::open(storage.clone(), options()).unwrap();
    let failed = opened.log.replay(|step, _| match step {
        Replayed::Entry(entry) if entry.index == LogIndex(3) => Err("no"),
        _ => Ok(()),
    });
    assert!(matches!(failed, Err(ReplayError::Apply("no"))));
    opened.log.close().unwrap();
    assert_eq!(contents(&storage), before);
}

#[test]
fn damage_in_a_sealed_segment_above_the_snapshot_stops_the_fold() {
    let (storage, _) = covered();
    let last = files(&storage, "seg-").pop().unwrap();
    storage.corrupt(&last, at(3) + 100, 4).unwrap();
    let (mut opened, replayed, end) = reopen(&storage).unwrap();
    assert_eq!(
        end,
        ReplayEnd::Damaged {
            range: range(33, 33)
        }
    );
    assert_eq!(replayed.len(), 2);
    assert!(matches!(
        append(&mut opened.log, 1, 10),
        Err(LogError::ReadOnly { .. })
    ));
    drop(opened);
    assert_eq!(
        salvage_accept_loss(&storage, &options()).unwrap(),
        [range(33, 33)]
    );
    assert_eq!(verify(&storage).unwrap().harm(), Harm::Bodies);
    let (_, replayed) = open(&storage);
    assert_eq!(replayed.len(), 4);
}

#[test]
fn one_bad_copy_of_footer_and_directory_harms_nothing() {
    for copy in 0..2 {
        let (storage, segment) = covered();
        let bytes = storage.open_read(&segment).unwrap().len().unwrap();
        let (log, _) = open(&storage);
        let entries = log.segments()[0].last.0;
        log.close().unwrap();
        let start = at(entries + 1);
        let copy_bytes = (bytes - start) / 2;
        storage
            .corrupt(&segment, start + copy * copy_bytes, copy_bytes as usize)
            .unwrap();
        let report = verify(&storage).unwrap();
        assert_eq!(report.harm(), Harm::None);
        assert!(
            report
                .findings
                .iter()
                .any(|f| f.what == Wrong::FooterCopy(copy)),
            "{report:?}"
        );
        let (log, _) = open(&storage);
        assert_eq!(log.reader().rows(TOPIC, 0, 100).unwrap().len(), 35);
    }
}

#[test]
fn a_damaged_newest_snapshot_is_made_up_for_by_the_older_one() {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    for round in 0..2_u8 {
        for _ in 0..5 {
            append(&mut log, 1, BYTES).unwrap();
        }
        let chunk = (ChunkId(1), vec![round; 100].into());
        let done = log
            .snapshot_job(log.applied(), vec![chunk], vec![])
            .unwrap()
            .run()
            .unwrap();
        log.install_snapshot(done).unwrap();
    }
    assert!(
        log.segments().iter().any(|segment| !segment.covered),
        "kept for the older snapshot"
    );
    log.close().unwrap();
    let newest = files(&storage, "snapshot-").pop().unwrap();
    let bytes = storage.open_read(&newest).unwrap().len().unwrap();
    storage.corrupt(&newest, 0, bytes as usize).unwrap();
    let (opened, replayed, end) = reopen(&storage).unwrap();
    assert_eq!((end, replayed.len()), (ReplayEnd::Healthy, 5));
    assert_eq!(opened.snapshot.unwrap().index(), LogIndex(5));
    assert_eq!(opened.log.report().snapshots_lost.len(), 1);
}

#[test]
fn a_manifest_with_a_hole_is_refused() {
    let (storage, _) = died_with(30);
    storage.corrupt("manifest", BLOCK, 8).unwrap();
    let refused = Log::open(storage, options()).map(drop);
    assert!(refused.is_err());
}

#[test]
fn a_manifest_that_is_older_than_the_segments_is_refused() {
    use millpond_wal::OpenError;
    let storage = SimStorage::new(3);
    let (log, _) = open(&storage);
    drop(log);
    let old = contents(&storage)["manifest"].clone();
    let (mut log, _) = open(&storage);
    append(&mut log, 1, BYTES).unwrap();
    drop(log);
    let file = storage.open("manifest").unwrap();
    file.write_at(0, &old).unwrap();
    let refused = Log::open(storage, options()).map(drop);
    assert!(
        matches!(refused, Err(OpenError::ManifestBehind { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_payload_that_looks_like_an_entry_is_not_taken_for_one() {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    let first = append(&mut log, 1, BYTES).unwrap();
    // A copy of the first entry, block-aligned in the second one's payload.
    let mut group = log.new_group();
    let lead = vec![1; BLOCK as usize - 96 - 24];
    group.push(1, 1, &[&lead, &first.bytes]);
    log.append_durable(group).unwrap();
    drop(log);
    storage.restart();
    let segment = files(&storage, "seg-").pop().unwrap();
    storage.corrupt(&segment, at(2), 8).unwrap();
    let (opened, replayed, end) = reopen(&storage).unwrap();
    assert_eq!((end, replayed.len()), (ReplayEnd::Healthy, 1));
    assert_eq!(opened.log.report().torn[0].bytes, 3 * BLOCK);
}

#[test]
fn a_dump_shows_every_entry_and_what_is_damaged() {
    let (storage, segment) = covered();
    storage.corrupt(&segment, at(2) + 300, 4).unwrap();
    let (mut entries, mut records, mut damaged, mut segments) = (0, 0, Vec::new(), 0);
    dump(&storage, LogIndex(1), |dumped| {
        match dumped {
            Dumped::Segment { .. } => segments += 1,
            Dumped::Entry { records: shown, .. } => {
                entries += 1;
                records += shown.count();
            }
            Dumped::Damaged(range) => damaged.push(range),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((records, damaged), (34, vec![range(2, 2)]));
    assert!(entries >= 34 && segments == files(&storage, "seg-").len());
}

#[test]
fn a_directory_that_claims_an_entry_larger_than_its_segment_is_damage() {
    let storage = SimStorage::new(3);
    let (mut log, _) = open(&storage);
    for _ in 0..3 {
        append(&mut log, 1, BYTES).unwrap();
    }
    log.close().unwrap();
    let segment = files(&storage, "seg-").remove(0);
    let file = storage.open(&segment).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(0, &mut bytes).unwrap();
    for block in bytes.chunks_mut(BLOCK as usize) {
        // The second block of either copy has where the entries stand; this is how long the first is.
        if block[4..12] == *b"MPDR\x01\0\0\0" {
            block[16 + 12..16 + 16].copy_from_slice(&0x00FF_FFFF_u32.to_le_bytes());
            let crc = crc32fast::hash(&block[4..]);
            block[..4].copy_from_slice(&crc.to_le_bytes());
        }
    }
    file.write_at(0, &bytes).unwrap();
    let report = verify(&storage).unwrap();
    let found: Vec<_> = report.findings.iter().map(|found| found.harm).collect();
    assert!(found.contains(&Harm::State), "{report:?}");
}
