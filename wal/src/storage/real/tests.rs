use super::*;
use crate::storage::read_exact_at;

fn folder(mapping: Mapping) -> (tempfile::TempDir, FolderStorage) {
    let dir = tempfile::tempdir().unwrap();
    let storage = FolderStorage::open(dir.path().join("wal"), mapping).unwrap();
    (dir, storage)
}

/// The same folder, but as if its file system refused direct writes.
fn without_direct(storage: FolderStorage) -> FolderStorage {
    let folder = Arc::into_inner(storage.folder).unwrap();
    FolderStorage {
        folder: Arc::new(Folder {
            durable: DurablePath::WriteThenSync,
            ..folder
        }),
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 31 % 251) as u8).collect()
}

fn writes_come_back(storage: &FolderStorage) {
    let pool = BufferPool::new(0);
    let file = storage.create("segment-1.log").unwrap();
    file.preallocate(1 << 20).unwrap();
    assert_eq!(file.len().unwrap(), 1 << 20);

    let mut block = pool.take(0);
    block.extend_from_slice(&pattern(600_000));
    block.pad_to_block();
    file.write_durable_at(8192, &block).unwrap();
    let mut unaligned = vec![0; BLOCK_BYTES + 1];
    unaligned.fill(9);
    file.write_durable_at(0, &unaligned[1..]).unwrap();
    file.write_at(4100, b"between").unwrap();
    file.sync_data().unwrap();

    let mut read = vec![0; 600_000];
    read_exact_at(&file, 8192, &mut read).unwrap();
    assert_eq!(read, pattern(600_000));
    let mut uncached = vec![0; 599_000];
    assert_eq!(
        file.read_uncached_at(8192 + 1000, &mut uncached).unwrap(),
        599_000
    );
    assert_eq!(uncached, pattern(600_000)[1000..]);
    let reader = storage.open_read("segment-1.log").unwrap();
    let mut head = [0; 4107];
    assert_eq!(reader.read_uncached_at(0, &mut head).unwrap(), 4107);
    assert!(head[..4096].iter().all(|&b| b == 9));
    assert_eq!(&head[4100..], b"between");
}

#[test]
fn what_was_written_comes_back_by_every_way() {
    let (_dir, storage) = folder(Mapping::On);
    writes_come_back(&storage);
}

#[test]
fn what_was_written_comes_back_without_direct_writes() {
    let (_dir, storage) = folder(Mapping::On);
    writes_come_back(&without_direct(storage));
}

#[test]
fn reads_are_short_only_at_the_end_of_the_file() {
    let (_dir, storage) = folder(Mapping::On);
    let file = storage.create("a").unwrap();
    file.write_at(0, &pattern(5000)).unwrap();
    for (offset, expected) in [(0, 5000), (4000, 1000), (4999, 1), (5000, 0), (9000, 0)] {
        let mut buf = vec![0; 6000];
        assert_eq!(file.read_at(offset, &mut buf).unwrap(), expected);
        let mut uncached = vec![0; 6000];
        assert_eq!(
            file.read_uncached_at(offset, &mut uncached).unwrap(),
            expected
        );
        assert_eq!(buf, uncached);
    }
}

#[test]
fn unaligned_durable_writes_are_refused() {
    let (_dir, storage) = folder(Mapping::On);
    let file = storage.create("a").unwrap();
    for (offset, bytes) in [(1, 4096), (512, 4096), (0, 4095)] {
        let e = file
            .write_durable_at(offset, &pattern(bytes))
            .expect_err("refused");
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(file.len().unwrap(), 0);
}

#[test]
fn only_files_opened_for_reading_are_mapped() {
    let (_dir, storage) = folder(Mapping::On);
    let file = storage.create("a").unwrap();
    file.write_at(0, b"hello").unwrap();
    assert!(file.map().unwrap().is_none());
    let sealed = storage.open_read("a").unwrap();
    let map = sealed.map().unwrap().expect("maps are on");
    storage.remove("a").unwrap();
    assert_eq!(&map[..], b"hello");
}

#[test]
fn mapping_off_maps_nothing() {
    let (_dir, storage) = folder(Mapping::Off);
    storage.create("a").unwrap();
    assert!(storage.open_read("a").unwrap().map().unwrap().is_none());
}

#[test]
fn a_held_folder_names_its_holder() {
    let (_dir, storage) = folder(Mapping::On);
    let open_file = storage.create("a").unwrap();
    let path = storage.path().to_owned();
    let held = FolderStorage::open(&path, Mapping::On).expect_err("is held");
    assert!(
        matches!(&held, FolderError::Held { pid: Some(pid), .. } if *pid == std::process::id())
    );
    assert!(
        held.to_string()
            .contains(&format!("(pid {})", std::process::id()))
    );

    drop(storage);
    assert!(FolderStorage::open(&path, Mapping::On).is_err());
    drop(open_file);
    FolderStorage::open(&path, Mapping::On).unwrap();
}

#[test]
fn the_list_shows_the_logs_files_only() {
    let (_dir, storage) = folder(Mapping::On);
    for name in ["b.log", "a-1", "c"] {
        storage.create(name).unwrap();
    }
    std::fs::create_dir(storage.path().join("sub")).unwrap();
    std::fs::write(storage.path().join("Notes.TXT"), "x").unwrap();
    storage.rename("c", "a-0").unwrap();
    assert_eq!(storage.list().unwrap(), ["a-0", "a-1", "b.log"]);
    storage.remove("a-1").unwrap();
    storage.sync_dir().unwrap();
    assert_eq!(storage.list().unwrap(), ["a-0", "b.log"]);
    let space = storage.space().unwrap();
    assert!(space.free_bytes > 0 && space.free_bytes <= space.total_bytes);
}

#[test]
fn names_cannot_leave_the_folder() {
    let (_dir, storage) = folder(Mapping::On);
    for name in ["", ".", "..", "../a", "a/b", "LOCK", "A"] {
        let e = storage.create(name).map(drop).expect_err(name);
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput, "{name}");
    }
    storage.create("a").unwrap();
    let again = storage.create("a").map(drop).expect_err("exists");
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn both_are_done_at_the_same_time() {
    let (_dir, storage) = folder(Mapping::Off);
    let (ask, asked) = std::sync::mpsc::channel();
    let (answer, answered) = std::sync::mpsc::channel();
    let one = move || {
        ask.send(1).unwrap();
        answered.recv().unwrap()
    };
    let other = move || {
        answer.send(2).unwrap();
        asked.recv().unwrap()
    };
    // One after the other would wait for ever.
    assert_eq!(storage.both(one, other), (2, 1));
}
