//! What consumers say between records: credit, begin marks, signs of life, coming and going.
//! Volatile: none of it is ever logged, and none of it changes what `apply` decides.

use std::sync::Arc;

use millpond_protocol::control::{LeaseName, MessageState, Outcome};
use millpond_protocol::hot::ConsumerCredit;
use millpond_protocol::{ErrorCode, SessionId, Stamp};

use super::timers::Timer;
use crate::effect::Attached;
use crate::limits::SESSION_GRACE_MS;
use crate::queue::Queue;
use crate::record::{FailureKind, LeaseRange, SettleEntry};
use crate::state::lease::{LeaseRun, Leases};
use crate::state::redelivery::{Failure, history_with};
use crate::state::session::{Clock, Session};

impl Queue {
    /// Cumulative since the session was attached. The first `begun` deliveries of this attachment
    /// are begun from now on. Counts as a renewal.
    pub fn credit(&mut self, id: SessionId, credit: ConsumerCredit, now: Stamp) {
        self.renew(id, now);
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let Some(sub) = self.subscriptions.get_mut(&session.subscription) else {
            return;
        };
        let have = &mut session.live.credit;
        have.max_messages = have.max_messages.max(credit.credit.max_messages);
        have.max_bytes = have.max_bytes.max(credit.credit.max_bytes);
        begin(session, &mut sub.leases, credit.begun, now);
        if sub.is_queue() {
            let config = &sub.config;
            let next = session.next_deadline(config.processing_timeout_ms, config.hold_max_ms);
            self.work.timers.arm(Timer::Session(id), next);
        }
        sub.hand.creditors.insert(id);
        self.work.hot.insert(session.subscription);
    }

    /// What the broker has really sent of the hand-outs: messages and their bytes. Hand-outs are
    /// reckoned at the topic's average size until then.
    pub fn sent(&mut self, id: SessionId, messages: u64, bytes: u64) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.live.sent_messages += messages;
        session.live.sent_bytes += bytes;
        if let Some(sub) = self.subscriptions.get_mut(&session.subscription) {
            sub.hand.creditors.insert(id);
            self.work.hot.insert(session.subscription);
        }
    }

    /// Of the hand-outs, what will never be sent, in the order in which it was handed out: the consumer will neither
    /// count it as begun nor give new credit for it.
    pub fn dropped(&mut self, id: SessionId, ranges: &[LeaseRange]) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        for range in ranges {
            session.live.drop_unsent(range);
        }
        if let Some(sub) = self.subscriptions.get_mut(&session.subscription) {
            sub.hand.creditors.insert(id);
            self.work.hot.insert(session.subscription);
        }
    }

    /// The consumer is alive.
    pub fn renew(&mut self, id: SessionId, now: Stamp) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if !session.live.attached {
            return;
        }
        if let Some(sub) = self.subscriptions.get(&session.subscription) {
            let deadline = now.plus_ms(sub.config.lease_ms);
            session.live.deadline = session.live.deadline.max(deadline);
        }
    }

    /// The processing clock of one lease starts again.
    pub fn extend(
        &mut self,
        id: SessionId,
        lease: LeaseName,
        now: Stamp,
    ) -> Result<(), (ErrorCode, MessageState)> {
        self.renew(id, now);
        let gone = (ErrorCode::SessionEnded, MessageState::Gone);
        let session = self.sessions.get_mut(&id).ok_or(gone)?;
        let sub = self
            .subscriptions
            .get_mut(&session.subscription)
            .ok_or(gone)?;
        let topic = self.topics.get(&sub.topic).ok_or(gone)?;
        let offset = lease.offset.0;
        let clock = Clock {
            at: now,
            first: offset,
            end: offset + 1,
            delivery: lease.delivery.0,
        };
        if mark(&mut sub.leases, id, clock, Mark::Again) == 0 {
            let state = sub.state_of(offset, topic, now);
            return Err((ErrorCode::LeaseLost, state));
        }
        add_clock(session, clock);
        drop_old_clocks(session, &sub.leases);
        Ok(())
    }

    /// A session comes back with its token. Counters of credit and begun deliveries start at 0 for
    /// the new attachment; what was begun stays begun. What was only held cannot be begun by count
    /// any more: it is called back, uncharged, when a handler would have taken too long.
    pub fn attach(&mut self, id: SessionId, token: u64, now: Stamp) -> Option<Attached> {
        let alone = self.held_alone(id);
        let session = self.sessions.get_mut(&id)?;
        let sub = self.subscriptions.get_mut(&session.subscription)?;
        if session.token != token || session.live.ending {
            return None;
        }
        let deadline = now.plus_ms(sub.config.lease_ms);
        session.attach(deadline, sub.floor);
        session.live.alone = session.live.alone.or(alone);
        let runs = sub.leases.of(id);
        let proposed = sub
            .hand
            .overlay
            .iter()
            .filter(|(_, proposed)| proposed.session == id);
        let proposed = proposed.map(|((first, delivery), proposed)| LeaseRun {
            first: *first,
            end: proposed.end,
            session: id,
            delivery: *delivery,
            begun: None,
        });
        let held: Vec<_> = runs.iter().copied().chain(proposed).collect();
        // What was still on its way is as if it were handed out now: it may be held so long.
        let config = &sub.config;
        let on_its_way = config
            .processing_timeout_ms
            .saturating_sub(config.hold_max_ms);
        let on_its_way = Stamp(now.0.saturating_sub(on_its_way * 1_000));
        for (n, run) in held.iter().enumerate() {
            if run.begun.is_none() {
                session.live.clocks.push_back(Clock {
                    at: if n < runs.len() { now } else { on_its_way },
                    first: run.first,
                    end: run.end,
                    delivery: run.delivery,
                });
            }
        }
        let clocks = session.live.clocks.make_contiguous();
        clocks.sort_by_key(|clock| clock.at);
        let next = session.next_deadline(config.processing_timeout_ms, config.hold_max_ms);
        self.work.timers.arm(Timer::Session(id), next);
        self.work.timers.arm(Timer::Session(id), deadline);
        self.work.hot.insert(sub.id);
        Some(Attached {
            topic: sub.topic,
            subscription: sub.id,
            mode: sub.config.mode,
            lease_ms: sub.config.lease_ms,
            leases: held.iter().flat_map(names).collect(),
            position: sub.position(),
            active: sub.is_queue() || sub.active == Some(id),
        })
    }

    /// A message that this session holds and that must be its only one; a restart forgets which.
    fn held_alone(&self, id: SessionId) -> Option<u64> {
        let sub = self
            .subscriptions
            .get(&self.sessions.get(&id)?.subscription)?;
        let runs = sub.leases.of(id);
        let mut offsets = runs.iter().flat_map(|run| run.first..run.end);
        offsets.find(|offset| {
            let retry = sub.retries.get(*offset);
            retry.is_some_and(|retry| retry.is_alone(self.max_attempts(sub, *offset, retry)))
        })
    }

    /// The connection broke without a close: the session has `SESSION_GRACE_MS` to come back.
    pub fn detach(&mut self, id: SessionId, now: Stamp) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.live.attached = false;
        session.live.deadline = now.plus_ms(SESSION_GRACE_MS);
        self.work
            .timers
            .arm(Timer::Session(id), session.live.deadline);
        if let Some(sub) = self.subscriptions.get_mut(&session.subscription) {
            sub.hand.creditors.remove(&id);
        }
    }

    /// The broker itself was away for so long, and could hear nobody: that time counts against no
    /// session. To be told before anything that came in meanwhile.
    pub fn was_away(&mut self, ms: u64) {
        for session in self.sessions.values_mut() {
            session.live.deadline = session.live.deadline.plus_ms(ms);
        }
    }

    /// Fills `begun_at` and `history`, the failure itself included, before a settlement is encoded.
    pub fn enrich(&self, id: SessionId, items: &mut [SettleEntry]) {
        let Some(session) = self.sessions.get(&id) else {
            return;
        };
        let Some(sub) = self.subscriptions.get(&session.subscription) else {
            return;
        };
        for item in items {
            let (offset, delivery) = (item.lease.offset.0, item.lease.delivery.0);
            let run = sub.leases.get(offset);
            let run = run.filter(|run| run.session == id && run.delivery == delivery);
            let early = session.live.early.iter().find(|clock| {
                clock.delivery == delivery && (clock.first..clock.end).contains(&offset)
            });
            item.begun_at = run
                .and_then(|run| run.begun)
                .or(early.map(|clock| clock.at));
            let (kind, code) = match &item.outcome {
                Outcome::Nack { code, .. } => (FailureKind::Nack, *code),
                Outcome::Reject { code, .. } => (FailureKind::Reject, *code),
                Outcome::Release { .. } | Outcome::Extend => continue,
            };
            let last = Failure {
                // The record's own stamp says when; it comes later.
                at: self.last,
                duration_ms: item.begun_at.map_or(0, |begun| self.last.ms_since(begun)),
                consumer: Arc::clone(&session.consumer),
                kind,
                code,
            };
            item.history = history_with(sub.retries.get(offset), &last);
        }
    }

    /// Leases have been applied: some of them may have been begun before.
    pub(crate) fn begin_early(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let Some(sub) = self.subscriptions.get_mut(&session.subscription) else {
            return;
        };
        if session.live.early.is_empty() {
            return;
        }
        let is_last = session.live.proposed == 0;
        let mut found = Vec::new();
        session.live.early.retain(|clock| {
            let is_found = mark(&mut sub.leases, id, *clock, Mark::First) > 0;
            found.extend(is_found.then_some(*clock));
            !is_found && !is_last
        });
        session.live.clocks.extend(found);
        let clocks = session.live.clocks.make_contiguous();
        clocks.sort_by_key(|clock| clock.at);
        let config = &sub.config;
        let next = session.next_deadline(config.processing_timeout_ms, config.hold_max_ms);
        self.work.timers.arm(Timer::Session(id), next);
    }
}

/// Marks the deliveries of this attachment up to the `upto`-th as begun.
fn begin(session: &mut Session, leases: &mut Leases, upto: u64, now: Stamp) {
    let live = &mut session.live;
    let upto = upto.min(live.handed);
    live.stuck &= upto <= live.begun;
    live.begun = live.begun.max(upto);
    let mut begun = Vec::new();
    while let Some(sent) = live.sent.front_mut() {
        let count = upto.saturating_sub(sent.ordinal).min(sent.count);
        if count == 0 {
            break;
        }
        begun.push(Clock {
            at: now,
            first: sent.first,
            end: sent.first + count,
            delivery: sent.delivery,
        });
        sent.ordinal += count;
        sent.first += count;
        sent.count -= count;
        if sent.count == 0 {
            live.sent.pop_front();
        }
    }
    for clock in begun {
        let found = mark(leases, session.id, clock, Mark::First);
        if found == 0 && session.live.proposed > 0 {
            session.live.early.push(clock);
        } else {
            add_clock(session, clock);
        }
    }
    drop_old_clocks(session, leases);
}

/// Starts a clock behind the others.
fn add_clock(session: &mut Session, clock: Clock) {
    if let Some(last) = session.live.clocks.back_mut()
        && (last.at, last.delivery, last.end) == (clock.at, clock.delivery, clock.first)
    {
        last.end = clock.end;
        return;
    }
    session.live.clocks.push_back(clock);
}

/// Clocks of leases that are over, or whose clock was set again, are forgotten once they are the most.
fn drop_old_clocks(session: &mut Session, leases: &Leases) {
    if session.live.clocks.len() as u64 <= 2 * session.leases + 2 * session.live.proposed + 64 {
        return;
    }
    let id = session.id;
    let counts = |clock: &Clock| {
        leases.between(clock.first, clock.end).any(|run| {
            let is_its = (run.session, run.delivery) == (id, clock.delivery);
            is_its && run.begun.is_none_or(|begun| begun == clock.at)
        })
    };
    session.live.clocks.retain(counts);
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Mark {
    /// Only leases that are not begun.
    First,
    /// Begun ones too.
    Again,
}

/// Sets when these leases of a session were begun; returns how many are its.
fn mark(leases: &mut Leases, session: SessionId, clock: Clock, mark: Mark) -> u64 {
    let mut found = 0;
    let mut at = clock.first;
    while at < clock.end
        && let Some(run) = leases.next(at).copied()
        && run.first < clock.end
    {
        let (first, end) = (run.first.max(at), run.end.min(clock.end));
        at = end;
        if run.session != session || run.delivery != clock.delivery {
            continue;
        }
        found += end - first;
        if (mark == Mark::Again || run.begun.is_none())
            && let Some(run) = leases.cut(first, end)
        {
            leases.insert(LeaseRun {
                begun: Some(clock.at),
                ..run
            });
        }
    }
    found
}

fn names(run: &LeaseRun) -> impl Iterator<Item = LeaseName> + use<> {
    let delivery = millpond_protocol::Delivery(run.delivery);
    (run.first..run.end).map(move |offset| LeaseName {
        offset: millpond_protocol::Offset(offset),
        delivery,
    })
}
