//! What the golden store holds: every acknowledged message with its bytes and its place, every entry with
//! its bytes on disk, and the state after each entry that a start may have to stop at.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};

use bytes::Bytes;
use millpond_protocol::{LogIndex, MessageView, Offset, Stamp, TopicId};
use millpond_queue::{Place, Queue, Record};
use millpond_wal::{Dumped, Log, Replayed};

use crate::disk::{Contents, Disk};
use crate::golden::{Golden, NEXT_MINUTE};
use crate::life::{self, NO_SNAPSHOT};

/// A state, as the chunks of a first snapshot of it.
pub type State = Vec<(u64, Bytes)>;

pub struct Oracle {
    pub contents: Contents,
    pub messages: BTreeMap<(TopicId, Offset), Known>,
    /// By index; those that cleaning let go are none.
    pub entries: BTreeMap<u64, EntryAt>,
    pub segments: BTreeMap<String, SegmentAt>,
    /// The highest index that something else says is durable; what is above may be a torn write.
    pub vouched: u64,
    pub last: u64,
    /// By index, before a start: where a fold may have to stop.
    pub stopped: BTreeMap<u64, State>,
    /// After a start that found everything, and after another.
    pub whole: [State; 2],
    /// After a start that took the last entry for a torn write, and after another.
    pub without_last: [State; 2],
    pub topics: BTreeSet<TopicId>,
}

/// One acknowledged message.
pub struct Known {
    pub bytes: Bytes,
    pub index: u64,
    /// Still wanted: neither finished by everybody nor let go.
    pub live: bool,
}

pub struct EntryAt {
    pub file: String,
    pub bytes: Range<u64>,
}

pub struct SegmentAt {
    pub first: u64,
    pub last: u64,
}

impl Oracle {
    pub fn of(golden: &Golden) -> Self {
        let disk = Disk::of(&golden.contents);
        let (entries, segments, vouched) = look(&disk);
        let last = *entries.keys().next_back().expect("there are entries");
        assert!(vouched < last, "the last entry is not vouched for");
        let without_last = without(&golden.contents, &entries[&last]);
        let (shard, recovered, _) =
            life::open(&disk, NEXT_MINUTE, NO_SNAPSHOT).expect("nothing is damaged");
        assert!(
            recovered.report.torn.is_empty() && !recovered.damaged,
            "{recovered:?}"
        );
        let messages = messages(golden, shard.queue());
        Self {
            contents: golden.contents.clone(),
            topics: messages.keys().map(|(topic, _)| *topic).collect(),
            messages,
            stopped: stops(&golden.contents),
            whole: started_twice(&golden.contents),
            without_last: started_twice(&without_last),
            entries,
            segments,
            vouched,
            last,
        }
    }

    pub fn bytes(&self) -> usize {
        self.contents.values().map(|bytes| bytes.len()).sum()
    }

    /// The entries of which a byte lies in this stretch of a file.
    pub fn entries_at<'a>(
        &'a self,
        file: &'a str,
        bytes: Range<u64>,
    ) -> impl Iterator<Item = u64> + 'a {
        let hit = move |entry: &EntryAt| {
            entry.file == file && entry.bytes.start < bytes.end && bytes.start < entry.bytes.end
        };
        let entries = self.entries.iter();
        entries
            .filter(move |(_, entry)| hit(entry))
            .map(|(index, _)| *index)
    }
}

/// Entries by index, segments by name, and what is vouched for.
pub fn look(disk: &Disk) -> (BTreeMap<u64, EntryAt>, BTreeMap<String, SegmentAt>, u64) {
    let (mut entries, mut segments, mut vouched) = (BTreeMap::new(), BTreeMap::new(), 0);
    let mut file = String::new();
    millpond_wal::dump(disk, millpond_wal::LogIndex(0), |dumped| {
        match dumped {
            Dumped::Segment {
                file: name, range, ..
            } => {
                file = name.to_owned();
                let (first, last) = (range.first.0, range.last.0);
                segments.insert(file.clone(), SegmentAt { first, last });
            }
            Dumped::Entry {
                header, position, ..
            } => {
                vouched = vouched.max(header.durable.0);
                let used = 96 + u64::from(header.payload_bytes);
                let entry = EntryAt {
                    file: file.clone(),
                    bytes: position..position + used.next_multiple_of(4096),
                };
                entries.insert(header.index.0, entry);
            }
            Dumped::Damaged(range) => panic!("the golden store is damaged: {range}"),
        }
        ControlFlow::Continue(())
    })
    .expect("nothing is damaged");
    (entries, segments, vouched)
}

fn messages(golden: &Golden, queue: &Queue) -> BTreeMap<(TopicId, Offset), Known> {
    let mut known = BTreeMap::new();
    for accepted in &golden.accepted {
        let mut rest: &[u8] = &accepted.messages;
        for nth in 0..u64::from(accepted.count) {
            let (view, behind) = MessageView::split(rest).expect("it was accepted");
            rest = behind;
            let offset = Offset(accepted.base.0 + nth);
            let message = Known {
                bytes: Bytes::copy_from_slice(view.bytes()),
                index: accepted.place.index.0,
                live: queue.is_live(accepted.topic, offset),
            };
            assert!(known.insert((accepted.topic, offset), message).is_none());
        }
        assert!(rest.is_empty());
    }
    known
}

/// The states between the snapshot and the end.
fn stops(contents: &Contents) -> BTreeMap<u64, State> {
    let disk = Disk::of(contents);
    let mut opened = Log::open(disk, life::options(NO_SNAPSHOT).log).expect("nothing is damaged");
    let snapshot = opened.snapshot.take().expect("there is a snapshot");
    let chunks = snapshot
        .chunks()
        .map(|chunk| chunk.expect("nothing is damaged"));
    let options = millpond_queue::Options {
        seed: u64::from_le_bytes(*b"the gold"),
        ..millpond_queue::Options::default()
    };
    let mut queue = Queue::restore(options, chunks.map(|(id, bytes)| (id.0, bytes)))
        .expect("it was written by a queue");
    let mut stops = BTreeMap::from([(snapshot.index().0, queue.chunks())]);
    let end = opened.log.replay(|step, _| {
        let Replayed::Entry(entry) = step else {
            panic!("no loss was accepted");
        };
        for record in entry.records() {
            let decoded = Record::decode(record.kind, record.body)?;
            let place = Place {
                index: LogIndex(record.place.index.0),
                record: record.place.record,
            };
            queue.apply(place, Stamp(record.stamp), &decoded, &mut Vec::new());
        }
        stops.insert(entry.index.0, queue.chunks());
        Ok::<(), millpond_queue::RecordError>(())
    });
    end.expect("nothing is damaged");
    stops
}

fn without(contents: &Contents, entry: &EntryAt) -> Contents {
    let mut contents = contents.clone();
    let mut bytes = contents[&entry.file].to_vec();
    bytes[entry.bytes.start as usize..entry.bytes.end as usize].fill(0);
    contents.insert(entry.file.clone(), bytes.into());
    contents
}

fn started_twice(contents: &Contents) -> [State; 2] {
    let disk = Disk::of(contents);
    [(); 2].map(|()| {
        let opened = life::open(&disk, NEXT_MINUTE, NO_SNAPSHOT);
        let (shard, recovered, _) = opened.expect("nothing is damaged");
        assert!(!recovered.damaged);
        shard.queue().chunks()
    })
}
