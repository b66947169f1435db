//! What the queue proposes, carried out: leases and expiries become records, deliveries leave.
//!
//! A delivery leaves at once, before its lease is durable: the message is, and nobody waits for the lease.

use millpond_protocol::{Offset, SessionId};
use millpond_queue::Proposal;
use millpond_wal::storage::Storage;

use super::io::{Handout, Output};
use super::{DISPATCH_BUDGET, Outbox, Shard};
use crate::clock::Clock;

impl<S: Storage, C: Clock> Shard<S, C> {
    /// Lets the queue propose leases, expiries and whatever time asks for, and hands out.
    pub fn dispatch(&mut self, out: &mut Outbox<S>) {
        if self.gates.read_only || self.held_until_us.is_some() {
            return;
        }
        let now = self.stamper.now();
        let mut proposals = std::mem::take(&mut self.proposals);
        self.more_to_dispatch = self.queue.dispatch(now, DISPATCH_BUDGET, &mut proposals);
        for proposal in proposals.drain(..) {
            self.propose(proposal, out);
        }
        self.proposals = proposals;
    }

    /// The same before the open group is committed: what a consumer has just asked for is on its way during
    /// the sync, and its leases are in this group. Not if what the group holds might make them void.
    pub fn dispatch_early(&mut self, out: &mut Outbox<S>) {
        if self.awaited && !self.upsets {
            self.dispatch(out);
        }
    }

    fn propose(&mut self, proposal: Proposal, out: &mut Outbox<S>) {
        match proposal {
            Proposal::Lease {
                record,
                session,
                topic,
                ranges,
                ..
            } => {
                self.push_unawaited(&record);
                for range in ranges {
                    let run = Handout {
                        topic,
                        offset: range.offset,
                        count: range.count,
                        delivery: range.delivery,
                        attempt: range.attempt,
                        elsewhere: None,
                    };
                    self.deliver(session, run, out);
                }
            }
            Proposal::Log(record) => self.push_unawaited(&record),
            Proposal::Stream {
                session,
                topic,
                offset,
                count,
                ..
            } => {
                let run = Handout {
                    topic,
                    offset,
                    count,
                    delivery: Default::default(),
                    attempt: 1,
                    elsewhere: None,
                };
                self.deliver(session, run, out);
            }
            Proposal::Notice { session, notice } => self.tell(session, Output::Notice(notice), out),
        }
    }

    /// Sends a run to its session; where bodies stand elsewhere, one by one with the place.
    fn deliver(&mut self, session: SessionId, run: Handout, out: &mut Outbox<S>) {
        if !self.queue.has_references(run.topic) {
            self.tell(session, Output::Deliver(run), out);
            return;
        }
        for offset in (run.offset.0..).take(run.count as usize).map(Offset) {
            let elsewhere = self.elsewhere(run.topic, offset).map(Box::new);
            let one = Handout {
                offset,
                count: 1,
                elsewhere,
                ..run.clone()
            };
            self.tell(session, Output::Deliver(one), out);
        }
    }

    pub(super) fn tell(&self, session: SessionId, output: Output, out: &mut Outbox<S>) {
        if let Some(attachment) = self.attached.get(&session) {
            out.replies.push((attachment.deliveries, output));
        }
    }
}
