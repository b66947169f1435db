//! Every planted bug is caught, by the invariant that it breaks; without one the same worlds are good.

use millpond_queue::planted as core;
use millpond_wal::planted as log;

use crate::fleet::{Sum, run_many};
use crate::oracle::Invariant::{self, I1, I3, I4, I5, I6, I7, I9, I11};

/// Worlds in which a bug has to show.
const WORLDS_MAX: u64 = 4_000;
/// Worlds of the run without any bug.
const CONTROL_WORLDS: u64 = 400;

#[derive(Copy, Clone, Debug)]
enum Bug {
    Core(core::Bug),
    Log(log::Bug),
}

/// With the invariants by which it may be caught: what a bug does first depends on the world.
const BUGS: &[(Bug, &[Invariant])] = &[
    (Bug::Log(log::Bug::AckBeforeSync), &[I1]),
    (Bug::Log(log::Bug::NoDirectorySync), &[I1]),
    (Bug::Log(log::Bug::RetryFailedSync), &[I9]),
    (Bug::Log(log::Bug::NoRecoveryEpoch), &[I6]),
    (Bug::Log(log::Bug::CutUnvouched), &[I1]),
    (Bug::Log(log::Bug::TrustPageCache), &[I1]),
    (Bug::Log(log::Bug::ManifestNotSynced), &[I1]),
    (Bug::Log(log::Bug::SnapshotWithoutDirectory), &[I1]),
    (Bug::Log(log::Bug::CleaningDropsLive), &[I1]),
    (Bug::Log(log::Bug::TrustDamagedDirectory), &[I1]),
    (Bug::Core(core::Bug::OffsetOffByOne), &[I3]),
    (Bug::Core(core::Bug::DuplicateAppended), &[I3]),
    (Bug::Core(core::Bug::SequenceGapAccepted), &[I3]),
    (Bug::Core(core::Bug::DedupNotInSnapshot), &[I3]),
    (Bug::Core(core::Bug::DoneNotInSnapshot), &[I7]),
    (Bug::Core(core::Bug::DueOneEarly), &[I5]),
    (Bug::Core(core::Bug::BackoffHalved), &[I5]),
    (Bug::Core(core::Bug::SnapshotMoves), &[I6]),
    (Bug::Core(core::Bug::RestartForgetsDue), &[I5]),
    (Bug::Core(core::Bug::RestartCharges), &[I6]),
    (Bug::Core(core::Bug::AttemptCountedTwice), &[I6]),
    (Bug::Core(core::Bug::OneAttemptMore), &[I6]),
    (Bug::Core(core::Bug::DeadLetterStays), &[I6]),
    (Bug::Core(core::Bug::DeadLetterLost), &[I6]),
    (Bug::Core(core::Bug::RedriveLosesLetter), &[I6]),
    (Bug::Core(core::Bug::StaleSettlementAccepted), &[I6]),
    (Bug::Core(core::Bug::AckTakesNeighbour), &[I6]),
    (Bug::Core(core::Bug::FloorMovesBack), &[I7]),
    (Bug::Core(core::Bug::ReleaseLost), &[I11]),
    (Bug::Core(core::Bug::SessionEndLosesLeases), &[I11]),
    (Bug::Core(core::Bug::StreamSkips), &[I4]),
    (Bug::Core(core::Bug::GoneForgotten), &[I1]),
];

impl Bug {
    fn choose(self) {
        match self {
            Self::Core(bug) => core::choose(Some(bug)),
            Self::Log(bug) => log::choose(Some(bug)),
        }
    }

    fn choose_none() {
        core::choose(None);
        log::choose(None);
    }
}

/// The first world in which the invariant is the first thing found broken.
fn caught(sum: &Sum, by: &[Invariant]) -> Option<(u64, Invariant)> {
    let named = sum.failed.iter().filter_map(|(seed, failure)| {
        let first = failure.invariants.first().copied();
        first
            .filter(|first| by.contains(first))
            .map(|by| (*seed, by))
    });
    named.min()
}

#[test]
#[ignore = "minutes; .ci/simulate runs it"]
fn every_planted_bug_is_caught_by_the_invariant_that_it_breaks() {
    Bug::choose_none();
    let control = run_many(0, |sum| sum.worlds() >= CONTROL_WORLDS);
    assert!(
        control.failed.is_empty(),
        "without a bug: {:?}",
        control.failed
    );
    let mut missed = Vec::new();
    for (bug, by) in BUGS {
        bug.choose();
        let sum = run_many(0, |sum| {
            caught(sum, by).is_some() || sum.worlds() >= WORLDS_MAX
        });
        Bug::choose_none();
        let worlds = sum.worlds();
        match caught(&sum, by) {
            Some((seed, by)) => println!("{bug:?}: {by:?} in world {seed}, {worlds} run"),
            None => {
                println!("{bug:?}: not caught in {worlds} worlds");
                for (seed, failure) in sum.failed.iter().take(3) {
                    let first = failure.what.lines().next().unwrap_or_default();
                    println!("  seed {seed}: {first}");
                }
                missed.push(bug);
            }
        }
    }
    println!("durability: planted_bugs {}", BUGS.len());
    println!(
        "durability: planted_bugs_caught {}",
        BUGS.len() - missed.len()
    );
    assert!(missed.is_empty(), "not caught by name: {missed:?}");
}
