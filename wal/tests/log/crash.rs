//! The machine dies at any write, also while it recovers, again and again. What was acknowledged
//! is there byte for byte, what was once recovered stays, and what was once gone never comes back.

use std::collections::BTreeMap;

use millpond_wal::sim::{Call, Failure, Fault, SimStorage};
use millpond_wal::storage::Storage;
use millpond_wal::{ChunkId, Log, LogError, LogIndex, Place, ReadError, ReplayEnd};

use crate::support::{Replayed, cover, reopen, row, stamp_of};

/// One life: what may happen between two crashes.
struct World {
    storage: SimStorage,
    rng: Rng,
    /// Never repeats, so that an entry of an earlier life is told from its successor at the same index.
    nonce: u64,
    /// What must be there.
    expected: BTreeMap<Place, Vec<u8>>,
    /// What may be there instead or besides, for the call that the crash interrupted.
    in_doubt: BTreeMap<Place, Vec<u8>>,
    /// Everything from here on may be gone, because a truncation was interrupted.
    truncating: Option<LogIndex>,
    /// One call of this life fails, instead of a crash.
    failing: bool,
    /// At least so far was acknowledged.
    durable: LogIndex,
}

/// Why a life ended.
enum Ended {
    Crashed,
    OutOfTime,
}

#[test]
fn acknowledged_entries_outlive_any_crash() {
    for seed in 0..SEEDS {
        live_through(seed, LIVES);
    }
}

fn live_through(seed: u64, lives: usize) {
    let mut world = World {
        storage: SimStorage::new(seed),
        rng: Rng(seed),
        nonce: 0,
        expected: BTreeMap::new(),
        in_doubt: BTreeMap::new(),
        truncating: None,
        failing: false,
        durable: LogIndex::NONE,
    };
    for life in 0..lives {
        let calls = world.rng.below(if life % 3 == 2 { 12 } else { 90 });
        world.failing = world.rng.below(3) == 0;
        if world.failing {
            let failure = world.failure();
            world.storage.plan(failure);
        } else {
            world.storage.crash_after(calls);
        }
        world.live(seed, life);
        if world.rng.below(4) == 0 {
            world.storage.restart_process();
        } else {
            world.storage.restart();
        }
    }
    // And once without a crash.
    world.failing = false;
    let log = world
        .open(seed, lives)
        .unwrap_or_else(|| panic!("seed {seed}: the last start failed"));
    world.expect_all(&log, seed, lives);
}

impl World {
    fn live(&mut self, seed: u64, life: usize) {
        let Some(mut log) = self.open(seed, life) else {
            return;
        };
        if self.storage.list().is_err() {
            // The power went while leftovers were deleted, which nobody waits for.
            return;
        }
        self.expect_all(&log, seed, life);
        for _ in 0..STEPS {
            if let Ended::Crashed = self.step(&mut log, seed) {
                assert!(self.excused(), "seed {seed}: an error without a crash");
                return;
            }
        }
        if self.rng.below(2) == 0 && log.close().is_err() {
            assert!(
                self.excused(),
                "seed {seed}: closing failed without a crash"
            );
        }
    }

    /// Whether an error may happen now.
    fn excused(&self) -> bool {
        self.failing || self.storage.list().is_err()
    }

    /// One call of a kind that changes the disk fails, and a failed sync loses what it should have kept.
    fn failure(&mut self) -> Failure {
        let calls = [
            Call::Create,
            Call::Rename,
            Call::SyncDir,
            Call::Write,
            Call::WriteDurable,
            Call::WriteDurable,
            Call::Sync,
            Call::Preallocate,
            Call::SetLen,
        ];
        let faults = [Fault::Io, Fault::NoSpace, Fault::Short];
        Failure {
            call: self.rng.choose(&calls).copied(),
            skip: self.rng.below(12),
            fault: faults[self.rng.below(3) as usize],
        }
    }

    /// `None` if the power went meanwhile.
    fn open(&mut self, seed: u64, life: usize) -> Option<Log<SimStorage>> {
        let (opened, replayed, end) = match reopen(&self.storage) {
            Ok(opened) => opened,
            Err(error) => {
                let excused = self.excused();
                assert!(excused, "seed {seed} life {life}: {error} {error:?}");
                return None;
            }
        };
        assert_eq!(
            end,
            ReplayEnd::Healthy,
            "seed {seed} life {life}: {:?}",
            opened.log.report()
        );
        let from = opened
            .snapshot
            .map_or(LogIndex::NONE, |snapshot| snapshot.index());
        self.compare(&replayed, from, seed, life);
        assert!(
            opened.log.durable() >= self.durable,
            "seed {seed} life {life}: entries are missing"
        );
        self.durable = opened.log.durable();
        Some(opened.log)
    }

    /// Replay shows everything expected behind the snapshot and nothing else but what is in doubt,
    /// which is settled by it.
    fn compare(&mut self, replayed: &Replayed, from: LogIndex, seed: u64, life: usize) {
        let truncated = self.truncating.take();
        if let Some(cut) = truncated {
            let kept = replayed.keys().any(|place| place.index >= cut);
            if !kept {
                self.expected.retain(|place, _| place.index < cut);
                self.durable = self.durable.min(cut.previous());
            }
        }
        for (place, body) in self.expected.range(
            Place {
                index: from.next(),
                record: 0,
            }..,
        ) {
            let found = replayed.get(place);
            assert!(
                found == Some(body),
                "seed {seed} life {life}: {place:?} is {found:?}"
            );
        }
        for (place, body) in replayed {
            if self.expected.contains_key(place) {
                continue;
            }
            let doubted = self.in_doubt.get(place) == Some(body);
            assert!(
                doubted,
                "seed {seed} life {life}: {place:?} came back from the dead"
            );
            self.expected.insert(*place, body.clone());
        }
        self.in_doubt.clear();
    }

    fn expect_all(&self, log: &Log<SimStorage>, seed: u64, life: usize) {
        let reader = log.reader();
        for (place, body) in &self.expected {
            let read = reader.record(*place);
            let same = read.as_ref().is_ok_and(|record| record.body == body[..]);
            assert!(same, "seed {seed} life {life}: {place:?} reads {read:?}");
            let offset = stamp_of(place.index.0, place.record);
            let found = reader
                .find(crate::support::TOPIC, offset)
                .expect("directories are whole");
            let found = found.map(|row| row.place);
            assert_eq!(found, Some(*place), "seed {seed} life {life}");
        }
    }

    fn step(&mut self, log: &mut Log<SimStorage>, seed: u64) -> Ended {
        let done = match self.rng.below(20) {
            0..=11 => self.append(log),
            12 => log.vouch(),
            13 => log.roll(),
            14 => self.seal(log),
            15 => self.spare(log),
            16 => self.snapshot(log),
            17 => self.remove(log),
            18 => self.clean(log),
            _ => self.truncate(log),
        };
        match done {
            Ok(()) => {
                self.in_doubt.clear();
                self.durable = log.durable();
                Ended::OutOfTime
            }
            Err(LogError::Disk { .. } | LogError::Read(ReadError::Io { .. })) => Ended::Crashed,
            // Nothing was written, and the log goes on.
            Err(LogError::DiskFull | LogError::SnapshotTooNew { .. }) if self.failing => {
                self.in_doubt.clear();
                Ended::OutOfTime
            }
            Err(error) => panic!("seed {seed}: {error} {error:?}"),
        }
    }

    fn append(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        let index = log.appended().next();
        let mut group = log.new_group();
        for record in 0..1 + self.rng.below(3) as u32 {
            self.nonce += 1;
            let mut body = format!("{} at {index} {record}", self.nonce).into_bytes();
            let bytes = [0, 100, 3000, 9000][self.rng.below(4) as usize];
            body.resize(body.len() + bytes, self.nonce as u8);
            group.push(stamp_of(index.0, record), 1, &[&body]);
            self.in_doubt.insert(Place { index, record }, body);
        }
        let appended = log.append_durable(group)?;
        assert_eq!(appended.index, index);
        for (&place, body) in &self.in_doubt {
            let stamp = stamp_of(place.index.0, place.record);
            log.add_row(row(place, stamp, stamp));
            self.expected.insert(place, body.clone());
        }
        log.set_applied(index);
        Ok(())
    }

    fn seal(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        match log.seal_job().map(|job| job.run()) {
            Some(Ok(done)) => log.install_sealed(done),
            Some(Err(error)) => Err(disk(error.source)),
            None => Ok(()),
        }
    }

    fn spare(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        match log.spare_job().map(|job| job.run()) {
            Some(Ok(done)) => log.install_spare(done),
            Some(Err(error)) => return Err(disk(error.source)),
            None => {}
        }
        Ok(())
    }

    fn snapshot(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        let chunk = (
            ChunkId(self.rng.below(5)),
            vec![self.nonce as u8; 5000].into(),
        );
        let job = log.snapshot_job(log.applied(), vec![chunk], vec![])?;
        match job.run() {
            Ok(done) => log.install_snapshot(done),
            Err(error) => Err(disk(std::io::Error::other(error))),
        }
    }

    fn remove(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        let covered: Vec<_> = log
            .segments()
            .into_iter()
            .filter(|segment| segment.covered)
            .collect();
        let Some(segment) = self.rng.choose(&covered) else {
            return Ok(());
        };
        self.expected
            .retain(|place, _| place.index < segment.first || place.index > segment.last);
        log.remove_segments(&[segment.id])?;
        // Before this is done, or never: whatever is left goes at the next opening.
        if self.rng.below(2) == 0
            && let Some(job) = log.unlink_job()
        {
            job.run();
        }
        Ok(())
    }

    fn clean(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        let covered: Vec<_> = log
            .segments()
            .into_iter()
            .filter(|segment| segment.covered)
            .collect();
        let Some(segment) = self.rng.choose(&covered) else {
            return Ok(());
        };
        let lives = |place: Place| (place.index.0 + u64::from(place.record)).is_multiple_of(2);
        self.expected.retain(|place, _| {
            place.index < segment.first || place.index > segment.last || lives(*place)
        });
        let job = log.clean_plan(segment.id, [], |row| lives(row.place))?;
        match job.run() {
            Ok(done) => log.install_cleaned(done).map(drop),
            Err(error) => Err(disk(error.source)),
        }
    }

    fn truncate(&mut self, log: &mut Log<SimStorage>) -> Result<(), LogError> {
        let from = LogIndex(log.durable().0.saturating_sub(self.rng.below(3)).max(1));
        self.truncating = Some(from);
        match log.truncate_suffix(from) {
            Ok(()) => self.expected.retain(|place, _| place.index < from),
            Err(LogError::TruncateCovered { .. }) => {}
            Err(error) => return Err(error),
        }
        self.truncating = None;
        Ok(())
    }
}

fn disk(source: std::io::Error) -> LogError {
    LogError::Disk {
        what: "run a job on",
        file: String::new(),
        source,
    }
}

/// Small and seeded; the quality needed is "different each time".
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn choose<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let bound = from.len() as u64;
        (bound > 0).then(|| &from[self.below(bound) as usize])
    }
}

#[test]
fn a_reader_outlives_the_removal_of_what_it_reads() {
    let storage = SimStorage::new(5);
    let (mut log, _) = crate::support::open(&storage);
    for _ in 0..30 {
        crate::support::append(&mut log, 1, 3000).unwrap();
    }
    cover(&mut log);
    let ids: Vec<_> = log.segments().iter().map(|segment| segment.id).collect();
    let reader = log.reader();
    let reading = std::thread::spawn(move || {
        let mut reads = 0;
        loop {
            match reader.record(crate::support::place(1, 0)) {
                Ok(_) => reads += 1,
                Err(ReadError::NotFound(_)) => return reads,
                Err(error) => panic!("after {reads} reads: {error}"),
            }
        }
    });
    log.remove_segments(&ids).unwrap();
    reading.join().unwrap();
    assert_eq!(log.segments(), []);
    log.unlink_job().expect("nobody reads them any more").run();
    assert_eq!(crate::support::files(&storage, "seg-").len(), 0);
    assert!(log.unlink_job().is_none());
}

const SEEDS: u64 = 300;
const LIVES: usize = 6;
const STEPS: usize = 60;
