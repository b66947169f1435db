//! The simulator: the real shard, queue and log over a simulated disk, clock and network, from one
//! seed; an oracle judges what came of it.
//!
//! ```text
//! plan ──▶ world: producers, consumers, admin ⇄ wire ⇄ door ⇄ shard (real) ⇄ disk (simulated)
//!            └──▶ history ──▶ oracle ──▶ violations, each by the name of its invariant
//! ```
//!
//! `MILLPOND_SIM_SEED=7 cargo test --test sim replay -- --nocapture` runs one seed and shows all that
//! happened; `MILLPOND_SIM_SECONDS` says how long `worlds_break_no_invariant` runs.

mod admin;
mod client;
mod consumer;
mod disk;
mod door;
mod history;
mod observe;
mod oracle;
mod plan;
mod producer;
mod rng;
mod stats;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use oracle::{Known, judge};
use stats::Stats;
use world::{Options, Trace, World};

/// Seeds of the default run: always the same ones, so that it fails for everybody or for nobody.
const SEEDS: u64 = 200;

/// Worlds in which it happens.
const LET_GO_SEEDS: [u64; 2] = [105, 609];

/// What is wrong with the world of a seed, if anything is.
fn run(seed: u64, options: Options) -> Result<Stats, String> {
    let world = || World::new(seed, options).run();
    let outcome = catch_unwind(AssertUnwindSafe(world)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        format!("panic: {}", text.unwrap_or("without words"))
    })?;
    let verdict = judge(&outcome.history);
    if verdict.violations.is_empty() {
        let mut stats = outcome.stats;
        stats.histories = 1;
        stats.known = u64::from(!verdict.known.is_empty());
        return Ok(stats);
    }
    let lines: Vec<_> = verdict.violations.iter().map(ToString::to_string).collect();
    Err(lines.join("\n"))
}

/// Everything that happens in the world of a seed, a line for each.
fn trace(seed: u64) -> (String, Result<Stats, String>) {
    let trace = Trace::default();
    let options = Options {
        trace: Some(trace.clone()),
    };
    let result = run(seed, options);
    let text = trace.lock().unwrap_or_else(PoisonError::into_inner).clone();
    (text, result)
}

fn replay_command(seed: u64) -> String {
    format!("MILLPOND_SIM_SEED={seed} cargo test --test sim replay -- --nocapture")
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

#[test]
fn worlds_break_no_invariant() {
    let until = number("MILLPOND_SIM_SECONDS").map(|s| Instant::now() + Duration::from_secs(s));
    let first = number("MILLPOND_SIM_FIRST").unwrap_or(0);
    let mut stats = Stats::default();
    let mut failed = Vec::new();
    for seed in first.. {
        let is_over = match until {
            Some(until) => Instant::now() >= until,
            None => seed - first >= SEEDS,
        };
        if is_over {
            break;
        }
        match run(seed, Options::default()) {
            Ok(more) => stats += more,
            Err(what) => {
                let first = what.lines().next().unwrap_or_default();
                println!("seed {seed}: {first}\n  {}", replay_command(seed));
                failed.push(seed);
            }
        }
    }
    for (name, value) in stats.all() {
        println!("durability: sim_{name} {value}");
    }
    assert!(
        failed.is_empty(),
        "{} seeds failed: {failed:?}",
        failed.len()
    );
    assert!(
        stats.recoveries > stats.histories,
        "nothing ever crashed: {stats:?}"
    );
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..8 {
        let (once, again) = (trace(seed), trace(seed));
        assert!(once == again, "seed {seed} differs from itself");
        assert!(once.0.lines().count() > 20, "seed {seed} does nothing");
    }
}

/// Whoever mends it finds this test failing, and takes `Known::LetGo` away.
#[test]
fn what_was_let_go_is_still_shown_to_who_seeks_back() {
    for seed in LET_GO_SEEDS {
        let outcome = World::new(seed, Options::default()).run();
        let verdict = judge(&outcome.history);
        assert!(verdict.known.contains(&Known::LetGo), "seed {seed}");
    }
}

/// Runs the seed of `MILLPOND_SIM_SEED`, or the first, and shows it.
#[test]
fn replay() {
    let seed = number("MILLPOND_SIM_SEED").unwrap_or(0);
    let (trace, result) = trace(seed);
    println!("{trace}");
    match result {
        Ok(stats) => println!("{stats:?}"),
        Err(what) => panic!("seed {seed}: {what}"),
    }
}
