//! What happens by time alone, as proposals: timeouts, ends of life, retention, limits, idleness,
//! the pace of redrives.

use std::sync::Arc;

use millpond_protocol::control::LeaseName;
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{Delivery, Offset, SessionId, Stamp, SubscriptionId, TopicId};

use super::timers::Timer;
use crate::apply::Meant;
use crate::effect::Proposal;
use crate::limits::{EXPIRE_MAX, PRODUCER_IDLE_MS, REDRIVE_SCAN_MAX, REDRIVE_STEP_MAX};
use crate::queue::Queue;
use crate::record::{Expired, FailureKind, LeaseRange, OffsetRun, Overdue, Record, Story};
use crate::state::lease::LeaseRun;
use crate::state::redelivery::{Failure, history_with};
use crate::state::session::{Clock, Session};
use crate::state::subscription::Subscription;

impl Queue {
    pub(super) fn ring(&mut self, timer: Timer, now: Stamp, out: &mut Vec<Proposal>) {
        match timer {
            Timer::Subscription(id) => self.ring_subscription(id, now, out),
            Timer::Topic(id) => self.ring_topic(id, now, out),
            Timer::Session(id) => self.ring_session(id, now, out),
            Timer::Job(key) => self.ring_job(key, now, out),
            Timer::Producers => self.ring_producers(now, out),
        }
    }

    /// Messages were appended: some day they are too old.
    pub(crate) fn arm_ages(&mut self, id: TopicId, now: Stamp) {
        let Some(topic) = self.topics.get(&id) else {
            return;
        };
        let retention = Some(topic.config.retention_ms).filter(|ms| *ms > 0);
        if let Some(ms) = topic.config.ttl_ms.into_iter().chain(retention).min() {
            self.work.timers.arm(Timer::Topic(id), now.plus_ms(ms));
        }
        for id in topic.subscriptions.values() {
            let sub = self.subscriptions.get(id);
            if let Some(ms) = sub.and_then(|sub| sub.config.max_age_ms) {
                self.work
                    .timers
                    .arm(Timer::Subscription(*id), now.plus_ms(ms));
            }
        }
    }

    fn ring_subscription(&mut self, id: SubscriptionId, now: Stamp, out: &mut Vec<Proposal>) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        self.work.hot.insert(id);
        if let Some(due) = sub.retries.next_known_due(now) {
            self.work.timers.arm(Timer::Subscription(id), due);
        }
        let Some(topic) = self.topics.get(&sub.topic) else {
            return;
        };
        let Some(age) = sub.config.max_age_ms.filter(|_| sub.is_queue()) else {
            return;
        };
        let end = topic.index.older_end(now, age, topic.next);
        let from = sub.hand.age_proposed.max(sub.age_floor).max(sub.floor);
        if end > from {
            let below = end.min(from + EXPIRE_MAX);
            sub.hand.age_proposed = below;
            out.push(log(Expired::MaxAge {
                subscription: id,
                below: Offset(below),
            }));
        } else if from < topic.next
            && let Some(turns) = topic.index.turns(from, age)
        {
            self.work
                .timers
                .arm(Timer::Subscription(id), turns.max(now.next()));
        }
    }

    fn ring_topic(&mut self, id: TopicId, now: Stamp, out: &mut Vec<Proposal>) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        if topic.delays.head().is_some_and(|due| due <= now) {
            self.work.hot.extend(topic.subscriptions.values());
        }
        if let Some(due) = topic.delays.next_due(now) {
            self.work.timers.arm(Timer::Topic(id), due);
        }
        self.ring_lives(id, now, out);
        self.ring_ttl(id, now, out);
        self.ring_retention(id, now, out);
        self.ring_limit(id, out);
    }

    fn ring_lives(&mut self, id: TopicId, now: Stamp, out: &mut Vec<Proposal>) {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let from = topic.lives_proposed.map_or(Unbounded, Excluded);
        let until = Included((now, u64::MAX));
        let is_empty = topic
            .lives_proposed
            .is_some_and(|last| last >= (now, u64::MAX));
        if !is_empty {
            let over = topic.lives.range((from, until)).take(EXPIRE_MAX as usize);
            let over: Vec<_> = over.copied().collect();
            if let Some(last) = over.last() {
                topic.lives_proposed = Some(*last);
                let offsets = over.iter().map(|(_, offset)| Offset(*offset)).collect();
                out.push(log(Expired::Ttl { topic: id, offsets }));
            }
        }
        let later = (Excluded((now, u64::MAX)), Unbounded);
        if let Some((at, _)) = topic.lives.range(later).next() {
            self.work.timers.arm(Timer::Topic(id), *at);
        }
    }

    fn ring_ttl(&mut self, id: TopicId, now: Stamp, out: &mut Vec<Proposal>) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let Some(ttl) = topic.config.ttl_ms else {
            return;
        };
        let end = topic.index.older_end(now, ttl, topic.next);
        let from = topic.ttl_proposed.max(topic.ttl_floor).max(topic.first);
        if end > from {
            let below = end.min(from + EXPIRE_MAX);
            topic.ttl_proposed = below;
            out.push(log(Expired::TopicTtl {
                topic: id,
                below: Offset(below),
            }));
        } else if from < topic.next
            && let Some(turns) = topic.index.turns(from, ttl)
        {
            self.work
                .timers
                .arm(Timer::Topic(id), turns.max(now.next()));
        }
    }

    /// Finished messages go once they are old enough; without subscriptions nothing is finished.
    fn ring_retention(&mut self, id: TopicId, now: Stamp, out: &mut Vec<Proposal>) {
        let kept = self.kept(id);
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let (Some(kept), retention @ 1..) = (kept, topic.config.retention_ms) else {
            return;
        };
        let end = topic.index.older_end(now, retention, topic.next);
        let first = end.min(kept);
        if first > topic.trim_proposed.max(topic.first) {
            topic.trim_proposed = first;
            out.push(trim(id, first));
        }
        if end < topic.next
            && let Some(turns) = topic.index.turns(end, retention)
        {
            self.work
                .timers
                .arm(Timer::Topic(id), turns.max(now.next()));
        }
    }

    /// A topic over its limit gives up its oldest messages, if that is its policy.
    fn ring_limit(&mut self, id: TopicId, out: &mut Vec<Proposal>) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let config = &topic.config;
        if config.on_limit == OnLimit::RefusePublish || !topic.is_over(0, 0) {
            return;
        }
        let by_count = config
            .max_messages
            .map_or(0, |max| topic.next.saturating_sub(max));
        let by_bytes = config
            .max_bytes
            .map_or(0, |max| topic.index.tail(max, topic.next));
        let from = topic.trim_proposed.max(topic.first);
        let mut first = by_count.max(by_bytes);
        if config.on_limit == OnLimit::DeadLetter {
            first = first.min(from + EXPIRE_MAX);
        }
        if first > from {
            topic.trim_proposed = first;
            out.push(trim(id, first));
        }
    }

    fn ring_session(&mut self, id: SessionId, now: Stamp, out: &mut Vec<Proposal>) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let Some(sub) = self.subscriptions.get(&session.subscription) else {
            return;
        };
        if session.live.ending {
            return;
        }
        // An attached consumer that holds nothing need not show that it is alive.
        let is_lost = session.live.deadline <= now;
        if is_lost && !(session.live.attached && session.is_empty()) {
            session.live.ending = true;
            let last = failure(session, FailureKind::SessionLost, now);
            out.push(Proposal::Log(lost(sub, id, &last)));
            return;
        }
        let processing = sub.config.processing_timeout_ms;
        let hold = sub.config.hold_max_ms;
        let (mut overdue, mut held) = (Vec::new(), Vec::new());
        while let Some(clock) = session.live.clocks.front().copied()
            && clock.at.plus_ms(processing) <= now
            && let left @ 1.. = EXPIRE_MAX.saturating_sub((overdue.len() + held.len()) as u64)
        {
            session.live.clocks.pop_front();
            let end = clock.end.min(clock.first + left);
            if end < clock.end {
                let rest = Clock {
                    first: end,
                    ..clock
                };
                session.live.clocks.push_front(rest);
            }
            let clock = Clock { end, ..clock };
            for run in leased(sub, id, clock) {
                match run.begun {
                    Some(at) if at == clock.at => {
                        let last = failure(session, FailureKind::ProcessingTimeout, now);
                        overdue.extend(overdue_items(sub, run, last));
                    }
                    Some(_) => {}
                    None => held.push(range(&run)),
                }
            }
        }
        while let Some(sent) = session.live.sent.front().copied()
            && sent.at.plus_ms(hold) <= now
            && held.len() < EXPIRE_MAX as usize
        {
            if sub.hand.proposed_until(sent.first).is_some() {
                // Its lease has not been applied: it is looked at again.
                let front = session.live.sent.front_mut();
                front.into_iter().for_each(|sent| sent.at = now);
                break;
            }
            session.live.sent.pop_front();
            let clock = Clock {
                at: sent.at,
                first: sent.first,
                end: sent.first + sent.count,
                delivery: sent.delivery,
            };
            let unbegun = leased(sub, id, clock).filter(|run| run.begun.is_none());
            let before = held.len();
            held.extend(unbegun.map(|run| range(&run)));
            session.live.stuck |= held.len() > before;
        }
        let next = session.next_deadline(processing, hold);
        if next > now || !session.is_empty() {
            self.work
                .timers
                .arm(Timer::Session(id), next.max(now.next()));
        }
        let subscription = sub.id;
        if !overdue.is_empty() {
            out.push(log(Expired::Processing {
                subscription,
                session: id,
                items: overdue,
            }));
        }
        if !held.is_empty() {
            out.push(log(Expired::Held {
                subscription,
                session: id,
                ranges: held,
            }));
        }
    }

    fn ring_job(&mut self, key: u64, now: Stamp, out: &mut Vec<Proposal>) {
        let Some(job) = self.jobs.all.get_mut(&key) else {
            return;
        };
        if job.finished || job.pace.proposed {
            return;
        }
        if job.pace.not_before > now {
            self.work.timers.arm(Timer::Job(key), job.pace.not_before);
            return;
        }
        let rate = job.rate_per_s.map(|rate| rate as usize);
        let most = rate.map_or(REDRIVE_STEP_MAX, |rate| {
            (rate / 10).clamp(1, REDRIVE_STEP_MAX)
        });
        let most = most.min((job.total - job.done).try_into().unwrap_or(usize::MAX));
        let mut next = job.end;
        let mut letters = Vec::new();
        if let Some(topic) = self.topics.get(&job.topic) {
            let meant = Meant::of(&job.source_topic, &job.subscription, &job.filter);
            let open = topic.letters.range(job.next..job.end);
            for (looked, (offset, letter)) in open.enumerate() {
                if letters.len() == most || looked == REDRIVE_SCAN_MAX {
                    next = *offset;
                    break;
                }
                if meant.has(*offset, letter) {
                    letters.push(Offset(*offset));
                }
            }
        }
        job.pace.proposed = true;
        if let Some(rate) = rate {
            let us = letters.len() as u64 * 1_000_000 / rate as u64;
            job.pace.not_before = Stamp(now.0.saturating_add(us));
        }
        out.push(Proposal::Log(Record::RedriveStep {
            job: key,
            letters,
            next: Offset(next),
        }));
    }

    fn ring_producers(&mut self, now: Stamp, out: &mut Vec<Proposal>) {
        let before = Stamp(now.0.saturating_sub(PRODUCER_IDLE_MS * 1_000));
        let idle = self.producers.idle_before(before).take(EXPIRE_MAX as usize);
        let producers: Vec<_> = idle.collect();
        if !producers.is_empty() {
            out.push(log(Expired::Producers { producers }));
        } else if let Some((used, _)) = self.producers.idlest() {
            let at = used.plus_ms(PRODUCER_IDLE_MS).next();
            self.work.timers.arm(Timer::Producers, at.max(now.next()));
        }
    }
}

fn log(expired: Expired) -> Proposal {
    Proposal::Log(Record::Expire(expired))
}

fn trim(topic: TopicId, first: u64) -> Proposal {
    Proposal::Log(Record::Trim {
        topic,
        first: Offset(first),
    })
}

/// The end of a session that gave no sign of life.
fn lost(sub: &Subscription, id: SessionId, last: &Failure) -> Record<'static> {
    let runs = sub.leases.of(id);
    let begun: Vec<_> = runs.iter().filter(|run| run.begun.is_some()).collect();
    let story = match begun.as_slice() {
        [run] if run.end - run.first == 1 => Some(story(sub, run, last)),
        _ => None,
    };
    let run = |run: &&LeaseRun| OffsetRun {
        offset: Offset(run.first),
        count: (run.end - run.first) as u32,
    };
    Record::SessionEnd {
        session: id,
        clean: false,
        begun: begun.iter().map(run).collect(),
        story,
    }
}

fn story(sub: &Subscription, run: &LeaseRun, last: &Failure) -> Story {
    let mut last = last.clone();
    last.duration_ms = run.begun.map_or(0, |begun| last.at.ms_since(begun));
    Story {
        begun_at: run.begun,
        history: history_with(sub.retries.get(run.first), &last),
    }
}

fn failure(session: &Session, kind: FailureKind, now: Stamp) -> Failure {
    Failure {
        at: now,
        duration_ms: 0,
        consumer: Arc::clone(&session.consumer),
        kind,
        code: 0,
    }
}

/// The parts of a session's leases that a clock is about.
fn leased(sub: &Subscription, id: SessionId, clock: Clock) -> impl Iterator<Item = LeaseRun> {
    let mut at = clock.first;
    std::iter::from_fn(move || {
        loop {
            if at >= clock.end {
                return None;
            }
            let run = sub.leases.next(at).filter(|run| run.first < clock.end)?;
            let (first, end) = (run.first.max(at), run.end.min(clock.end));
            at = end;
            if run.session == id && run.delivery == clock.delivery {
                return Some(LeaseRun { first, end, ..*run });
            }
        }
    })
}

fn overdue_items(
    sub: &Subscription,
    run: LeaseRun,
    last: Failure,
) -> impl Iterator<Item = Overdue> {
    (run.first..run.end).map(move |offset| {
        let end = offset + 1;
        let one = LeaseRun {
            first: offset,
            end,
            ..run
        };
        Overdue {
            lease: LeaseName {
                offset: Offset(offset),
                delivery: Delivery(run.delivery),
            },
            story: story(sub, &one, &last),
        }
    })
}

fn range(run: &LeaseRun) -> LeaseRange {
    LeaseRange {
        offset: Offset(run.first),
        count: (run.end - run.first) as u32,
        delivery: Delivery(run.delivery),
    }
}
