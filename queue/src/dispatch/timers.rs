//! When dispatch must look at what, by time alone. Volatile; a timer may ring early, never late.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::{SessionId, Stamp, SubscriptionId, TopicId};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// A retry comes due, or messages grow older than `max_age`.
    Subscription(SubscriptionId),
    /// A delayed message comes due, a life ends, retention lets something go.
    Topic(TopicId),
    /// A lease deadline, a processing clock, a hold clock, the grace to come back.
    Session(SessionId),
    /// The next step of a redrive.
    Job(u64),
    /// A producer has been idle too long.
    Producers,
}

#[derive(Debug, Default)]
pub struct Timers {
    order: BTreeSet<(Stamp, Timer)>,
    armed: BTreeMap<Timer, Stamp>,
}

impl Timers {
    /// Rings at `at`, or earlier if that was asked for before.
    pub fn arm(&mut self, timer: Timer, at: Stamp) {
        match self.armed.get(&timer) {
            Some(armed) if *armed <= at => return,
            Some(armed) => {
                self.order.remove(&(*armed, timer));
            }
            None => {}
        }
        self.armed.insert(timer, at);
        self.order.insert((at, timer));
    }

    /// Takes the first timer that has rung by `now`.
    pub fn ring(&mut self, now: Stamp) -> Option<Timer> {
        let (at, timer) = *self.order.first()?;
        if at > now {
            return None;
        }
        self.order.pop_first();
        self.armed.remove(&timer);
        Some(timer)
    }

    pub fn next(&self) -> Option<Stamp> {
        self.order.first().map(|(at, _)| *at)
    }

    pub fn drop(&mut self, timer: Timer) {
        if let Some(at) = self.armed.remove(&timer) {
            self.order.remove(&(at, timer));
        }
    }
}
