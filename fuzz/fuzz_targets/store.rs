//! A damaged folder of the log: it opens or says why not, and what it serves is what was written.
#![no_main]

use std::ops::ControlFlow;

use libfuzzer_sys::fuzz_target;
use millpond_fuzz::Cut;
use millpond_fuzz::store::{Seals, TOPIC, body, damaged, options, row};
use millpond_wal::{Dumped, Log, LogIndex, ReplayEnd, Replayed, dump, salvage_accept_loss, verify};

fuzz_target!(|input: &[u8]| {
    let mut input = Cut(input);
    let seals = match input.u8() % 2 {
        0 => Seals::Broken,
        _ => Seals::Mended,
    };
    let storage = damaged(&mut input, seals);
    look(&storage);
    let Ok(opened) = Log::open(storage.clone(), options()) else {
        return;
    };
    let mut log = opened.log;
    let end = log.replay(|step, rows| {
        let Replayed::Entry(entry) = step else {
            return Ok(());
        };
        for record in entry.records() {
            // Behind mended checksums anything may stand.
            assert!(seals == Seals::Mended || record.body == body(record.place));
            rows.add(row(record.place));
        }
        Ok::<(), std::convert::Infallible>(())
    });
    let reader = log.reader();
    for row in reader.rows(TOPIC, 0, 64).unwrap_or_default() {
        if let Ok(record) = reader.record(row.place) {
            assert!(seals == Seals::Mended || record.body == body(row.place));
        }
    }
    let _ = reader.offset_at_stamp(TOPIC, 3_000);
    // Mended checksums may claim the last index that there is.
    if let Ok(ReplayEnd::Healthy) = end
        && log.appended() < LogIndex(u64::MAX - 8)
    {
        let mut group = log.new_group();
        group.push(1 << 60, 1, &[b"one more"]);
        log.append_durable(group)
            .expect("a healthy log takes writes");
        log.vouch().expect("a healthy log takes writes");
    } else {
        drop(log);
        let _ = salvage_accept_loss(&storage, &options());
    }
    look(&storage);
});

/// The offline tools.
fn look(storage: &millpond_wal::sim::SimStorage) {
    let _ = verify(storage);
    let _ = dump(storage, LogIndex(1), |shown| {
        if let Dumped::Entry { records, .. } = shown {
            assert!(records.map(|record| record.body.len()).sum::<usize>() < 1 << 20);
        }
        ControlFlow::Continue(())
    });
}
