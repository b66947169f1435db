//! Records that hand out, settle and take away: the life of one message in one subscription.

use std::collections::BTreeSet;

use millpond_protocol::control::{
    DeadReason, LeaseName, MessageState, Outcome as Said, RejectKind,
};
use millpond_protocol::hot::AckRun;
use millpond_protocol::limits::DELAY_MS_MAX;
use millpond_protocol::policy::{Backoff, Jitter};
use millpond_protocol::{Delivery, ErrorCode, Offset, SessionId, Stamp, SubscriptionId, TopicId};
use millpond_queue::{
    Effect, Expired, FailureKind, LeaseRange, OffsetRun, Outcome, Record, Refusal, SettleEntry,
};

use crate::fold::Applied;
use crate::state::*;

/// What must become of one settlement.
enum Verdict {
    Accept,
    Refuse,
    /// The rules leave it open; the core's answer is followed.
    Either,
}

impl Model {
    pub fn fold_lease(&mut self, record: &Record<'_>, to: &Applied<'_>) {
        match record {
            Record::Lease {
                subscription,
                session,
                ranges,
            } => self.lease(*subscription, *session, ranges, to),
            Record::Settle {
                subscription,
                session,
                acks,
                items,
            } => self.settle(*subscription, *session, acks, items, to),
            Record::SessionEnd {
                session,
                clean,
                begun,
                ..
            } => self.session_end(*session, *clean, begun, to),
            Record::Expire(Expired::Processing {
                subscription,
                session,
                items,
            }) => {
                for item in items {
                    let at = item.lease.offset.0;
                    if self.holds(*subscription, *session, item.lease) {
                        self.revoke(*subscription, at, Ending::Taken);
                        let kind = FailureKind::ProcessingTimeout;
                        self.fail(*subscription, at, kind, 0, None, to);
                    }
                }
            }
            Record::Expire(Expired::Held {
                subscription,
                session,
                ranges,
            }) => {
                for lease in names(ranges) {
                    if self.holds(*subscription, *session, lease) {
                        self.revoke(*subscription, lease.offset.0, Ending::Taken);
                        self.release(*subscription, lease.offset.0, None, to);
                    }
                }
            }
            Record::Expire(Expired::Ttl { topic, offsets }) => {
                for offset in offsets {
                    self.kill_everywhere(*topic, offset.0, DeadReason::Expired, to);
                }
            }
            Record::Expire(Expired::TopicTtl { topic, below }) => {
                for offset in 0..self.end_of(*topic).min(below.0) {
                    if self.topics[topic].messages[offset as usize].ttl_ms == 0 {
                        self.kill_everywhere(*topic, offset, DeadReason::Expired, to);
                    }
                }
            }
            Record::Expire(Expired::MaxAge {
                subscription,
                below,
            }) => {
                let end = self
                    .subs
                    .get(subscription)
                    .map_or(0, |sub| sub.items.len() as u64);
                for offset in 0..end.min(below.0) {
                    self.kill(*subscription, offset, DeadReason::MaxAge, to);
                }
            }
            Record::Damaged { topic, ranges } => {
                for run in ranges {
                    let end = self.end_of(*topic).min(run.offset.0 + u64::from(run.count));
                    for offset in run.offset.0..end {
                        self.kill_everywhere(*topic, offset, DeadReason::Damaged, to);
                    }
                }
            }
            _ => self.fold_dead(record, to),
        }
    }

    fn end_of(&self, topic: TopicId) -> u64 {
        self.topics.get(&topic).map_or(0, Topic::next)
    }

    pub fn holds(&self, sub: SubscriptionId, session: SessionId, lease: LeaseName) -> bool {
        let Some(sub) = self.subs.get(&sub) else {
            return false;
        };
        let item = sub.items.get(lease.offset.0 as usize);
        item.and_then(Item::lease) == Some((session, lease.delivery))
    }

    fn kill_everywhere(
        &mut self,
        topic: TopicId,
        offset: u64,
        reason: DeadReason,
        to: &Applied<'_>,
    ) {
        for sub in self.subs_of(topic) {
            if self.subs[&sub].is_queue() {
                self.kill(sub, offset, reason, to);
            }
        }
    }

    /// Ends what nobody has finished. A lease may be left to end by itself: effects tell.
    fn kill(&mut self, sub: SubscriptionId, offset: u64, reason: DeadReason, to: &Applied<'_>) {
        let item = &self.subs[&sub].items[offset as usize];
        if item.is_finished() {
            return;
        }
        if item.redrives > 0 && !self.is_letter_new(sub, offset, to) {
            return;
        }
        let leased = self.subs[&sub].items[offset as usize].lease();
        if let Some((session, delivery)) = leased
            && !tells_of(to.effects, session, name(offset, delivery))
        {
            self.item(sub, offset).is_over = true;
            return;
        }
        self.revoke(sub, offset, Ending::Revoked);
        self.die(sub, offset, vec![reason], to);
    }

    /// Whether the core has filed a letter about this message with this very record.
    pub fn is_letter_new(&self, sub: SubscriptionId, offset: u64, to: &Applied<'_>) -> bool {
        let Some(dead) = self.topic_named(&self.subs[&sub].dead_topic) else {
            return false;
        };
        let new = (self.topics[&dead].next()..).map_while(|at| to.core.letter(dead, Offset(at)));
        new.into_iter()
            .any(|letter| (letter.subscription_id, letter.source_offset) == (sub, Offset(offset)))
    }

    fn lease(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        ranges: &[LeaseRange],
        to: &Applied<'_>,
    ) {
        let is_known = self
            .sessions
            .get(&session)
            .is_some_and(|known| known.sub == id);
        // A range may be refused as a whole for one of its messages.
        let mut broken = BTreeSet::new();
        for range in ranges {
            let of_range = names(std::slice::from_ref(range));
            let is_good = |lease: &LeaseName| {
                let is_refused = tells_of(to.effects, session, *lease);
                self.may_be_leased(id, *lease, to.stamp, is_refused)
            };
            if is_known && !of_range.iter().all(is_good) {
                broken.extend(of_range);
            }
        }
        for lease in names(ranges) {
            let at = lease.offset.0;
            let is_refused = tells_of(to.effects, session, lease);
            if is_known && is_refused && broken.contains(&lease) {
                self.lost.insert((session, lease));
                self.sessions
                    .get_mut(&session)
                    .unwrap()
                    .marks
                    .remove(&lease);
            } else if is_known && self.may_be_leased(id, lease, to.stamp, is_refused) {
                let new_name = self.names.insert((id, session, lease));
                assert!(
                    new_name,
                    "the name of {lease:?} of {session:?} was used before"
                );
                let item = self.item(id, at);
                item.state = State::Leased {
                    session,
                    delivery: lease.delivery,
                    at: to.stamp,
                };
                item.leases.push(Past {
                    session,
                    delivery: lease.delivery,
                    ending: None,
                });
                item.deliveries += 1;
                item.first_attempt.get_or_insert(to.stamp);
                self.counts.delivered += 1;
            } else if is_known {
                self.lost.insert((session, lease));
                self.sessions
                    .get_mut(&session)
                    .unwrap()
                    .marks
                    .remove(&lease);
            } else {
                self.maybe_lost.insert((session, lease));
            }
        }
    }

    fn may_be_leased(
        &self,
        id: SubscriptionId,
        lease: LeaseName,
        stamp: Stamp,
        is_refused: bool,
    ) -> bool {
        let sub = &self.subs[&id];
        let available = self.available(sub, lease.offset.0);
        if available.is_none_or(|(from, _)| from > stamp) {
            return false;
        }
        // It may have outlived its time on the way.
        let is_over = is_refused && self.outlived(sub, lease.offset.0, stamp) != Some(false);
        let is_overtaken = is_refused && self.overtaken.contains(&(id, lease));
        !is_over && !is_overtaken
    }

    fn settle(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        acks: &[AckRun],
        items: &[SettleEntry],
        to: &Applied<'_>,
    ) {
        let Some(sub) = self.subs.get(&id) else {
            let gone = [
                ErrorCode::UnknownSubscription,
                ErrorCode::Deleted,
                ErrorCode::SessionEnded,
            ];
            if to.code().is_some() {
                to.accepted(&gone);
            }
            return;
        };
        if !sub.is_queue() {
            to.accepted(&[ErrorCode::WrongMode, ErrorCode::SessionEnded]);
            return;
        }
        let Outcome::Settled { count, refused } = to.outcome else {
            panic!("settlements are answered one by one: {:?}", to.outcome);
        };
        assert!(
            refused.is_sorted_by_key(|refusal| refusal.ordinal),
            "{refused:?}"
        );
        let ack = |run: &AckRun| {
            let (offset, delivery) = (run.offset.0, run.delivery);
            (0..u64::from(run.run)).map(move |i| (name(offset + i, delivery), None))
        };
        let acks = acks.iter().flat_map(ack);
        let items = items.iter().map(|item| (item.lease, Some(&item.outcome)));
        let mut total = 0;
        for (ordinal, (lease, said)) in acks.chain(items).enumerate() {
            let refusal = refused
                .iter()
                .find(|refusal| refusal.ordinal == ordinal as u64);
            self.settle_one(id, session, lease, said, refusal, to);
            total += 1;
        }
        assert_eq!(*count, total, "every settlement is answered");
        assert!(
            refused.iter().all(|refusal| refusal.ordinal < total),
            "{refused:?}"
        );
    }

    fn settle_one(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        lease: LeaseName,
        said: Option<&Said>,
        refusal: Option<&Refusal>,
        to: &Applied<'_>,
    ) {
        let offset = lease.offset.0;
        let says = || format!("{said:?} of {lease:?} by {session:?} at {:?}", to.stamp);
        let Some(item) = self.subs[&id].items.get(offset as usize) else {
            let refusal = refusal.unwrap_or_else(|| panic!("nothing is there: {}", says()));
            assert_eq!(refusal.state, MessageState::Gone);
            return;
        };
        let mut verdict = verdict(item, session, lease.delivery, said);
        if item.state == State::Dead && self.is_purged(id, offset) {
            verdict = Verdict::Either;
        }
        // A crash took the lease away before it was durable, but the delivery was on its way.
        let is_survivor = session.0 >> 32 < u64::from(self.recovery_epoch)
            && self.sessions.contains_key(&session)
            && self.is_due(id, offset, to.stamp)
            && item
                .leases
                .iter()
                .all(|past| past.delivery < lease.delivery);
        if said.is_none() && is_survivor && lease.delivery.0 < u32::MAX {
            verdict = Verdict::Either;
        }
        match (verdict, refusal) {
            (Verdict::Accept | Verdict::Either, None) => {}
            (Verdict::Refuse | Verdict::Either, Some(refusal)) => {
                assert_eq!(refusal.code, ErrorCode::LeaseLost);
                self.check_state(id, offset, refusal.state, to.stamp);
                self.counts.late += 1;
                return;
            }
            (Verdict::Accept, Some(refusal)) => panic!("{refusal:?} for {}: {item:?}", says()),
            (Verdict::Refuse, None) => panic!("accepted: {}: {item:?}", says()),
        }
        let held = item.lease() == Some((session, lease.delivery));
        if !held && (said.is_some() || item.is_finished()) {
            return;
        }
        let ending = ending(said);
        let item = self.item(id, offset);
        item.end(ending);
        match said {
            None => {
                item.state = State::Acked;
                self.counts.acked += 1;
            }
            Some(Said::Nack { delay_ms, code, .. }) => {
                self.fail(id, offset, FailureKind::Nack, *code, *delay_ms, to)
            }
            Some(Said::Reject { kind, code, .. }) => {
                item.failures += 1;
                item.failed_at = Some(to.place);
                item.history.push((to.stamp, FailureKind::Reject, *code));
                self.counts.failures += 1;
                let reason = match kind {
                    RejectKind::Rejected => DeadReason::Rejected,
                    RejectKind::Undecodable => DeadReason::Undecodable,
                };
                self.die(id, offset, vec![reason], to);
            }
            Some(Said::Release { delay_ms }) => self.release(id, offset, *delay_ms, to),
            Some(Said::Extend) => {}
        }
    }

    fn is_due(&self, id: SubscriptionId, offset: u64, now: Stamp) -> bool {
        let available = self.available(&self.subs[&id], offset);
        available.is_some_and(|(from, _)| from <= now)
    }

    /// The state that the core tells of a message must be the model's.
    pub fn check_state(&self, id: SubscriptionId, offset: u64, told: MessageState, now: Stamp) {
        let item = &self.subs[&id].items[offset as usize];
        let is_due = self.available(&self.subs[&id], offset);
        let fits = match told {
            MessageState::Ready => is_due.is_some_and(|(from, _)| from <= now),
            MessageState::Scheduled => is_due.is_some_and(|(from, _)| from > Stamp(0)),
            MessageState::Leased => item.lease().is_some(),
            MessageState::Dead => item.state == State::Dead,
            // What was before the start and what was purged may look like what was acked.
            MessageState::Acked | MessageState::Gone => match item.state {
                State::Acked | State::Gone => true,
                State::Dead => self.is_purged(id, offset),
                _ => false,
            },
        };
        assert!(
            fits,
            "offset {offset} of {id:?} at {now:?} is told to be {told:?}: {item:?}"
        );
    }

    /// What died and whose letter is gone too may look like anything that is finished.
    fn is_purged(&self, id: SubscriptionId, offset: u64) -> bool {
        let is_gone = self.topics[&self.subs[&id].topic].first > offset;
        let mut letters = self.letters();
        is_gone || !letters.any(|(_, _, letter)| (letter.sub, letter.offset) == (id, offset))
    }

    fn session_end(
        &mut self,
        session: SessionId,
        clean: bool,
        begun: &[OffsetRun],
        to: &Applied<'_>,
    ) {
        if !self.sessions.contains_key(&session) {
            return;
        }
        let id = self.sessions[&session].sub;
        self.allow_losses(session);
        let held = self.applied_leases(session);
        let was_begun = |lease: &&LeaseName| {
            begun.iter().any(|run| {
                (run.offset.0..run.offset.0 + u64::from(run.count)).contains(&lease.offset.0)
            })
        };
        let begun: BTreeSet<LeaseName> = held.iter().filter(was_begun).copied().collect();
        for lease in held {
            let offset = lease.offset.0;
            self.revoke(id, offset, Ending::Taken);
            if !clean && begun.len() == 1 && begun.contains(&lease) {
                self.fail(id, offset, FailureKind::SessionLost, 0, None, to);
                continue;
            }
            self.release(id, offset, None, to);
            if !clean && begun.contains(&lease) {
                self.item(id, offset).suspect = Suspect::Yes;
            }
        }
        self.lost.clear();
        self.sessions.remove(&session);
        let sub = self.subs.get_mut(&id).unwrap();
        let was_active = sub.line.first() == Some(&session);
        sub.line.retain(|other| *other != session);
        if let (true, Some(&next)) = (was_active, sub.line.first()) {
            let told = Effect::Active {
                session: next,
                from: Offset(sub.committed),
            };
            assert!(
                to.effects.contains(&told),
                "{told:?} is missing in {:?}",
                to.effects
            );
            self.sessions.get_mut(&next).unwrap().read = None;
        }
    }

    fn fail(
        &mut self,
        id: SubscriptionId,
        offset: u64,
        kind: FailureKind,
        code: u32,
        delay_ms: Option<u64>,
        to: &Applied<'_>,
    ) {
        let max_attempts = self.max_attempts(&self.subs[&id], offset);
        let max_deliveries = self.subs[&id].config.max_deliveries;
        let item = self.item(id, offset);
        item.failures += 1;
        item.failed_at = Some(to.place);
        item.history.push((to.stamp, kind, code));
        item.suspect = Suspect::No;
        let is_last = item.failures + 1 >= max_attempts;
        item.lost_last = (kind == FailureKind::SessionLost).then_some(is_last);
        let mut over = Vec::new();
        let deliveries = item.deliveries - item.before_redrive.0;
        let failures = item.failures;
        if failures >= max_attempts {
            over.push(DeadReason::MaxAttempts);
        }
        if deliveries >= max_deliveries {
            over.push(DeadReason::MaxDeliveries);
        }
        self.counts.failures += 1;
        if self.is_late_death(id, offset, to) {
            over.extend([DeadReason::Expired, DeadReason::MaxAge]);
        }
        if !over.is_empty() {
            self.die(id, offset, over, to);
            return;
        }
        let (from, until) = match delay_ms {
            Some(ms) => (ms.min(DELAY_MS_MAX) * 1_000, ms.min(DELAY_MS_MAX) * 1_000),
            None => self.wait_us(id, offset),
        };
        let (from, until) = (Stamp(to.stamp.0 + from), Stamp(to.stamp.0 + until));
        self.item(id, offset).state = State::Scheduled { from, to: until };
    }

    /// The shortest and longest wait after the failure just counted.
    fn wait_us(&self, id: SubscriptionId, offset: u64) -> (u64, u64) {
        let sub = &self.subs[&id];
        let failures = sub.items[offset as usize].failures;
        let own = self.message(sub, offset).initial_ms;
        let ms = match &sub.config.backoff {
            Backoff::Fixed { wait_ms } if own == 0 => *wait_ms as f64,
            Backoff::Fixed { .. } => own as f64,
            Backoff::List { waits_ms } => {
                let step = (failures as usize - 1).min(waits_ms.len() - 1);
                waits_ms[step] as f64
            }
            Backoff::Exponential {
                initial_ms,
                multiplier_milli,
                max_ms,
            } => {
                let initial = if own == 0 { *initial_ms } else { own };
                let grown = f64::from(*multiplier_milli) / 1_000.0;
                (initial as f64 * grown.powi(failures as i32 - 1)).min(*max_ms as f64)
            }
        };
        // A millisecond of slack where the wait is not a whole number of them.
        let (low, high) = if ms.fract() == 0.0 {
            (ms, ms)
        } else {
            (ms.floor(), ms.ceil())
        };
        let (low, high) = ((low * 1_000.0) as u64, (high * 1_000.0) as u64);
        match sub.config.jitter {
            Jitter::None => (low, high),
            Jitter::Equal => (low / 2, high),
            Jitter::Full => (0, high),
        }
    }

    fn release(
        &mut self,
        id: SubscriptionId,
        offset: u64,
        delay_ms: Option<u64>,
        to: &Applied<'_>,
    ) {
        let max_deliveries = self.subs[&id].config.max_deliveries;
        let item = self.item(id, offset);
        item.releases += 1;
        if item.suspect == Suspect::Yes {
            item.suspect = Suspect::Maybe;
        }
        item.state = match delay_ms {
            None | Some(0) => State::Ready,
            Some(ms) => {
                let due = to.stamp.plus_ms(ms.min(DELAY_MS_MAX));
                State::Scheduled { from: due, to: due }
            }
        };
        let is_over = item.deliveries - item.before_redrive.0 >= max_deliveries;
        self.counts.released += 1;
        let mut over = Vec::new();
        if is_over {
            over.push(DeadReason::MaxDeliveries);
        }
        if self.is_late_death(id, offset, to) {
            over.extend([DeadReason::Expired, DeadReason::MaxAge]);
        }
        if !over.is_empty() {
            self.die(id, offset, over, to);
        }
    }

    /// What outlived its time while it was leased may die with its lease.
    fn is_late_death(&self, id: SubscriptionId, offset: u64, to: &Applied<'_>) -> bool {
        let item = &self.subs[&id].items[offset as usize];
        let outlived = self.outlived(&self.subs[&id], offset, to.stamp);
        if self.subs[&id].dead_topic.is_empty() {
            // Nothing is filed that could tell.
            return item.is_over || outlived == Some(true);
        }
        (item.is_over || outlived != Some(false)) && self.is_letter_new(id, offset, to)
    }
}

fn verdict(item: &Item, session: SessionId, delivery: Delivery, said: Option<&Said>) -> Verdict {
    if item.lease() == Some((session, delivery)) {
        return Verdict::Accept;
    }
    let named = |past: &&Past| (past.session, past.delivery) == (session, delivery);
    let past = item.leases.iter().find(named);
    let is_last = item.leases.last() == past;
    let ending = past.and_then(|past| past.ending);
    let repeats = is_last && ending.is_some() && ending == self::ending(said);
    match (item.state, said) {
        (State::Leased { .. }, _) => Verdict::Refuse,
        _ if item.sought || item.redrives > 0 => Verdict::Either,
        (State::Ready | State::Scheduled { .. } | State::Acked | State::Dead, _) if repeats => {
            Verdict::Accept
        }
        (State::Ready | State::Scheduled { .. }, None) => match ending {
            Some(Ending::Taken) if is_last => Verdict::Accept,
            Some(_) => Verdict::Either,
            None => Verdict::Refuse,
        },
        // Nothing changes, whatever is answered.
        (State::Gone, Some(_)) if repeats => Verdict::Either,
        (State::Acked | State::Gone, None) => Verdict::Either,
        _ => Verdict::Refuse,
    }
}

fn ending(said: Option<&Said>) -> Option<Ending> {
    match said {
        None => Some(Ending::Ack),
        Some(Said::Nack { .. }) => Some(Ending::Nack),
        Some(Said::Reject { .. }) => Some(Ending::Reject),
        Some(Said::Release { .. }) => Some(Ending::Release),
        Some(Said::Extend) => None,
    }
}

fn names(ranges: &[LeaseRange]) -> Vec<LeaseName> {
    let each = |range: &LeaseRange| {
        let (offset, delivery) = (range.offset.0, range.delivery);
        (0..u64::from(range.count)).map(move |i| name(offset + i, delivery))
    };
    ranges.iter().flat_map(each).collect()
}

fn tells_of(effects: &[Effect], session: SessionId, lease: LeaseName) -> bool {
    effects.iter().any(|effect| match effect {
        Effect::LeasesLost {
            session: to,
            leases,
            ..
        } => *to == session && leases.contains(&lease),
        _ => false,
    })
}
