//! What the owner of the log asks when it reclaims space and when it starts.

use millpond_protocol::{LogIndex, Offset, ProducerKey, Sequence, Stamp, TopicId};

use crate::effect::Place;
use crate::queue::Queue;

impl Queue {
    /// The stamp of the last record applied; the next must be later.
    #[must_use]
    pub fn last_stamp(&self) -> Stamp {
        Stamp(0)
    }

    /// The last accepted sequence of a producer; 0: none, or unknown.
    #[must_use]
    pub fn last_accepted(&self, _producer: ProducerKey) -> Sequence {
        Sequence(0)
    }

    /// How many of the offsets from `first` to before `end` may still be read by somebody.
    #[must_use]
    pub fn live_between(&self, _topic: TopicId, first: Offset, end: Offset) -> u64 {
        end.0.saturating_sub(first.0)
    }

    /// Records in these entries by which a dead letter or a waiting retry tells its story.
    pub fn pins_between(&self, _first: LogIndex, _last: LogIndex) -> impl Iterator<Item = Place> {
        std::iter::empty()
    }

    /// Whether any message of the topic is a reference to a body elsewhere.
    #[must_use]
    pub fn has_references(&self, _topic: TopicId) -> bool {
        true
    }

    /// The last snapshot was not written: the next one is whole.
    pub fn forget_snapshots(&mut self) {}
}
