use super::*;
use crate::storage::{BLOCK_BYTES, read_exact_at};

mod model;

const SEEDS: u64 = 300;

fn block(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK_BYTES]
}

fn bytes_of(storage: &SimStorage, name: &str) -> Vec<u8> {
    let file = storage.open_read(name).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    read_exact_at(&file, 0, &mut bytes).unwrap();
    bytes
}

/// A machine with one durable file of `blocks` blocks, each filled with its number plus one.
fn with_file(seed: u64, blocks: u8) -> (SimStorage, SimFile) {
    let storage = SimStorage::new(seed);
    let file = storage.create("a").unwrap();
    for i in 0..blocks {
        file.write_at(u64::from(i) * 4096, &block(i + 1)).unwrap();
    }
    file.sync_data().unwrap();
    storage.sync_dir().unwrap();
    (storage, file)
}

#[test]
fn what_was_synced_outlives_every_crash() {
    for seed in 0..SEEDS {
        let (storage, _file) = with_file(seed, 3);
        storage.crash();
        storage.crash();
        let bytes = bytes_of(&storage, "a");
        assert_eq!(
            bytes,
            [block(1), block(2), block(3)].concat(),
            "seed {seed}"
        );
    }
}

#[test]
fn a_durable_write_makes_its_own_bytes_durable_and_no_others() {
    let mut others_lost = 0;
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 3);
        file.write_at(0, &block(7)).unwrap();
        file.write_durable_at(4096, &block(8)).unwrap();
        storage.crash();
        let bytes = bytes_of(&storage, "a");
        assert_eq!(bytes[4096..8192], block(8), "seed {seed}");
        others_lost += u32::from(bytes[..4096] != block(7));
    }
    assert!(
        others_lost > 0,
        "a crash must take unsynced bytes for some seed"
    );
}

#[test]
fn sectors_are_old_or_new_and_never_mixed() {
    let (mut torn, mut holes, mut whole) = (0, 0, 0);
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 2);
        file.write_at(0, &[9; 8192]).unwrap();
        storage.crash();
        let bytes = bytes_of(&storage, "a");
        assert_eq!(bytes.len(), 8192);
        let kept: Vec<bool> = bytes
            .chunks(SECTOR_BYTES)
            .enumerate()
            .map(|(i, sector)| {
                let old = (i / 8 + 1) as u8;
                assert!(sector.iter().all(|&b| b == 9) || sector.iter().all(|&b| b == old));
                sector[0] == 9
            })
            .collect();
        let first_lost = kept.iter().position(|&kept| !kept);
        match first_lost {
            None => whole += 1,
            Some(at) if kept[at..].contains(&true) => holes += 1,
            Some(_) => torn += 1,
        }
    }
    assert!(torn > 0 && holes > 0 && whole > 0, "{torn} {holes} {whole}");
}

#[test]
fn an_older_version_of_a_rewritten_sector_may_remain() {
    let mut seen = 0;
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 1);
        file.write_at(0, &block(8)).unwrap();
        file.write_at(0, &block(9)).unwrap();
        storage.crash();
        seen += u32::from(bytes_of(&storage, "a").contains(&8));
    }
    assert!(seen > 0);
}

#[test]
fn new_ground_may_show_what_another_file_held() {
    let (mut stale, mut zero) = (0, 0);
    for seed in 0..SEEDS {
        let storage = SimStorage::new(seed);
        let old = storage.create("old").unwrap();
        old.write_durable_at(0, &block(3)).unwrap();
        let new = storage.create("new").unwrap();
        storage.sync_dir().unwrap();
        new.write_at(0, &block(4)).unwrap();
        storage.crash();
        let bytes = bytes_of(&storage, "new");
        stale += u32::from(bytes.contains(&3));
        zero += u32::from(bytes.contains(&0));
    }
    assert!(stale > 0 && zero > 0, "{stale} {zero}");
}

#[test]
fn an_unsynced_length_may_be_lost_and_a_synced_one_not() {
    let mut lengths = std::collections::BTreeSet::new();
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 1);
        file.preallocate(16 * 4096).unwrap();
        storage.crash();
        lengths.insert(bytes_of(&storage, "a").len());

        let (storage, file) = with_file(seed, 1);
        file.preallocate(16 * 4096).unwrap();
        file.sync_data().unwrap();
        storage.crash();
        assert_eq!(bytes_of(&storage, "a").len(), 16 * 4096);
    }
    assert!(lengths.contains(&4096) && lengths.contains(&65536) && lengths.len() > 2);
}

#[test]
fn a_lost_cut_brings_the_old_bytes_back() {
    let (mut back, mut cut) = (0, 0);
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 2);
        file.set_len(4096).unwrap();
        assert_eq!(bytes_of(&storage, "a"), block(1));
        storage.crash();
        let bytes = bytes_of(&storage, "a");
        assert_eq!(bytes[..4096], block(1));
        back += u32::from(bytes.len() == 8192 && bytes[4096..].contains(&2));
        cut += u32::from(bytes.len() == 4096);

        let (storage, file) = with_file(seed, 2);
        file.set_len(4096).unwrap();
        file.sync_data().unwrap();
        file.set_len(8192).unwrap();
        file.sync_data().unwrap();
        storage.crash();
        assert_eq!(bytes_of(&storage, "a"), [block(1), block(0)].concat());
    }
    assert!(back > 0 && cut > 0, "{back} {cut}");
}

#[test]
fn names_are_durable_after_a_folder_sync_only() {
    let mut found = std::collections::BTreeSet::new();
    for seed in 0..SEEDS {
        let (storage, _file) = with_file(seed, 1);
        storage.create("b").unwrap();
        storage.rename("a", "c").unwrap();
        storage.crash();
        let names = storage.list().unwrap();
        // A rename is kept or lost as a whole.
        assert_ne!(
            names.contains(&"a".to_owned()),
            names.contains(&"c".to_owned())
        );
        found.insert(names);

        let (storage, _file) = with_file(seed, 1);
        storage.create("b").unwrap();
        storage.remove("a").unwrap();
        storage.sync_dir().unwrap();
        storage.crash();
        assert_eq!(storage.list().unwrap(), ["b"]);
    }
    assert_eq!(found.len(), 4, "every combination: {found:?}");
}

#[test]
fn a_lost_removal_brings_the_file_back_whole() {
    let mut back = 0;
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 2);
        drop(file);
        storage.remove("a").unwrap();
        storage.crash();
        if storage.list().unwrap() == ["a"] {
            back += 1;
            assert_eq!(bytes_of(&storage, "a"), [block(1), block(2)].concat());
        }
    }
    assert!(back > 0);
}

#[test]
fn a_failed_sync_loses_data_that_reads_still_show() {
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 1);
        file.write_at(0, &block(9)).unwrap();
        storage.plan(Failure {
            call: Some(Call::Sync),
            skip: 0,
            fault: Fault::Io,
        });
        let e = file.sync_data().expect_err("planned");
        assert_eq!(e.raw_os_error(), Some(EIO));
        file.sync_data().expect("nothing is dirty any more");

        assert_eq!(bytes_of(&storage, "a"), block(9));
        let mut disk = block(0);
        assert_eq!(file.read_uncached_at(0, &mut disk).unwrap(), BLOCK_BYTES);
        assert_ne!(disk, block(9));
        storage.crash();
        assert_eq!(bytes_of(&storage, "a"), disk);
    }
}

#[test]
fn a_failed_folder_sync_loses_names_that_are_still_listed() {
    let mut lost = 0;
    for seed in 0..SEEDS {
        let (storage, _file) = with_file(seed, 1);
        storage.create("b").unwrap();
        storage.plan(Failure {
            call: Some(Call::SyncDir),
            skip: 0,
            fault: Fault::Io,
        });
        storage.sync_dir().expect_err("planned");
        assert_eq!(storage.list().unwrap(), ["a", "b"]);
        storage.crash();
        lost += u32::from(storage.list().unwrap() == ["a"]);
    }
    assert!(lost > 0);
}

#[test]
fn a_short_write_leaves_a_first_part() {
    for (fault, kind) in [
        (Fault::Short, io::ErrorKind::WriteZero),
        (Fault::NoSpace, io::ErrorKind::StorageFull),
        (Fault::Quota, io::ErrorKind::QuotaExceeded),
    ] {
        for call in [Call::Write, Call::WriteDurable] {
            let (storage, file) = with_file(5, 2);
            storage.plan(Failure {
                call: Some(call),
                skip: 1,
                fault,
            });
            let write = |fill| match call {
                Call::Write => file.write_at(0, &[fill; 8192]),
                _ => file.write_durable_at(0, &[fill; 8192]),
            };
            write(8).unwrap();
            assert_eq!(write(9).expect_err("planned").kind(), kind);
            let bytes = bytes_of(&storage, "a");
            let new = bytes.iter().take_while(|&&b| b == 9).count();
            assert!(new < 8192 && bytes[new..].iter().all(|&b| b == 8));
            write(9).expect("a failure is planned once");
        }
    }
}

#[test]
fn power_goes_in_the_middle_of_the_planned_call() {
    let (mut before, mut torn, mut after) = (0, 0, 0);
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 1);
        storage.crash_after(1);
        file.write_at(4096, &block(2)).unwrap();
        file.write_durable_at(0, &block(9))
            .expect_err("the power went");
        file.sync_data().expect_err("is off");
        storage.list().expect_err("is off");
        storage.restart();
        file.sync_data().expect_err("the handle is from before");
        let bytes = bytes_of(&storage, "a");
        match bytes[..4096].iter().filter(|&&b| b == 9).count() {
            0 => before += 1,
            4096 => after += 1,
            _ => torn += 1,
        }
    }
    assert!(
        before > 0 && torn > 0 && after > 0,
        "{before} {torn} {after}"
    );
}

#[test]
fn the_page_cache_outlives_the_process_but_not_the_power() {
    let mut lost = 0;
    for seed in 0..SEEDS {
        let (storage, file) = with_file(seed, 1);
        file.write_at(0, &block(9)).unwrap();
        storage.restart_process();
        assert_eq!(bytes_of(&storage, "a"), block(9));
        storage.crash();
        lost += u32::from(bytes_of(&storage, "a") != block(9));
    }
    assert!(lost > 0);
}

#[test]
fn the_same_seed_gives_the_same_disk() {
    let run = |seed| {
        let (storage, file) = with_file(seed, 2);
        storage.create("b").unwrap();
        file.write_at(100, &[9; 20_000]).unwrap();
        storage.crash();
        let names = storage.list().unwrap();
        let bytes: Vec<_> = names.iter().map(|name| bytes_of(&storage, name)).collect();
        (names, bytes)
    };
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
    assert!((1..20).any(|seed| run(seed) != run(0)));
}

#[test]
fn a_full_disk_refuses_new_ground_only() {
    let (storage, file) = with_file(1, 2);
    storage.set_capacity(4 * 4096);
    assert_eq!(storage.space().unwrap().free_bytes, 2 * 4096);
    file.preallocate(4 * 4096).unwrap();
    file.write_durable_at(3 * 4096, &block(4)).unwrap();
    let e = file
        .write_durable_at(4 * 4096, &block(5))
        .expect_err("full");
    assert_eq!(e.kind(), io::ErrorKind::StorageFull);
    let other = storage.create("b").unwrap();
    assert!(other.preallocate(1).is_err());
    assert!(other.write_at(0, &[1]).is_err());

    storage.remove("a").unwrap();
    assert!(other.write_at(0, &[1]).is_err(), "still open");
    drop(file);
    other.write_at(0, &[1]).unwrap();
}

#[test]
fn corrupt_bytes_are_wrong_in_the_cache_and_on_the_disk() {
    let (storage, file) = with_file(1, 1);
    storage.corrupt("a", 10, 5).unwrap();
    let (mut cached, mut disk) = (block(0), block(0));
    file.read_at(0, &mut cached).unwrap();
    file.read_uncached_at(0, &mut disk).unwrap();
    assert_eq!(cached, disk);
    assert_eq!(cached.iter().filter(|&&b| b != 1).count(), 5);
}

#[test]
fn a_file_opened_for_reading_is_not_written() {
    let (storage, _file) = with_file(1, 1);
    let reader = storage.open_read("a").unwrap();
    assert!(reader.write_at(0, &[1]).is_err());
    assert!(reader.set_len(0).is_err());
    assert_eq!(bytes_of(&storage, "a"), block(1));
}
