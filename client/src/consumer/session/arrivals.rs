//! What comes from the broker: deliveries, notices, answers to settlements.

use std::collections::BTreeSet;

use millpond_protocol::control::{ConsumerNotice, LeaseName, LostReason, Outcome, Settled};
use millpond_protocol::hot::Delivered;
use millpond_protocol::{Offset, SubscriptionMode};

use super::{Held, Item, Phase, Session, State, Stray};
use crate::completion::Wakeups;
use crate::limits::LOST_LEASES_MAX;

impl Session {
    /// Takes a deliver frame's messages.
    pub fn delivered(&self, delivered: Vec<Delivered>) {
        let mut state = self.state.lock();
        let (strays, buffered) = (state.strays.len(), state.buffer.len() + delivered.len());
        for delivered in delivered {
            state.receive(delivered);
        }
        let is_stray = state.strays.len() < strays;
        let is_all_buffered = state.buffer.len() == buffered;
        let user = state.user.take();
        drop(state);
        if !is_all_buffered {
            // The user never takes it, and so never makes the room that it leaves known.
            self.credit_work.notify_one();
        }
        if is_stray {
            self.settle_work.notify_one();
        }
        if let Some(user) = user {
            user.wake();
        }
    }

    pub fn notice(&self, notice: ConsumerNotice) {
        let mut state = self.state.lock();
        match notice {
            ConsumerNotice::LeasesLost { leases, reason } => state.leases_lost(leases, reason),
            ConsumerNotice::Active { from } => state.activated(from),
            ConsumerNotice::Standby => {
                state.stream.active = false;
                state.clear_buffer();
            }
            ConsumerNotice::Paused { reason } => {
                tracing::info!(reason, "deliveries are paused");
            }
            ConsumerNotice::Corrupt { first, next } => {
                state.buffer.push_back(Item::Corrupt { first, next });
            }
        }
        let user = state.user.take();
        drop(state);
        self.credit_work.notify_one();
        if let Some(user) = user {
            user.wake();
        }
    }

    pub fn settled(&self, settled: &Settled) -> Result<(), String> {
        let mut wakeups = Wakeups::default();
        let mut state = self.state.lock();
        let result = state.settle.settled(settled, &mut wakeups);
        if let Ok(Some(next)) = result {
            state.stream.committed = state.stream.committed.max(next);
        }
        let may_close = state.phase == Phase::Detached && state.settle.pending() == 0;
        drop(state);
        wakeups.wake();
        if may_close {
            self.settle_work.notify_one();
        }
        self.credit_work.notify_one();
        self.progress.notify_waiters();
        result.map(|_| ())
    }
}

impl State {
    fn receive(&mut self, delivered: Delivered) {
        let held = Held {
            delivered,
            session: self.resume.session,
            slot: 0,
            ordinal: self.received,
            generation: self.generation,
        };
        let bytes = held.bytes();
        self.received += 1;
        self.received_bytes += bytes;
        if self.mode == SubscriptionMode::Stream {
            let offset = held.delivered.meta.offset;
            self.stream.active = true;
            if offset < self.stream.skip_below {
                return;
            }
            self.stream.next = offset.next();
        }
        if self.phase != Phase::Open {
            // Released with the session's end.
            return;
        }
        if let Some(stray) = self.strays.remove(&held.lease()) {
            return self.came_again(held.lease(), stray);
        }
        if self.lost.remove(&held.lease()).is_some() {
            // The notice has overtaken it. It is over as soon as all before it is.
            return self.count_begun();
        }
        self.outstanding += 1;
        self.outstanding_bytes += bytes;
        self.buffer.push_back(Item::Message(held));
    }

    /// A lease of which the broker knew nothing after its crash has been given again, under its old name.
    fn came_again(&mut self, lease: LeaseName, stray: Stray) {
        match stray {
            // Handed out once more, it would be done twice. It is begun as soon as all before it is.
            Stray::Held => {
                // A notice may have overtaken the delivery.
                if self.lost.get(&lease) == Some(&LostReason::LeaseExpired) {
                    self.lost.remove(&lease);
                }
                self.count_begun();
            }
            // If that counted, this is refused; else it comes under its next name.
            Stray::Settled => {
                let release = Outcome::Release { delay_ms: None };
                self.settle.settle(lease, release);
            }
        }
    }

    fn leases_lost(&mut self, leases: Vec<LeaseName>, reason: LostReason) {
        let mut gone: BTreeSet<LeaseName> = leases.into_iter().collect();
        self.retain(|held| !gone.remove(&held.lease()));
        self.count_begun();
        if self.outstanding == 0 && self.received >= self.lost_until {
            // Nobody has any of those before, and none is on its way.
            self.lost.clear();
        }
        self.lost_until = self.granted.max_messages;
        if self.lost.len() + gone.len() <= LOST_LEASES_MAX {
            self.lost
                .extend(gone.into_iter().map(|lease| (lease, reason)));
        }
    }

    fn activated(&mut self, from: Offset) {
        self.stream.active = true;
        // A resumed session goes on behind what it has received; any other turn begins anew.
        if !std::mem::take(&mut self.stream.resumed) {
            self.clear_buffer();
            self.stream.skip_below = Offset(0);
            (self.stream.next, self.stream.committed) = (from, from);
        }
    }
}
