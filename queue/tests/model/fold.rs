//! Records that administer, publish and open: what each must answer and change.

use millpond_protocol::control::DeadReason;
use millpond_protocol::hot::AckKind;
use millpond_protocol::message::MessageView;
use millpond_protocol::name::{check_subscription, check_topic, default_dead_letter};
use millpond_protocol::policy::{OnLimit, SubscriptionMode};
use millpond_protocol::{
    Epoch, ErrorCode, Offset, ProducerKey, Sequence, SessionId, Stamp, SubscriptionConfig,
    SubscriptionId, TopicConfig, TopicId,
};
use millpond_queue::{
    Effect, Expired, Outcome, PRODUCER_IDLE_MS, Place, Queue, Record, StartPosition,
};

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
            Record::Skip { .. } => {}
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
        }
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
            session.read = None;
        }
    }

    fn fresh_id(&mut self, kind: u64, id: u64) {
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

    fn unknown_sub(&self, id: SubscriptionId) -> Vec<ErrorCode> {
        reasons(&[(!self.subs.contains_key(&id), ErrorCode::UnknownSubscription)])
    }

    fn sub_create(
        &mut self,
        topic: TopicId,
        name: &str,
        config: &SubscriptionConfig,
        start: StartPosition,
        to: &Applied<'_>,
    ) {
        let Some(known) = self.topics.get(&topic) else {
            to.accepted(&[
                ErrorCode::UnknownTopic,
                ErrorCode::InvalidName,
                ErrorCode::InvalidPolicy,
            ]);
            return;
        };
        let (first, next) = (known.first, known.next());
        let mut dead_topic = String::new();
        let takes_letters = self.takes_letters(topic);
        if config.mode == SubscriptionMode::Queue && !takes_letters {
            let default = default_dead_letter(&known.name, name);
            dead_topic = config.dead_letter.clone().unwrap_or(default);
        }
        let beyond = matches!(start, StartPosition::At(at) if at.0 > next);
        if beyond && to.code() == Some(ErrorCode::OffsetOutOfRange) {
            return;
        }
        let cycle = self.cycle(topic, &dead_topic);
        let is_stream = config.mode == SubscriptionMode::Stream;
        if is_stream && config.dead_letter.is_some() && to.code() == Some(ErrorCode::WrongMode) {
            return;
        }
        // A dead-letter topic has none of its own.
        let chain =
            takes_letters && config.dead_letter.is_some() || self.sends_letters(&dead_topic);
        if chain && to.code() == Some(ErrorCode::DeadLetterCycle) {
            return;
        }
        if !to.accepted(&reasons(&[
            (check_subscription(name).is_err(), ErrorCode::InvalidName),
            (config.check().is_err(), ErrorCode::InvalidPolicy),
            (
                self.sub_named(topic, name).is_some(),
                ErrorCode::AlreadyExists,
            ),
            (cycle, ErrorCode::DeadLetterCycle),
        ])) {
            return;
        }
        let Outcome::SubscriptionCreated(id) = *to.outcome else {
            panic!("a created subscription has an id: {:?}", to.outcome);
        };
        self.fresh_id(2, u64::from(id.0));
        let start = clamp(start, first, next);
        let mut items = vec![Item::default(); next as usize];
        items
            .iter_mut()
            .take(start as usize)
            .for_each(|item| item.state = State::Gone);
        if config.mode == SubscriptionMode::Stream {
            items.clear();
        }
        let sub = Sub {
            id,
            topic,
            name: name.to_owned(),
            config: config.clone(),
            dead_topic: dead_topic.clone(),
            paused: false,
            items,
            floor: start,
            committed: start,
            line: Vec::new(),
            sought: false,
        };
        self.subs.insert(id, sub);
        if !dead_topic.is_empty() {
            self.dead_topic(&dead_topic, to.core);
        }
    }

    /// Whether letters of some subscription go to this topic.
    fn takes_letters(&self, id: TopicId) -> bool {
        let topic = &self.topics[&id];
        topic.is_dead || self.subs.values().any(|sub| sub.dead_topic == topic.name)
    }

    /// Whether letters of some subscription come from this topic.
    fn sends_letters(&self, name: &str) -> bool {
        let Some(id) = self.topic_named(name) else {
            return false;
        };
        let mut subs = self.subs.values().filter(|sub| sub.topic == id);
        subs.any(|sub| !sub.dead_topic.is_empty())
    }

    /// Whether letters of a subscription of `topic` would come round to it again.
    fn cycle(&self, topic: TopicId, dead: &str) -> bool {
        let mut seen = vec![self.topics[&topic].name.clone()];
        let mut ahead = vec![dead.to_owned()];
        while let Some(name) = ahead.pop() {
            if name == seen[0] {
                return true;
            }
            if seen.contains(&name) {
                continue;
            }
            if let Some(id) = self.topic_named(&name) {
                let subs = self.subs.values().filter(|sub| sub.topic == id);
                ahead.extend(subs.map(|sub| sub.dead_topic.clone()));
            }
            seen.push(name);
        }
        false
    }

    fn sub_update(
        &mut self,
        id: SubscriptionId,
        patch: &millpond_protocol::policy::SubscriptionPatch,
        to: &Applied<'_>,
    ) {
        let Some(sub) = self.subs.get(&id) else {
            to.accepted(&[ErrorCode::UnknownSubscription]);
            return;
        };
        let new = sub.config.patched(patch);
        let dead_topic = patch.dead_letter.clone().unwrap_or(sub.dead_topic.clone());
        let chain = patch
            .dead_letter
            .as_deref()
            .is_some_and(|name| self.sends_letters(name));
        let own = self.takes_letters(sub.topic) || !sub.is_queue() || chain;
        if own && patch.dead_letter.is_some() && to.code().is_some() {
            return;
        }
        let cycle = self.cycle(sub.topic, &dead_topic);
        if to.accepted(&reasons(&[
            (new.check().is_err(), ErrorCode::InvalidPolicy),
            (cycle, ErrorCode::DeadLetterCycle),
        ])) {
            let sub = self.subs.get_mut(&id).unwrap();
            sub.config = new;
            sub.dead_topic = dead_topic.clone();
            if !dead_topic.is_empty() {
                self.dead_topic(&dead_topic, to.core);
            }
        }
    }

    fn pause(&mut self, id: SubscriptionId, paused: bool, to: &Applied<'_>) {
        if to.accepted(&self.unknown_sub(id)) {
            self.subs.get_mut(&id).unwrap().paused = paused;
        }
    }

    fn seek(&mut self, id: SubscriptionId, target: StartPosition, to: &Applied<'_>) {
        let Some(sub) = self.subs.get(&id) else {
            to.accepted(&[ErrorCode::UnknownSubscription]);
            return;
        };
        let topic = &self.topics[&sub.topic];
        let beyond = matches!(target, StartPosition::At(at) if at.0 > topic.next());
        if beyond && to.code() == Some(ErrorCode::OffsetOutOfRange) {
            return;
        }
        assert!(to.accepted(&[]));
        let (first, target) = (topic.first, clamp(target, topic.first, topic.next()));
        if !sub.is_queue() {
            self.move_stream(id, target, to);
            return;
        }
        let proposed = self.proposed_of(id).into_iter();
        for lease in proposed {
            self.overtaken.insert((id, lease));
            for session in self
                .sessions
                .values_mut()
                .filter(|session| session.sub == id)
            {
                session.marks.remove(&lease);
            }
        }
        for offset in 0..self.subs[&id].items.len() as u64 {
            self.revoke(id, offset, Ending::Revoked);
            let is_dead = self.is_dead_still(id, offset, to.core);
            let item = self.item(id, offset);
            item.sought = true;
            if offset < target {
                if !item.is_finished() {
                    item.state = State::Acked;
                }
            } else if offset >= first && !is_dead {
                let leases = std::mem::take(&mut item.leases);
                *item = Item {
                    leases,
                    sought: true,
                    ..Item::default()
                };
            }
        }
        let sub = self.subs.get_mut(&id).unwrap();
        sub.sought = true;
        sub.floor = target;
    }

    /// I6: a message whose letter still lies in a dead-letter topic is not in the queue.
    fn is_dead_still(&self, sub: SubscriptionId, offset: u64, core: &Queue) -> bool {
        self.subs[&sub].items[offset as usize].state == State::Dead
            && self.letters().any(|(dead, at, letter)| {
                (letter.sub, letter.offset) == (sub, offset)
                    && core.letter(dead, Offset(at)).is_some()
            })
    }

    /// Every letter: the dead-letter topic, the offset there, what it tells.
    pub fn letters(&self) -> impl Iterator<Item = (TopicId, u64, &Death)> {
        self.topics.iter().flat_map(|(id, topic)| {
            let all = topic.messages.iter().enumerate();
            all.filter_map(|(at, message)| Some((*id, at as u64, message.letter.as_ref()?)))
        })
    }

    fn move_stream(&mut self, id: SubscriptionId, target: u64, to: &Applied<'_>) {
        let sub = self.subs.get_mut(&id).unwrap();
        sub.committed = target;
        sub.sought = true;
        if let Some(&session) = sub.line.first() {
            let told = Effect::Active {
                session,
                from: Offset(target),
            };
            assert!(
                to.effects.contains(&told),
                "{told:?} is missing in {:?}",
                to.effects
            );
            self.sessions.get_mut(&session).unwrap().read = None;
        }
    }

    fn open_producer(
        &mut self,
        topic: TopicId,
        id: Option<&str>,
        resume: Option<millpond_protocol::control::ProducerResume>,
        to: &Applied<'_>,
    ) {
        let known = match (id, resume) {
            (Some(id), _) => {
                let named = |producer: &Producer| {
                    producer.topic == topic && producer.name.as_deref() == Some(id)
                };
                self.producers
                    .iter()
                    .find(|(_, producer)| named(producer))
                    .map(|(key, _)| *key)
            }
            (None, Some(resume)) => self
                .producers
                .contains_key(&resume.producer)
                .then_some(resume.producer),
            (None, None) => None,
        };
        let last = known.map_or(0, |key| self.producers[&key].last);
        let forgotten = resume.is_some_and(|resume| resume.last_known.0 > last);
        let older = |resume: millpond_protocol::control::ProducerResume| {
            known.is_some_and(|key| self.producers[&key].epoch > resume.epoch)
        };
        if resume.is_some_and(older) && to.code() == Some(ErrorCode::ProducerFenced) {
            return;
        }
        let lost = id.is_none() && resume.is_some() && known.is_none();
        if lost && to.code() == Some(ErrorCode::ProducerStateExpired) {
            return;
        }
        if !to.accepted(&reasons(&[
            (!self.topics.contains_key(&topic), ErrorCode::UnknownTopic),
            (forgotten, ErrorCode::ProducerStateExpired),
        ])) {
            return;
        }
        let Outcome::ProducerOpened {
            topic: of,
            producer: key,
            epoch,
            last_sequence,
        } = *to.outcome
        else {
            panic!("an opened producer has an epoch: {:?}", to.outcome);
        };
        assert_eq!(
            (of, last_sequence),
            (topic, Sequence(last)),
            "the last accepted sequence"
        );
        match known {
            Some(known) => {
                let old = self.producers[&known].epoch;
                assert_eq!(key, known, "the state that was there goes on");
                assert!(
                    epoch > old,
                    "a new incarnation has a higher epoch: {epoch} after {old}"
                );
                let fenced = Effect::ProducerFenced {
                    producer: key,
                    epoch,
                };
                assert!(
                    to.effects.contains(&fenced),
                    "{fenced:?} is missing in {:?}",
                    to.effects
                );
                self.counts.fenced += 1;
            }
            None => self.fresh_id(3, key.0),
        }
        let producer = self.producers.entry(key).or_insert_with(|| Producer {
            topic,
            name: id.map(str::to_owned),
            epoch,
            last: 0,
            accepted: Vec::new(),
            batches: Vec::new(),
            active: to.stamp,
        });
        producer.epoch = epoch;
        producer.active = to.stamp;
    }

    fn publish(
        &mut self,
        topic: TopicId,
        key: ProducerKey,
        epoch: Epoch,
        batch: &Batch,
        to: &Applied<'_>,
    ) {
        let Some(producer) = self
            .producers
            .get(&key)
            .filter(|found| found.topic == topic)
        else {
            to.accepted(&[
                ErrorCode::ProducerStateExpired,
                ErrorCode::UnknownTopic,
                ErrorCode::Deleted,
            ]);
            return;
        };
        if epoch < producer.epoch {
            to.accepted(&[ErrorCode::ProducerFenced]);
            return;
        }
        let last = producer.last;
        let skip = batch
            .messages
            .iter()
            .take_while(|(sequence, _)| *sequence <= last)
            .count();
        let before_rest = match skip {
            0 => batch.previous,
            n => batch.messages[n - 1].0,
        };
        let rest = &batch.messages[skip..];
        if !rest.is_empty() && before_rest != last {
            assert!(!to.accepted(&[ErrorCode::SequenceGap]));
            assert!(
                matches!(*to.outcome, Outcome::PublishRefused { last_accepted, .. } if last_accepted.0 == last)
            );
            self.counts.gaps += 1;
            return;
        }
        if let Some(code) = to.code() {
            assert!(
                !rest.is_empty(),
                "duplicates are answered, not refused: {code:?}"
            );
            assert_eq!(code, ErrorCode::BacklogLimit);
            assert!(
                self.may_be_full(topic, rest),
                "the topic is not at its limit"
            );
            assert!(
                matches!(*to.outcome, Outcome::PublishRefused { last_accepted, .. } if last_accepted.0 == last)
            );
            return;
        }
        assert!(
            rest.is_empty() || !self.is_full(topic),
            "the topic is beyond its limit"
        );
        self.check_rows(key, batch, skip, to);
        self.append(topic, key, rest, to.stamp);
        self.counts.dedup_hits += skip as u64;
    }

    /// I3: one append per (producer, epoch, sequence), answered with the original offset for ever.
    fn check_rows(&self, key: ProducerKey, batch: &Batch, skip: usize, to: &Applied<'_>) {
        let Outcome::Published {
            rows,
            appended,
            last_accepted,
        } = to.outcome
        else {
            panic!("a publish is answered with rows: {:?}", to.outcome);
        };
        let producer = &self.producers[&key];
        let base = self.topics[&producer.topic].next();
        let mut at = 0;
        for row in rows {
            assert!(
                row.count > 0 && at + row.count as usize <= batch.messages.len(),
                "{rows:?}"
            );
            for i in 0..u64::from(row.count) {
                let (sequence, _) = batch.messages[at];
                let found = (row.kind, row.offset.0 + i);
                if at >= skip {
                    // I4: offsets are gapless in append order.
                    assert_eq!(found, (AckKind::Appended, base + (at - skip) as u64));
                } else if let Some(offset) = producer.remembered(sequence) {
                    assert_eq!(
                        found,
                        (AckKind::Duplicate, offset),
                        "of sequence {sequence}"
                    );
                } else if row.kind != AckKind::DuplicateUnknown {
                    let original = producer
                        .accepted
                        .iter()
                        .find(|(known, _)| *known == sequence);
                    assert_eq!(row.kind, AckKind::Duplicate);
                    let original = original.map(|(_, offset)| *offset);
                    assert_eq!(
                        original,
                        Some(found.1),
                        "of sequence {sequence}, long ago or never"
                    );
                }
                at += 1;
            }
            assert_eq!(row.last_sequence.0, batch.messages[at - 1].0);
        }
        assert_eq!(at, batch.messages.len(), "rows cover the batch: {rows:?}");
        let rest = batch.messages.len() - skip;
        let run =
            appended.map(|run| (run.topic, run.base.0, run.count as usize, run.skip as usize));
        let expected = (rest > 0).then_some((producer.topic, base, rest, skip));
        assert_eq!(run, expected, "what was appended");
        let last = batch.messages.last().map_or(0, |(sequence, _)| *sequence);
        assert_eq!(last_accepted.0, producer.last.max(last));
    }

    fn append(&mut self, topic: TopicId, key: ProducerKey, rest: &[(u64, Message)], stamp: Stamp) {
        let producer = self.producers.get_mut(&key).unwrap();
        producer.active = stamp;
        if rest.is_empty() {
            return;
        }
        producer.batches.push(producer.accepted.len());
        for (sequence, message) in rest {
            let offset = self.topics[&topic].next();
            let producer = self.producers.get_mut(&key).unwrap();
            producer.accepted.push((*sequence, offset));
            producer.last = *sequence;
            let body = (topic, offset);
            self.add_message(
                topic,
                Message {
                    published: stamp,
                    body,
                    ..message.clone()
                },
            );
        }
        self.counts.published += rest.len() as u64;
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

    fn is_full(&self, id: TopicId) -> bool {
        let topic = &self.topics[&id];
        let needed = (topic.first..topic.next()).filter(|offset| self.is_unread(id, *offset));
        let limit = topic.config.max_messages;
        topic.config.on_limit == OnLimit::RefusePublish
            && limit.is_some_and(|limit| needed.count() as u64 >= limit)
    }

    fn may_be_full(&self, id: TopicId, rest: &[(u64, Message)]) -> bool {
        let topic = &self.topics[&id];
        let kept = &topic.messages[topic.first as usize..];
        let bytes: u64 = kept
            .iter()
            .map(|m| m.bytes)
            .chain(rest.iter().map(|(_, m)| m.bytes))
            .sum();
        let count = (kept.len() + rest.len()) as u64;
        topic.config.on_limit == OnLimit::RefusePublish
            && (topic.config.max_messages.is_some_and(|limit| count > limit)
                || topic
                    .config
                    .max_bytes
                    .is_some_and(|limit| bytes > limit / 2))
    }

    fn session_open(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        token: u64,
        to: &Applied<'_>,
    ) {
        if !to.accepted(&self.unknown_sub(id)) {
            return;
        }
        let sub = self.subs.get_mut(&id).unwrap();
        if !sub.is_queue() {
            sub.line.push(session);
        }
        let is_active = sub.is_queue() || sub.line[0] == session;
        let Outcome::SessionOpened {
            session: opened,
            topic,
            subscription,
            mode,
            lease_ms,
            position,
            active,
        } = *to.outcome
        else {
            panic!("an opened session is described: {:?}", to.outcome);
        };
        assert_eq!((opened, topic, subscription), (session, sub.topic, id));
        assert_eq!(
            (mode, lease_ms, active),
            (sub.config.mode, sub.config.lease_ms, is_active)
        );
        if !sub.is_queue() {
            assert_eq!(position.0, sub.committed);
        }
        let opened = Session {
            sub: id,
            token,
            attached: true,
            since: to.stamp,
            alive: to.stamp,
            given: to.stamp,
            resumed: Stamp(0),
            max_messages: 0,
            max_bytes: 0,
            sent: Vec::new(),
            begun: 0,
            marks: Default::default(),
            read: None,
        };
        self.sessions.insert(session, opened);
    }

    /// I7: the consumer offset never moves back except by a seek.
    fn commit(&mut self, id: SubscriptionId, session: SessionId, next: Offset, to: &Applied<'_>) {
        let Some(sub) = self.subs.get_mut(&id) else {
            to.accepted(&[
                ErrorCode::UnknownSubscription,
                ErrorCode::Deleted,
                ErrorCode::SessionEnded,
            ]);
            return;
        };
        let is_queue = sub.is_queue();
        let known = self
            .sessions
            .get(&session)
            .is_some_and(|session| session.sub == id);
        let end = self.topics[&sub.topic].next();
        let beyond = next.0 > end;
        if beyond && known && sub.line.first() == Some(&session) && to.code().is_none() {
            let clamped = Outcome::Committed { next: Offset(end) };
            assert_eq!(
                *to.outcome, clamped,
                "a commit beyond the end, if not refused, is clamped"
            );
            sub.committed = end;
            return;
        }
        if to.accepted(&reasons(&[
            (is_queue, ErrorCode::WrongMode),
            (!known, ErrorCode::SessionEnded),
            (
                known && sub.line.first() != Some(&session),
                ErrorCode::NotActive,
            ),
            (known && beyond, ErrorCode::OffsetOutOfRange),
        ])) {
            sub.committed = sub.committed.max(next.0);
            assert_eq!(
                *to.outcome,
                Outcome::Committed {
                    next: Offset(sub.committed)
                }
            );
        }
    }

    /// Nothing unfinished goes, unless the topic says so.
    fn trim(&mut self, id: TopicId, first: u64, to: &Applied<'_>) {
        let Some(topic) = self.topics.get(&id) else {
            return;
        };
        let on_limit = topic.config.on_limit;
        if on_limit == OnLimit::RefusePublish {
            return;
        }
        let end = first.min(topic.next());
        for offset in topic.first..end {
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
                    if on_limit == OnLimit::DeadLetter {
                        self.revoke(sub, offset, Ending::Revoked);
                        self.die(sub, offset, vec![DeadReason::Expired], to);
                    } else {
                        self.vanish(sub, offset);
                    }
                }
            }
        }
        for sub in self.subs_of(id) {
            let sub = self.subs.get_mut(&sub).unwrap();
            sub.committed = sub.committed.max(end);
        }
        if self.subs_of(id).is_empty() {
            let topic = self.topics.get_mut(&id).unwrap();
            topic.first = topic.first.max(end);
            let gone = topic.messages.iter_mut().take(end as usize);
            gone.for_each(|message| message.letter = None);
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

impl Producer {
    /// The offset of a sequence within the last 1,024 batches.
    fn remembered(&self, sequence: u64) -> Option<u64> {
        let batch = self
            .batches
            .len()
            .checked_sub(1_024)
            .map_or(0, |from| self.batches[from]);
        let recent = &self.accepted[batch..];
        recent
            .iter()
            .find(|(known, _)| *known == sequence)
            .map(|(_, offset)| *offset)
    }
}

/// A publish as read back from its bytes.
pub struct Batch {
    pub previous: u64,
    pub messages: Vec<(u64, Message)>,
}

impl Batch {
    fn read(previous: Sequence, count: u32, mut bytes: &[u8]) -> Self {
        let mut messages = Vec::new();
        for _ in 0..count {
            let (view, rest) = MessageView::split(bytes).unwrap();
            bytes = rest;
            let message = Message {
                published: Stamp(0),
                bytes: view.bytes().len() as u64,
                delay_ms: u64::from(view.delay_ms()),
                ttl_ms: u64::from(view.ttl_ms()),
                max_attempts: u32::from(view.max_attempts()),
                initial_ms: u64::from(view.backoff_initial_ms()),
                body: (TopicId(0), 0),
                letter: None,
                copy: false,
            };
            messages.push((view.sequence().0, message));
        }
        Self {
            previous: previous.0,
            messages,
        }
    }
}

fn clamp(position: StartPosition, first: u64, next: u64) -> u64 {
    match position {
        StartPosition::Earliest => first,
        StartPosition::Latest => next,
        StartPosition::At(at) => at.0.clamp(first, next),
    }
}

/// The codes of those reasons that hold.
pub fn reasons(all: &[(bool, ErrorCode)]) -> Vec<ErrorCode> {
    all.iter()
        .filter(|(holds, _)| *holds)
        .map(|(_, code)| *code)
        .collect()
}
