//! The bytes of a shelf of retries.
//!
//! Neighbours are much alike, because they were handed out and failed together. So an entry is told by what of it
//! differs from the one before: where many failed alike it takes 3 bytes instead of 69.
//!
//! ```text
//! shelf    0 u8, then entries to the end
//! entry    which columns differ from the entry before u32, a bit each; the first follows zeros
//!          the difference of each that does, from the lowest bit: i64, wrapping
//!          the consumer of the last failure, if its number is new: str
//!          each earlier lease, oldest first: delivery, session, less those of the last lease: i64 i64
//!          each earlier failure, oldest first: at less that of the last i64, duration u64,
//!              consumer u64, its name if that number is new: str, kind u8, code u32
//! ```
//!
//! Numbers and strings are postcard's; consumers are numbered from 0 as they come. What an entry does not have leaves
//! its column as it was, so that the bytes depend on the entries alone. That none is missing at the end, the
//! chunk's own length and checksum say.

use std::collections::BTreeMap;

use bytes::Bytes;
use millpond_protocol::{LogIndex, SessionId, Stamp};
use serde::{Deserialize, Serialize};

use super::super::OwnChunk;
use crate::effect::Place;
use crate::record::FailureKind;
use crate::state::redelivery::Answer;

/// What is told of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    pub offset: u64,
    pub failures: u32,
    pub deliveries: u32,
    pub releases: u32,
    pub redrives: u32,
    pub delivery: u32,
    pub session: SessionId,
    pub answered: Option<Answer>,
    pub suspect: bool,
    pub lost: bool,
    pub due: Option<Stamp>,
    pub first_attempt_at: Option<Stamp>,
    pub place: Option<Place>,
    pub own: Option<OwnChunk>,
    /// Leases before the last one: delivery and session.
    pub earlier: Vec<(u32, SessionId)>,
    /// Failures before the last one; none if there is no last one.
    pub before: Vec<FailureRow<'a>>,
    pub last: Option<FailureRow<'a>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureRow<'a> {
    pub at: Stamp,
    pub duration_ms: u64,
    pub consumer: &'a str,
    pub kind: FailureKind,
    pub code: u32,
}

/// What differs most often comes first, so that most masks take one byte.
const AT: usize = 0;
const RECORD: usize = 1;
const INDEX: usize = 2;
const FIRST_ATTEMPT: usize = 3;
const DURATION: usize = 4;
/// Less `AT`: one backoff gives many the same.
const DUE: usize = 5;
/// Less the entry's number in the shelf.
const OFFSET: usize = 6;
const DELIVERY: usize = 7;
const CODE: usize = 8;
const SESSION: usize = 9;
const STATE: usize = 10;
const FAILURES: usize = 11;
const DELIVERIES: usize = 12;
const CONSUMER: usize = 13;
const RELEASES: usize = 14;
const REDRIVES: usize = 15;
const OWN_ATTEMPTS: usize = 16;
const OWN_BACKOFF: usize = 17;
const EARLIER: usize = 18;
const BEFORE: usize = 19;
const COLUMNS: usize = 20;

type Columns = [u64; COLUMNS];

// The column of the state: an answer's number or 0, then these, then the kind of the last failure.
const ANSWER_MASK: u64 = 3;
const SUSPECT: u64 = 1 << 2;
const LOST: u64 = 1 << 3;
const WAITS: u64 = 1 << 4;
const HAS_BEGUN: u64 = 1 << 5;
const HAS_PLACE: u64 = 1 << 6;
const HAS_OWN: u64 = 1 << 7;
const HAS_FAILED: u64 = 1 << 8;
const KIND_SHIFT: u32 = 9;
const STATE_END: u64 = 1 << 11;

/// By their numbers, which are part of the format: see `answer_number`, where 0 is none, and `kind_number`.
const ANSWERS: [Answer; 3] = [Answer::Nack, Answer::Reject, Answer::Release];
const KINDS: [FailureKind; 4] = [
    FailureKind::Nack,
    FailureKind::Reject,
    FailureKind::ProcessingTimeout,
    FailureKind::SessionLost,
];

/// Whether these bytes are a shelf in this form; in the one before they began with the number of entries.
pub fn is_shelf(chunk: &[u8]) -> bool {
    chunk.first() == Some(&0)
}

/// A shelf of these entries; none without any.
pub fn write<'a>(rows: impl Iterator<Item = Row<'a>>) -> Option<Bytes> {
    let mut shelf = Writer {
        bytes: vec![0],
        nth: 0,
        columns: Columns::default(),
        consumers: BTreeMap::new(),
    };
    rows.for_each(|row| shelf.add(&row));
    (shelf.nth > 0).then(|| Bytes::from(shelf.bytes.into_boxed_slice()))
}

struct Writer<'a> {
    bytes: Vec<u8>,
    nth: u64,
    columns: Columns,
    consumers: BTreeMap<&'a str, u64>,
}

impl<'a> Writer<'a> {
    fn add(&mut self, row: &Row<'a>) {
        debug_assert!(row.last.is_some() || row.before.is_empty());
        let known = self.consumers.len() as u64;
        let columns = self.columns_of(row);
        let differs = |nth: &usize| columns[*nth] != self.columns[*nth];
        let mask = (0..COLUMNS).filter(differs);
        let mask = mask.fold(0_u32, |mask, nth| mask | 1 << nth);
        self.put(&mask);
        for nth in (0..COLUMNS).filter(|nth| mask & 1 << nth != 0) {
            self.put(&(columns[nth].wrapping_sub(self.columns[nth]) as i64));
        }
        self.columns = columns;
        self.nth += 1;
        if let Some(last) = &row.last
            && self.columns[CONSUMER] == known
        {
            self.put(last.consumer);
        }
        for (delivery, session) in &row.earlier {
            let delivery = i64::from(*delivery) - i64::from(row.delivery);
            self.put(&(delivery, session.0.wrapping_sub(row.session.0) as i64));
        }
        for failure in &row.before {
            let known = self.consumers.len() as u64;
            let consumer = self.number(failure.consumer);
            let at = failure.at.0.wrapping_sub(self.columns[AT]) as i64;
            self.put(&(at, failure.duration_ms, consumer));
            if consumer == known {
                self.put(failure.consumer);
            }
            self.put(&(kind_number(failure.kind) as u8, failure.code));
        }
    }

    fn columns_of(&mut self, row: &Row<'a>) -> Columns {
        let mut columns = self.columns;
        let mut state = row.answered.map_or(0, answer_number);
        state |= if row.suspect { SUSPECT } else { 0 };
        state |= if row.lost { LOST } else { 0 };
        if let Some(last) = &row.last {
            state |= HAS_FAILED | kind_number(last.kind) << KIND_SHIFT;
            columns[AT] = last.at.0;
            columns[DURATION] = last.duration_ms;
            columns[CONSUMER] = self.number(last.consumer);
            columns[CODE] = last.code.into();
        }
        if let Some(due) = row.due {
            state |= WAITS;
            columns[DUE] = due.0.wrapping_sub(columns[AT]);
        }
        if let Some(at) = row.first_attempt_at {
            state |= HAS_BEGUN;
            columns[FIRST_ATTEMPT] = at.0;
        }
        if let Some(place) = row.place {
            state |= HAS_PLACE;
            columns[INDEX] = place.index.0;
            columns[RECORD] = place.record.into();
        }
        if let Some((max_attempts, backoff_initial_ms)) = row.own {
            state |= HAS_OWN;
            columns[OWN_ATTEMPTS] = max_attempts.into();
            columns[OWN_BACKOFF] = backoff_initial_ms.into();
        }
        columns[STATE] = state;
        columns[OFFSET] = row.offset.wrapping_sub(self.nth);
        columns[DELIVERY] = row.delivery.into();
        columns[SESSION] = row.session.0;
        columns[FAILURES] = row.failures.into();
        columns[DELIVERIES] = row.deliveries.into();
        columns[RELEASES] = row.releases.into();
        columns[REDRIVES] = row.redrives.into();
        columns[EARLIER] = row.earlier.len() as u64;
        columns[BEFORE] = row.before.len() as u64;
        columns
    }

    fn number(&mut self, consumer: &'a str) -> u64 {
        let next = self.consumers.len() as u64;
        *self.consumers.entry(consumer).or_insert(next)
    }

    fn put<T: Serialize + ?Sized>(&mut self, value: &T) {
        let bytes = std::mem::take(&mut self.bytes);
        self.bytes = postcard::to_extend(value, bytes).expect("encoding into memory cannot fail");
    }
}

fn answer_number(answer: Answer) -> u64 {
    match answer {
        Answer::Nack => 1,
        Answer::Reject => 2,
        Answer::Release => 3,
    }
}

fn kind_number(kind: FailureKind) -> u64 {
    match kind {
        FailureKind::Nack => 0,
        FailureKind::Reject => 1,
        FailureKind::ProcessingTimeout => 2,
        FailureKind::SessionLost => 3,
    }
}

/// The entries of a shelf, one by one; `None` where it is none, and then nothing more.
pub fn read(chunk: &[u8]) -> impl Iterator<Item = Option<Row<'_>>> {
    let mut shelf = Some(Reader {
        rest: chunk.get(1..).unwrap_or_default(),
        nth: 0,
        columns: Columns::default(),
        consumers: Vec::new(),
    });
    std::iter::from_fn(move || {
        let reader = shelf.as_mut().filter(|reader| !reader.rest.is_empty())?;
        let row = reader.row();
        if row.is_none() {
            shelf = None;
        }
        Some(row)
    })
}

struct Reader<'a> {
    rest: &'a [u8],
    nth: u64,
    columns: Columns,
    consumers: Vec<&'a str>,
}

impl<'a> Reader<'a> {
    fn row(&mut self) -> Option<Row<'a>> {
        let mut mask: u32 = self.take()?;
        if mask >> COLUMNS != 0 {
            return None;
        }
        while mask != 0 {
            let difference: i64 = self.take().filter(|difference| *difference != 0)?;
            let column = &mut self.columns[mask.trailing_zeros() as usize];
            *column = column.wrapping_add(difference as u64);
            mask &= mask - 1;
        }
        let columns = self.columns;
        let state = columns[STATE];
        let has = |what: u64| state & what != 0;
        if state >= STATE_END || (state >> KIND_SHIFT != 0 && !has(HAS_FAILED)) {
            return None;
        }
        let number = |column: usize| u32::try_from(columns[column]).ok();
        let last = match has(HAS_FAILED) {
            false => None,
            true => Some(FailureRow {
                at: Stamp(columns[AT]),
                duration_ms: columns[DURATION],
                consumer: self.consumer(columns[CONSUMER])?,
                kind: *KINDS.get((state >> KIND_SHIFT) as usize)?,
                code: number(CODE)?,
            }),
        };
        let place = match has(HAS_PLACE) {
            false => None,
            true => Some(Place {
                index: LogIndex(columns[INDEX]),
                record: number(RECORD)?,
            }),
        };
        let own = match has(HAS_OWN) {
            false => None,
            true => {
                let max_attempts = u16::try_from(columns[OWN_ATTEMPTS]).ok()?;
                Some((max_attempts, number(OWN_BACKOFF)?))
            }
        };
        let due = Stamp(columns[DUE].wrapping_add(columns[AT]));
        let (delivery, session) = (number(DELIVERY)?, SessionId(columns[SESSION]));
        let nth = self.nth;
        self.nth += 1;
        Some(Row {
            offset: columns[OFFSET].wrapping_add(nth),
            failures: number(FAILURES)?,
            deliveries: number(DELIVERIES)?,
            releases: number(RELEASES)?,
            redrives: number(REDRIVES)?,
            delivery,
            session,
            answered: match (state & ANSWER_MASK) as usize {
                0 => None,
                answer => Some(ANSWERS[answer - 1]),
            },
            suspect: has(SUSPECT),
            lost: has(LOST),
            due: has(WAITS).then_some(due),
            first_attempt_at: has(HAS_BEGUN).then_some(Stamp(columns[FIRST_ATTEMPT])),
            place,
            own,
            // Each takes two bytes or more: there are no more of them than bytes.
            earlier: (0..columns[EARLIER])
                .map(|_| self.lease(delivery, session))
                .collect::<Option<_>>()?,
            before: (0..columns[BEFORE])
                .map(|_| self.failure().filter(|_| last.is_some()))
                .collect::<Option<_>>()?,
            last,
        })
    }

    fn lease(&mut self, delivery: u32, session: SessionId) -> Option<(u32, SessionId)> {
        let (earlier, whose): (i64, i64) = self.take()?;
        let earlier = u32::try_from(i64::from(delivery).checked_add(earlier)?).ok()?;
        Some((earlier, SessionId(session.0.wrapping_add(whose as u64))))
    }

    fn failure(&mut self) -> Option<FailureRow<'a>> {
        let (at, duration_ms, consumer): (i64, u64, u64) = self.take()?;
        let consumer = self.consumer(consumer)?;
        let (kind, code): (u8, u32) = self.take()?;
        Some(FailureRow {
            at: Stamp(self.columns[AT].wrapping_add(at as u64)),
            duration_ms,
            consumer,
            kind: *KINDS.get(usize::from(kind))?,
            code,
        })
    }

    /// The consumer of this number, whose name stands here if the number is new.
    fn consumer(&mut self, number: u64) -> Option<&'a str> {
        let number = usize::try_from(number).ok()?;
        if number == self.consumers.len() {
            let name = self.take()?;
            if self.consumers.contains(&name) {
                return None;
            }
            self.consumers.push(name);
        }
        self.consumers.get(number).copied()
    }

    fn take<T: Deserialize<'a>>(&mut self) -> Option<T> {
        let (value, rest) = postcard::take_from_bytes(self.rest).ok()?;
        self.rest = rest;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0..3_u64, 1_000..1_100_u64, any::<u64>()]
    }

    fn small() -> impl Strategy<Value = u32> {
        prop_oneof![0..3_u32, any::<u32>()]
    }

    fn failure() -> impl Strategy<Value = FailureRow<'static>> {
        let name = proptest::sample::select(vec!["", "a", "consumer-1", "consumer-2"]);
        let kind = proptest::sample::select(KINDS.to_vec());
        (number(), number(), name, kind, small()).prop_map(
            |(at, duration_ms, consumer, kind, code)| FailureRow {
                at: Stamp(at),
                duration_ms,
                consumer,
                kind,
                code,
            },
        )
    }

    fn row() -> impl Strategy<Value = Row<'static>> {
        let stamp = || option::of(number().prop_map(Stamp));
        let place = (number(), small()).prop_map(|(index, record)| Place {
            index: LogIndex(index),
            record,
        });
        let lease = || (small(), number().prop_map(SessionId));
        let counts = (small(), small(), small(), small());
        let answer = option::of(proptest::sample::select(ANSWERS.to_vec()));
        let when = (stamp(), stamp(), option::of(place));
        let past = (vec(lease(), 0..3), vec(failure(), 0..3));
        let own = option::of((any::<u16>(), small()));
        let is = (any::<bool>(), any::<bool>());
        (number(), counts, lease(), answer, when, past, own, is).prop_map(
            |(offset, counts, lease, answered, when, (earlier, mut before), own, is)| {
                let last = before.pop();
                Row {
                    offset,
                    failures: counts.0,
                    deliveries: counts.1,
                    releases: counts.2,
                    redrives: counts.3,
                    delivery: lease.0,
                    session: lease.1,
                    answered,
                    suspect: is.0,
                    lost: is.1,
                    due: when.0,
                    first_attempt_at: when.1,
                    place: when.2,
                    own,
                    earlier,
                    before,
                    last,
                }
            },
        )
    }

    fn told(shelf: &[u8]) -> Option<Vec<Row<'_>>> {
        read(shelf).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(rows in vec(row(), 1..20)) {
            let shelf = write(rows.iter().cloned()).unwrap();
            prop_assert!(is_shelf(&shelf));
            prop_assert_eq!(told(&shelf), Some(rows));
        }

        #[test]
        fn what_is_not_whole_is_no_other_entry(rows in vec(row(), 1..5), cut in any::<usize>()) {
            let shelf = write(rows.iter().cloned()).unwrap();
            let cut = 1 + cut % (shelf.len() - 1);
            let found: Vec<_> = read(&shelf[..cut]).collect();
            let good = found.iter().take_while(|row| row.is_some()).count();
            // Bytes are missing: either an entry is not whole, or whole entries are missing.
            prop_assert!(good < rows.len());
            prop_assert!(found.len() <= good + 1);
            for (found, written) in found.into_iter().flatten().zip(&rows) {
                prop_assert_eq!(&found, written);
            }
        }

        #[test]
        fn any_bytes_are_entries_or_none(mut bytes in vec(any::<u8>(), 1..200)) {
            bytes[0] = 0;
            let found: Vec<_> = read(&bytes).collect();
            prop_assert!(found.len() < bytes.len());
        }
    }

    #[test]
    fn what_failed_alike_takes_little() {
        let rows = (0..512).map(|nth| Row {
            offset: 7_000 + nth,
            failures: 1,
            deliveries: 1,
            releases: 0,
            redrives: 0,
            delivery: 40 + nth as u32 / 64,
            session: SessionId(1 << 40),
            answered: Some(Answer::Nack),
            suspect: false,
            lost: false,
            due: Some(Stamp(1_700_000_001_000_000 + nth)),
            first_attempt_at: Some(Stamp(1_699_999_999_999_000)),
            place: Some(Place {
                index: LogIndex(90_000 + nth / 100),
                record: nth as u32 % 100,
            }),
            own: None,
            earlier: Vec::new(),
            before: Vec::new(),
            last: Some(FailureRow {
                at: Stamp(1_700_000_000_000_000 + nth),
                duration_ms: 1 + nth / 10,
                consumer: "consumer",
                kind: FailureKind::Nack,
                code: 0,
            }),
        });
        let shelf = write(rows).unwrap();
        assert!(shelf.len() < 512 * 4, "{}", shelf.len());
    }

    #[test]
    fn columns_that_are_none_are_refused() {
        // A column too many, one that does not differ, a state too high, a kind of no failure, a consumer that is not the
        // next, a number too large.
        let bad: [(u32, i64); 6] = [
            (1 << COLUMNS, 1),
            (1 << RELEASES, 0),
            (1 << STATE, 1 << KIND_SHIFT),
            (1 << STATE, STATE_END as i64),
            (1 << STATE | 1 << CONSUMER, HAS_FAILED as i64),
            (1 << DELIVERY, 1 << 40),
        ];
        for (mask, difference) in bad {
            let mut shelf = vec![0];
            shelf = postcard::to_extend(&mask, shelf).unwrap();
            for _ in 0..mask.count_ones() {
                shelf = postcard::to_extend(&difference, shelf).unwrap();
            }
            assert_eq!(told(&shelf), None, "{mask:x}");
        }
        assert_eq!(told(&[0, 0]).unwrap().len(), 1);
    }
}
