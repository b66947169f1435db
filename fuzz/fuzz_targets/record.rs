//! Records of the log: what was understood is understood again from its own bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millpond_queue::Record;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, body)) = input.split_first() else {
        return;
    };
    let Ok(record) = Record::decode(kind, body) else {
        return;
    };
    assert_eq!(record.kind(), kind);
    let mut again = Vec::new();
    record.encode(&mut again);
    assert_eq!(Record::decode(kind, &again), Ok(record));
});
