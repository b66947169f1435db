//! I5 to I7: what consumers were given, what they said, and where every message ended.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::control::DeadReason;

use super::Invariant::{I1, I4, I5, I6, I7};
use super::Verdict;
use super::published::Published;
use crate::history::{
    Admin, Delivery, End, Event, History, How, LetterSeen, Settling, SubEnd, SubNo, SubRules,
};

#[derive(Debug)]
pub struct Consumed {
    subs: Vec<Sub>,
    /// Taken in, not answered.
    settling: BTreeMap<u64, Settle>,
    committing: BTreeMap<u64, (SubNo, u64, usize)>,
    sessions: BTreeSet<u64>,
    /// Counts processes.
    process: u64,
}

#[derive(Debug)]
struct Sub {
    rules: SubRules,
    keeps_all: bool,
    /// What all others may have finished when it began, or went back: that may have been let go.
    let_go: BTreeSet<u64>,
    /// Another had been moved by then: nobody knows what it had finished.
    is_unsure: bool,
    messages: BTreeMap<u64, Message>,
    /// The last seek, redrive or purge that may have changed what is known.
    upset: Option<usize>,
    was_sought: bool,
    /// A seek was taken in and has not been applied yet: told once for each.
    is_being_sought: bool,
    was_redriven: bool,
    letters_were_purged: bool,
    /// The first floor that was shown: messages below it were never its own.
    start: Option<u64>,
    floor: u64,
    /// Stream mode: who reads, and which offset comes next.
    reading: Option<(u64, u64)>,
    /// The furthest commit that was asked for; what is read goes on behind it.
    asked: u64,
}

#[derive(Debug, Default)]
struct Message {
    last: Option<Last>,
    deliveries: u64,
    /// Failures that were answered, and those that may have been.
    nacked: u64,
    was_rejected: bool,
    ack: Ack,
    /// Endings other than acks that were asked for, by session and delivery.
    ended: BTreeSet<(u64, u32)>,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
enum Ack {
    #[default]
    None,
    /// Asked for, not answered.
    Maybe,
    Done,
}

/// The last delivery, and what was said of it.
#[derive(Clone, Debug)]
struct Last {
    delivery: Delivery,
    event: usize,
    process: u64,
    begun: bool,
    /// Its session was told that it is over.
    lost: bool,
    /// In this order; of those that were not answered any may have counted.
    said: Vec<Said>,
}

#[derive(Copy, Clone, Debug)]
struct Said {
    /// The settlement and the place in it: one may say several things of a lease.
    settle: (u64, usize),
    how: How,
    at: u64,
    is_answered: bool,
}

impl Said {
    /// The wait that a nack asked for, if it is one.
    fn own_us(&self) -> Option<Option<u64>> {
        match self.how {
            How::Nack { delay_ms } => Some(delay_ms.map(|ms| ms * 1_000)),
            _ => None,
        }
    }

    fn is_failure(&self) -> bool {
        self.is_answered && self.own_us().is_some()
    }
}

#[derive(Debug)]
struct Settle {
    sub: SubNo,
    session: u64,
    items: Vec<Settling>,
    /// The ordinals of those that were not said before.
    fresh: Vec<usize>,
    event: usize,
}

impl Consumed {
    pub fn new(history: &History) -> Self {
        let subs = history.subs.iter().map(|rules| Sub {
            rules: rules.clone(),
            keeps_all: history.topics[rules.topic].keeps_all,
            let_go: BTreeSet::new(),
            is_unsure: false,
            messages: BTreeMap::new(),
            upset: None,
            was_sought: false,
            is_being_sought: false,
            was_redriven: false,
            letters_were_purged: false,
            start: None,
            floor: 0,
            reading: None,
            asked: 0,
        });
        Self {
            subs: subs.collect(),
            settling: BTreeMap::new(),
            committing: BTreeMap::new(),
            sessions: BTreeSet::new(),
            process: 0,
        }
    }

    pub fn stopped(&mut self) {
        self.process += 1;
        for sub in &mut self.subs {
            sub.reading = None;
            // What was shown meanwhile was from before the seek, which may have become durable.
            if std::mem::take(&mut sub.is_being_sought) {
                sub.floor = 0;
            }
        }
    }

    pub fn see(&mut self, now: usize, event: &Event, verdict: &mut Verdict) {
        match event {
            Event::SessionOpened { session } => {
                verdict.check(self.sessions.insert(*session), I6, || {
                    format!("event {now}: session {session} begins for the second time")
                });
            }
            Event::Delivered(delivery) => self.delivered(now, *delivery, verdict),
            Event::Begun {
                sub,
                offset,
                delivery,
            } => {
                let message = self.subs[*sub].messages.get_mut(offset);
                let last = message.and_then(|message| message.last.as_mut());
                if let Some(last) = last.filter(|last| last.delivery.delivery == *delivery) {
                    last.begun = true;
                }
            }
            Event::Lost {
                sub,
                session,
                leases,
            } => {
                for (offset, delivery) in leases {
                    let message = self.subs[*sub].messages.get_mut(offset);
                    let last = message.and_then(|message| message.last.as_mut());
                    let this = (*session, *delivery);
                    if let Some(last) = last
                        && (last.delivery.session, last.delivery.delivery) == this
                    {
                        last.lost = true;
                    }
                }
            }
            Event::SettleTaken {
                id,
                sub,
                session,
                items,
                at,
            } => {
                let mut fresh = Vec::new();
                for (ordinal, item) in items.iter().enumerate() {
                    if self.subs[*sub].said((*id, ordinal), *session, *item, *at) {
                        fresh.push(ordinal);
                    }
                }
                let settle = Settle {
                    sub: *sub,
                    session: *session,
                    items: items.clone(),
                    fresh,
                    event: now,
                };
                self.settling.insert(*id, settle);
            }
            Event::Settled { id, refused } => {
                if let Some(settle) = self.settling.remove(id) {
                    let sub = &mut self.subs[settle.sub];
                    sub.stale(now, self.process, &settle, refused, verdict);
                    sub.settled(*id, &settle, refused);
                }
            }
            Event::Active { sub, session, from } => {
                self.subs[*sub].reading = Some((*session, *from));
            }
            Event::CommitTaken { id, sub, next } => {
                self.committing.insert(*id, (*sub, *next, now));
                let sub = &mut self.subs[*sub];
                sub.asked = sub.asked.max(*next);
            }
            Event::Committed { id, refused } => {
                if let Some((sub, next, taken)) = self.committing.remove(id)
                    && !refused
                    && self.subs[sub].upset.is_none_or(|upset| upset < taken)
                {
                    let sub = &mut self.subs[sub];
                    sub.floor = sub.floor.max(next);
                }
            }
            Event::Floor { sub, floor } => {
                if self.subs[*sub].start.is_none() {
                    self.note_let_go(*sub);
                }
                self.subs[*sub].floor(now, *sub, *floor, verdict);
            }
            Event::Admin(admin) => self.upset(now, *admin),
            _ => {}
        }
    }

    pub fn end(&mut self, end: &End, published: &Published, verdict: &mut Verdict) {
        for seen in &end.subs {
            let sub = &mut self.subs[seen.sub];
            sub.floor(usize::MAX, seen.sub, seen.floor, verdict);
            if !sub.rules.is_stream {
                sub.letters(seen, published, verdict);
                if end.stuck.is_empty() {
                    sub.account(seen, published, verdict);
                }
            }
            sub.due_first(seen.sub, published, verdict);
        }
    }

    fn delivered(&mut self, now: usize, delivery: Delivery, verdict: &mut Verdict) {
        let process = self.process;
        let sub = &mut self.subs[delivery.sub];
        verdict.check(delivery.digest.is_some(), I1, || {
            format!("event {now}: delivered without a body: {delivery:?}")
        });
        if sub.rules.is_stream {
            sub.read(now, delivery, verdict);
        } else {
            sub.leased(now, process, delivery, verdict);
        }
    }

    fn upset(&mut self, now: usize, admin: Admin) {
        for (no, sub) in self.subs.iter_mut().enumerate() {
            let is_meant = match admin {
                Admin::Seek { sub } | Admin::Redrive { sub } | Admin::DeadPurge { sub } => {
                    sub == no
                }
                Admin::Purge { topic } => sub.rules.topic == topic,
            };
            if is_meant {
                sub.upset(now, admin);
            }
        }
        if let Admin::Seek { sub } = admin {
            self.note_let_go(sub);
        }
    }

    /// A subscription begins or goes back: it passes over what was let go, and only that.
    fn note_let_go(&mut self, no: SubNo) {
        let this = &self.subs[no];
        let others = self.subs.iter().enumerate().filter(|(other, sub)| {
            *other != no && sub.rules.topic == this.rules.topic && sub.start.is_some()
        });
        let is_unsure = others.clone().any(|(_, sub)| sub.was_sought);
        let mut others = others.map(|(_, sub)| sub.may_have_finished());
        let Some(first) = others.next().filter(|_| !this.keeps_all) else {
            return;
        };
        let all = others.fold(first, |all, more| &all & &more);
        let this = &mut self.subs[no];
        this.is_unsure |= is_unsure;
        this.let_go.extend(all);
    }
}

impl Sub {
    fn upset(&mut self, now: usize, admin: Admin) {
        match admin {
            Admin::Seek { .. } => {
                self.was_sought = true;
                self.is_being_sought = !self.is_being_sought;
                self.floor = 0;
                self.reading = None;
            }
            Admin::Purge { .. } => {
                self.was_sought = true;
                self.reading = None;
            }
            Admin::Redrive { .. } => self.was_redriven = true,
            Admin::DeadPurge { .. } => {
                self.letters_were_purged = true;
                return;
            }
        }
        self.upset = Some(now);
        for message in self.messages.values_mut() {
            if message.ack == Ack::Done && self.was_sought {
                message.ack = Ack::Maybe;
            }
        }
    }

    fn may_have_finished(&self) -> BTreeSet<u64> {
        if self.rules.is_stream {
            return (0..self.asked).collect();
        }
        let acked = self.messages.iter().filter(|(_, m)| m.ack != Ack::None);
        acked.map(|(offset, _)| *offset).collect()
    }

    fn read(&mut self, now: usize, delivery: Delivery, verdict: &mut Verdict) {
        let Some((session, next)) = self.reading else {
            return;
        };
        // A seek that is under way moves the reading without a notice to wait for.
        if session == delivery.session {
            let may_lack =
                |offset| offset < self.asked || self.is_unsure || self.let_go.contains(&offset);
            let passes_over = delivery.offset > next && (next..delivery.offset).all(may_lack);
            verdict.check(delivery.offset == next || passes_over, I4, || {
                format!("event {now}: the stream goes on at {next}, not with {delivery:?}")
            });
            self.reading = Some((session, delivery.offset + 1));
        }
    }

    fn leased(&mut self, now: usize, process: u64, new: Delivery, verdict: &mut Verdict) {
        let upset = self.upset;
        let message = self.messages.entry(new.offset).or_default();
        verdict.check(message.ack != Ack::Done, I7, || {
            format!("event {now}: acknowledged and delivered again: {new:?}")
        });
        verdict.check(new.attempt <= self.rules.max_attempts, I6, || {
            format!(
                "event {now}: more than {} attempts: {new:?}",
                self.rules.max_attempts
            )
        });
        let before = message.last.replace(Last {
            delivery: new,
            event: now,
            process,
            begun: false,
            lost: false,
            said: Vec::new(),
        });
        message.deliveries += 1;
        let Some(before) = before else {
            if upset.is_none() {
                verdict.check(new.attempt == 1, I6, || {
                    format!("event {now}: the first attempt has another number: {new:?}")
                });
            }
            return;
        };
        verdict.check(
            // A hand-out that came to nothing leaves its number to the next one.
            before.process != process || before.lost || new.delivery > before.delivery.delivery,
            I6,
            || {
                format!(
                    "event {now}: the lease {:?} is given again: {new:?}",
                    before.delivery
                )
            },
        );
        // Counters may have begun anew.
        if upset.is_none_or(|upset| upset < before.event) {
            self.again(now, &before, new, verdict);
        }
    }

    /// A redelivery: counted rightly, and not too early.
    fn again(&self, now: usize, before: &Last, new: Delivery, verdict: &mut Verdict) {
        let (old, attempt) = (before.delivery, new.attempt);
        let mut nacks = before.said.iter().filter(|said| said.own_us().is_some());
        let may_have_failed = before.begun || nacks.clone().next().is_some();
        let right = match nacks.clone().any(|said| said.is_answered) {
            true => attempt == old.attempt + 1,
            false if may_have_failed => attempt == old.attempt || attempt == old.attempt + 1,
            false => attempt == old.attempt,
        };
        verdict.check(right, I6, || {
            format!(
                "event {now}: after attempt {} of {before:?} comes {new:?}",
                old.attempt
            )
        });
        if let [said] = before.said.as_slice()
            && said.is_answered
            && let How::Release { delay_ms: Some(ms) } = said.how
        {
            verdict.check(new.at >= said.at + ms * 1_000, I5, || {
                format!(
                    "event {now}: released at {} for {ms} ms, delivered {new:?}",
                    said.at
                )
            });
        }
        if attempt != old.attempt + 1 {
            return;
        }
        let backoff_us = self.rules.least_wait_us(old.attempt);
        let due = |said: &Said| said.at + said.own_us().flatten().unwrap_or(backoff_us);
        let is_sure = matches!(before.said.as_slice(), [said] if said.is_answered);
        let due = match (is_sure, nacks.next()) {
            (true, Some(said)) => due(said),
            // Any of them may have counted, or something else that ended the lease before.
            _ => {
                let least = nacks.filter_map(|said| said.own_us().flatten()).min();
                let first = before
                    .said
                    .iter()
                    .filter_map(|said| said.own_us().flatten())
                    .min();
                let least = least.into_iter().chain(first).chain([backoff_us]).min();
                old.at + least.unwrap_or(0)
            }
        };
        verdict.check(new.at >= due, I5, || {
            format!("event {now}: due at {due} at the earliest after {before:?}, came {new:?}")
        });
    }

    /// True: nobody has ended this lease before otherwise than by an ack.
    fn said(&mut self, settle: (u64, usize), session: u64, item: Settling, at: u64) -> bool {
        let Some(message) = self.messages.get_mut(&item.offset) else {
            return false;
        };
        let is_ending = !matches!(item.how, How::Ack | How::Extend);
        let is_fresh = is_ending && message.ended.insert((session, item.delivery));
        match item.how {
            How::Ack if message.ack == Ack::None => message.ack = Ack::Maybe,
            How::Reject => message.was_rejected = true,
            _ => {}
        }
        let last = message.last.as_mut();
        let last = last.filter(|last| {
            (last.delivery.session, last.delivery.delivery) == (session, item.delivery)
        });
        let Some(last) = last else {
            return is_fresh;
        };
        // Who is still working has begun.
        if item.how == How::Extend {
            last.begun = true;
        } else {
            last.said.push(Said {
                settle,
                how: item.how,
                at,
                is_answered: false,
            });
        }
        is_fresh
    }

    /// Only an ack may come from somebody else than the holder, and only while there is none.
    fn stale(
        &self,
        now: usize,
        process: u64,
        settle: &Settle,
        refused: &[usize],
        verdict: &mut Verdict,
    ) {
        if self.upset.is_some() {
            return;
        }
        for (ordinal, item) in settle.items.iter().enumerate() {
            let lease = (settle.session, item.delivery);
            let is_ending = !matches!(item.how, How::Ack | How::Extend);
            let Some(message) = self.messages.get(&item.offset) else {
                continue;
            };
            let Some(last) = &message.last else {
                continue;
            };
            let is_over = (last.delivery.session, last.delivery.delivery) != lease
                && last.process == process
                && last.event < settle.event
                && !last.lost;
            // To repeat what was said before is fine.
            let is_new = settle.fresh.contains(&ordinal);
            let is_good = refused.binary_search(&ordinal).is_err();
            verdict.check(!(is_ending && is_over && is_new && is_good), I6, || {
                format!(
                    "event {now}: {item:?} of session {} counts against {last:?}",
                    lease.0
                )
            });
        }
    }

    fn settled(&mut self, id: u64, settle: &Settle, refused: &[usize]) {
        let is_clear = self.upset.is_none_or(|upset| upset < settle.event);
        for (ordinal, item) in settle.items.iter().enumerate() {
            let Some(message) = self.messages.get_mut(&item.offset) else {
                continue;
            };
            let is_good = refused.binary_search(&ordinal).is_err();
            if is_good && item.how == How::Ack && is_clear {
                message.ack = Ack::Done;
            }
            let last = message.last.as_mut().filter(|last| {
                (last.delivery.session, last.delivery.delivery) == (settle.session, item.delivery)
            });
            let Some(last) = last else {
                continue;
            };
            if !is_good {
                last.said.retain(|said| said.settle != (id, ordinal));
                continue;
            }
            let was_failed = last.said.iter().any(|said| said.is_failure());
            let Some(said) = last
                .said
                .iter_mut()
                .find(|said| said.settle == (id, ordinal))
            else {
                continue;
            };
            said.is_answered = true;
            // Repeating a settlement is fine, and counts once.
            message.nacked += u64::from(said.own_us().is_some() && !was_failed);
        }
    }

    fn floor(&mut self, now: usize, no: SubNo, floor: u64, verdict: &mut Verdict) {
        verdict.check(floor >= self.floor, I7, || {
            format!(
                "event {now}: subscription {no} is back at {floor} from {}",
                self.floor
            )
        });
        self.floor = floor;
        self.start.get_or_insert(floor);
    }

    /// Dead exactly once, and for a reason.
    fn letters(&self, seen: &SubEnd, published: &Published, verdict: &mut Verdict) {
        let no = seen.sub;
        let mut offsets: Vec<_> = seen.letters.iter().map(|letter| letter.offset).collect();
        offsets.sort_unstable();
        for pair in offsets.windows(2) {
            verdict.check(pair[0] != pair[1], I6, || {
                format!("offset {} of subscription {no} is dead twice", pair[0])
            });
        }
        for letter in &seen.letters {
            self.letter(no, letter, published, verdict);
        }
    }

    fn letter(&self, no: SubNo, letter: &LetterSeen, published: &Published, verdict: &mut Verdict) {
        let none = Message::default();
        let message = self.messages.get(&letter.offset).unwrap_or(&none);
        verdict.check(message.ack != Ack::Done, I6, || {
            format!("subscription {no}: acknowledged and dead: {letter:?}")
        });
        if self.upset.is_none() {
            let possible = u64::from(letter.failures) <= message.deliveries
                && u64::from(letter.failures) >= message.nacked;
            verdict.check(possible, I6, || {
                format!(
                    "subscription {no}: {} nacks and {} deliveries made {letter:?}",
                    message.nacked, message.deliveries
                )
            });
        }
        let sent = published.sent_at(self.rules.topic, letter.offset);
        let right = match letter.reason {
            DeadReason::MaxAttempts => letter.failures == self.rules.max_attempts,
            DeadReason::Rejected => message.was_rejected,
            DeadReason::MaxDeliveries => letter.deliveries >= self.rules.max_deliveries,
            DeadReason::Expired => sent.is_none_or(|(sent, _)| sent.ttl_ms > 0),
            DeadReason::MaxAge | DeadReason::Undecodable | DeadReason::Damaged => false,
        };
        verdict.check(right, I6, || {
            format!(
                "subscription {no}: dead without a reason: {letter:?}, attempts {}",
                self.rules.max_attempts
            )
        });
    }

    /// Every message ended as acknowledged or dead.
    fn account(&self, seen: &SubEnd, published: &Published, verdict: &mut Verdict) {
        let topic = self.rules.topic;
        let is_unknown = self.letters_were_purged || self.was_sought || self.is_unsure;
        if published.is_purged(topic) || is_unknown {
            return;
        }
        let mut dead: Vec<_> = seen.letters.iter().map(|letter| letter.offset).collect();
        dead.sort_unstable();
        let start = self.start.unwrap_or(0);
        for offset in published.offsets(topic).filter(|offset| *offset >= start) {
            let ack = self
                .messages
                .get(&offset)
                .map_or(Ack::None, |message| message.ack);
            let is_dead = dead.binary_search(&offset).is_ok();
            let is_gone = self.let_go.contains(&offset);
            verdict.check(ack != Ack::None || is_dead || is_gone, I6, || {
                format!(
                    "subscription {}: offset {offset} is finished, but nobody acknowledged it and it \
                     is not dead",
                    seen.sub
                )
            });
        }
    }

    /// Delayed messages did not come before their time.
    fn due_first(&self, no: SubNo, published: &Published, verdict: &mut Verdict) {
        // A redrive wants to be tried at once.
        if self.rules.is_stream || self.was_redriven {
            return;
        }
        for (offset, message) in &self.messages {
            let sent = published.sent_at(self.rules.topic, *offset);
            if let (Some((sent, taken)), Some(last)) = (sent, &message.last) {
                verdict.check(last.delivery.at >= taken + sent.delay_ms * 1_000, I5, || {
                    format!("subscription {no}: {sent:?} taken in at {taken} came too early: {last:?}")
                });
            }
        }
    }
}
