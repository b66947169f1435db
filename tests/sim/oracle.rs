//! Judges a history: one pass over its events, n log n in their number.
//!
//! It knows what was asked, what was answered, and what was seen on the disk and by consumers, and
//! nothing of how the broker works. Every violation carries the name of the invariant that it breaks
//! (see ARCHITECTURE.md). What was never answered is unknown: it may have happened or not, but only
//! once and only before the process that it was sent to was gone.

mod consumed;
mod published;
mod tests;

use std::fmt;

use crate::history::{Event, History};
use consumed::Consumed;
use published::Published;

/// Violations after which the rest of a history is not looked at.
const VIOLATIONS_MAX: usize = 20;

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Acknowledged, so there: the same bytes at the same offset.
    I1,
    /// What was cut off and not sent again stays away.
    I2,
    /// One append per producer and sequence; a retry gets the original offset.
    I3,
    /// Offsets are gapless, in append order.
    I4,
    /// No redelivery before its due time.
    I5,
    /// Dead exactly once, exactly after the configured attempts; in one place, never in none. So that
    /// attempts can be counted, no two leases have the same name.
    I6,
    /// Acknowledged by a consumer, so finished: floors and offsets go back only by a seek.
    I7,
    /// Bytes that are nobody's are never served.
    I8,
    /// No answer after a failed sync.
    I9,
    /// When the faults stop, the backlog drains.
    I11,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub invariant: Invariant,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.invariant, self.what)
    }
}

/// What is wrong with a history.
#[derive(Debug, Default)]
struct Verdict {
    violations: Vec<Violation>,
}

impl Verdict {
    fn broken(&mut self, invariant: Invariant, what: impl FnOnce() -> String) {
        if self.violations.len() < VIOLATIONS_MAX {
            let what = what();
            self.violations.push(Violation { invariant, what });
        }
    }

    fn check(&mut self, holds: bool, invariant: Invariant, what: impl FnOnce() -> String) {
        if !holds {
            self.broken(invariant, what);
        }
    }
}

/// All that is wrong with a history.
pub fn judge(history: &History) -> Vec<Violation> {
    let mut verdict = Verdict::default();
    let mut published = Published::new(history);
    let mut consumed = Consumed::new(history);
    let mut sync_failed = false;
    for (at, event) in history.events.iter().enumerate() {
        match event {
            Event::SyncFailed => sync_failed = true,
            Event::AnsweredAfterFailure => verdict.check(!sync_failed, Invariant::I9, || {
                format!("event {at}: an answer left the process after a sync had failed")
            }),
            Event::Unserved { why } => verdict.broken(Invariant::I1, || {
                format!("event {at}: what was acknowledged is not served: {why}")
            }),
            Event::Stopped => {
                sync_failed = false;
                consumed.stopped();
            }
            _ => {}
        }
        published.see(at, event, &mut verdict);
        consumed.see(at, event, &mut verdict);
        if let Event::End(end) = event {
            for stuck in &end.stuck {
                verdict.broken(Invariant::I11, || format!("not at rest: {stuck}"));
            }
            consumed.end(end, &published, &mut verdict);
        }
    }
    verdict.violations
}
