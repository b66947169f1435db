//! What `dispatch` may propose, and what it must have proposed when it says there is no more.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::control::LeaseName;
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{Offset, SessionId, Stamp, SubscriptionId, TopicId};
use millpond_queue::{
    Expired, Handout, LeaseRange, OffsetRun, PRODUCER_IDLE_MS, Proposal, Record, SESSION_GRACE_MS,
};

use crate::state::*;

/// The hand-outs of one turn of dispatch, to judge their order.
#[derive(Debug, Default)]
pub struct Turn {
    /// First deliveries, and retries by (due, offset); those that go alone stand in neither.
    pub new: BTreeMap<SubscriptionId, BTreeSet<u64>>,
    pub retried: BTreeMap<SubscriptionId, BTreeSet<(Stamp, u64)>>,
    /// How many went that had been handed out before, released messages included, and how many
    /// had not, delayed ones included.
    pub counts: BTreeMap<SubscriptionId, (usize, usize)>,
}

impl Model {
    /// Takes a proposal into the model, if it may be made now.
    pub fn judge(&mut self, proposal: &Proposal, now: Stamp, turn: &mut Turn) {
        match proposal {
            Proposal::Lease {
                record,
                session,
                subscription,
                topic,
                ranges,
            } => {
                let each = |handout: &Handout| LeaseRange {
                    offset: handout.offset,
                    count: handout.count,
                    delivery: handout.delivery,
                };
                let same = Record::Lease {
                    subscription: *subscription,
                    session: *session,
                    ranges: ranges.iter().map(each).collect(),
                };
                assert_eq!(*record, same, "the record says what is delivered");
                assert_eq!(self.subs[subscription].topic, *topic);
                let mark = self.pending.len();
                for handout in ranges {
                    for i in 0..u64::from(handout.count) {
                        self.judge_handout(*subscription, *session, handout, i, now, turn);
                        // Singly for now, so that the next one sees it.
                        let offset = Offset(handout.offset.0 + i);
                        self.pending.push(Record::Lease {
                            subscription: *subscription,
                            session: *session,
                            ranges: vec![LeaseRange {
                                offset,
                                count: 1,
                                ..each(handout)
                            }],
                        });
                    }
                }
                self.pending.truncate(mark);
                self.pending.push(record.clone());
                self.judge_session(*session);
            }
            Proposal::Log(record) => {
                self.judge_record(record, now);
                self.note_stuck(record);
                self.pending.push(record.clone());
            }
            Proposal::Stream {
                session,
                subscription,
                topic,
                offset,
                count,
            } => {
                assert_eq!(self.subs[subscription].topic, *topic);
                self.judge_stream(*subscription, *session, *offset, u64::from(*count));
            }
            Proposal::Notice { session, .. } => assert!(self.sessions.contains_key(session)),
        }
    }

    fn judge_handout(
        &mut self,
        id: SubscriptionId,
        to: SessionId,
        handout: &Handout,
        i: u64,
        now: Stamp,
        turn: &mut Turn,
    ) {
        let at = handout.offset.0 + i;
        let sub = &self.subs[&id];
        let item = &sub.items[at as usize];
        let says = format!("{at} of {id:?} handed to {to:?} at {now:?}: {item:?}");
        assert!(!sub.paused && !self.holding && sub.is_queue(), "{says}");
        let Some((from, until)) = self.available(sub, at) else {
            panic!("it is not to be had: {says}");
        };
        assert!(from <= now, "I5, too early: {says}");
        let again = self.overtaken.contains(&(id, name(at, handout.delivery)));
        let is_other = item.sought && !again;
        assert!(
            is_other || !self.is_proposed(id, at),
            "handed out twice at once: {says}"
        );
        let told = (handout.delivery.0, handout.attempt);
        let used = item.leases.iter().map(|past| past.delivery.0).max();
        if sub.sought {
            assert!(used < Some(told.0), "the number of an older lease: {says}");
            assert_eq!(told.1, item.failures + 1, "{says}");
        } else {
            assert_eq!(told, (item.deliveries + 1, item.failures + 1), "{says}");
        }
        let outlived = self.outlived(sub, at, now) == Some(true);
        assert!(!outlived, "it has outlived its time: {says}");
        let (leased, proposed) = self.in_flight(sub);
        assert!(
            leased + proposed < u64::from(sub.config.max_in_flight),
            "too much in flight: {says}"
        );
        let exact = from == until;
        let alone = self.is_alone(sub, at);
        let (is_new, is_retry) = (
            item.deliveries + item.redrives == 0,
            item.failures > 0 && exact,
        );
        let is_delayed = self.message(sub, at).delay_ms > 0;
        if alone == Some(false) && is_retry && item.state != State::Ready {
            turn.retried.entry(id).or_default().insert((from, at));
        }
        let counts = turn.counts.entry(id).or_default();
        if is_new {
            counts.1 += 1;
        } else {
            counts.0 += 1;
        }
        if alone == Some(false) && is_new && !is_delayed {
            turn.new.entry(id).or_default().insert(at);
        }
        self.handed_at.insert((to, name(at, handout.delivery)), now);
        if alone == Some(true) {
            self.alone.insert((id, at, handout.delivery));
        }
        let session = self
            .sessions
            .get_mut(&to)
            .expect("to a session that is there");
        assert!(session.attached && session.sub == id, "{says}");
        session.sent.push(name(at, handout.delivery));
        session.given = now;
        let (sent, credit) = (session.sent.len() as u64, session.max_messages);
        assert!(
            sent <= credit,
            "{sent} sent with credit for {credit}: {says}"
        );
        assert!(session.max_bytes > 0, "no credit in bytes: {says}");
    }

    /// A session that was sent what is called back now does not take what it is given.
    fn note_stuck(&mut self, record: &Record<'_>) {
        let Record::Expire(Expired::Held {
            session, ranges, ..
        }) = record
        else {
            return;
        };
        let session = self.sessions.get_mut(session).expect("it was judged");
        session.stuck |= session.sent.iter().any(|lease| is_in(ranges, *lease));
    }

    /// A session that holds a suspect holds nothing else; one that begins nothing gets one at a time.
    fn judge_session(&self, to: SessionId) {
        let id = self.sessions[&to].sub;
        let held = self.leases_of(to);
        if self.sessions[&to].stuck {
            assert_eq!(held.len(), 1, "{to:?} begins nothing, but holds {held:?}");
        }
        let alone = held
            .iter()
            .find(|lease| self.alone.contains(&(id, lease.offset.0, lease.delivery)));
        if let Some(alone) = alone {
            assert_eq!(
                held.len(),
                1,
                "{alone:?} had to be alone, but {to:?} holds {held:?}"
            );
        }
    }

    /// Whether a hand-out must be alone: suspects, and last attempts after a session was lost.
    pub fn is_alone(&self, sub: &Sub, offset: u64) -> Option<bool> {
        let item = &sub.items[offset as usize];
        let is_last = item.failures + 1 >= self.max_attempts(sub, offset);
        match item.suspect {
            Suspect::Yes => Some(true),
            // A change of policy in between leaves it open.
            Suspect::No if item.lost_last.is_some() && item.failures > 0 => {
                (item.lost_last == Some(is_last)).then_some(is_last)
            }
            Suspect::Maybe => None,
            Suspect::No => Some(false),
        }
    }

    fn judge_stream(&mut self, id: SubscriptionId, to: SessionId, offset: Offset, count: u64) {
        let sub = &self.subs[&id];
        let topic = &self.topics[&sub.topic];
        let session = &self.sessions[&to];
        let says = format!("{count} from {offset} to {to:?}: {sub:?} {session:?}");
        assert!(!sub.is_queue() && !sub.paused, "{says}");
        assert_eq!(
            sub.line.first(),
            Some(&to),
            "only the active one reads: {says}"
        );
        assert!(session.attached, "{says}");
        let cursor = session
            .read
            .unwrap_or(0)
            .max(sub.committed)
            .max(topic.first);
        let cursor = (cursor..).find(|at| !sub.gone.contains(at));
        assert_eq!(
            Some(offset.0),
            cursor,
            "in strict order, without holes: {says}"
        );
        let mut run = offset.0..offset.0 + count;
        assert!(
            !run.any(|at| sub.gone.contains(&at)),
            "it was let go: {says}"
        );
        assert!(count > 0 && offset.0 + count <= topic.next(), "{says}");
        let session = self.sessions.get_mut(&to).unwrap();
        session.read = Some(offset.0 + count);
        session
            .sent
            .extend((0..count).map(|i| name(offset.0 + i, Default::default())));
        assert!(
            session.sent.len() as u64 <= session.max_messages,
            "more than credit: {says}"
        );
    }

    fn judge_record(&self, record: &Record<'_>, now: Stamp) {
        // A seek or a new subscription may bring back what was about to end; nobody dies twice.
        let again = matches!(
            record,
            Record::Expire(Expired::Ttl { .. } | Expired::TopicTtl { .. } | Expired::MaxAge { .. })
        );
        assert!(
            again || !self.pending.contains(record),
            "proposed twice: {record:?}"
        );
        match record {
            Record::SessionEnd {
                session,
                clean,
                begun,
                story,
            } => {
                assert!(!clean, "only a client ends cleanly");
                self.judge_end(*session, begun, now);
                let begun: u64 = begun.iter().map(|run| u64::from(run.count)).sum();
                assert_eq!(
                    story.is_some(),
                    begun == 1,
                    "the story of the one that is charged"
                );
            }
            Record::Expire(expired) => self.judge_expired(expired, now),
            Record::Trim { topic, first } => self.judge_trim(*topic, first.0, now),
            Record::RedriveStep {
                job: id, letters, ..
            } => {
                let job = &self.jobs[id];
                assert!(!job.cancelled);
                let proposed = |at: &Offset| {
                    self.pending.iter().any(|other| match other {
                        Record::RedriveStep { job, letters, .. } => {
                            job == id && letters.contains(at)
                        }
                        _ => false,
                    })
                };
                for at in letters {
                    assert!(
                        job.letters.contains(&at.0),
                        "{at:?} is no letter of {job:?}"
                    );
                    assert!(!proposed(at), "{at:?} is on its way already");
                }
                if let Some(rate) = job.rate {
                    let time = now.ms_since(job.begun) + 1_000;
                    // A restart forgets the pace, which lets one step more through.
                    let steps = u64::from(self.recovery_epoch);
                    let allowed = u64::from(rate) * time.div_ceil(1_000) + steps;
                    let sent = job.done + letters.len() as u64;
                    assert!(sent <= allowed, "{sent} in {time} ms at {rate}/s: {job:?}");
                }
            }
            other => panic!("dispatch has no business with {other:?}"),
        }
    }

    fn judge_end(&self, session: SessionId, begun: &[OffsetRun], now: Stamp) {
        let known = &self.sessions[&session];
        let ends = |record: &Record<'_>| matches!(record, Record::SessionEnd { session: other, .. } if *other == session);
        assert!(!self.pending.iter().any(ends), "{session:?} is ended twice");
        let lease_ms = self.subs[&known.sub].config.lease_ms;
        let over = match known.attached {
            true => known.alive.plus_ms(lease_ms),
            false => known.since.plus_ms(SESSION_GRACE_MS),
        };
        assert!(
            over <= now,
            "{session:?} is ended at {now:?}, before {over:?}: {known:?}"
        );
        let told: BTreeSet<u64> = begun
            .iter()
            .flat_map(|run| run.offset.0..run.offset.0 + u64::from(run.count))
            .collect();
        let held = self.leases_of(session).into_iter();
        let marked = held.filter(|lease| known.marks.contains_key(lease));
        let marked: BTreeSet<u64> = marked.map(|lease| lease.offset.0).collect();
        // What is on its way may be left out.
        let applied = self.applied_leases(session).into_iter();
        let applied: BTreeSet<u64> = applied.map(|lease| lease.offset.0).collect();
        let least: BTreeSet<u64> = marked.intersection(&applied).copied().collect();
        assert!(
            told.is_superset(&least) && told.is_subset(&marked),
            "what {session:?} had begun is {marked:?}, not {told:?}"
        );
    }

    fn judge_expired(&self, expired: &Expired, now: Stamp) {
        match expired {
            Expired::Processing {
                subscription,
                session,
                items,
            } => {
                let ms = self.subs[subscription].config.processing_timeout_ms;
                for item in items {
                    let begun = self.held_mark(*session, item.lease);
                    let begun = begun.unwrap_or_else(|| panic!("{item:?} was never begun"));
                    assert!(
                        begun.plus_ms(ms) <= now,
                        "{item:?} begun at {begun:?}, {now:?}"
                    );
                    assert_eq!(item.story.begun_at, Some(begun));
                    assert!(
                        !self.is_expiring(*session, item.lease),
                        "{item:?} expires twice"
                    );
                }
            }
            Expired::Held {
                subscription,
                session,
                ranges,
            } => {
                let ms = self.subs[subscription].config.hold_max_ms;
                let processing = self.subs[subscription].config.processing_timeout_ms;
                for range in ranges {
                    for at in range.offset.0..range.offset.0 + u64::from(range.count) {
                        let lease = name(at, range.delivery);
                        assert_eq!(self.held_mark(*session, lease), None, "{lease:?} is begun");
                        assert!(
                            !self.is_expiring(*session, lease),
                            "{lease:?} expires twice"
                        );
                        let handed = self.handed_at[&(*session, lease)];
                        let known = &self.sessions[session];
                        // What was begun before a session came back is not known: see below.
                        let over = match known.resumed > handed {
                            true => handed.plus_ms(processing.min(ms)),
                            false => handed.plus_ms(ms),
                        };
                        assert!(
                            over <= now,
                            "{lease:?} may be held until {over:?}, not {now:?}"
                        );
                    }
                }
            }
            Expired::Ttl { topic, offsets } => {
                for at in offsets {
                    let message = &self.topics[topic].messages[at.0 as usize];
                    let over = message.published.plus_ms(message.ttl_ms);
                    assert!(
                        message.ttl_ms > 0 && over <= now,
                        "{at:?} lives until {over:?}"
                    );
                }
            }
            Expired::TopicTtl { topic, below } => {
                let topic = &self.topics[topic];
                let ms = topic
                    .config
                    .ttl_ms
                    .expect("a topic without it has no such end");
                for message in &topic.messages[..below.0 as usize] {
                    let over = message.published.plus_ms(ms);
                    assert!(over <= now, "a message lives until {over:?}, not {now:?}");
                }
            }
            Expired::MaxAge {
                subscription,
                below,
            } => {
                let sub = &self.subs[subscription];
                let ms = sub.config.max_age_ms.expect("none without it");
                for message in &self.topics[&sub.topic].messages[..below.0 as usize] {
                    let over = message.published.plus_ms(ms);
                    assert!(
                        over <= now,
                        "a message may wait until {over:?}, not {now:?}"
                    );
                }
            }
            Expired::Producers { producers } => {
                for key in producers {
                    let over = self.producers[key].active.plus_ms(PRODUCER_IDLE_MS);
                    assert!(
                        over <= now,
                        "{key:?} is remembered until {over:?}, not {now:?}"
                    );
                }
            }
        }
    }

    /// When it was begun, if the session still holds it.
    fn held_mark(&self, session: SessionId, lease: LeaseName) -> Option<Stamp> {
        let held = self.leases_of(session).contains(&lease);
        assert!(held, "{session:?} does not hold {lease:?}");
        self.sessions[&session].marks.get(&lease).copied()
    }

    pub fn is_expiring(&self, session: SessionId, lease: LeaseName) -> bool {
        self.pending.iter().any(|record| match record {
            Record::Expire(Expired::Processing {
                session: of, items, ..
            }) => *of == session && items.iter().any(|item| item.lease == lease),
            Record::Expire(Expired::Held {
                session: of,
                ranges,
                ..
            }) => *of == session && is_in(ranges, lease),
            _ => false,
        })
    }

    fn judge_trim(&self, id: TopicId, first: u64, now: Stamp) {
        let topic = &self.topics[&id];
        assert!(
            first > topic.first && first <= topic.next(),
            "{first} of {topic:?}"
        );
        let kept = topic.next() - first + 1;
        let bytes: u64 = topic.messages[first as usize - 1..]
            .iter()
            .map(|m| m.bytes)
            .sum();
        let full = topic.config.max_messages.is_some_and(|limit| kept > limit)
            || topic
                .config
                .max_bytes
                .is_some_and(|limit| bytes > limit / 2);
        for at in topic.first..first {
            let message = &topic.messages[at as usize];
            let old = message.published.plus_ms(topic.config.retention_ms) <= now;
            let finished = !self.is_unread(id, at);
            let forced = full && topic.config.on_limit != OnLimit::RefusePublish;
            assert!(
                finished || forced,
                "{at} of {id:?} is not finished: trim to {first}"
            );
            assert!(
                old || full,
                "{at} of {id:?} is to be kept for replay: trim to {first}"
            );
        }
    }
}

fn is_in(ranges: &[LeaseRange], lease: LeaseName) -> bool {
    ranges.iter().any(|range| {
        let all = range.offset.0..range.offset.0 + u64::from(range.count);
        range.delivery == lease.delivery && all.contains(&lease.offset.0)
    })
}
