//! What must have been proposed when dispatch says that there is no more, and when it must wake.

use millpond_protocol::control::{LeaseName, RedriveTarget};
use millpond_protocol::{Offset, SessionId, Stamp, SubscriptionId};
use millpond_queue::{Expired, PRODUCER_IDLE_MS, Record, SESSION_GRACE_MS};

use crate::judge::Turn;
use crate::state::*;

impl Model {
    /// What is left undone although dispatch says that there is no more to do.
    pub fn judge_rest(&self, now: Stamp, turn: &Turn) {
        for sub in self.subs.values().filter(|sub| sub.is_queue()) {
            self.judge_order(sub, now, turn);
            self.judge_idle(sub, now);
        }
        for (id, session) in &self.sessions {
            self.judge_overdue(*id, session, now);
        }
        for (key, producer) in &self.producers {
            let over = producer.active.plus_ms(PRODUCER_IDLE_MS + 1) <= now;
            let goes = self.pending.iter().any(|record| {
                matches!(record, Record::Expire(Expired::Producers { producers }) if producers.contains(key))
            });
            assert!(!over || goes, "{key:?} is idle for too long: {producer:?}");
        }
        for job in self.jobs.values().filter(|job| job.rate.is_none()) {
            let goes = |at: &u64| {
                let proposed = self.pending.iter().any(|record| {
                    matches!(record, Record::RedriveStep { letters, .. } if letters.contains(&Offset(*at)))
                });
                proposed || !self.can_go(job, *at)
            };
            let gone = job.letters.iter().filter(|at| goes(at)).count() as u64;
            assert!(
                gone == job.letters.len() as u64 || gone + job.done >= job.total,
                "a job is not done at {now:?}: {job:?}"
            );
        }
    }

    /// Whether there is a letter, and what it would go back to.
    fn can_go(&self, job: &Job, at: u64) -> bool {
        let topic = self.topics.get(&job.dead);
        let letter = topic.and_then(|topic| topic.messages[at as usize].letter.as_ref());
        letter.is_some_and(|letter| match job.target {
            RedriveTarget::Topic => self.topics.contains_key(&letter.topic),
            RedriveTarget::Subscription => self.subs.contains_key(&letter.sub),
        })
    }

    /// Messages that could be handed out now: that surely may be, and not alone.
    fn waiting(&self, sub: &Sub, now: Stamp) -> Vec<u64> {
        let proposed = self.proposed_of(sub.id);
        let surely = |at: &u64| {
            self.available(sub, *at)
                .is_some_and(|(_, until)| until <= now)
                && !self.is_proposed(sub.id, *at)
                && self.outlived(sub, *at, now) == Some(false)
                // One that comes due while others are on their way follows them.
                && (proposed.is_empty() || self.message(sub, *at).delay_ms == 0)
        };
        (0..sub.items.len() as u64).filter(surely).collect()
    }

    /// Sessions that surely could be given a message now.
    fn free_sessions(&self, sub: &Sub) -> Vec<SessionId> {
        let is_free = |id: &SessionId| {
            let session = &self.sessions[id];
            let ends = self.pending.iter().any(
                |record| matches!(record, Record::SessionEnd { session, .. } if session == id),
            );
            let alone = self.leases_of(*id).iter().any(|lease| {
                let key = (sub.id, lease.offset.0, lease.delivery);
                self.alone.contains(&key) || sub.items[lease.offset.0 as usize].may_be_alone()
            });
            let is_busy = session.stuck && !self.leases_of(*id).is_empty();
            session.attached
                && !ends
                && !is_busy
                && !alone
                && (session.sent.len() as u64) < session.max_messages
                && session.max_bytes == u64::MAX
        };
        self.sessions_of(sub.id)
            .into_iter()
            .filter(is_free)
            .collect()
    }

    fn judge_idle(&self, sub: &Sub, now: Stamp) {
        let (leased, proposed) = self.in_flight(sub);
        let is_full = leased + proposed >= u64::from(sub.config.max_in_flight);
        let free = self.free_sessions(sub);
        if sub.paused || self.holding || is_full || free.is_empty() {
            return;
        }
        let waiting = self.waiting(sub, now);
        let suspects = waiting
            .iter()
            .any(|at| self.is_alone(sub, *at) != Some(false));
        let empty = free.iter().find(|id| self.leases_of(**id).is_empty());
        if suspects {
            assert!(
                empty.is_none(),
                "{empty:?} is free, a suspect waits: {waiting:?} {sub:?}"
            );
        } else {
            assert!(
                waiting.is_empty(),
                "{free:?} are free at {now:?}, {waiting:?} wait: {sub:?}"
            );
        }
    }

    /// Retries by (due, offset), new messages by offset, and at most half are retries.
    fn judge_order(&self, sub: &Sub, now: Stamp, turn: &Turn) {
        let waiting = self.waiting(sub, now);
        let plain = waiting
            .iter()
            .filter(|at| self.is_alone(sub, **at) == Some(false));
        let (mut new_waits, mut retry_waits) = (None, None);
        for &at in plain {
            let item = &sub.items[at as usize];
            let is_new =
                item.deliveries + item.redrives == 0 && self.message(sub, at).delay_ms == 0;
            match item.state {
                State::Scheduled { from, to } if item.failures > 0 && from == to => {
                    let earliest =
                        retry_waits.map_or((from, at), |one: (Stamp, u64)| one.min((from, at)));
                    retry_waits = Some(earliest);
                }
                State::Ready if is_new && item.releases == 0 && !item.sought => {
                    new_waits = new_waits.or(Some(at));
                }
                _ => {}
            }
        }
        let (new, retried) = (turn.new.get(&sub.id), turn.retried.get(&sub.id));
        let last_new = new.and_then(|all| all.last().copied());
        let last_retry = retried.and_then(|all| all.last().copied());
        if let (Some(waits), Some(last)) = (new_waits, last_new) {
            assert!(last < waits, "{last} went before {waits} of {:?}", sub.id);
        }
        if let (Some(waits), Some(last)) = (retry_waits, last_retry) {
            assert!(
                last < waits,
                "{last:?} went before {waits:?} of {:?}",
                sub.id
            );
        }
        let (retried, new) = turn.counts.get(&sub.id).copied().unwrap_or_default();
        if new_waits.is_some() && new + retried >= 4 {
            assert!(
                retried <= new + 2,
                "{retried} retries, {new} new of {:?}",
                sub.id
            );
        }
        if retry_waits.is_some() && new + retried >= 4 {
            assert!(
                new <= retried + 2,
                "{new} new, {retried} retries of {:?}",
                sub.id
            );
        }
    }

    fn judge_overdue(&self, id: SessionId, session: &Session, now: Stamp) {
        let ends = self.pending.iter().any(
            |record| matches!(record, Record::SessionEnd { session: other, .. } if *other == id),
        );
        let config = &self.subs[&session.sub].config;
        let held = self.applied_leases(id);
        let gone = match session.attached {
            true => session.seen().plus_ms(config.lease_ms) <= now && !held.is_empty(),
            false => session.since.plus_ms(SESSION_GRACE_MS) <= now,
        };
        assert!(ends || !gone, "{id:?} is over at {now:?}: {session:?}");
        if ends || !session.attached {
            return;
        }
        for lease in held {
            let item = &self.subs[&session.sub].items[lease.offset.0 as usize];
            let State::Leased { at, .. } = item.state else {
                continue;
            };
            let over = match session.marks.get(&lease) {
                Some(begun) => begun.plus_ms(config.processing_timeout_ms),
                None if session.since <= at => at.plus_ms(config.hold_max_ms),
                // Nothing tells what was begun before a session came back: it is called back when
                // a handler would have taken too long.
                None => session
                    .since
                    .plus_ms(config.hold_max_ms.max(config.processing_timeout_ms)),
            };
            let expires = self.is_expiring(id, lease) || self.is_dying(session.sub, lease.offset.0);
            assert!(
                over > now || expires,
                "{lease:?} of {id:?} is overdue at {now:?}: {over:?}"
            );
        }
    }

    /// Whether an end of the message's life has been proposed.
    fn is_dying(&self, sub: SubscriptionId, offset: u64) -> bool {
        self.pending.iter().any(|record| match record {
            Record::Expire(Expired::Ttl { offsets, .. }) => offsets.contains(&Offset(offset)),
            Record::Expire(Expired::TopicTtl { below, .. }) => below.0 > offset,
            Record::Expire(Expired::MaxAge {
                subscription,
                below,
            }) => *subscription == sub && below.0 > offset,
            Record::Trim { first, .. } => first.0 > offset,
            _ => false,
        })
    }

    /// When something is due by time alone, while nothing is pending.
    pub fn next_event(&self, now: Stamp) -> Option<Stamp> {
        let mut events = Vec::new();
        for sub in self.subs.values().filter(|sub| sub.is_queue()) {
            let (leased, proposed) = self.in_flight(sub);
            let is_full = leased + proposed >= u64::from(sub.config.max_in_flight);
            let goes = !sub.paused && !self.holding && !is_full;
            let free = self.free_sessions(sub);
            for at in 0..sub.items.len() as u64 {
                let item = &sub.items[at as usize];
                let message = self.message(sub, at);
                if goes
                    && !free.is_empty()
                    && self.is_alone(sub, at) == Some(false)
                    && let Some((_, until)) = self.available(sub, at)
                {
                    events.push(until);
                }
                if message.ttl_ms > 0 && item.redrives == 0 && !item.is_finished() {
                    events.push(message.published.plus_ms(message.ttl_ms));
                }
            }
        }
        for (id, session) in &self.sessions {
            let config = &self.subs[&session.sub].config;
            if !session.attached {
                events.push(session.since.plus_ms(SESSION_GRACE_MS));
            } else if let [_, ..] = self.applied_leases(*id)[..] {
                events.push(session.seen().plus_ms(config.lease_ms));
                let mark = |lease: LeaseName| session.marks.get(&lease).copied();
                let begun = self.applied_leases(*id).into_iter().filter_map(mark);
                events.extend(begun.map(|at| at.plus_ms(config.processing_timeout_ms)));
            }
        }
        let idle = self.producers.values();
        events.extend(idle.map(|producer| producer.active.plus_ms(PRODUCER_IDLE_MS + 1)));
        events.into_iter().filter(|at| *at > now).min()
    }
}
