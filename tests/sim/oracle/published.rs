//! I1 to I4: what producers sent, what they were told, and where it stands.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::limits::DEDUP_BATCHES_MAX;

use super::Invariant::{I1, I2, I3, I4, I8};
use super::Verdict;
use crate::history::{Admin, Event, History, Placed, Sent, TopicNo, TopicRules, TopicSeen};

#[derive(Debug)]
pub struct Published {
    rules: Vec<TopicRules>,
    messages: BTreeMap<u64, Message>,
    topics: Vec<Topic>,
    /// Which message has a producer's sequence.
    sequences: BTreeMap<(u64, u64), u64>,
    /// How many batches of a producer were answered.
    batches: BTreeMap<u64, usize>,
    /// Sent, and nowhere seen yet.
    open: BTreeSet<u64>,
}

#[derive(Debug)]
struct Topic {
    /// Digest by offset, however it became known.
    at: BTreeMap<u64, u64>,
    /// One above the highest offset that was acknowledged.
    acknowledged_until: u64,
    /// One above the highest offset that was looked at on the disk.
    looked_until: u64,
    /// The last look began behind something that was let go before anybody saw it: what is not known to
    /// stand elsewhere may have stood there.
    is_unsure: bool,
    is_purged: bool,
}

/// One message, by its digest.
#[derive(Debug)]
struct Message {
    topic: TopicNo,
    sent: Sent,
    sent_at: usize,
    /// When the shard took it in for the first time, by its stamp.
    taken: Option<u64>,
    /// When it was first found to be missing after it was last sent.
    absent: Option<usize>,
    offset: Option<u64>,
    is_acknowledged: bool,
    is_appended: bool,
}

impl Published {
    pub fn new(history: &History) -> Self {
        let topics = history.topics.iter().map(|_| Topic {
            at: BTreeMap::new(),
            acknowledged_until: 0,
            looked_until: 0,
            is_unsure: false,
            is_purged: false,
        });
        Self {
            rules: history.topics.clone(),
            messages: BTreeMap::new(),
            topics: topics.collect(),
            sequences: BTreeMap::new(),
            batches: BTreeMap::new(),
            open: BTreeSet::new(),
        }
    }

    pub fn see(&mut self, now: usize, event: &Event, verdict: &mut Verdict) {
        match event {
            Event::Send {
                topic, messages, ..
            } => {
                for sent in messages {
                    self.sent(now, *topic, *sent);
                }
            }
            Event::SendTaken { messages, at } => {
                for sent in messages {
                    if let Some(message) = self.messages.get_mut(&sent.digest) {
                        // Stamps that never became durable may be given again, and lower.
                        message.taken = Some(message.taken.map_or(*at, |taken| taken.min(*at)));
                    }
                }
            }
            Event::Accepted {
                producer,
                topic,
                messages,
            } => self.accepted(now, producer.key, *topic, messages, verdict),
            Event::ProducerOpened {
                producer,
                last_sequence,
                last_known,
            } => verdict.check(last_sequence >= last_known, I3, || {
                format!(
                    "event {now}: producer {} is told that {last_sequence} is its last accepted \
                     sequence, and knows of {last_known}",
                    producer.key
                )
            }),
            Event::Forgotten {
                producer,
                last_known,
            } => verdict.broken(I3, || {
                format!(
                    "event {now}: producer {producer} is forgotten, accepted up to {last_known}"
                )
            }),
            Event::Delivered(delivery) => {
                if let Some(digest) = delivery.digest {
                    let known = self.messages.get(&digest).map(|message| message.topic);
                    match known {
                        Some(topic) => self.found(now, topic, delivery.offset, digest, verdict),
                        None => verdict.broken(I8, || {
                            format!("event {now}: bytes that nobody sent: {delivery:?}")
                        }),
                    }
                }
            }
            Event::Started { topics, .. } => {
                for seen in topics {
                    self.looked(now, seen, verdict);
                }
                self.missed(now);
            }
            Event::Admin(Admin::Purge { topic }) => self.topics[*topic].is_purged = true,
            Event::End(end) => {
                for seen in &end.topics {
                    self.looked(now, seen, verdict);
                    self.unseen(seen.topic, verdict);
                }
            }
            _ => {}
        }
    }

    /// Offsets at which something is known to stand in the topic.
    pub fn offsets(&self, topic: TopicNo) -> impl Iterator<Item = u64> {
        self.topics[topic].at.keys().copied()
    }

    pub fn is_purged(&self, topic: TopicNo) -> bool {
        self.topics[topic].is_purged
    }

    /// What was sent at this offset, and the stamp before which it cannot have been published.
    pub fn sent_at(&self, topic: TopicNo, offset: u64) -> Option<(Sent, u64)> {
        let digest = self.topics[topic].at.get(&offset)?;
        let message = self.messages.get(digest)?;
        Some((message.sent, message.taken?))
    }

    fn sent(&mut self, now: usize, topic: TopicNo, sent: Sent) {
        let message = self.messages.entry(sent.digest).or_insert(Message {
            topic,
            sent,
            sent_at: now,
            taken: None,
            absent: None,
            offset: None,
            is_acknowledged: false,
            is_appended: false,
        });
        message.sent_at = now;
        message.absent = None;
        if message.offset.is_none() {
            self.open.insert(sent.digest);
        }
    }

    fn accepted(
        &mut self,
        now: usize,
        producer: u64,
        topic: TopicNo,
        messages: &[Placed],
        verdict: &mut Verdict,
    ) {
        *self.batches.entry(producer).or_default() += 1;
        let mut before: Option<u64> = None;
        for placed in messages {
            let other = self
                .sequences
                .insert((producer, placed.sequence), placed.digest);
            verdict.check(other.is_none_or(|other| other == placed.digest), I3, || {
                format!(
                    "event {now}: producer {producer} was acknowledged two messages of sequence {}",
                    placed.sequence
                )
            });
            let Some(message) = self.messages.get_mut(&placed.digest) else {
                verdict.broken(I1, || {
                    format!("event {now}: acknowledged, never sent: {placed:?}")
                });
                continue;
            };
            message.is_acknowledged = true;
            if !placed.is_duplicate {
                let again = std::mem::replace(&mut message.is_appended, true);
                verdict.check(!again, I3, || {
                    format!("event {now}: appended for the second time: {placed:?}")
                });
            }
            let Some(offset) = placed.offset else {
                let batches = self.batches.get(&producer).copied().unwrap_or(0);
                verdict.check(batches > DEDUP_BATCHES_MAX, I3, || {
                    format!("event {now}: after {batches} batches nobody knows where {placed:?} is")
                });
                continue;
            };
            if !placed.is_duplicate {
                verdict.check(before.is_none_or(|before| offset == before + 1), I4, || {
                    format!("event {now}: a batch with a gap or out of order at {placed:?}")
                });
                before = Some(offset);
            }
            let until = &mut self.topics[topic].acknowledged_until;
            *until = (*until).max(offset + 1);
            self.found(now, topic, offset, placed.digest, verdict);
        }
    }

    /// A message has been seen at an offset.
    fn found(
        &mut self,
        now: usize,
        topic: TopicNo,
        offset: u64,
        digest: u64,
        verdict: &mut Verdict,
    ) {
        let Some(message) = self.messages.get_mut(&digest) else {
            return verdict.broken(I1, || {
                format!("event {now}: at offset {offset} of topic {topic} stand bytes nobody sent")
            });
        };
        self.open.remove(&digest);
        if let Some(absent) = message.absent {
            verdict.broken(I2, || {
                format!(
                    "event {now}: {:?}, last sent at event {}, was cut off at event {absent} and is \
                     back at offset {offset} of topic {topic}",
                    message.sent, message.sent_at
                )
            });
        }
        let before = *message.offset.get_or_insert(offset);
        verdict.check(before == offset && message.topic == topic, I3, || {
            format!(
                "event {now}: {:?} stands at offset {before} and at {offset} of topic {topic}",
                message.sent
            )
        });
        let other = *self.topics[topic].at.entry(offset).or_insert(digest);
        if other != digest {
            let acknowledged = self.messages.get(&other).is_some_and(|m| m.is_acknowledged);
            let invariant = if acknowledged { I1 } else { I4 };
            verdict.broken(invariant, || {
                format!(
                    "event {now}: offset {offset} of topic {topic} holds other bytes than before"
                )
            });
        }
    }

    /// A topic has been read from the disk.
    fn looked(&mut self, now: usize, seen: &TopicSeen, verdict: &mut Verdict) {
        let no = seen.topic;
        let until = self.topics[no].acknowledged_until;
        verdict.check(seen.next >= until, I1, || {
            format!(
                "event {now}: topic {no} ends before offset {}, acknowledged up to {until}",
                seen.next
            )
        });
        let topic = &mut self.topics[no];
        topic.is_unsure = (topic.looked_until..seen.from).any(|at| !topic.at.contains_key(&at));
        let mut expected = seen.from;
        for message in &seen.messages {
            verdict.check(message.offset >= expected, I4, || {
                format!(
                    "event {now}: offset {} of topic {no} is there twice",
                    message.offset
                )
            });
            if self.rules[no].keeps_all && !self.topics[no].is_purged {
                verdict.check(message.offset <= expected, I1, || {
                    format!(
                        "event {now}: offsets {expected} to before {} of topic {no} are missing",
                        message.offset
                    )
                });
            }
            expected = message.offset + 1;
            self.found(now, no, message.offset, message.digest, verdict);
        }
        let topic = &mut self.topics[no];
        topic.looked_until = topic.looked_until.max(expected);
        if self.rules[no].keeps_all && !self.topics[no].is_purged {
            verdict.check(seen.first_kept == 0, I1, || {
                format!(
                    "event {now}: topic {no} keeps nothing below {}",
                    seen.first_kept
                )
            });
            verdict.check(expected == seen.next, I1, || {
                format!(
                    "event {now}: offsets {expected} to before {} of topic {no} cannot be read",
                    seen.next
                )
            });
        }
    }

    /// What was acknowledged, if only as a duplicate, stands somewhere.
    fn unseen(&self, topic: TopicNo, verdict: &mut Verdict) {
        if !self.rules[topic].keeps_all || self.topics[topic].is_purged {
            return;
        }
        let of_topic = self.messages.values().filter(|m| m.topic == topic);
        for message in of_topic.filter(|m| m.is_acknowledged && m.offset.is_none()) {
            verdict.broken(I1, || {
                let sent = message.sent;
                format!("{sent:?} was acknowledged and stands nowhere in topic {topic}")
            });
        }
    }

    /// What was sent before this start and is not there is cut off.
    fn missed(&mut self, now: usize) {
        for digest in std::mem::take(&mut self.open) {
            let message = self.messages.get_mut(&digest);
            let Some(message) = message.filter(|message| message.offset.is_none()) else {
                continue;
            };
            if self.topics[message.topic].is_unsure {
                self.open.insert(digest);
            } else {
                message.absent = Some(now);
            }
        }
    }
}
