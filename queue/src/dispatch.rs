//! What there is to do now, as proposals: hand-outs, expiries, trims, the next steps of redrives.
//!
//! Nothing here changes what a restart would bring back: what changes is volatile (credit, begin marks,
//! deadlines, timers, what has been proposed). A proposal stands in an overlay until its record is applied,
//! so that nothing is proposed twice. Costs what it proposes: subscriptions without work are not looked at.

mod credit;
mod expiry;
mod ready;
pub mod timers;

use millpond_protocol::{Stamp, SubscriptionId};
use std::ops::Bound;

use crate::effect::Proposal;
use crate::limits::{QUANTUM, RINGS_MAX, TIMED_BYTES_TARGET};
use crate::queue::Queue;

impl Queue {
    /// Proposes what there is to do now: hand-outs of about `budget` messages, expiries, trims.
    /// True: there is more to do at once.
    pub fn dispatch(&mut self, now: Stamp, budget: usize, out: &mut Vec<Proposal>) -> bool {
        let now = now.max(self.last);
        let mut bytes = 0;
        for _ in 0..RINGS_MAX {
            let Some(timer) = self.work.timers.ring(now) else {
                break;
            };
            let before = out.len();
            self.ring(timer, now, out);
            bytes += out[before..].iter().map(Proposal::bytes).sum::<usize>();
            if bytes >= TIMED_BYTES_TARGET {
                break;
            }
        }
        let mut left = budget;
        while left > 0 && !self.is_held() {
            let Some(id) = self.next_hot() else {
                break;
            };
            self.work.served = id;
            let quantum = left.min(QUANTUM);
            let served = self.serve(id, now, quantum, out);
            left -= served.handed.min(left);
            if served.more {
                // Looking costs as well.
                left -= quantum.min(left);
            } else if served.handed < quantum {
                self.work.hot.remove(&id);
            }
        }
        self.next_wakeup(now).is_some_and(|at| at <= now)
    }

    /// When `dispatch` has something to do by time alone. It may find nothing then, but nothing is
    /// due before.
    #[must_use]
    pub fn next_wakeup(&self, now: Stamp) -> Option<Stamp> {
        if !self.work.hot.is_empty() && !self.is_held() {
            return Some(now);
        }
        self.work.timers.next()
    }

    /// Graceful shutdown: no new leases from now on.
    pub fn drain(&mut self) {
        self.work.draining = true;
    }

    /// No new leases while there is a reason, e.g. the disk's reserve is gone.
    pub fn hold_leases(&mut self, reason: Option<&'static str>) {
        self.work.hold = reason;
    }

    fn is_held(&self) -> bool {
        self.work.draining || self.work.hold.is_some()
    }

    /// Subscriptions take turns.
    fn next_hot(&self) -> Option<SubscriptionId> {
        let hot = &self.work.hot;
        let after = (Bound::Excluded(self.work.served), Bound::Unbounded);
        hot.range(after).next().or(hot.first()).copied()
    }
}
