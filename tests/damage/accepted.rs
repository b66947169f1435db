//! Losses that were accepted: each entry of a log damaged in turn, the loss accepted, the broker started. What is
//! whole is at the offset that was acknowledged, what is lost is never anything else, producers go on.

use std::collections::BTreeMap;

use bytes::Bytes;
use millpond_broker::bodies::{BodyError, read_log};
use millpond_broker::shard::Outbox;
use millpond_broker::shard::io::{Fresh, ResolvedRequest};
use millpond_protocol::control::Request;
use millpond_protocol::{Message, MessageView, Offset, TopicConfig, TopicId};

use crate::disk::{Contents, Disk};
use crate::life::{self, Life, NO_SNAPSHOT, Producer, TestShard};
use crate::oracle::{self, EntryAt, State};

/// A store, and all that was acknowledged while it was made.
struct Story {
    contents: Contents,
    messages: BTreeMap<(TopicId, Offset), Known>,
    entries: BTreeMap<u64, EntryAt>,
}

struct Known {
    bytes: Bytes,
    index: u64,
}

/// How the store was left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Killed,
    Closed,
}

fn story(left: Left) -> Story {
    let disk = Disk::default();
    let mut life = Life::begin(&disk, 0, NO_SNAPSHOT);
    life.ask(vec![topic("orders"), topic("audit")]);
    let [mut shop, mut web] = life.producers([("orders", "shop"), ("audit", "web")]);
    life.publish(&mut shop, &messages("first", 3));
    life.publish(&mut web, &messages("seen", 2));
    life.publish(&mut shop, &messages("second", 2));
    life.ask(vec![topic("late")]);
    let [mut late, mut again] = life.producers([("late", "night"), ("orders", "shop")]);
    life.publish(&mut late, &messages("late", 4));
    again.last = shop.last;
    life.publish(&mut again, &messages("third", 1));
    life.publish(&mut web, &messages("seen again", 1));
    life.publish(&mut again, &messages("fourth", 2));
    life.publish(&mut late, &messages("later", 1));
    life.vouch();
    let messages = known(&std::mem::take(&mut life.accepted));
    if left == Left::Closed {
        let closed = life.shard.close(&mut Outbox::default());
        closed.expect("the disk takes it");
    }
    let (entries, ..) = oracle::look(&disk);
    Story {
        contents: disk.contents(),
        messages,
        entries,
    }
}

fn topic(name: &str) -> ResolvedRequest {
    ResolvedRequest::Plain(Request::TopicCreate {
        name: name.to_owned(),
        config: TopicConfig::default(),
    })
}

fn messages(name: &str, count: u64) -> Vec<Message> {
    (0..count)
        .map(|nth| Message::new(format!("{name} {nth}")))
        .collect()
}

fn known(accepted: &[Fresh]) -> BTreeMap<(TopicId, Offset), Known> {
    let mut known = BTreeMap::new();
    for fresh in accepted {
        let mut rest: &[u8] = &fresh.messages;
        for offset in (fresh.base.0..).take(fresh.count as usize) {
            let (view, behind) = MessageView::split(rest).expect("it was accepted");
            rest = behind;
            let one = Known {
                bytes: Bytes::copy_from_slice(view.bytes()),
                index: fresh.place.index.0,
            };
            known.insert((fresh.topic, Offset(offset)), one);
        }
    }
    known
}

impl Story {
    /// The store with one byte of these entries changed.
    fn damaged(&self, entries: &[u64]) -> Disk {
        let mut contents = self.contents.clone();
        for index in entries {
            let entry = &self.entries[index];
            let mut bytes = contents[&entry.file].to_vec();
            bytes[entry.bytes.start as usize + 100] ^= 1;
            contents.insert(entry.file.clone(), bytes.into());
        }
        Disk::of(&contents)
    }

    fn check(&self, lost: &[u64], shard: &TestShard) {
        let reader = shard.log().reader();
        for (&(topic, offset), known) in &self.messages {
            let read = read_log(&reader, topic, offset, 1, usize::MAX);
            let what = format!("offset {offset} of topic {topic}, entries {lost:?} lost");
            match read {
                Ok(runs) => {
                    assert!(!lost.contains(&known.index), "{what}: served");
                    let run = &runs[0];
                    assert_eq!((run.base, &run.messages), (offset, &known.bytes), "{what}");
                }
                Err(BodyError::Damaged { .. } | BodyError::Gone(_)) => {
                    assert!(lost.contains(&known.index), "{what}: not served");
                }
                Err(error) => panic!("{what}: {error}"),
            }
            let next = shard.queue().topic_view(topic).map(|topic| topic.next);
            assert!(
                next.is_none_or(|next| next > offset),
                "{what}: to be given again"
            );
        }
    }

    /// Where the messages of the topic end.
    fn end(&self, topic: TopicId) -> u64 {
        let of = self
            .messages
            .range((topic, Offset(0))..=(topic, Offset(u64::MAX)));
        of.last().map_or(0, |((_, offset), _)| offset.0 + 1)
    }
}

/// Accepts the loss, starts, publishes, starts again.
fn try_without(story: &Story, lost: &[u64]) {
    let disk = story.damaged(lost);
    let (shard, recovered, _) =
        life::open(&disk, 10, NO_SNAPSHOT).expect("only entries are damaged");
    assert!(recovered.damaged, "entries {lost:?} are above any snapshot");
    drop(shard);
    let given_up = millpond_wal::salvage_accept_loss(&disk, &life::options(NO_SNAPSHOT).log);
    assert!(!given_up.expect("the manifest is whole").is_empty());

    let mut life = Life::begin(&disk, 11, NO_SNAPSHOT);
    story.check(lost, &life.shard);
    let names = [
        ("orders", "shop", 8),
        ("audit", "web", 3),
        ("late", "night", 5),
    ];
    for (name, id, sent) in names {
        let topic = life.shard.queue().topic_id(name);
        if topic.is_none() {
            continue;
        }
        let [mut producer] = life.producers([(name, id)]);
        go_on(story, lost, &mut life, &mut producer, sent);
    }
    let added = known(&std::mem::take(&mut life.accepted));
    assert!(!added.is_empty());
    for &(topic, offset) in added.keys() {
        assert!(
            offset.0 >= story.end(topic),
            "{offset} of {topic} was given twice"
        );
    }
    life.vouch();
    let state = without_meta(&life.shard);
    drop(life);

    let again = story_of(&disk, story, added);
    let (shard, recovered, _) = life::open(&disk, 12, NO_SNAPSHOT).expect("it opened before");
    assert!(!recovered.damaged);
    again.check(lost, &shard);
    assert_eq!(
        without_meta(&shard),
        state,
        "entries {lost:?} lost: the second start says otherwise"
    );
}

/// The state, but for which start it is of.
fn without_meta(shard: &TestShard) -> State {
    let mut chunks = shard.queue().chunks();
    chunks.retain(|(id, _)| *id != 0);
    chunks
}

/// A producer knows its last sequence, unless nothing that is left tells of it.
fn go_on(story: &Story, lost: &[u64], life: &mut Life, producer: &mut Producer, sent: u64) {
    let last = producer.last.0;
    assert!(last <= sent, "{last} of {sent}");
    let of_topic = story
        .messages
        .iter()
        .filter(|((topic, _), _)| *topic == producer.topic);
    let newest = of_topic.map(|(_, known)| known.index).max();
    if newest.is_some_and(|newest| !lost.contains(&newest)) {
        assert_eq!(last, sent, "entries {lost:?} lost");
    }
    life.publish(producer, &messages("more", 2));
}

fn story_of(disk: &Disk, story: &Story, added: BTreeMap<(TopicId, Offset), Known>) -> Story {
    let old = story.messages.iter().map(|(at, known)| {
        let known = Known {
            bytes: known.bytes.clone(),
            index: known.index,
        };
        (*at, known)
    });
    Story {
        contents: disk.contents(),
        messages: old.chain(added).collect(),
        entries: BTreeMap::new(),
    }
}

/// Entries that are damage rather than a torn tail: all but the last, which is blank.
fn all(story: &Story) -> Vec<u64> {
    let last = story.entries.keys().next_back().copied();
    story
        .entries
        .keys()
        .copied()
        .filter(|index| Some(*index) != last)
        .collect()
}

#[test]
fn behind_a_lost_entry_of_an_open_segment_every_message_keeps_its_offset() {
    let story = story(Left::Killed);
    for index in all(&story) {
        try_without(&story, &[index]);
    }
}

#[test]
fn behind_a_lost_entry_of_a_sealed_segment_every_message_keeps_its_offset() {
    let story = story(Left::Closed);
    for index in all(&story) {
        try_without(&story, &[index]);
    }
}

#[test]
fn behind_two_lost_entries_every_message_keeps_its_offset() {
    for story in [story(Left::Killed), story(Left::Closed)] {
        let all = all(&story);
        for (nth, first) in all.iter().enumerate() {
            for second in &all[nth + 1..] {
                try_without(&story, &[*first, *second]);
            }
        }
    }
}
