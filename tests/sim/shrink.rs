//! A failing world made smaller, and the command that shows it again.
//!
//! Everything in a world hangs on one stream of random numbers, so a world that is cut is another
//! world; it counts as the same failure if it breaks the same invariant, or panics as well.

use std::fmt;

use crate::world::{Cut, Options, World};
use crate::{Failure, number, run};

/// Runs that shrinking may take.
const TRIES_MAX: u32 = 60;

/// The smallest cut found with which the seed still fails in the same way.
pub fn shrink(seed: u64, failure: &Failure) -> Cut {
    let mut smallest = Cut::default();
    let mut tries = 0;
    let mut still_fails = |cut: &Cut| {
        tries += 1;
        let options = Options {
            cut: cut.clone(),
            ..Options::default()
        };
        let first = failure.invariants.first();
        tries <= TRIES_MAX
            && run(seed, options).is_err_and(|other| other.invariants.first() == first)
    };
    for client in (0..World::clients_of(seed)).skip(1) {
        let mut cut = smallest.clone();
        cut.silent.insert(client);
        if still_fails(&cut) {
            smallest = cut;
        }
    }
    let (mut passes, mut fails) = (0, World::chaos_us_of(seed));
    while fails - passes > 100_000 {
        let chaos_us = passes.midpoint(fails);
        let cut = Cut {
            chaos_us: Some(chaos_us),
            ..smallest.clone()
        };
        if still_fails(&cut) {
            (smallest, fails) = (cut, chaos_us);
        } else {
            passes = chaos_us;
        }
    }
    smallest
}

/// The cut that a replay command names.
pub fn cut_from_environment() -> Cut {
    let silent = std::env::var("MILLPOND_SIM_SILENT").unwrap_or_default();
    let silent = silent.split(',').filter(|number| !number.is_empty());
    Cut {
        chaos_us: number("MILLPOND_SIM_CHAOS_US"),
        silent: silent.map(|n| n.parse().expect("a number")).collect(),
    }
}

/// One command that shows a seed's world.
pub struct Replay<'a>(pub u64, pub &'a Cut);

impl fmt::Display for Replay<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(seed, cut) = self;
        write!(f, "MILLPOND_SIM_SEED={seed} ")?;
        if let Some(chaos_us) = cut.chaos_us {
            write!(f, "MILLPOND_SIM_CHAOS_US={chaos_us} ")?;
        }
        if !cut.silent.is_empty() {
            let silent: Vec<_> = cut.silent.iter().map(ToString::to_string).collect();
            write!(f, "MILLPOND_SIM_SILENT={} ", silent.join(","))?;
        }
        write!(f, "cargo test --test sim replay -- --nocapture")
    }
}
