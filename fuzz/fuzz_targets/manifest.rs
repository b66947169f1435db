//! A manifest that goes on with records of any content, all with good checksums.
#![no_main]

use std::convert::Infallible;

use libfuzzer_sys::fuzz_target;
use millpond_fuzz::Cut;
use millpond_fuzz::reseal::{BLOCK_BYTES, reseal};
use millpond_fuzz::store::{File, files, options, put_file};
use millpond_wal::sim::SimStorage;
use millpond_wal::{Log, verify};

const NAME: &str = "manifest";
const HEADER: usize = 40;

fuzz_target!(|input: &[u8]| {
    let mut input = Cut(input);
    let original = files().iter().find(|file| file.name == NAME);
    let original = original.expect("a store has one");
    let manifest = went_on(original, &mut input);
    let storage = SimStorage::new(1);
    for file in files().iter().filter(|file| file.name != NAME) {
        put_file(&storage, &file.name, &file.bytes, file.length);
    }
    let length = original.length.max(manifest.len() as u64);
    put_file(&storage, NAME, &manifest, length);
    let _ = verify(&storage);
    if let Ok(opened) = Log::open(storage.clone(), options()) {
        let mut log = opened.log;
        let _ = log.replay(|_, _| Ok::<(), Infallible>(()));
    }
    let _ = verify(&storage);
});

/// The first few records as they were, then the pieces of the input as the payloads of more.
fn went_on(original: &File, input: &mut Cut<'_>) -> Vec<u8> {
    let records = original.bytes.len() / BLOCK_BYTES;
    let kept = usize::from(input.u8()) % (records + 1);
    let mut out = original.bytes[..kept * BLOCK_BYTES].to_vec();
    while !input.is_empty() && out.len() < original.length as usize {
        let sequence = (out.len() / BLOCK_BYTES) as u64 + 1;
        let durable = input.u8();
        let payload = input.piece();
        let payload = &payload[..payload.len().min(BLOCK_BYTES - HEADER)];
        let at = out.len();
        out.extend_from_slice(b"MPMF\0\0\0\0");
        out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&[1, 0, 0, 0]);
        out.extend_from_slice(&sequence.to_le_bytes());
        out.extend_from_slice(&u64::from(durable).to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(payload);
        out.resize(at + BLOCK_BYTES, 0);
    }
    reseal(&mut out);
    out
}
