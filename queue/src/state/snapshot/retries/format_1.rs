//! Retries as the first format had them: a chunk was the number of its entries and then these, each by itself. It is read
//! for ever, and never written.

use bytes::Bytes;
use millpond_protocol::{SessionId, Stamp};
use serde::Deserialize;

use super::super::OwnChunk;
use super::rows::{self, FailureRow, Row};
use crate::effect::Place;
use crate::record::FailureKind;
use crate::state::redelivery::Answer;

/// The shelf with the entries of such a chunk; `None` if it is none, or has none.
pub fn shelf(chunk: &[u8]) -> Option<Bytes> {
    let (entries, rest) = postcard::take_from_bytes::<Vec<RetryChunk<'_>>>(chunk).ok()?;
    let entries = rest.is_empty().then_some(entries)?;
    rows::write(entries.into_iter().map(RetryChunk::row))
}

/// An entry.
#[derive(Deserialize)]
struct RetryChunk<'a> {
    offset: u64,
    failures: u32,
    deliveries: u32,
    releases: u32,
    redrives: u32,
    delivery: u32,
    session: SessionId,
    answered: Option<Answer>,
    suspect: bool,
    lost: bool,
    due: Option<Stamp>,
    first_attempt_at: Option<Stamp>,
    place: Option<Place>,
    own: Option<OwnChunk>,
    earlier: Vec<(u32, SessionId)>,
    #[serde(borrow)]
    history: Vec<FailureChunk<'a>>,
}

/// When, after how long, whose, of which kind and with which code.
type FailureChunk<'a> = (Stamp, u64, &'a str, FailureKind, u32);

impl<'a> RetryChunk<'a> {
    fn row(self) -> Row<'a> {
        let failure = |(at, duration_ms, consumer, kind, code)| FailureRow {
            at,
            duration_ms,
            consumer,
            kind,
            code,
        };
        let mut before: Vec<_> = self.history.into_iter().map(failure).collect();
        let last = before.pop();
        Row {
            offset: self.offset,
            failures: self.failures,
            deliveries: self.deliveries,
            releases: self.releases,
            redrives: self.redrives,
            delivery: self.delivery,
            session: self.session,
            answered: self.answered,
            suspect: self.suspect,
            lost: self.lost,
            due: self.due,
            first_attempt_at: self.first_attempt_at,
            place: self.place,
            own: self.own,
            earlier: self.earlier,
            before,
            last,
        }
    }
}
