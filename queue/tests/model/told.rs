//! What others are told: leases lost, and what a settlement is told from memory.

use std::collections::BTreeSet;

use millpond_protocol::control::Outcome as Said;
use millpond_protocol::limits::HISTORY_MAX;
use millpond_protocol::{SessionId, SubscriptionId};
use millpond_queue::{Effect, FailureKind, Record, SettleEntry};

use crate::fold::Applied;
use crate::state::*;

impl Model {
    /// Every lease taken away is told of exactly once, and nothing else is.
    pub fn check_losses(&mut self, record: &Record<'_>, to: &Applied<'_>) {
        let mut told = BTreeSet::new();
        for effect in to.effects {
            if let Effect::LeasesLost {
                session, leases, ..
            } = effect
            {
                for lease in leases {
                    assert!(
                        told.insert((*session, *lease)),
                        "told twice: {lease:?} by {record:?}"
                    );
                }
            }
        }
        for (session, lease) in &self.lost {
            let known = self.sessions.contains_key(session);
            let is_told = told.contains(&(*session, *lease));
            assert!(
                is_told || !known,
                "nobody told {session:?} of {lease:?} lost by {record:?}"
            );
        }
        for lost in &told {
            let is_right = self.lost.contains(lost) || self.maybe_lost.contains(lost);
            assert!(
                is_right,
                "{lost:?} is told to be lost but is not: {record:?}"
            );
        }
    }

    pub fn is_ending(&self, session: SessionId) -> bool {
        self.pending.iter().any(|record| {
            matches!(record, Record::SessionEnd { session: other, .. } if *other == session)
        })
    }

    /// What memory adds to a settlement before it is logged.
    pub fn check_enriched(&self, id: SubscriptionId, session: SessionId, items: &[SettleEntry]) {
        for entry in items {
            if !self.holds(id, session, entry.lease) {
                continue;
            }
            let begun = self.sessions[&session].marks.get(&entry.lease).copied();
            let is_expiring = self.is_expiring(session, entry.lease);
            assert!(
                entry.begun_at == begun || is_expiring,
                "{:?} was begun at {begun:?}, not {:?}",
                entry.lease,
                entry.begun_at
            );
            let item = &self.subs[&id].items[entry.lease.offset.0 as usize];
            if item.redrives > 0 {
                continue;
            }
            let now = match &entry.outcome {
                Said::Nack { code, .. } => Some((FailureKind::Nack, *code)),
                Said::Reject { code, .. } => Some((FailureKind::Reject, *code)),
                // It costs nothing and has nothing to tell.
                Said::Release { .. } | Said::Extend => continue,
            };
            let before = item.history.iter().map(|(_, kind, code)| (*kind, *code));
            let all: Vec<_> = before.chain(now).collect();
            let recent = &all[all.len().saturating_sub(HISTORY_MAX)..];
            let told = entry.history.iter().map(|was| (was.outcome, was.code));
            assert_eq!(told.collect::<Vec<_>>(), recent, "of {:?}", entry.lease);
        }
    }
}
