//! One record: what it must answer and change. Here are topics, tokens and the whole.

use std::collections::BTreeSet;

use millpond_protocol::control::DeadReason;
use millpond_protocol::name::check_topic;
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{
    ErrorCode, Offset, SessionId, Stamp, SubscriptionId, TopicConfig, TopicId,
};
use millpond_queue::{Effect, Expired, OffsetRun, Outcome, PRODUCER_IDLE_MS, Place, Queue, Record};

use crate::producers::Batch;
use crate::state::*;

/// One record with what the core made of it.
pub struct Applied<'a> {
    pub place: Place,
    pub stamp: Stamp,
    pub outcome: &'a Outcome,
    pub effects: &'a [Effect],
    pub core: &'a Queue,
}

impl Applied<'_> {
    pub fn code(&self) -> Option<ErrorCode> {
        match self.outcome {
            Outcome::Error(error) | Outcome::PublishRefused { error, .. } => Some(error.code),
            _ => None,
        }
    }

    /// True: it must have been accepted, and was. False: refused, with one of these codes.
    pub fn accepted(&self, reasons: &[ErrorCode]) -> bool {
        match (self.code(), reasons) {
            (None, []) => true,
            (Some(code), [_, ..]) if reasons.contains(&code) => false,
            (found, _) => panic!(
                "answer {found:?}, expected one of {reasons:?}: {:?}",
                self.outcome
            ),
        }
    }
}

impl Model {
    pub fn fold(&mut self, record: &Record<'_>, to: &Applied<'_>) {
        self.deaths.clear();
        self.lost.clear();
        self.maybe_lost.clear();
        match record {
            Record::Start { recovery_epoch } => {
                self.recovery_epoch = *recovery_epoch;
                self.start(to.stamp);
            }
            Record::TopicCreate { name, config } => self.topic_create(name, config, to),
            Record::TopicUpdate { topic, patch } => {
                let old = self.topics.get(topic).map(|topic| topic.config.clone());
                let new = old.map(|old| old.patched(patch));
                if to.accepted(&reasons(&[
                    (new.is_none(), ErrorCode::UnknownTopic),
                    (
                        new.as_ref().is_some_and(|new| new.check().is_err()),
                        ErrorCode::InvalidPolicy,
                    ),
                ])) {
                    self.topics.get_mut(topic).unwrap().config = new.unwrap();
                }
            }
            Record::TopicPurge { topic } => self.topic_purge(*topic, to),
            Record::TopicDelete { topic } => self.topic_delete(*topic, to),
            Record::SubscriptionCreate {
                topic,
                name,
                config,
                start,
            } => self.sub_create(*topic, name, config, *start, to),
            Record::SubscriptionUpdate {
                subscription,
                patch,
            } => self.sub_update(*subscription, patch, to),
            Record::SubscriptionPause { subscription } => self.pause(*subscription, true, to),
            Record::SubscriptionResume { subscription } => self.pause(*subscription, false, to),
            Record::SubscriptionSeek {
                subscription,
                to: target,
            } => self.seek(*subscription, *target, to),
            Record::SubscriptionDelete { subscription } => {
                if to.accepted(&self.unknown_sub(*subscription)) {
                    self.sub_delete(*subscription, to);
                }
            }
            Record::OpenProducer {
                topic,
                producer_id,
                resume,
                ..
            } => self.open_producer(*topic, *producer_id, *resume, to),
            Record::CloseProducer { producer, epoch } => {
                let known = self.producers.get(producer);
                if known.is_some_and(|known| known.name.is_none() && known.epoch == *epoch) {
                    self.producers.remove(producer);
                }
            }
            Record::Publish {
                topic,
                producer,
                epoch,
                previous,
                count,
                messages,
            } => {
                let batch = Batch::read(*previous, *count, messages);
                self.publish(*topic, *producer, *epoch, &batch, to);
            }
            Record::SessionOpen {
                subscription,
                session,
                token,
                ..
            } => self.session_open(*subscription, *session, *token, to),
            Record::Commit {
                subscription,
                session,
                next,
            } => self.commit(*subscription, *session, *next, to),
            Record::Trim { topic, first } => self.trim(*topic, first.0, to),
            Record::LetGo { topic, ranges } => self.let_go(*topic, ranges, to),
            Record::TokenAdd { name, hash } => {
                let known = self.tokens.contains_key(*name);
                if to.accepted(&reasons(&[(known, ErrorCode::AlreadyExists)])) {
                    self.tokens.insert((*name).to_owned(), *hash);
                }
            }
            Record::TokenRevoke { name } => {
                let unknown = !self.tokens.contains_key(*name);
                if to.accepted(&reasons(&[(unknown, ErrorCode::UnknownToken)])) {
                    self.tokens.remove(*name);
                }
            }
            Record::Skip { .. } | Record::Mark(_) => {}
            Record::Expire(Expired::Producers { producers }) => {
                for key in producers {
                    let known = self.producers.get(key);
                    let over = known.map(|known| known.active.plus_ms(PRODUCER_IDLE_MS));
                    // It may have come back to life meanwhile.
                    if over.is_some_and(|over| over <= to.stamp) {
                        self.producers.remove(key);
                    }
                }
            }
            _ => self.fold_lease(record, to),
        }
        self.check_losses(record, to);
        self.check_letters(to);
        self.adopt_first(to);
        for sub in self.subs.values_mut() {
            sub.floor = sub.floor.max(sub.unfinished_after(sub.floor));
            while sub.gone.contains(&sub.committed) {
                sub.committed += 1;
            }
        }
    }

    /// The core chooses what it lets go; nobody may need any of it.
    fn let_go(&mut self, id: TopicId, ranges: &[OffsetRun], to: &Applied<'_>) {
        assert!(to.accepted(&[]));
        let Some(topic) = self.topics.get(&id) else {
            return;
        };
        let (first, next) = (topic.first, topic.next());
        for range in ranges {
            let end = (range.offset.0 + u64::from(range.count)).min(next);
            for offset in range.offset.0.max(first)..end {
                let is_gone = to.core.is_let_go(id, Offset(offset), Offset(offset + 1));
                if is_gone && !self.topics[&id].gone.contains(&offset) {
                    assert!(self.may_go(id, offset), "{offset} of {id:?} is needed");
                    self.topics.get_mut(&id).unwrap().gone.insert(offset);
                }
            }
        }
    }

    /// Whether a body is only the message's own, and nobody can come to need it.
    fn may_go(&self, id: TopicId, offset: u64) -> bool {
        let message = &self.topics[&id].messages[offset as usize];
        let is_reference = message.letter.is_some() || message.copy;
        let mut letters = self.letters();
        // Where a letter was taken out, its body stands elsewhere, and stays there for other letters.
        let has_letter = letters.any(|(.., letter)| letter.body == (id, offset));
        !is_reference && !has_letter && !self.is_needed(id, offset)
    }

    /// A restart charges nothing; everybody has to come back.
    fn start(&mut self, stamp: Stamp) {
        self.pending.clear();
        self.holding = false;
        for session in self.sessions.values_mut() {
            session.attached = false;
            session.since = stamp;
            session.alive = stamp;
            session.marks.clear();
            session.sent.clear();
            session.begun = 0;
            session.stuck = false;
            session.read = None;
        }
    }

    pub fn fresh_id(&mut self, kind: u64, id: u64) {
        assert!(
            self.ids.insert(kind << 56 | id),
            "an id was used twice: {kind} {id}"
        );
    }

    fn topic_create(&mut self, name: &str, config: &TopicConfig, to: &Applied<'_>) {
        if to.accepted(&reasons(&[
            (check_topic(name).is_err(), ErrorCode::InvalidName),
            (config.check().is_err(), ErrorCode::InvalidPolicy),
            (self.topic_named(name).is_some(), ErrorCode::AlreadyExists),
        ])) {
            let Outcome::TopicCreated(id) = *to.outcome else {
                panic!("a created topic has an id: {:?}", to.outcome);
            };
            self.add_topic(id, name, config.clone(), false);
        }
    }

    fn add_topic(&mut self, id: TopicId, name: &str, config: TopicConfig, is_dead: bool) {
        self.fresh_id(1, u64::from(id.0));
        let topic = Topic {
            name: name.to_owned(),
            config,
            first: 0,
            messages: Vec::new(),
            gone: BTreeSet::new(),
            is_dead,
        };
        self.topics.insert(id, topic);
    }

    /// The topic for letters, which the core makes if it is missing.
    pub fn dead_topic(&mut self, name: &str, core: &Queue) -> TopicId {
        if let Some(id) = self.topic_named(name) {
            // From now on, whoever sends letters there or no longer does.
            self.topics.get_mut(&id).unwrap().is_dead = true;
            return id;
        }
        let id = core
            .topic_id(name)
            .expect("there is always a dead-letter topic");
        let config = core
            .topic_view(id)
            .expect("it was just found by its name")
            .config;
        self.add_topic(id, name, config, true);
        id
    }

    fn topic_purge(&mut self, id: TopicId, to: &Applied<'_>) {
        if !to.accepted(&reasons(&[(
            !self.topics.contains_key(&id),
            ErrorCode::UnknownTopic,
        )])) {
            return;
        }
        for sub in self.subs_of(id) {
            let next = self.topics[&id].next();
            for offset in 0..self.subs[&sub].items.len() as u64 {
                self.vanish(sub, offset);
            }
            let sub = self.subs.get_mut(&sub).unwrap();
            sub.committed = sub.committed.max(next);
        }
        let topic = self.topics.get_mut(&id).unwrap();
        topic.first = topic.next();
        topic
            .messages
            .iter_mut()
            .for_each(|message| message.letter = None);
    }

    /// An unfinished message is no more.
    fn vanish(&mut self, sub: SubscriptionId, offset: u64) {
        if !self.subs[&sub].items[offset as usize].is_finished() {
            self.revoke(sub, offset, Ending::Revoked);
            self.item(sub, offset).state = State::Gone;
        }
    }

    /// Takes the lease away, if there is one; the new state is the caller's to set.
    pub fn revoke(&mut self, sub: SubscriptionId, offset: u64, ending: Ending) {
        let item = self.item(sub, offset);
        if let Some((session, delivery)) = item.lease() {
            item.end(Some(ending));
            self.lost.insert((session, name(offset, delivery)));
        }
    }

    pub fn item(&mut self, sub: SubscriptionId, offset: u64) -> &mut Item {
        &mut self.subs.get_mut(&sub).unwrap().items[offset as usize]
    }

    fn topic_delete(&mut self, id: TopicId, to: &Applied<'_>) {
        let Some(topic) = self.topics.get(&id) else {
            to.accepted(&[ErrorCode::UnknownTopic]);
            return;
        };
        let in_use = self
            .subs
            .values()
            .any(|sub| sub.topic != id && sub.dead_topic == topic.name);
        if in_use && to.code().is_some() {
            return;
        }
        assert!(to.accepted(&[]));
        for sub in self.subs_of(id) {
            self.sub_delete(sub, to);
        }
        self.producers.retain(|_, producer| producer.topic != id);
        self.topics.remove(&id);
        for (dead, topic) in &mut self.topics {
            for (offset, message) in topic.messages.iter_mut().enumerate() {
                let is_kept = to.core.letter(*dead, Offset(offset as u64)).is_some();
                if message.body.0 == id && !is_kept {
                    message.letter = None;
                }
            }
        }
        assert!(
            to.effects.contains(&Effect::TopicGone { topic: id }),
            "{:?}",
            to.effects
        );
    }

    fn sub_delete(&mut self, id: SubscriptionId, to: &Applied<'_>) {
        for session in self.sessions_of(id) {
            let ended = Effect::SessionEnded {
                session,
                code: ErrorCode::Deleted,
            };
            assert!(
                to.effects.contains(&ended),
                "{ended:?} is missing in {:?}",
                to.effects
            );
            self.allow_losses(session);
            self.sessions.remove(&session);
        }
        self.subs.remove(&id);
    }

    pub fn allow_losses(&mut self, session: SessionId) {
        let leases = self.applied_leases(session).into_iter();
        self.maybe_lost.extend(leases.map(|lease| (session, lease)));
    }

    /// Every letter: the dead-letter topic, the offset there, what it tells.
    pub fn letters(&self) -> impl Iterator<Item = (TopicId, u64, &Death)> {
        self.topics.iter().flat_map(|(id, topic)| {
            let all = topic.messages.iter().enumerate();
            all.filter_map(|(at, message)| Some((*id, at as u64, message.letter.as_ref()?)))
        })
    }

    pub fn add_message(&mut self, topic: TopicId, message: Message) {
        self.topics.get_mut(&topic).unwrap().messages.push(message);
        for id in self.subs_of(topic) {
            let sub = self.subs.get_mut(&id).unwrap();
            if sub.is_queue() {
                sub.items.push(Item::default());
            }
        }
    }

    /// Whether somebody has not finished this message.
    pub fn is_needed(&self, topic: TopicId, offset: u64) -> bool {
        self.is_wanted(topic, offset, |item| !item.is_finished())
    }

    /// The same without what a redrive brought back: its body stays by itself.
    pub fn is_unread(&self, topic: TopicId, offset: u64) -> bool {
        self.is_wanted(topic, offset, |item| {
            !item.is_finished() && item.redrives == 0
        })
    }

    fn is_wanted(&self, topic: TopicId, offset: u64, counts: impl Fn(&Item) -> bool) -> bool {
        if self.topics[&topic].gone.contains(&offset) {
            return false;
        }
        let subs = self.subs_of(topic);
        let one_wants = |id: &SubscriptionId| {
            let sub = &self.subs[id];
            match sub.is_queue() {
                true => counts(&sub.items[offset as usize]),
                false => sub.committed <= offset,
            }
        };
        subs.is_empty() || subs.iter().any(one_wants)
    }

    /// Nothing unfinished goes, unless the topic says so.
    fn trim(&mut self, id: TopicId, first: u64, to: &Applied<'_>) {
        let Some(topic) = self.topics.get(&id) else {
            return;
        };
        let on_limit = topic.config.on_limit;
        let end = first.min(topic.next());
        if self.subs_of(id).is_empty() {
            let topic = self.topics.get_mut(&id).unwrap();
            topic.first = topic.first.max(end);
            let gone = topic.messages.iter_mut().take(end as usize);
            gone.for_each(|message| message.letter = None);
        }
        if on_limit == OnLimit::RefusePublish {
            return;
        }
        // What was redriven below the floor goes only if something above it has to.
        let needs = |id: &SubscriptionId| match &self.subs[id] {
            sub if sub.is_queue() => sub.floor < end,
            sub => sub.committed < end,
        };
        if !self.subs_of(id).iter().any(needs) {
            return;
        }
        for offset in 0..end {
            for sub in self.subs_of(id) {
                let item = self.subs[&sub].items.get(offset as usize);
                // What was redriven meanwhile may stay.
                let stays = item.is_none_or(|item| {
                    item.is_finished()
                        || (item.redrives > 0
                            && on_limit == OnLimit::DeadLetter
                            && !self.is_letter_new(sub, offset, to))
                });
                if !stays {
                    let has_dead_topic = !self.subs[&sub].dead_topic.is_empty();
                    if on_limit == OnLimit::DeadLetter && has_dead_topic {
                        self.revoke(sub, offset, Ending::Revoked);
                        self.die(sub, offset, vec![DeadReason::Expired], to);
                    } else {
                        // Nothing can be filed, but it counts.
                        let counts = on_limit == OnLimit::DeadLetter && self.subs[&sub].is_queue();
                        self.counts.dead += u64::from(counts);
                        self.vanish(sub, offset);
                    }
                }
            }
        }
        for sub in self.subs_of(id) {
            let sub = self.subs.get_mut(&sub).unwrap();
            sub.committed = sub.committed.max(end);
        }
    }

    /// Whether it is over for everybody, also where nobody reads.
    fn is_expired(&self, id: TopicId, offset: u64, stamp: Stamp) -> bool {
        let topic = &self.topics[&id];
        let message = &topic.messages[offset as usize];
        let own = Some(message.ttl_ms).filter(|ms| *ms > 0);
        let ttl = own.or(topic.config.ttl_ms);
        let unread = self.subs_of(id).is_empty();
        unread && ttl.is_some_and(|ms| message.published.plus_ms(ms) <= stamp)
    }

    /// The core lets finished messages go when it likes, but only those.
    fn adopt_first(&mut self, to: &Applied<'_>) {
        for id in self.topics.keys().copied().collect::<Vec<_>>() {
            let (first, told) = (self.topics[&id].first, to.core.first_kept(id).0);
            assert!(
                told >= first,
                "the first offset moved back from {first} to {told}"
            );
            assert!(told <= self.topics[&id].next(), "{told} is beyond the end");
            for offset in first..told {
                assert!(
                    !self.is_unread(id, offset) || self.is_expired(id, offset, to.stamp),
                    "{offset} of {id:?} is not finished, but gone"
                );
                self.topics.get_mut(&id).unwrap().messages[offset as usize].letter = None;
            }
            self.topics.get_mut(&id).unwrap().first = told;
        }
    }
}

impl Sub {
    /// The first unfinished message from `from` on.
    fn unfinished_after(&self, from: u64) -> u64 {
        let rest = self.items.iter().enumerate().skip(from as usize);
        let first = rest
            .filter(|(_, item)| !item.is_finished())
            .map(|(at, _)| at as u64)
            .next();
        first.unwrap_or(self.items.len() as u64)
    }
}

/// The codes of those reasons that hold.
pub fn reasons(all: &[(bool, ErrorCode)]) -> Vec<ErrorCode> {
    all.iter()
        .filter(|(holds, _)| *holds)
        .map(|(_, code)| *code)
        .collect()
}
