//! The leases of one queue subscription, as runs of consecutive offsets.
//!
//! A run is keyed by its last offset, so that acknowledging from its front, the common case, changes
//! one number in place. Invariants: runs do not overlap; `count` is the number of offsets in all of
//! them; neighbours that are alike are one run. When a lease was begun is volatile: it is not part
//! of a snapshot and no decision of `apply` depends on it.

use std::collections::BTreeMap;

use millpond_protocol::{SessionId, Stamp};

#[derive(Clone, Debug, Default)]
pub struct Leases {
    runs: BTreeMap<u64, LeaseRun>,
    count: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct LeaseRun {
    pub first: u64,
    /// One past the last.
    pub end: u64,
    pub session: SessionId,
    pub delivery: u32,
    /// When the user began it; volatile.
    pub begun: Option<Stamp>,
}

impl LeaseRun {
    fn is_like(&self, other: &Self) -> bool {
        (self.session, self.delivery, self.begun) == (other.session, other.delivery, other.begun)
    }
}

impl Leases {
    /// Adds leases on offsets that have none.
    pub fn insert(&mut self, mut run: LeaseRun) {
        debug_assert!(run.first < run.end);
        self.count += run.end - run.first;
        if let Some(before) = run
            .first
            .checked_sub(1)
            .and_then(|last| self.runs.get(&last))
            && before.is_like(&run)
        {
            let last = run.first - 1;
            run.first = before.first;
            self.runs.remove(&last);
        }
        if let Some((_, after)) = self.runs.range_mut(run.end..).next()
            && after.first == run.end
            && after.is_like(&run)
        {
            after.first = run.first;
            return;
        }
        self.runs.insert(run.end - 1, run);
    }

    /// The run that holds this offset.
    pub fn get(&self, offset: u64) -> Option<&LeaseRun> {
        let run = self.next(offset)?;
        (run.first <= offset).then_some(run)
    }

    /// The first run that ends behind this offset.
    pub fn next(&self, offset: u64) -> Option<&LeaseRun> {
        self.runs.range(offset..).next().map(|(_, run)| run)
    }

    /// The runs that hold any of `first..end`, by offset.
    pub fn between(&self, first: u64, end: u64) -> impl Iterator<Item = &LeaseRun> {
        let runs = self.runs.range(first..).map(|(_, run)| run);
        runs.take_while(move |run| run.first < end)
    }

    /// Takes `first..end` out of the one run that holds all of it.
    pub fn cut(&mut self, first: u64, end: u64) -> Option<LeaseRun> {
        let (last, run) = self.runs.range_mut(first..).next()?;
        if run.first > first || run.end < end || first >= end {
            return None;
        }
        let (last, mut rest) = (*last, *run);
        let taken = LeaseRun { first, end, ..rest };
        if run.end > end {
            run.first = end;
        } else {
            self.runs.remove(&last);
        }
        if rest.first < first {
            rest.end = first;
            self.runs.insert(first - 1, rest);
        }
        self.count -= end - first;
        Some(taken)
    }

    /// Leased offsets.
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn iter(&self) -> impl Iterator<Item = &LeaseRun> {
        self.runs.values()
    }

    /// The runs of one session, by offset.
    pub fn of(&self, session: SessionId) -> Vec<LeaseRun> {
        let mine = |run: &&LeaseRun| run.session == session;
        self.iter().filter(mine).copied().collect()
    }

    /// Forgets which leases were begun.
    pub fn forget_begun(&mut self) {
        let all = std::mem::take(self);
        for run in all.runs.into_values() {
            self.insert(LeaseRun { begun: None, ..run });
        }
    }

    pub fn memory_bytes(&self) -> u64 {
        self.runs.len() as u64 * 72
    }

    pub fn check_invariants(&self) {
        let mut edge = 0;
        let mut count = 0;
        for (last, run) in &self.runs {
            assert!(
                run.first < run.end && run.end == last + 1,
                "a run has offsets"
            );
            assert!(edge <= run.first, "runs do not overlap");
            edge = run.end;
            count += run.end - run.first;
        }
        assert_eq!(count, self.count, "leases are counted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, end: u64) -> LeaseRun {
        LeaseRun {
            first,
            end,
            session: SessionId(1),
            delivery: 1,
            begun: None,
        }
    }

    #[test]
    fn a_run_is_cut_at_its_front_in_its_middle_and_at_its_end() {
        for (first, end) in [(10, 12), (13, 15), (18, 20), (10, 20)] {
            let mut leases = Leases::default();
            leases.insert(run(10, 20));
            assert_eq!(leases.cut(first, end), Some(run(first, end)));
            leases.check_invariants();
            assert_eq!(leases.count(), 10 - (end - first));
            let held: Vec<_> = (9..21).filter(|o| leases.get(*o).is_some()).collect();
            let want: Vec<_> = (10..first).chain(end..20).collect();
            assert_eq!(held, want);
        }
    }

    #[test]
    fn what_no_run_holds_cannot_be_cut() {
        let mut leases = Leases::default();
        leases.insert(run(10, 20));
        assert_eq!(leases.cut(9, 11), None);
        assert_eq!(leases.cut(19, 21), None);
        assert_eq!(leases.count(), 10);
    }

    #[test]
    fn neighbours_that_are_alike_become_one_run() {
        let mut leases = Leases::default();
        leases.insert(run(10, 12));
        leases.insert(run(14, 16));
        leases.insert(run(12, 14));
        assert_eq!(leases.iter().copied().collect::<Vec<_>>(), [run(10, 16)]);
        leases.check_invariants();
    }
}
