//! The simulated disk against two judges: a real folder while nothing fails, and after a crash a plain
//! account of what may be there.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::storage::{FolderStorage, Mapping};

#[test]
fn without_failures_it_is_a_folder() {
    for seed in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let folder = FolderStorage::open(dir.path(), Mapping::Off).unwrap();
        let sim = SimStorage::new(seed);
        let mut rng = Rng::new(seed);
        for number in 0..60 {
            let step = Step::draw(&mut rng);
            let (real, simulated) = (step.run(&folder), step.run(&sim));
            assert!(real == simulated, "seed {seed}, step {number}: {step}");
        }
        assert_eq!(summary(&folder), summary(&sim), "seed {seed}");
    }
}

/// Every sector and length after a crash is one that the calls before allow, and a sync or a durable
/// write leaves only one choice.
#[test]
fn a_crash_leaves_only_what_it_may() {
    let mut choices = BTreeSet::new();
    for seed in 0..1500 {
        let (storage, file) = with_file(seed, 2);
        let mut account = Account::of(&bytes_of(&storage, "a"));
        let mut rng = Rng::new(seed ^ 0xabcd);
        for _ in 0..rng.below(12) {
            account.step(&file, &mut rng);
        }
        assert!(bytes_of(&storage, "a") == account.now, "seed {seed}");
        storage.crash();
        let left = bytes_of(&storage, "a");
        account.check(&left, seed);
        choices.insert(left == account.now);
        storage.crash();
        assert_eq!(
            bytes_of(&storage, "a"),
            left,
            "seed {seed}: nothing is left to lose"
        );
    }
    assert_eq!(
        choices.len(),
        2,
        "some crashes lose something and some nothing"
    );
}

/// What one file may hold after a crash.
struct Account {
    now: Vec<u8>,
    /// Per sector every content since the last sync of it; without an entry it must be zero.
    sectors: BTreeMap<usize, BTreeSet<Vec<u8>>>,
    /// The least and the most that the length may be.
    len_min: usize,
    len_max: usize,
    /// From here on nothing was ever synced, and anything may be there.
    new_ground: usize,
}

impl Account {
    fn of(bytes: &[u8]) -> Account {
        let mut account = Account {
            now: bytes.to_vec(),
            sectors: BTreeMap::new(),
            len_min: 0,
            len_max: 0,
            new_ground: 0,
        };
        account.synced();
        account
    }

    fn step(&mut self, file: &SimFile, rng: &mut Rng) {
        let fill = rng.next() as u8;
        match rng.below(8) {
            0..=3 => {
                let (offset, bytes) = (rng.below(14_000) as usize, 1 + rng.below(6000) as usize);
                file.write_at(offset as u64, &vec![fill; bytes]).unwrap();
                self.wrote(offset, &vec![fill; bytes]);
            }
            4 => {
                let (offset, bytes) = (
                    rng.below(4) as usize * 4096,
                    4096 * (1 + rng.below(2) as usize),
                );
                file.write_durable_at(offset as u64, &vec![fill; bytes])
                    .unwrap();
                self.wrote(offset, &vec![fill; bytes]);
                for sector in offset / 512..(offset + bytes) / 512 {
                    self.sectors
                        .insert(sector, BTreeSet::from([self.sector(sector)]));
                }
                self.len_min = self.len_min.max(offset + bytes);
                self.new_ground = self.new_ground.max(offset + bytes);
            }
            5 => {
                let bytes = self.now.len() + rng.below(9000) as usize;
                file.preallocate(bytes as u64).unwrap();
                self.now.resize(bytes, 0);
                self.len_max = self.len_max.max(bytes);
            }
            _ => {
                file.sync_data().unwrap();
                self.synced();
            }
        }
    }

    fn wrote(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        // What was there before stays possible, zeros included.
        let touched = offset / 512..end.div_ceil(512);
        for sector in touched.clone() {
            let before = self.sector(sector);
            self.sectors.entry(sector).or_default().insert(before);
        }
        self.now.resize(self.now.len().max(end), 0);
        self.now[offset..end].copy_from_slice(data);
        for sector in touched {
            let after = self.sector(sector);
            self.sectors.entry(sector).or_default().insert(after);
        }
        self.len_max = self.len_max.max(end);
    }

    fn synced(&mut self) {
        self.sectors.clear();
        for sector in 0..self.now.len().div_ceil(512) {
            self.sectors
                .insert(sector, BTreeSet::from([self.sector(sector)]));
        }
        self.len_min = self.now.len();
        self.len_max = self.now.len();
        self.new_ground = self.now.len();
    }

    /// As on the disk: a whole sector, zero behind the end of the file.
    fn sector(&self, number: usize) -> Vec<u8> {
        let start = (number * 512).min(self.now.len());
        let end = (start + 512).min(self.now.len());
        let mut sector = self.now[start..end].to_vec();
        sector.resize(512, 0);
        sector
    }

    fn check(&self, left: &[u8], seed: u64) {
        let len = left.len();
        assert!(
            self.len_min <= len && len <= self.len_max,
            "seed {seed}: {len} bytes"
        );
        for (number, sector) in left.chunks(512).enumerate() {
            if number * 512 >= self.new_ground {
                continue;
            }
            let allowed = self.sectors.get(&number);
            let is_allowed = match allowed {
                // A length that was lost cuts its last sector.
                Some(allowed) => allowed
                    .iter()
                    .any(|content| content[..sector.len()] == *sector),
                None => sector.iter().all(|&b| b == 0),
            };
            assert!(is_allowed, "seed {seed}, sector {number}");
        }
    }
}

#[derive(Debug)]
enum Step {
    Create(String),
    Rename(String, String),
    Remove(String),
    List,
    SyncDir,
    Write {
        name: String,
        offset: u64,
        data: Vec<u8>,
    },
    WriteDurable {
        name: String,
        offset: u64,
        data: Vec<u8>,
    },
    Preallocate {
        name: String,
        bytes: u64,
    },
    SetLen {
        name: String,
        bytes: u64,
    },
    Sync(String),
    Read {
        name: String,
        offset: u64,
        bytes: usize,
    },
    ReadUncached {
        name: String,
        offset: u64,
        bytes: usize,
    },
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text: String = format!("{self:?}").chars().take(80).collect();
        f.write_str(&text)
    }
}

type Answer = Result<Vec<u8>, io::ErrorKind>;

impl Step {
    fn draw(rng: &mut Rng) -> Step {
        let kind = rng.below(16);
        let mut name = || ["a", "b", "c.log"][rng.below(3) as usize].to_owned();
        let (name, other) = (name(), name());
        let offset = rng.below(20_000);
        let bytes = rng.below(9000) as usize;
        let fill = rng.next() as u8;
        match kind {
            0 | 1 => Step::Create(name),
            2 => Step::Rename(name, other),
            3 => Step::Remove(name),
            4 => Step::List,
            5 => Step::SyncDir,
            6..=8 => Step::Write {
                name,
                offset,
                data: vec![fill; bytes],
            },
            9 | 10 => Step::WriteDurable {
                name,
                offset: offset / 4096 * 4096,
                data: vec![fill; bytes / 4096 * 4096],
            },
            11 => Step::Preallocate {
                name,
                bytes: offset,
            },
            12 => Step::SetLen {
                name,
                bytes: offset,
            },
            13 => Step::Sync(name),
            14 => Step::Read {
                name,
                offset,
                bytes,
            },
            _ => Step::ReadUncached {
                name,
                offset,
                bytes,
            },
        }
    }

    fn run(&self, storage: &impl Storage) -> Answer {
        self.answer(storage).map_err(|e| e.kind())
    }

    fn answer(&self, storage: &impl Storage) -> io::Result<Vec<u8>> {
        match self {
            Step::Create(name) => storage.create(name).map(drop)?,
            Step::Rename(from, to) => storage.rename(from, to)?,
            Step::Remove(name) => storage.remove(name)?,
            Step::List => return Ok(storage.list()?.concat().into_bytes()),
            Step::SyncDir => storage.sync_dir()?,
            Step::Write { name, offset, data } => storage.open(name)?.write_at(*offset, data)?,
            Step::WriteDurable { name, offset, data } => {
                storage.open(name)?.write_durable_at(*offset, data)?;
            }
            Step::Preallocate { name, bytes } => storage.open(name)?.preallocate(*bytes)?,
            Step::SetLen { name, bytes } => storage.open(name)?.set_len(*bytes)?,
            Step::Sync(name) => storage.open(name)?.sync_data()?,
            Step::Read {
                name,
                offset,
                bytes,
            } => {
                let mut buf = vec![0; *bytes];
                let read = storage.open_read(name)?.read_at(*offset, &mut buf)?;
                buf.truncate(read);
                return Ok(buf);
            }
            Step::ReadUncached {
                name,
                offset,
                bytes,
            } => {
                let mut buf = vec![0; *bytes];
                let read = storage.open(name)?.read_uncached_at(*offset, &mut buf)?;
                buf.truncate(read);
                return Ok(buf);
            }
        }
        Ok(Vec::new())
    }
}

/// Names, lengths and checksums: contents in full would bury a failure.
fn summary(storage: &impl Storage) -> Vec<(String, usize, u32)> {
    let names = storage.list().unwrap();
    let read = |name: String| {
        let file = storage.open_read(&name).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        read_exact_at(&file, 0, &mut bytes).unwrap();
        (name, bytes.len(), crc32fast::hash(&bytes))
    };
    names.into_iter().map(read).collect()
}
