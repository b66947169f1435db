//! Retries, written, and read back: most of a large state, so by several threads where there are many.
//!
//! Every chunk is a shelf; it is looked at, all of it, and left as it is (`state/redelivery/shelves.rs`). In which order they are
//! read changes nothing. Bytes from disk: every chunk may be wrong, none may panic.

mod format_1;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use millpond_protocol::SubscriptionId;

use self::rows::{FailureRow, Row};
use super::read::{ORPHAN, Result, own};
use crate::effect::RestoreError;
use crate::queue::Queue;
use crate::state::dirty;
use crate::state::redelivery::{Failure, Glance, Retry, Told};

impl Queue {
    /// Reads the retries of all subscriptions, and pins what they need.
    pub(super) fn read_retries(&mut self, chunks: &BTreeMap<u64, Bytes>) -> Result<()> {
        let chunks = chunks.iter().filter(|(id, _)| dirty::is_retries(**id));
        let chunks: Vec<_> = chunks.map(|(id, bytes)| (*id, bytes)).collect();
        let mut places = Vec::new();
        let mut suspected = BTreeSet::new();
        for ((chunk, _), (mut told, shelf)) in chunks.iter().zip(told(&chunks)?) {
            let id = SubscriptionId(dirty::entity(*chunk));
            let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
            places.append(&mut told.places);
            if told.has_suspects {
                suspected.insert(id);
            }
            if !sub.retries.put_shelf(&told, shelf) {
                return Err(DISORDER);
            }
        }
        self.pins.pin_first_records(places);
        for id in suspected {
            self.sort_last_attempts(id);
        }
        Ok(())
    }
}

/// What each chunk tells, in their order, and the shelf that it is.
fn told(chunks: &[(u64, &Bytes)]) -> Result<Vec<(Told, Bytes)>> {
    let look = |&(chunk, bytes): &(u64, &Bytes)| {
        let shelf = match rows::is_shelf(bytes) {
            true => Some(Bytes::clone(bytes)),
            false => format_1::shelf(bytes),
        };
        let told = shelf.and_then(|shelf| Some((Told::of(glances_of(&shelf))?, shelf)));
        told.ok_or(RestoreError::Chunk { chunk })
    };
    let read = |part: &[(u64, &Bytes)]| part.iter().map(look).collect::<Result<Vec<_>>>();
    if chunks.len() < SHARED_CHUNKS_MIN {
        return read(chunks);
    }
    let parts = chunks.chunks(chunks.len().div_ceil(READERS));
    let read: Vec<Result<Vec<_>>> = thread::scope(|scope| {
        let start = |part| thread::Builder::new().spawn_scoped(scope, move || read(part));
        let started: Vec<_> = parts.map(|part| (part, start(part))).collect();
        let finish = |(part, thread): (_, std::io::Result<thread::ScopedJoinHandle<'_, _>>)| {
            match thread.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(read)) => read,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                // No more threads are to be had.
                Err(_) => read(part),
            }
        };
        started.into_iter().map(finish).collect()
    });
    let mut all = Vec::with_capacity(chunks.len());
    for part in read {
        all.append(&mut part?);
    }
    Ok(all)
}

/// The entries of a shelf, one by one; `None` where it is none, and then nothing more.
pub(in crate::state) fn entries_of(shelf: &[u8]) -> impl Iterator<Item = Option<(u64, Retry)>> {
    let mut names = BTreeMap::new();
    rows::read(shelf).map(move |row| row.map(|row| (row.offset, retry(row, &mut names))))
}

/// What there is to know of the same entries without making them: the same bytes are good for both.
pub(in crate::state) fn glances_of(shelf: &[u8]) -> impl Iterator<Item = Option<(u64, Glance)>> {
    let glance = |row: Row<'_>| {
        let has_more = row.redrives > 0 || row.own.is_some();
        let failures = row.before.len() + usize::from(row.last.is_some());
        let glance = Glance {
            due: row.due,
            place: row.place,
            is_suspect: row.suspect || row.lost,
            bytes: Retry::bytes_with(has_more, row.earlier.len(), failures),
        };
        (row.offset, glance)
    };
    rows::read(shelf).map(move |row| row.map(glance))
}

/// The bytes of a shelf with these entries; none without any.
pub(in crate::state) fn shelf<'a>(
    entries: impl Iterator<Item = (u64, &'a Retry)>,
) -> Option<Bytes> {
    rows::write(entries.map(|(offset, retry)| row(offset, retry)))
}

fn row(offset: u64, retry: &Retry) -> Row<'_> {
    fn failure_row(failure: &Failure) -> FailureRow<'_> {
        FailureRow {
            at: failure.at,
            duration_ms: failure.duration_ms,
            consumer: &failure.consumer,
            kind: failure.kind,
            code: failure.code,
        }
    }
    let mut before: Vec<_> = retry.history().map(failure_row).collect();
    let last = before.pop();
    let own = retry.own();
    Row {
        offset,
        failures: retry.failures,
        deliveries: retry.deliveries,
        releases: retry.releases,
        redrives: retry.redrives(),
        delivery: retry.delivery,
        session: retry.session,
        answered: retry.answered,
        suspect: retry.suspect,
        lost: retry.lost,
        due: retry.due(),
        first_attempt_at: retry.first_attempt_at(),
        place: retry.place(),
        own: own.map(|own| (own.max_attempts, own.backoff_initial_ms)),
        earlier: retry.earlier().collect(),
        before,
        last,
    }
}

fn retry<'a>(row: Row<'a>, names: &mut BTreeMap<&'a str, Arc<str>>) -> Retry {
    let failure = |row: FailureRow<'a>| Failure {
        at: row.at,
        duration_ms: row.duration_ms,
        consumer: names
            .entry(row.consumer)
            .or_insert_with(|| row.consumer.into())
            .clone(),
        kind: row.kind,
        code: row.code,
    };
    let mut retry = Retry::redriven(row.redrives, row.own.map(own));
    retry.failures = row.failures;
    retry.deliveries = row.deliveries;
    retry.releases = row.releases;
    retry.delivery = row.delivery;
    retry.session = row.session;
    retry.answered = row.answered;
    retry.suspect = row.suspect;
    retry.lost = row.lost;
    retry.set_due(row.due);
    retry.set_first_attempt_at(row.first_attempt_at);
    retry.set_place(row.place);
    let history = row.before.into_iter().chain(row.last).map(failure);
    retry.set_past(row.earlier, history.collect());
    retry
}

const DISORDER: RestoreError = RestoreError::Contradiction("retries are out of order");

/// With fewer a thread more is not worth its start; 512 retries each at most.
const SHARED_CHUNKS_MIN: usize = 64;

/// Threads that read.
const READERS: usize = 4;
