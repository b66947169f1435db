use super::*;
use crate::buffer::BufferPool;
use crate::sim::{Call, Failure, Fault, SimStorage};

const STORE: [u8; 16] = [7; 16];
type State = BTreeMap<ChunkId, Bytes>;

fn chunk(id: u64, version: u64, bytes: usize) -> (ChunkId, Bytes) {
    let content = (0..bytes as u64).map(|i| (i * 7 + id * 13 + version) as u8);
    (ChunkId(id), content.collect())
}

fn job(
    storage: &SimStorage,
    base: Option<&Snapshot<SimStorage>>,
    number: u64,
    dirty: Vec<(ChunkId, Bytes)>,
    removed: &[u64],
) -> SnapshotJob<SimStorage> {
    let removed = removed.iter().map(|&id| ChunkId(id));
    let at = (number, LogIndex(number * 10));
    SnapshotJob::new(
        storage.clone(),
        BufferPool::new(0),
        STORE,
        base.map(|base| Base {
            state: base,
            files: Some(base),
        }),
        at,
        dirty,
        removed,
    )
}

fn write(
    storage: &SimStorage,
    base: Option<&Snapshot<SimStorage>>,
    number: u64,
    dirty: Vec<(ChunkId, Bytes)>,
    removed: &[u64],
) -> Snapshot<SimStorage> {
    let done = job(storage, base, number, dirty, removed).run().unwrap();
    assert!(done.damaged.is_empty());
    Snapshot::of(storage.clone(), &done)
}

fn open(storage: &SimStorage, number: u64) -> Result<Snapshot<SimStorage>, SnapshotError> {
    Snapshot::open(storage.clone(), STORE, number)
}

fn content(snapshot: &Snapshot<SimStorage>) -> State {
    snapshot.chunks().collect::<Result<_, _>>().unwrap()
}

fn bytes_of(storage: &SimStorage, name: &str) -> Vec<u8> {
    let file = storage.open_read(name).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    read_exact_at(&file, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_snapshot_reads_back_as_written() {
    let storage = SimStorage::new(1);
    let chunks: Vec<_> = (0..40).map(|id| chunk(id, 0, id as usize * 5000)).collect();
    let written = write(&storage, None, 1, chunks.clone(), &[]);
    let read = open(&storage, 1).unwrap();
    assert_eq!(read.info(), written.info());
    assert_eq!(read.index(), LogIndex(10));
    assert_eq!(read.info().files, ["snapshot-0000000000000001"]);
    assert_eq!(content(&read), chunks.into_iter().collect());
}

#[test]
fn an_empty_state_is_a_snapshot_too() {
    let storage = SimStorage::new(1);
    write(&storage, None, 3, vec![], &[]);
    assert!(content(&open(&storage, 3).unwrap()).is_empty());
}

#[test]
fn only_dirty_chunks_are_written_and_removed_ones_are_gone() {
    let storage = SimStorage::new(1);
    let mut state: State = (0..100).map(|id| chunk(id, 0, 10_000)).collect();
    let first = write(&storage, None, 1, state.clone().into_iter().collect(), &[]);
    let dirty = chunk(7, 1, 12_000);
    let done = job(&storage, Some(&first), 2, vec![dirty.clone()], &[8, 999])
        .run()
        .unwrap();
    assert_eq!(done.chunk_bytes, 12_000);
    assert_eq!(done.info().files, [file_name(1), file_name(2)]);
    state.insert(dirty.0, dirty.1);
    state.remove(&ChunkId(8));
    assert_eq!(content(&open(&storage, 2).unwrap()), state);
    assert_eq!(content(&first).len(), 100, "the older one is untouched");
}

#[test]
fn mostly_dead_files_are_merged_into_the_new_one() {
    let storage = SimStorage::new(1);
    let mut state: State = (0..10).map(|id| chunk(id, 0, 1000)).collect();
    let mut last = write(&storage, None, 1, state.clone().into_iter().collect(), &[]);
    let half: Vec<_> = (0..5).map(|id| chunk(id, 1, 1000)).collect();
    state.extend(half.clone());
    last = write(&storage, Some(&last), 2, half, &[]);
    assert_eq!(
        last.info().files,
        [file_name(1), file_name(2)],
        "half alive stays"
    );
    last = write(&storage, Some(&last), 3, vec![], &[9]);
    state.remove(&ChunkId(9));
    assert_eq!(last.info().files, [file_name(2), file_name(3)]);
    storage.remove(&file_name(1)).unwrap();
    assert_eq!(content(&open(&storage, 3).unwrap()), state);
}

#[test]
fn files_stay_few_and_hold_at_most_twice_the_state() {
    let storage = SimStorage::new(1);
    let mut state: State = (0..200).map(|id| chunk(id, 0, 500)).collect();
    let mut last = write(&storage, None, 1, state.clone().into_iter().collect(), &[]);
    for number in 2..150 {
        let dirty: Vec<_> = (0..2)
            .map(|i| chunk((number * 7 + i * 91) % 200, number, 500))
            .collect();
        state.extend(dirty.clone());
        last = write(&storage, Some(&last), number, dirty, &[]);
        assert!(last.table.files.len() <= FILES_MAX);
        let held: u64 = last.table.files.values().map(|file| file.chunk_bytes).sum();
        assert!(held <= 2 * 200 * 500, "{held} bytes at {number}");
    }
    for name in storage.list().unwrap() {
        if !last.info().files.contains(&name) {
            storage.remove(&name).unwrap();
        }
    }
    assert_eq!(content(&open(&storage, 149).unwrap()), state);
}

#[test]
fn two_generations_share_no_file_and_unchanged_chunks_are_not_written_again() {
    let storage = SimStorage::new(1);
    let mut state: State = (0..50).map(|id| chunk(id, 0, 1000)).collect();
    let mut kept = vec![write(
        &storage,
        None,
        1,
        state.clone().into_iter().collect(),
        &[],
    )];
    for number in 2..40 {
        let dirty = chunk(number % 7, number, 1000);
        state.insert(dirty.0, dirty.1.clone());
        let base = Base {
            state: kept.last().unwrap(),
            files: kept.len().checked_sub(2).map(|older| &kept[older]),
        };
        let at = (number, LogIndex(number * 10));
        let done = SnapshotJob::new(
            storage.clone(),
            BufferPool::new(0),
            STORE,
            Some(base),
            at,
            [dirty],
            [],
        )
        .run()
        .unwrap();
        // The second generation has to be made once; then only what changed since its last is written.
        let bytes_max = if number == 2 { 50_000 } else { 5_000 };
        assert!(
            done.chunk_bytes <= bytes_max,
            "{} at {number}",
            done.chunk_bytes
        );
        let snapshot = Snapshot::of(storage.clone(), &done);
        assert_eq!(content(&snapshot), state);
        let (mine, others) = (snapshot.info().files, kept.last().unwrap().info().files);
        assert!(
            mine.iter().all(|file| !others.contains(file)),
            "{mine:?} {others:?}"
        );
        kept.push(snapshot);
    }
}

#[test]
fn one_bad_copy_of_header_or_table_costs_nothing() {
    let fresh = || {
        let storage = SimStorage::new(1);
        let written = write(
            &storage,
            None,
            1,
            (0..9).map(|id| chunk(id, 0, 999)).collect(),
            &[],
        );
        let len = storage.open(&file_name(1)).unwrap().len().unwrap();
        (storage, content(&written), len)
    };
    let (_, _, len) = fresh();
    let block = BLOCK_BYTES as u64;
    for at in [0, len - block, len - 2 * block, len - 3 * block] {
        let (storage, state, _) = fresh();
        storage.corrupt(&file_name(1), at + 20, 4).unwrap();
        assert_eq!(content(&open(&storage, 1).unwrap()), state, "byte {at}");
    }
    for (first, second, what) in [
        (0, len - block, Damage::Headers),
        (len - 2 * block, len - 3 * block, Damage::Tables),
    ] {
        let (storage, ..) = fresh();
        storage.corrupt(&file_name(1), first, 1).unwrap();
        storage
            .corrupt(&file_name(1), second + block - 1, 1)
            .unwrap();
        let e = open(&storage, 1)
            .map(drop)
            .expect_err("both copies are bad");
        assert!(
            matches!(e, SnapshotError::Damaged { what: found, .. } if found == what),
            "{e}"
        );
    }
}

#[test]
fn a_damaged_chunk_is_named() {
    let storage = SimStorage::new(1);
    write(
        &storage,
        None,
        1,
        (0..3).map(|id| chunk(id, 0, 1000)).collect(),
        &[],
    );
    storage.corrupt(&file_name(1), 4096 + 1500, 1).unwrap();
    let snapshot = open(&storage, 1).unwrap();
    let e = snapshot.verify().expect_err("chunk 1 is bad");
    assert_eq!(
        e.to_string(),
        "snapshot-0000000000000001 is damaged (chunk 1 is bad); an older snapshot or a full replay \
         must take its place"
    );
    assert_eq!(snapshot.chunks().filter(Result::is_ok).count(), 2);
}

#[test]
fn damage_met_while_merging_is_reported_and_healed_by_a_dirty_chunk() {
    let storage = SimStorage::new(1);
    let mut state: State = (0..10).map(|id| chunk(id, 0, 1000)).collect();
    let first = write(&storage, None, 1, state.clone().into_iter().collect(), &[]);
    storage.corrupt(&file_name(1), 4096 + 8500, 1).unwrap();
    let dirty: Vec<_> = (0..6).map(|id| chunk(id, 1, 1000)).collect();
    state.extend(dirty.clone());
    let done = job(&storage, Some(&first), 2, dirty, &[]).run().unwrap();
    assert_eq!(done.damaged, [ChunkId(8)]);
    assert_eq!(done.info().files, [file_name(1), file_name(2)]);

    let second = Snapshot::of(storage.clone(), &done);
    let third = write(&storage, Some(&second), 3, vec![chunk(8, 0, 1000)], &[]);
    assert_eq!(third.info().files, [file_name(2), file_name(3)]);
    assert_eq!(content(&open(&storage, 3).unwrap()), state);
}

#[test]
fn strangers_are_refused() {
    let storage = SimStorage::new(1);
    write(&storage, None, 1, vec![chunk(1, 0, 10)], &[]);
    let e = Snapshot::open(storage.clone(), [8; 16], 1).map(drop);
    assert!(matches!(e, Err(SnapshotError::ForeignStore { .. })));

    storage.rename(&file_name(1), &file_name(2)).unwrap();
    let e = open(&storage, 2).map(drop).expect_err("its number is 1");
    assert!(matches!(
        e,
        SnapshotError::Damaged {
            what: Damage::Headers,
            ..
        }
    ));
    let e = open(&storage, 1).map(drop).expect_err("is gone");
    assert!(
        matches!(e, SnapshotError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
}

#[test]
fn a_newer_format_is_told_apart_from_damage() {
    let storage = SimStorage::new(1);
    write(&storage, None, 1, vec![], &[]);
    let file = storage.open(&file_name(1)).unwrap();
    let mut block = bytes_of(&storage, &file_name(1))[..BLOCK_BYTES].to_vec();
    block[8] = 2;
    block[12..16].fill(0);
    let crc = crc32fast::hash(&block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    file.write_at(0, &block).unwrap();
    let e = open(&storage, 1).map(drop).expect_err("format 2");
    assert!(matches!(
        e,
        SnapshotError::NewerFormat {
            found: 2,
            known: 1,
            ..
        }
    ));
}

#[test]
fn names_and_numbers_go_both_ways() {
    assert_eq!(number_of(&file_name(0x1f)), Some(0x1f));
    for name in [
        "snapshot-1f",
        "snapshot-000000000000001F",
        "manifest",
        "snapshot-",
    ] {
        assert_eq!(number_of(name), None, "{name}");
    }
}

/// The job of number 2 over the same base, as often as there are places to fail in it.
fn second_job(storage: &SimStorage, first: &Snapshot<SimStorage>) -> SnapshotJob<SimStorage> {
    let dirty = (5..15).map(|id| chunk(id, 1, 3000)).collect();
    job(storage, Some(first), 2, dirty, &[0, 1])
}

fn with_first(seed: u64) -> (SimStorage, Snapshot<SimStorage>) {
    let storage = SimStorage::new(seed);
    let chunks = (0..10).map(|id| chunk(id, 0, 3000)).collect();
    let first = write(&storage, None, 1, chunks, &[]);
    (storage, first)
}

#[test]
fn a_crash_at_any_write_leaves_the_older_snapshot_and_never_a_wrong_newer_one() {
    let (storage, first) = with_first(0);
    let before = storage.calls();
    let done = second_job(&storage, &first).run().unwrap();
    let calls = storage.calls() - before;
    let expected = content(&Snapshot::of(storage, &done));

    let mut whole = 0;
    for seed in 0..400 {
        let (storage, first) = with_first(seed);
        let old = content(&first);
        storage.crash_after(seed % calls);
        second_job(&storage, &first)
            .run()
            .map(drop)
            .expect_err("the power went");
        storage.restart();
        assert_eq!(content(&open(&storage, 1).unwrap()), old, "seed {seed}");
        if let Ok(second) = open(&storage, 2)
            && second.verify().is_ok()
        {
            whole += 1;
            assert_eq!(content(&second), expected, "seed {seed}");
        }
        // What the first try left does not stand in the way.
        let first = open(&storage, 1).unwrap();
        second_job(&storage, &first).run().unwrap();
        storage.crash();
        assert_eq!(
            content(&open(&storage, 2).unwrap()),
            expected,
            "seed {seed}"
        );
    }
    assert!(
        whole > 0,
        "the last calls may lose power after everything was written"
    );
}

#[test]
fn every_failed_call_is_an_error_and_harms_nothing() {
    for call in [
        Call::Create,
        Call::Preallocate,
        Call::WriteDurable,
        Call::Sync,
        Call::SyncDir,
    ] {
        for fault in [Fault::Io, Fault::NoSpace] {
            let (storage, first) = with_first(3);
            storage.plan(Failure {
                call: Some(call),
                skip: 0,
                fault,
            });
            let failed = second_job(&storage, &first).run().map(drop);
            let e = failed.expect_err("planned");
            assert!(matches!(e, SnapshotError::Io { .. }), "{call:?}: {e}");
            assert_eq!(storage.list().unwrap(), [file_name(1)], "{call:?}");
            storage.crash();
            open(&storage, 1).unwrap().verify().unwrap();
        }
    }
}

#[test]
fn what_cannot_be_read_while_merging_stays_where_it_is() {
    let (storage, first) = with_first(3);
    storage.plan(Failure {
        call: Some(Call::Read),
        skip: 1,
        fault: Fault::Io,
    });
    let done = second_job(&storage, &first).run().unwrap();
    assert_eq!(done.damaged, [ChunkId(3)]);
    assert_eq!(done.info().files, [file_name(1), file_name(2)]);
    open(&storage, 2).unwrap().verify().unwrap();
}

#[test]
fn the_bytes_of_the_file_stay_what_they_are() {
    let storage = SimStorage::new(1);
    let first = write(
        &storage,
        None,
        1,
        vec![(ChunkId(5), Bytes::from_static(b"five"))],
        &[],
    );
    let dirty = vec![(ChunkId(6), Bytes::from_static(b"six"))];
    write(&storage, Some(&first), 2, dirty, &[]);
    let bytes = bytes_of(&storage, &file_name(2));
    assert_eq!(bytes.len(), 5 * BLOCK_BYTES);
    let shown = |at: usize, bytes_shown: usize| {
        let hex = bytes[at..at + bytes_shown]
            .iter()
            .map(|b| format!("{b:02x}"));
        hex.collect::<String>()
    };
    assert_eq!(shown(0, 88), GOLDEN_HEADER);
    assert_eq!(&bytes[4096..4100], b"six\0");
    assert_eq!(shown(8192, 96), GOLDEN_TABLE);
    assert_eq!(bytes[8192..12288], bytes[12288..16384]);
    assert_eq!(bytes[..4096], bytes[16384..]);
    assert!(
        bytes[88..4096]
            .iter()
            .chain(&bytes[8288..12288])
            .all(|&b| b == 0)
    );
}

const GOLDEN_HEADER: &str = "4d50534e4150533101000000f2833fa607070707070707070707070707070707\
  02000000000000001400000000000000002000000000000002000000020000000300000000000000\
  fe22b58cac4ab1f56e00c6f555ab47f4";
const GOLDEN_TABLE: &str = "01000000000000000400000000000000\
  02000000000000000300000000000000\
  05000000000000000100000000000000001000000000000004000000cbccb23c\
  06000000000000000200000000000000001000000000000003000000fb261743";

#[test]
fn a_chunk_beyond_the_limit_fails_the_snapshot_and_nothing_else() {
    let storage = SimStorage::new(1);
    let large = Bytes::from(vec![0; CHUNK_BYTES_MAX + 1]);
    let result = job(&storage, None, 1, vec![(ChunkId(1), large)], &[]).run();
    assert!(matches!(
        result,
        Err(SnapshotError::ChunkTooLarge { bytes }) if bytes == CHUNK_BYTES_MAX + 1
    ));
}
