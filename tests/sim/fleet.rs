//! Many worlds on all cores: 200 with every test run, 100,000 in the gate, as many as fit in a soak.
//!
//! Which worlds run depends on nothing but the first seed and their number, so that a failure is
//! everybody's; only a soak goes on until its time is over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::shrink::{Replay, shrink};
use crate::stats::Stats;
use crate::world::Options;
use crate::{Failure, number, run};

/// Worlds of every test run.
const WORLDS: u64 = 200;
/// What the gate asks for, at least.
const HISTORIES_MIN: u64 = 100_000;
const CRASH_RECOVERIES_MIN: u64 = 500_000;
/// Worlds after which the gate gives up on them.
const HISTORIES_MAX: u64 = 150_000;
/// Failures after which no more worlds are begun.
const FAILURES_MAX: usize = 5;
const TELL_EVERY: Duration = Duration::from_secs(15);

/// What many worlds came to.
#[derive(Default)]
pub struct Sum {
    pub stats: Stats,
    pub failed: Vec<(u64, Failure)>,
}

/// Runs the worlds of seeds from `first` on, on all cores, until `is_enough` says so.
pub fn run_many(first: u64, is_enough: impl Fn(&Sum) -> bool + Sync) -> Sum {
    let sum = Mutex::new(Sum::default());
    let (next, is_over) = (AtomicU64::new(first), AtomicBool::new(false));
    let work = || {
        while !is_over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let result = run(seed, Options::default());
            let mut sum = sum.lock().expect("nothing panics while it adds");
            match result {
                Ok(stats) => sum.stats += stats,
                Err(failure) => sum.failed.push((seed, failure)),
            }
            if is_enough(&sum) {
                is_over.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    sum.into_inner().expect("all threads have ended")
}

#[expect(clippy::print_stdout, reason = "figures, for people and for scripts")]
impl Sum {
    pub fn worlds(&self) -> u64 {
        self.stats.counts.histories + self.failed.len() as u64
    }

    /// Says how to see what failed, as small as it gets.
    fn assert_good(&self) {
        for (seed, failure) in &self.failed {
            let cut = shrink(*seed, failure);
            println!("seed {seed}: {failure}\n  {}", Replay(*seed, &cut));
        }
        let seeds: Vec<_> = self.failed.iter().map(|(seed, _)| seed).collect();
        assert!(seeds.is_empty(), "seeds failed: {seeds:?}");
    }

    fn print(&self) {
        for (name, value) in self.stats.all() {
            println!("durability: sim_{name} {value}");
        }
    }
}

#[test]
fn worlds_break_no_invariant() {
    let worlds = number("MILLPOND_SIM_WORLDS").unwrap_or(WORLDS);
    let first = number("MILLPOND_SIM_FIRST").unwrap_or(0);
    let sum = run_many(first, |sum| sum.worlds() >= worlds);
    sum.print();
    sum.assert_good();
    let counts = &sum.stats.counts;
    assert!(counts.crash_recoveries > counts.histories, "{counts:?}");
}

/// `MILLPOND_SIM_SECONDS` makes a soak of it: as many as fit, from another first seed.
#[test]
#[ignore = "minutes on all cores; .ci/simulate runs it"]
fn a_hundred_thousand_worlds_break_no_invariant() {
    let begun = Instant::now();
    let soak = number("MILLPOND_SIM_SECONDS").map(Duration::from_secs);
    let first = number("MILLPOND_SIM_FIRST").unwrap_or(0);
    let told = AtomicU64::new(0);
    let sum = run_many(first, |sum| {
        let (counts, passed) = (&sum.stats.counts, begun.elapsed());
        let ticks = passed.as_secs() / TELL_EVERY.as_secs();
        if told.fetch_max(ticks, Ordering::Relaxed) < ticks {
            println!(
                "{} s: {} worlds, {} crash recoveries, {} failed",
                passed.as_secs(),
                sum.worlds(),
                counts.crash_recoveries,
                sum.failed.len()
            );
        }
        let is_enough = match soak {
            Some(soak) => passed >= soak,
            None => {
                counts.histories >= HISTORIES_MAX
                    || (counts.histories >= HISTORIES_MIN
                        && counts.crash_recoveries >= CRASH_RECOVERIES_MIN)
            }
        };
        is_enough || sum.failed.len() >= FAILURES_MAX
    });
    sum.print();
    println!("durability: sim_seconds {}", begun.elapsed().as_secs());
    sum.assert_good();
    let missing = sum.stats.missing();
    assert!(missing.is_empty(), "faults that never were: {missing:?}");
    let counts = &sum.stats.counts;
    assert!(
        soak.is_some()
            || counts.histories >= HISTORIES_MIN && counts.crash_recoveries >= CRASH_RECOVERIES_MIN,
        "too little was tried: {counts:?}"
    );
}
