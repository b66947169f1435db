//! Reading retries back: most of a large state, so by several threads where there are many.
//!
//! Each chunk becomes a shelf by itself, from its bytes and from what was read before; in which order they are
//! read changes nothing. Bytes from disk: every chunk may be wrong, none may panic.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use millpond_protocol::SubscriptionId;

use super::RetryChunk;
use super::read::{ORPHAN, Result, own};
use crate::effect::RestoreError;
use crate::queue::Queue;
use crate::state::dirty::{self, ENTRIES_SHIFT};
use crate::state::redelivery::{Failure, Retry, Shelf};

impl Queue {
    /// Reads the retries of all subscriptions, and pins what they need.
    pub(super) fn read_retries(&mut self, chunks: &BTreeMap<u64, Bytes>) -> Result<()> {
        let chunks = chunks.iter().filter(|(id, _)| dirty::is_retries(**id));
        let chunks: Vec<_> = chunks.map(|(id, bytes)| (*id, &**bytes)).collect();
        let mut shelves: BTreeMap<SubscriptionId, Vec<Shelf>> = BTreeMap::new();
        let mut places = Vec::new();
        for (id, mut shelf) in self.shelves(&chunks)? {
            places.append(&mut shelf.places);
            shelves.entry(id).or_default().push(shelf);
        }
        self.pins.pin_first_records(places);
        for (id, shelves) in shelves {
            let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
            if !sub.retries.put_shelves(shelves) {
                return Err(DISORDER);
            }
        }
        Ok(())
    }

    /// A shelf of each chunk, in their order.
    fn shelves(&self, chunks: &[(u64, &[u8])]) -> Result<Vec<(SubscriptionId, Shelf)>> {
        let read = |part: &[(u64, &[u8])]| -> Result<Vec<_>> {
            part.iter()
                .map(|(id, bytes)| self.shelf(*id, bytes))
                .collect()
        };
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

    fn shelf(&self, chunk: u64, bytes: &[u8]) -> Result<(SubscriptionId, Shelf)> {
        let id = SubscriptionId(dirty::entity(chunk));
        let sub = self.subscriptions.get(&id).ok_or(ORPHAN)?;
        let entries = entries(bytes).ok_or(RestoreError::Chunk { chunk })?;
        let is_alone = |offset, retry: &Retry| {
            // Few have to be told which attempt is their last.
            retry.suspect || (retry.lost && retry.is_alone(self.max_attempts(sub, offset, retry)))
        };
        let shelf = Shelf::of(entries, is_alone).ok_or(DISORDER)?;
        Ok((id, shelf))
    }
}

/// The entries of a chunk; `None` if it is none. They are taken out one by one, without a list of them as they
/// stand there.
fn entries(bytes: &[u8]) -> Option<Vec<(u64, Box<Retry>)>> {
    let (count, mut rest): (u64, _) = postcard::take_from_bytes(bytes).ok()?;
    let mut names = BTreeMap::new();
    let mut entries = Vec::with_capacity(count.min(1 << ENTRIES_SHIFT) as usize);
    for _ in 0..count {
        let (read, left): (RetryChunk<'_>, _) = postcard::take_from_bytes(rest).ok()?;
        entries.push((read.offset, Box::new(retry(read, &mut names))));
        rest = left;
    }
    rest.is_empty().then_some(entries)
}

fn retry<'a>(read: RetryChunk<'a>, names: &mut BTreeMap<&'a str, Arc<str>>) -> Retry {
    let mut name = |name: &'a str| names.entry(name).or_insert_with(|| name.into()).clone();
    let failure = |(at, duration_ms, consumer, kind, code)| Failure {
        at,
        duration_ms,
        consumer: name(consumer),
        kind,
        code,
    };
    let mut retry = Retry::redriven(read.redrives, read.own.map(own));
    retry.failures = read.failures;
    retry.deliveries = read.deliveries;
    retry.releases = read.releases;
    retry.delivery = read.delivery;
    retry.session = read.session;
    retry.answered = read.answered;
    retry.suspect = read.suspect;
    retry.lost = read.lost;
    retry.set_due(read.due);
    retry.set_first_attempt_at(read.first_attempt_at);
    retry.set_place(read.place);
    retry.set_past(
        read.earlier,
        read.history.into_iter().map(failure).collect(),
    );
    retry
}

const DISORDER: RestoreError = RestoreError::Contradiction("retries are out of order");

/// With fewer a thread more is not worth its start; 512 retries each at most.
const SHARED_CHUNKS_MIN: usize = 64;

/// Threads that read.
const READERS: usize = 4;
