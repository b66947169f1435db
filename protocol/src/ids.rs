//! Numbers that must not be confused with one another.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number after this one; the largest number stays itself.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A topic's lane. Never reused, also not after the topic is deleted.
    TopicId(u32)
}
number! {
    /// A subscription. Never reused.
    SubscriptionId(u32)
}
number! {
    /// A message's position in its topic: gapless from 0, assigned once, never reused.
    Offset(u64)
}
number! {
    /// A producer's own number for a message, from 1; it rises but may skip. 0 means "none yet".
    Sequence(u64)
}
number! {
    /// An incarnation of a producer id. A higher epoch fences every lower one.
    Epoch(u32)
}
number! {
    /// The broker's number for a (producer id, topic) pair. Never reused.
    ProducerKey(u64)
}
number! {
    /// One producer's place on a publish stream, chosen by the client. They rise from 1 in the order
    /// of opening, and none is used twice on a stream.
    ProducerHandle(u32)
}
number! {
    /// One consumer's stay. The upper 32 bits are the recovery epoch, so it is never reused.
    SessionId(u64)
}
number! {
    /// The ordinal of a hand-out of one message in one subscription, from 1.
    Delivery(u32)
}
number! {
    /// The position of an entry in the log, from 1; 0 means "nothing".
    LogIndex(u64)
}
number! {
    /// Microseconds since the Unix epoch as the broker stamps them; they never go back.
    Stamp(u64)
}

impl Stamp {
    /// This stamp moved later by `ms` milliseconds; saturates.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000)))
    }

    /// Whole milliseconds from `earlier` to this stamp; 0 if it is not later.
    #[must_use]
    pub const fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000
    }
}
