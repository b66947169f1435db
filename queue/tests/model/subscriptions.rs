//! Subscriptions, their sessions and where they stand.

use millpond_protocol::name::{check_subscription, default_dead_letter};
use millpond_protocol::policy::{SubscriptionMode, SubscriptionPatch};
use millpond_protocol::{
    ErrorCode, Offset, SessionId, Stamp, SubscriptionConfig, SubscriptionId, TopicId,
};
use millpond_queue::{Effect, Outcome, Queue, StartPosition};

use crate::fold::{Applied, reasons};
use crate::state::*;

impl Model {
    pub fn unknown_sub(&self, id: SubscriptionId) -> Vec<ErrorCode> {
        reasons(&[(!self.subs.contains_key(&id), ErrorCode::UnknownSubscription)])
    }

    pub fn sub_create(
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
        let gone = self.topics[&topic].gone.clone();
        for offset in gone.range(start..) {
            items[*offset as usize].state = State::Acked;
        }
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
            gone: match config.mode {
                SubscriptionMode::Stream => gone,
                SubscriptionMode::Queue => Default::default(),
            },
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

    pub fn sub_update(&mut self, id: SubscriptionId, patch: &SubscriptionPatch, to: &Applied<'_>) {
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

    pub fn pause(&mut self, id: SubscriptionId, paused: bool, to: &Applied<'_>) {
        if to.accepted(&self.unknown_sub(id)) {
            self.subs.get_mut(&id).unwrap().paused = paused;
        }
    }

    pub fn seek(&mut self, id: SubscriptionId, target: StartPosition, to: &Applied<'_>) {
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
        let gone = self.topics[&self.subs[&id].topic].gone.clone();
        let sub = self.subs.get_mut(&id).unwrap();
        for offset in gone.range(target..) {
            sub.items[*offset as usize].state = State::Acked;
        }
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

    fn move_stream(&mut self, id: SubscriptionId, target: u64, to: &Applied<'_>) {
        let gone = self.topics[&self.subs[&id].topic].gone.clone();
        let sub = self.subs.get_mut(&id).unwrap();
        sub.gone = gone;
        let target = (target..)
            .find(|at| !sub.gone.contains(at))
            .unwrap_or(target);
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

    pub fn session_open(
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
            stuck: false,
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
    pub fn commit(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        next: Offset,
        to: &Applied<'_>,
    ) {
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
            while sub.gone.contains(&sub.committed) {
                sub.committed += 1;
            }
            assert_eq!(
                *to.outcome,
                Outcome::Committed {
                    next: Offset(sub.committed)
                }
            );
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
