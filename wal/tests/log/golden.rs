//! The bytes on disk: a change of a format shows as a change of the files in `golden/`.
//!
//! They are written anew with `MILLPOND_BLESS=1`.

use std::fmt::Write;
use std::path::Path;

use millpond_wal::sim::SimStorage;
use millpond_wal::storage::{Storage, StorageFile};
use millpond_wal::{ChunkId, LogIndex, Place, Row};

use crate::support::{files, open};

#[test]
fn segment_manifest_and_snapshot_have_the_bytes_they_always_had() {
    let storage = written();
    for (golden, prefix) in [
        ("segment", "seg-"),
        ("manifest", "manifest"),
        ("snapshot", "snapshot-"),
    ] {
        let name = files(&storage, prefix).remove(0);
        compare(golden, &hex_of(&storage, &name));
    }
}

/// A little of everything: two entries of which one is blank, three rows of two topics, a snapshot, a seal.
fn written() -> SimStorage {
    let storage = SimStorage::new(1);
    let (mut log, _) = open(&storage);
    let mut group = log.new_group();
    group.push(1_000, 1, &[b"first ", b"body"]);
    group.push(1_001, 2, &[b""]);
    group.push(1_002, 3, &[b"12345678"]);
    log.append_durable(group).unwrap();
    for (topic, record, base) in [(7, 0, 40), (7, 2, 44), (9, 2, 1)] {
        let place = Place {
            index: LogIndex(1),
            record,
        };
        let stamp = 1_000 + u64::from(record);
        log.add_row(Row {
            topic,
            base,
            count: 2,
            skip: 1,
            place,
            stamp,
        });
    }
    log.set_applied(LogIndex(1));
    log.vouch().unwrap();
    let state = vec![(ChunkId(3), b"the state".as_slice().into())];
    let done = log
        .snapshot_job(log.applied(), state, vec![])
        .unwrap()
        .run()
        .unwrap();
    log.install_snapshot(done).unwrap();
    log.close().unwrap();
    storage
}

/// Lines of 32 bytes that are not all zero, and the file's size.
fn hex_of(storage: &SimStorage, name: &str) -> String {
    let file = storage.open_read(name).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(0, &mut bytes).unwrap();
    let mut text = format!("{name}, {} bytes\n", bytes.len());
    for (nth, line) in bytes.chunks(32).enumerate() {
        if line.iter().any(|&byte| byte != 0) {
            write!(text, "{:06x} ", nth * 32).unwrap();
            for part in line.chunks(4) {
                let part: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
                write!(text, " {part}").unwrap();
            }
            text.push('\n');
        }
    }
    text
}

fn compare(golden: &str, text: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/log/golden");
    let path = folder.join(format!("{golden}.txt"));
    if std::env::var_os("MILLPOND_BLESS").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert!(
        text == expected,
        "{golden} changed:\n{text}\nwas:\n{expected}"
    );
}
