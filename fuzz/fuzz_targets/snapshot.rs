//! A damaged snapshot file: it is read or refused, and a chunk that is served is what was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millpond_fuzz::Cut;
use millpond_fuzz::reseal::reseal;
use millpond_fuzz::store::{STORE, files, put_file};
use millpond_wal::sim::SimStorage;
use millpond_wal::snapshot::{self, Snapshot};

fuzz_target!(|input: &[u8]| {
    let mut input = Cut(input);
    let original = files()
        .iter()
        .find(|file| file.name.starts_with("snapshot-"));
    let original = original.expect("a store has one");
    let number = snapshot::number_of(&original.name).expect("it is named so");
    let mended = input.u8() % 2 == 1;
    let (mut bytes, mut length) = (original.bytes.clone(), original.length);
    while !input.is_empty() {
        let at = usize::from(input.u16());
        let count = input.u8();
        let edit = input.bytes((count % 64).into());
        if edit.is_empty() {
            length = length.min(at as u64);
            bytes.truncate(at);
        }
        let end = bytes.len().min(at + edit.len());
        if at < end {
            bytes[at..end].copy_from_slice(&edit[..end - at]);
        }
    }
    if mended {
        reseal(&mut bytes);
    }
    let storage = SimStorage::new(1);
    put_file(&storage, &original.name, &bytes, length);
    let Ok(snapshot) = Snapshot::open(storage, STORE, number) else {
        return;
    };
    let _ = snapshot.info();
    let _ = snapshot.verify();
    for (id, chunk) in snapshot.chunks().flatten() {
        let written: &[u8] = if id.0 == 3 { b"the state" } else { &[5; 300] };
        assert!(mended || chunk == written);
    }
});
