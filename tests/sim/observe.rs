//! Reading what a shard holds, past all clients: messages through the log's reader, the rest by the
//! queue's views.

use millpond_broker::clock::ManualClock;
use millpond_broker::shard::Shard;
use millpond_protocol::{MessageView, Offset, TopicId};
use millpond_queue::{PUBLISH_FIXED_BYTES, Queue};
use millpond_wal::{LogReader, Row};

use crate::disk::Disk;
use crate::history::{LetterSeen, Seen, SubEnd, SubNo, TopicNo, TopicSeen};
use crate::plan::Plan;
use crate::rng::digest;

pub type SimShard = Shard<Disk, ManualClock>;

/// Rows looked up at once.
const ROWS: usize = 64;

/// The topic from `from` on, as far as it can be read.
pub fn topic(shard: &SimShard, plan: &Plan, no: TopicNo, from: u64) -> Option<TopicSeen> {
    let queue = shard.queue();
    let id = queue.topic_id(&plan.topics[no].name)?;
    let view = queue.topic_view(id)?;
    let from = from.max(view.first.0);
    Some(TopicSeen {
        topic: no,
        from,
        first_kept: view.first.0,
        next: view.next.0,
        messages: messages(&shard.log().reader(), id, from, view.next.0),
    })
}

fn messages(reader: &LogReader<Disk>, topic: TopicId, from: u64, next: u64) -> Vec<Seen> {
    let mut all = Vec::new();
    let mut offset = from;
    while offset < next {
        let rows = reader.rows(topic.0, offset, ROWS).unwrap_or_default();
        let Some(last) = rows.last() else {
            break;
        };
        let end = last.end();
        for row in rows {
            let run = read_row(reader, &row);
            all.extend(
                run.into_iter()
                    .filter(|seen| seen.offset >= from && seen.offset < next),
            );
        }
        offset = end;
    }
    all
}

/// Reads bodies one by one; neighbours stand in one record.
#[derive(Default)]
pub struct Bodies {
    topic: TopicId,
    row: Vec<Seen>,
}

impl Bodies {
    /// One message's digest, if it can be had.
    pub fn digest(
        &mut self,
        reader: &LogReader<Disk>,
        topic: TopicId,
        offset: Offset,
    ) -> Option<u64> {
        let there = |row: &[Seen]| {
            let at = row.binary_search_by_key(&offset.0, |seen| seen.offset);
            at.ok().map(|at| row[at].digest)
        };
        if self.topic == topic
            && let Some(digest) = there(&self.row)
        {
            return Some(digest);
        }
        let row = reader.find(topic.0, offset.0).ok()??;
        self.topic = topic;
        self.row = read_row(reader, &row);
        there(&self.row)
    }
}

fn read_row(reader: &LogReader<Disk>, row: &Row) -> Vec<Seen> {
    let Ok(record) = reader.record(row.place) else {
        return Vec::new();
    };
    let mut rest = record.body.get(PUBLISH_FIXED_BYTES..).unwrap_or_default();
    let mut all = Vec::new();
    for nth in 0..u64::from(row.skip) + u64::from(row.count) {
        let Ok((view, behind)) = MessageView::split(rest) else {
            break;
        };
        rest = behind;
        if nth >= u64::from(row.skip) && view.verify().is_ok() {
            all.push(Seen {
                offset: row.base + nth - u64::from(row.skip),
                sequence: view.sequence().0,
                digest: digest(view.bytes()),
            });
        }
    }
    all
}

/// The ack floor or consumer offset of a subscription.
pub fn floor(queue: &Queue, plan: &Plan, sub: SubNo) -> Option<u64> {
    let topic = queue.topic_id(&plan.topics[plan.subs[sub].topic].name)?;
    let id = queue.subscription_id(topic, &plan.subs[sub].name)?;
    let view = queue.subscription_view(id, queue.last_stamp())?;
    Some(view.floor.0)
}

/// How many messages a subscription has not finished.
pub fn backlog(queue: &Queue, plan: &Plan, sub: SubNo) -> Option<u64> {
    let topic = queue.topic_id(&plan.topics[plan.subs[sub].topic].name)?;
    let id = queue.subscription_id(topic, &plan.subs[sub].name)?;
    let view = queue.subscription_view(id, queue.last_stamp())?;
    Some(view.backlog)
}

/// A subscription at rest, with its letters.
pub fn subscription(queue: &Queue, plan: &Plan, sub: SubNo) -> Option<SubEnd> {
    let topic_name = &plan.topics[plan.subs[sub].topic].name;
    let name = &plan.subs[sub].name;
    let topic = queue.topic_id(topic_name)?;
    let id = queue.subscription_id(topic, name)?;
    let view = queue.subscription_view(id, queue.last_stamp())?;
    let mut letters = Vec::new();
    if let Some(dead) = queue.dead_topic(topic_name, name) {
        let mut from = Offset(0);
        loop {
            let page = queue.dead_letters(dead, topic_name, name, from, 1_000);
            letters.extend(page.letters.iter().map(|(_, letter)| LetterSeen {
                offset: letter.source_offset.0,
                reason: letter.reason,
                failures: letter.failures,
                deliveries: letter.deliveries,
                redrives: letter.redrives,
            }));
            if !page.more {
                break;
            }
            from = page.next;
        }
    }
    Some(SubEnd {
        sub,
        floor: view.floor.0,
        backlog: view.backlog,
        letters,
    })
}
