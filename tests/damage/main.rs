//! Damage: every bit of a small golden store flipped, every file of it truncated at every length and removed,
//! one at a time, each opened by the real recovery and shard and judged by what users were promised.
//!
//! ```text
//! life (real shard, driven by hand) ──▶ golden store ──▶ mutation ──▶ real start ──▶ judge ◀── oracle
//! ```
//!
//! Plain `cargo test` tries a sample with a fixed stride, and shows that the judge can say no;
//! `whole_catalogue` tries everything, in a release build: `.ci/damage`.

mod accepted;
mod disk;
mod golden;
mod judge;
mod life;
mod mutation;
mod oracle;
mod released;
mod wrongs;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use judge::{Depth, Verdict, judge};
use mutation::{Mutation, What};
use oracle::Oracle;

/// How many mutations a plain run leaves out between two; prime, so that every kind of byte is met.
const STRIDE: usize = 1_009;
/// Mutations that a thread takes at once.
const PIECE: usize = 256;
/// Every so many-eth mutation is also verified and started twice: no multiple of a byte, so that each bit has
/// its turn.
const TWICE_EVERY: usize = 61;
/// Failures that are shown.
const SHOWN_MAX: usize = 20;

/// What came of many mutations.
#[derive(Default)]
struct Tally {
    verdicts: BTreeMap<Verdict, u64>,
    twice: u64,
    failed: Vec<String>,
}

/// Mutations of one kind, made when they are asked for: there are millions.
struct Kind<'a> {
    files: Vec<(&'a str, usize)>,
    what: fn(u64) -> What,
}

impl<'a> Kind<'a> {
    /// `per_file` of them for a file of so many bytes.
    fn of(oracle: &'a Oracle, per_file: fn(usize) -> usize, what: fn(u64) -> What) -> Self {
        let files = oracle.contents.iter();
        Self {
            files: files
                .map(|(name, bytes)| (name.as_str(), per_file(bytes.len())))
                .collect(),
            what,
        }
    }

    fn bits(oracle: &'a Oracle) -> Self {
        Self::of(oracle, |bytes| bytes * 8, What::FlippedBit)
    }

    fn lengths(oracle: &'a Oracle) -> Self {
        Self::of(oracle, |bytes| bytes, What::Truncated)
    }

    fn removals(oracle: &'a Oracle) -> Self {
        Self::of(oracle, |_| 1, |_| What::Removed)
    }

    fn count(&self) -> usize {
        self.files.iter().map(|(_, count)| count).sum()
    }

    fn nth(&self, mut nth: usize) -> Mutation {
        let file = self
            .files
            .iter()
            .find(|(_, count)| match nth.checked_sub(*count) {
                Some(rest) => {
                    nth = rest;
                    false
                }
                None => true,
            });
        let (file, _) = file.expect("within the count");
        Mutation {
            file: (*file).to_owned(),
            what: (self.what)(nth as u64),
        }
    }
}

fn golden() -> Oracle {
    Oracle::of(&golden::make())
}

/// Judges every `stride`th mutation on all cores.
fn run(oracle: &Oracle, kind: &Kind<'_>, stride: usize, depth: fn(usize) -> Depth) -> Tally {
    let (next, tally) = (AtomicUsize::new(0), Mutex::new(Tally::default()));
    let work = || {
        loop {
            let from = next.fetch_add(PIECE, Ordering::Relaxed) * stride;
            if from >= kind.count() {
                return;
            }
            let piece = (from..kind.count()).step_by(stride).take(PIECE);
            let judged: Vec<_> = piece
                .map(|nth| {
                    let (mutation, depth) = (kind.nth(nth), depth(nth));
                    let judged = judge(oracle, &mutation, depth);
                    (mutation, depth, judged)
                })
                .collect();
            let mut tally = tally.lock().expect("nothing panics while it counts");
            judged.into_iter().for_each(|(mutation, depth, result)| {
                tally.twice += u64::from(depth == Depth::Twice);
                match result {
                    Ok(verdict) => *tally.verdicts.entry(verdict).or_default() += 1,
                    Err(error) => tally.failed.push(format!("{mutation}: {error}")),
                }
            });
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(work);
        }
    });
    tally.into_inner().expect("nothing panics while it counts")
}

#[expect(clippy::print_stdout, reason = "a script reads it")]
impl Tally {
    fn tell(&self, kind: &str) {
        println!("durability: damage_{kind} {}", self.count());
        for (verdict, count) in &self.verdicts {
            let name = format!("{verdict:?}").to_lowercase();
            println!("durability: damage_{kind}_{name} {count}");
        }
        println!("durability: damage_{kind}_started_twice {}", self.twice);
    }

    fn count(&self) -> u64 {
        self.verdicts.values().sum()
    }

    fn expect_good(&self) {
        // One of each sort.
        let mut sorts: BTreeMap<String, (&str, u64)> = BTreeMap::new();
        for failure in &self.failed {
            let sort = failure
                .replace(|c: char| c.is_ascii_digit(), "")
                .chars()
                .take(120)
                .collect();
            sorts.entry(sort).or_insert((failure, 0)).1 += 1;
        }
        for (failure, count) in sorts.values().take(SHOWN_MAX) {
            println!("{count} times like {failure}");
        }
        assert!(
            self.failed.is_empty(),
            "{} mutations came through badly",
            self.failed.len()
        );
    }
}

#[test]
fn a_sample_of_all_damage_is_told_and_the_rest_is_served() {
    let oracle = golden();
    for (kind, stride) in [
        (Kind::bits(&oracle), STRIDE),
        (Kind::lengths(&oracle), STRIDE),
        (Kind::removals(&oracle), 1),
    ] {
        run(&oracle, &kind, stride, |_| Depth::Twice).expect_good();
    }
}

#[test]
#[ignore = "takes minutes; the gate runs it in a release build"]
fn whole_catalogue() {
    let oracle = golden();
    println!("durability: damage_store_bytes {}", oracle.bytes());
    let depth = |nth: usize| match nth.is_multiple_of(TWICE_EVERY) {
        true => Depth::Twice,
        false => Depth::Once,
    };
    let tally = run(&oracle, &Kind::bits(&oracle), 1, depth);
    tally.tell("bits");
    tally.expect_good();
    assert_eq!(tally.count(), oracle.bytes() as u64 * 8);
    let tally = run(&oracle, &Kind::lengths(&oracle), 1, depth);
    tally.tell("lengths");
    tally.expect_good();
    assert_eq!(tally.count(), oracle.bytes() as u64);
    let tally = run(&oracle, &Kind::removals(&oracle), 1, |_| Depth::Twice);
    tally.tell("removals");
    tally.expect_good();
}

/// The golden store has something of everything, or the rest proves little.
#[test]
fn the_golden_store_has_something_of_everything() {
    let oracle = golden();
    let names = |prefix: &str| {
        oracle
            .contents
            .keys()
            .filter(|name| name.starts_with(prefix))
            .count()
    };
    assert!(names("seg-") >= 4, "{:?}", oracle.contents.keys());
    assert_eq!(names("snapshot-"), 2);
    let cleaned = oracle
        .contents
        .keys()
        .filter(|name| name.ends_with("-0001.log"));
    assert_eq!(cleaned.count(), 1, "{:?}", oracle.contents.keys());
    assert!(oracle.messages.values().any(|known| known.live));
    assert!(oracle.messages.values().any(|known| !known.live));
    for (name, bytes) in &oracle.contents {
        println!("{name} {}", bytes.len());
    }
    println!("{} bytes", oracle.bytes());
}

#[test]
fn the_golden_store_is_always_the_same() {
    assert_eq!(golden::make().contents, golden::make().contents);
}
