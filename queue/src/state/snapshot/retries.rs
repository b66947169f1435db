//! Reading retries back: most of a large state, so by several threads where there are many.
//!
//! Every chunk is looked at, all of it, and left as it is (`state/redelivery/shelves.rs`). In which order they are
//! read changes nothing. Bytes from disk: every chunk may be wrong, none may panic.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use millpond_protocol::SubscriptionId;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

use super::read::{ORPHAN, Result, own};
use super::{EarlierChunk, FailureChunk, RetryChunk};
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
        for ((chunk, bytes), mut told) in chunks.iter().zip(told(&chunks)?) {
            let id = SubscriptionId(dirty::entity(*chunk));
            let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
            places.append(&mut told.places);
            if told.has_suspects {
                suspected.insert(id);
            }
            if !sub.retries.put_shelf(&told, Bytes::clone(bytes)) {
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

/// What each chunk tells, in their order.
fn told(chunks: &[(u64, &Bytes)]) -> Result<Vec<Told>> {
    let read = |part: &[(u64, &Bytes)]| -> Result<Vec<_>> {
        let told = |&(chunk, bytes): &(u64, &Bytes)| {
            Told::of(glances_of(bytes)).ok_or(RestoreError::Chunk { chunk })
        };
        part.iter().map(told).collect()
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

/// The entries of a chunk, one by one; `None` where it is none, and then nothing more.
pub(in crate::state) fn entries_of(chunk: &[u8]) -> impl Iterator<Item = Option<(u64, Retry)>> {
    let mut names = BTreeMap::new();
    items(chunk).map(move |read| read.map(|read| (read.offset, retry(read, &mut names))))
}

/// What there is to know of the same entries without making them: the same bytes are good for both.
pub(in crate::state) fn glances_of(chunk: &[u8]) -> impl Iterator<Item = Option<(u64, Glance)>> {
    let glance = |read: RetryChunk<Passed<EarlierChunk>, Passed<FailureChunk<'_>>>| {
        let has_more = read.redrives > 0 || read.own.is_some();
        let glance = Glance {
            due: read.due,
            place: read.place,
            is_suspect: read.suspect || read.lost,
            bytes: Retry::bytes_with(has_more, read.earlier.count, read.history.count),
        };
        (read.offset, glance)
    };
    items(chunk).map(move |read| read.map(glance))
}

fn items<'a, E, H>(chunk: &'a [u8]) -> impl Iterator<Item = Option<RetryChunk<E, H>>>
where
    E: Deserialize<'a>,
    H: Deserialize<'a>,
{
    let mut rest = postcard::take_from_bytes::<u64>(chunk).ok();
    std::iter::from_fn(move || match rest.take()? {
        (0, []) => None,
        (0, _) => Some(None),
        (left, bytes) => {
            let read = postcard::take_from_bytes(bytes).ok();
            rest = read.as_ref().map(|(_, behind)| (left - 1, *behind));
            Some(read.map(|(read, _)| read))
        }
    })
}

/// A list that is read to its end, and only counted.
struct Passed<T> {
    count: usize,
    items: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Passed<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let items = PhantomData;
        from.deserialize_seq(Passed { count: 0, items })
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Passed<T> {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> std::result::Result<Self, A::Error> {
        while list.next_element::<T>()?.is_some() {
            self.count += 1;
        }
        Ok(self)
    }
}

type WholeChunk<'a> = RetryChunk<Vec<EarlierChunk>, Vec<FailureChunk<'a>>>;

fn retry<'a>(read: WholeChunk<'a>, names: &mut BTreeMap<&'a str, Arc<str>>) -> Retry {
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
