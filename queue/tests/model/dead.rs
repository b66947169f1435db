//! Dead letters and redrives: in the queue or in the dead-letter topic, never both, never neither.

use std::collections::BTreeSet;

use millpond_protocol::control::{DeadFilter, DeadReason, RedriveTarget};
use millpond_protocol::{ErrorCode, Offset, SubscriptionId, TopicId};
use millpond_queue::{Letter, Outcome, Record};

use crate::fold::{Applied, reasons};
use crate::state::*;

impl Model {
    pub fn fold_dead(&mut self, record: &Record<'_>, to: &Applied<'_>) {
        match record {
            Record::Redrive {
                topic,
                source_topic,
                subscription,
                filter,
                rate_per_s,
                target,
            } => {
                let all = DeadFilter {
                    limit: None,
                    ..filter.clone()
                };
                let letters = self.matching(*topic, source_topic, subscription, &all);
                let total = letters.len() as u64;
                let total = total.min(filter.limit.unwrap_or(u64::MAX));
                let source = self.topic_named(source_topic);
                let sub = source.and_then(|source| self.sub_named(source, subscription));
                let to_sub = *target == RedriveTarget::Subscription;
                // Without a target nothing can go, which a refusal says best.
                let no_target = source.is_none() || (to_sub && sub.is_none());
                if no_target && to.code().is_some() {
                    return;
                }
                if letters.is_empty() && to.code().is_some() {
                    return;
                }
                if !to.accepted(&reasons(&[(
                    !self.topics.contains_key(topic),
                    ErrorCode::UnknownTopic,
                )])) {
                    return;
                }
                let Outcome::Redrive(view) = to.outcome else {
                    panic!("a redrive is answered with its job: {:?}", to.outcome);
                };
                assert_eq!((view.total, view.done), (total, 0), "{view:?}");
                let job = Job {
                    dead: *topic,
                    source: (*source_topic).to_owned(),
                    sub: (*subscription).to_owned(),
                    target: *target,
                    total: view.total,
                    letters,
                    done: 0,
                    rate: *rate_per_s,
                    begun: to.stamp,
                    cancelled: false,
                };
                if !view.finished {
                    assert!(
                        self.ids.insert(4 << 56 | view.job),
                        "a job's number was used twice"
                    );
                    self.jobs.insert(view.job, job);
                } else {
                    assert_eq!(view.total, 0, "a job ends with its last letter");
                }
            }
            Record::RedriveStep { job, letters, .. } => self.redrive_step(*job, letters, to),
            Record::RedriveCancel { job } => {
                if let Some(job) = self.jobs.get_mut(job) {
                    assert_eq!(to.code(), None);
                    job.cancelled |= !job.letters.is_empty();
                    job.letters.clear();
                }
            }
            Record::DeadPurge {
                topic,
                source_topic,
                subscription,
                filter,
            } => {
                let letters = self.matching(*topic, source_topic, subscription, filter);
                if letters.is_empty() && to.code().is_some() {
                    return;
                }
                assert_eq!(
                    *to.outcome,
                    Outcome::Purged {
                        count: letters.len() as u64
                    }
                );
                for at in &letters {
                    self.take_letter(*topic, *at);
                }
                self.counts.purged += letters.len() as u64;
            }
            other => panic!("no rule for {other:?}"),
        }
    }

    /// Letters that a filter means, in order.
    fn matching(
        &self,
        dead: TopicId,
        source: &str,
        sub: &str,
        filter: &DeadFilter,
    ) -> BTreeSet<u64> {
        let all = self.letters().filter(|(id, _, _)| *id == dead);
        let mine = all.filter(|(_, at, letter)| {
            letter.topic_name == source
                && letter.sub_name == sub
                && (filter.offsets.is_empty() || filter.offsets.contains(&Offset(*at)))
                && filter
                    .reason
                    .is_none_or(|reason| letter.reasons.contains(&reason))
        });
        let limit = filter.limit.map_or(usize::MAX, |limit| limit as usize);
        mine.map(|(_, at, _)| at).take(limit).collect()
    }

    fn take_letter(&mut self, dead: TopicId, at: u64) -> Option<Death> {
        let topic = self.topics.get_mut(&dead)?;
        let letter = topic.messages.get_mut(at as usize)?.letter.take()?;
        topic.gone.insert(at);
        for sub in self.subs_of(dead) {
            if !self.subs[&sub].is_queue() {
                self.subs.get_mut(&sub).unwrap().gone.insert(at);
                continue;
            }
            if !self.item(sub, at).is_finished() {
                self.revoke(sub, at, Ending::Revoked);
                self.item(sub, at).state = State::Gone;
            }
        }
        Some(letter)
    }

    fn redrive_step(&mut self, job: u64, letters: &[Offset], to: &Applied<'_>) {
        let Some(known) = self.jobs.get(&job).cloned() else {
            return;
        };
        let source = self.topic_named(&known.source);
        let sub = source.and_then(|source| self.sub_named(source, &known.sub));
        for at in letters {
            if !self.jobs[&job].letters.contains(&at.0) {
                continue;
            }
            let goes_to = match known.target {
                // Not one that has only the same name.
                RedriveTarget::Subscription => self.letter_is_of(known.dead, at.0, sub),
                RedriveTarget::Topic => self.letter_is_from(known.dead, at.0, source),
            };
            if !goes_to {
                continue;
            }
            self.jobs.get_mut(&job).unwrap().letters.remove(&at.0);
            let Some(letter) = self.take_letter(known.dead, at.0) else {
                continue;
            };
            let state = self.jobs.get_mut(&job).unwrap();
            state.done += 1;
            if state.done == state.total {
                state.letters.clear();
            }
            self.counts.redriven += 1;
            match (known.target, sub, source) {
                (RedriveTarget::Subscription, Some(sub), _) => self.revive(sub, &letter),
                (RedriveTarget::Topic, _, Some(source)) => self.copy(source, &letter, to),
                _ => unreachable!("checked above"),
            }
        }
    }

    fn letter_is_from(&self, dead: TopicId, at: u64, source: Option<TopicId>) -> bool {
        let topic = self.topics.get(&dead);
        let letter = topic.and_then(|topic| topic.messages[at as usize].letter.as_ref());
        letter.is_none_or(|letter| Some(letter.topic) == source)
    }

    fn letter_is_of(&self, dead: TopicId, at: u64, sub: Option<SubscriptionId>) -> bool {
        let topic = self.topics.get(&dead);
        let letter = topic.and_then(|topic| topic.messages[at as usize].letter.as_ref());
        letter.is_none_or(|letter| Some(letter.sub) == sub)
    }

    /// DEAD to READY: failures begin again, deliveries and releases go on.
    fn revive(&mut self, sub: SubscriptionId, letter: &Death) {
        if letter.sub != sub {
            return;
        }
        let item = self.item(sub, letter.offset);
        assert_eq!(
            item.state,
            State::Dead,
            "in the queue or dead, never both: {item:?}"
        );
        item.state = State::Ready;
        item.failures = 0;
        item.redrives += 1;
        item.before_redrive = (item.deliveries, item.releases);
        item.failed_at = None;
        item.history.clear();
        item.suspect = Suspect::No;
        item.lost_last = None;
    }

    fn copy(&mut self, source: TopicId, letter: &Death, to: &Applied<'_>) {
        let original = self
            .topics
            .get(&letter.topic)
            .map(|topic| topic.messages[letter.offset as usize].clone());
        let Some(original) = original else {
            return;
        };
        let at = self.topics[&source].next();
        assert_eq!(
            to.core.body_of(source, Offset(at)),
            (letter.body.0, Offset(letter.body.1))
        );
        let message = Message {
            published: to.stamp,
            delay_ms: 0,
            ttl_ms: 0,
            letter: None,
            copy: true,
            ..original
        };
        self.add_message(source, message);
    }

    pub fn die(
        &mut self,
        id: SubscriptionId,
        offset: u64,
        reasons: Vec<DeadReason>,
        to: &Applied<'_>,
    ) {
        let sub = &self.subs[&id];
        let item = sub.items[offset as usize].clone();
        let death = Death {
            topic: sub.topic,
            topic_name: self.topics[&sub.topic].name.clone(),
            sub: id,
            sub_name: sub.name.clone(),
            dead_topic: sub.dead_topic.clone(),
            offset,
            body: self.message(sub, offset).body,
            reasons,
            place: item.failed_at.unwrap_or(to.place),
            item,
            at: to.stamp,
        };
        self.item(id, offset).state = State::Dead;
        self.counts.dead += 1;
        if !death.dead_topic.is_empty() {
            self.deaths.push(death);
        }
    }

    /// I6: the deaths of this record are the new letters, one for each.
    pub fn check_letters(&mut self, to: &Applied<'_>) {
        while !self.deaths.is_empty() {
            let dead_name = self.deaths[0].dead_topic.clone();
            let dead = self.dead_topic(&dead_name, to.core);
            let at = self.topics[&dead].next();
            let letter = to.core.letter(dead, Offset(at));
            let Some(letter) = letter else {
                panic!("no letter at {at} of {dead_name} for {:?}", self.deaths[0]);
            };
            let fits = |death: &Death| {
                death.dead_topic == dead_name
                    && (death.sub, death.offset) == (letter.subscription_id, letter.source_offset.0)
            };
            let found = self.deaths.iter().position(fits);
            let found = found.unwrap_or_else(|| panic!("nobody died: {letter:?}"));
            let mut death = self.deaths.remove(found);
            let doubled = self
                .letters()
                .any(|(_, _, other)| (other.sub, other.offset) == (death.sub, death.offset));
            assert!(!doubled, "I6: {letter:?} is dead twice");
            check_letter(letter, &death);
            death.reasons = vec![letter.reason];
            let original = self.topics[&death.topic].messages[death.offset as usize].clone();
            let message = Message {
                published: to.stamp,
                delay_ms: 0,
                ttl_ms: 0,
                letter: Some(death),
                // What the message asked for was asked of the topic that it was published to.
                max_attempts: 0,
                initial_ms: 0,
                ..original
            };
            self.add_message(dead, message);
        }
        for (id, topic) in &self.topics {
            assert_eq!(
                to.core.letter(*id, Offset(topic.next())),
                None,
                "a letter of nobody"
            );
        }
    }
}

fn check_letter(letter: &Letter, death: &Death) {
    let item = &death.item;
    assert!(
        death.reasons.contains(&letter.reason),
        "{letter:?} but {death:?}"
    );
    let told = (
        letter.failures,
        letter.deliveries,
        letter.releases,
        letter.redrives,
    );
    let real = (item.failures, item.deliveries, item.releases, item.redrives);
    let since = (
        item.failures,
        item.deliveries - item.before_redrive.0,
        item.releases - item.before_redrive.1,
        item.redrives,
    );
    assert!(
        told == real || told == since,
        "failures, deliveries, releases, redrives are {real:?}, not as in {letter:?}"
    );
    assert_eq!(letter.source, death.topic);
    assert_eq!(*letter.source_topic, *death.topic_name);
    assert_eq!(*letter.subscription, *death.sub_name);
    assert_eq!((letter.body.0, letter.body.1.0), death.body);
    assert_eq!(
        (letter.dead_at, letter.place),
        (death.at, death.place),
        "{letter:?}"
    );
    // An attempt is what was begun, as far as is known, or what failed.
    let tried = letter.first_attempt_at.is_some();
    assert!(!tried || item.deliveries > 0, "{letter:?}: {item:?}");
    assert!(tried || item.failures == 0, "{letter:?}: {item:?}");
}
