//! The simulator: the real shard, queue and log over a simulated disk, clock and network, from one
//! seed; an oracle judges what came of it.
//!
//! ```text
//! plan ──▶ world: producers, consumers, admin ⇄ wire ⇄ door ⇄ shard (real) ⇄ disk (simulated)
//!            └──▶ history ──▶ oracle ──▶ violations, each by the name of its invariant
//! ```
//!
//! `MILLPOND_SIM_SEED=7 cargo test --test sim replay -- --nocapture` runs one seed and shows all that
//! happened. `.ci/simulate` runs very many; how many is in `fleet.rs`.

mod admin;
mod client;
mod consumer;
mod disk;
mod door;
mod fleet;
mod history;
mod observe;
mod oracle;
mod plan;
#[cfg(feature = "planted")]
mod planted;
mod producer;
mod rng;
mod shrink;
mod stats;
mod wire;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;

use oracle::{Invariant, judge};
use stats::Stats;
use world::{Cut, Options, Trace, World};

/// What is wrong with a world.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    /// None: something panicked.
    invariants: Vec<Invariant>,
    what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// What is wrong with the world of a seed, if anything is.
fn run(seed: u64, options: Options) -> Result<Stats, Failure> {
    let world = || World::new(seed, options).run();
    let outcome = catch_unwind(AssertUnwindSafe(world)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Failure {
            invariants: Vec::new(),
            what: format!("panic: {}", text.unwrap_or("without words")),
        }
    })?;
    let violations = judge(&outcome.history);
    if violations.is_empty() {
        let mut stats = outcome.stats;
        stats.counts.histories = 1;
        return Ok(stats);
    }
    let lines: Vec<_> = violations.iter().map(ToString::to_string).collect();
    Err(Failure {
        invariants: violations.iter().map(|v| v.invariant).collect(),
        what: lines.join("\n"),
    })
}

/// Everything that happens in the world of a seed, a line for each.
fn trace(seed: u64, cut: Cut) -> (String, Result<Stats, Failure>) {
    let trace = Trace::default();
    let options = Options {
        trace: Some(trace.clone()),
        cut,
    };
    let result = run(seed, options);
    let text = trace.lock().unwrap_or_else(PoisonError::into_inner).clone();
    (text, result)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..8 {
        let (once, again) = (trace(seed, Cut::default()), trace(seed, Cut::default()));
        assert!(once == again, "seed {seed} differs from itself");
        assert!(once.0.lines().count() > 20, "seed {seed} does nothing");
    }
}

/// Seed 1142319: a seek was taken in while a full disk held the group back, and applied rounds later.
#[test]
fn a_seek_that_waits_for_the_disk_may_move_the_floor_back_later() {
    let (_, result) = trace(1_142_319, Cut::default());
    assert!(result.is_ok(), "{result:?}");
}

/// Seed 1018047: a seek was appended and the broker died before it was applied; a floor was shown in between.
#[test]
fn a_seek_that_was_cut_off_may_have_moved_the_floor_back() {
    let cut = Cut {
        chaos_us: Some(3_235_591),
        ..Cut::default()
    };
    let (_, result) = trace(1_018_047, cut);
    assert!(result.is_ok(), "{result:?}");
}

/// Runs the seed of `MILLPOND_SIM_SEED`, or the first, and shows it.
#[test]
fn replay() {
    let seed = number("MILLPOND_SIM_SEED").unwrap_or(0);
    let (trace, result) = trace(seed, shrink::cut_from_environment());
    println!("{trace}");
    match result {
        Ok(stats) => println!("{stats:?}"),
        Err(failure) => panic!("seed {seed}: {failure}"),
    }
}
