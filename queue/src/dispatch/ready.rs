//! Which messages go to which session: ready order and turns.
//!
//! Due retries first by (due, offset), but at most half of the hand-outs while new messages wait; new
//! ones by offset. After a start that left more overdue than one turn opens, those first whose shelves
//! are open. Sessions take turns, each with its share of what is ready and at most its credit.
//! Suspects, and last attempts after a session's loss, go to a session that holds nothing else; if
//! there is none, one is left to run empty.

use std::collections::BTreeMap;
use std::ops::Bound;

use millpond_protocol::{Delivery, Offset, SessionId, Stamp, SubscriptionId};

use super::timers::{Timer, Timers};
use crate::counters::Counters;
use crate::effect::{Handout, Proposal};
use crate::limits::{HANDOUT_MAX, SCAN_MAX, SHELVES_OPENED_MAX};
use crate::planted::{self, Bug};
use crate::policy::due_by;
use crate::queue::Queue;
use crate::record::{LeaseRange, Record};
use crate::state::redelivery::Retry;
use crate::state::session::{Sent, Session};
use crate::state::subscription::Subscription;
use crate::state::topic::Topic;

/// Consecutive messages that would be handed out alike.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Piece {
    first: u64,
    end: u64,
    delivery: u32,
    attempt: u32,
    /// It moves the cursor of hand-outs.
    fresh: bool,
}

/// One subscription at work.
struct Server<'a> {
    sub: &'a mut Subscription,
    topic: &'a Topic,
    sessions: &'a mut BTreeMap<SessionId, Session>,
    timers: &'a mut Timers,
    counters: &'a mut Counters,
    out: &'a mut Vec<Proposal>,
    retry_bytes_max: u64,
    average_bytes: u64,
    now: Stamp,
    /// Messages below it are too old for the topic's time to live, or for `max_age`.
    ttl_end: u64,
    age_end: u64,
    /// Shelves that may still be opened.
    shelves_left: usize,
    /// It stopped looking before it had seen all.
    more: bool,
}

/// What one turn of a subscription came to.
pub(super) struct Served {
    pub handed: usize,
    /// There may be more although nothing was handed out.
    pub more: bool,
}

impl Queue {
    /// Hands out up to `budget` messages of one subscription.
    pub(super) fn serve(
        &mut self,
        id: SubscriptionId,
        now: Stamp,
        budget: usize,
        out: &mut Vec<Proposal>,
    ) -> Served {
        let nothing = Served {
            handed: 0,
            more: false,
        };
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return nothing;
        };
        let Some(topic) = self.topics.get(&sub.topic) else {
            return nothing;
        };
        if sub.paused || sub.sessions.is_empty() {
            return nothing;
        }
        let older = |ms: Option<u64>| ms.map_or(0, |ms| topic.index.older_end(now, ms, topic.next));
        let mut server = Server {
            average_bytes: topic.average_bytes(),
            ttl_end: topic.ttl_floor.max(older(topic.config.ttl_ms)),
            age_end: older(sub.config.max_age_ms),
            shelves_left: SHELVES_OPENED_MAX,
            more: false,
            sub,
            topic,
            sessions: &mut self.sessions,
            timers: &mut self.work.timers,
            counters: &mut self.counters,
            out,
            retry_bytes_max: self.options.retry_bytes_max,
            now,
        };
        let handed = if server.sub.is_queue() {
            server.queue(budget as u64)
        } else {
            server.stream(budget as u64)
        };
        let closed = server.sub.retries.first_closed();
        let has_due = closed.is_some_and(|due| due <= due_by(now));
        Served {
            handed: handed as usize,
            more: server.more || (server.shelves_left == 0 && has_due),
        }
    }
}

impl Server<'_> {
    fn stream(&mut self, budget: u64) -> u64 {
        let mut handed = 0;
        let Some(active) = self.sub.active else {
            return 0;
        };
        let Some(session) = self.sessions.get_mut(&active) else {
            return 0;
        };
        while handed < budget {
            let read = session.live.read.max(self.sub.floor).max(self.topic.first);
            let room = session.room(self.average_bytes).min(HANDOUT_MAX);
            // What was let go is passed over.
            let read = self.sub.done.next_absent(read);
            let read = read + u64::from(planted::is(Bug::StreamSkips) && read % 8 == 5);
            let end = self.sub.done.next_present(read).unwrap_or(u64::MAX);
            let count = self
                .topic
                .next
                .min(end)
                .saturating_sub(read)
                .min(room)
                .min(budget - handed);
            if count == 0 {
                break;
            }
            session.live.read = read + count;
            session.live.handed += count;
            handed += count;
            self.out.push(Proposal::Stream {
                session: active,
                subscription: self.sub.id,
                topic: self.topic.id,
                offset: Offset(read),
                count: count as u32,
            });
        }
        handed
    }

    fn queue(&mut self, budget: u64) -> u64 {
        let mut handed = 0;
        loop {
            let in_flight = self.sub.leases.count() + self.sub.hand.count;
            let free = u64::from(self.sub.config.max_in_flight).saturating_sub(in_flight);
            let free = free.min(budget - handed);
            if free == 0 {
                return handed;
            }
            let given = match self.alone() {
                0 => self.turn(free),
                given => given,
            };
            if given == 0 {
                return handed;
            }
            handed += given;
        }
    }

    /// One message that must be its session's only one.
    fn alone(&mut self) -> u64 {
        let until = ..=(due_by(self.now), u64::MAX);
        let hand = &self.sub.hand;
        let mut waiting = self.sub.retries.alone().range(until);
        let next = waiting.find(|(_, offset)| {
            hand.proposed_until(*offset).is_none() && !self.is_retry_over(*offset)
        });
        let Some((due, offset)) = next.copied() else {
            self.sub.hand.draining = None;
            return 0;
        };
        let room = |id: &&SessionId| {
            let session = self.sessions.get(*id);
            session.is_some_and(|session| session.room(self.average_bytes) > 0)
        };
        let mut able = self.sub.hand.creditors.iter().filter(room);
        let empty = |id: &&SessionId| self.sessions.get(*id).is_some_and(Session::is_empty);
        if let Some(id) = able.clone().find(empty).copied() {
            let Some(piece) = self.piece_of_retry(due, offset) else {
                return 0;
            };
            if self.sub.hand.draining == Some(id) {
                self.sub.hand.draining = None;
            }
            self.give(id, &[piece]);
            if let Some(session) = self.sessions.get_mut(&id) {
                session.live.alone = Some(offset);
            }
            return 1;
        }
        let draining = self.sub.hand.draining;
        if !draining.is_some_and(|id| able.clone().any(|able| *able == id)) {
            let leases = |id: &&SessionId| self.sessions.get(*id).map(|session| session.leases);
            let one = able.by_ref().min_by_key(leases).copied();
            self.sub.hand.draining = one;
        }
        0
    }

    /// The next session's share, at most `free`.
    fn turn(&mut self, free: u64) -> u64 {
        let Some((id, room)) = self.next_session() else {
            return 0;
        };
        let until = ..=(due_by(self.now), u64::MAX);
        let eligible = self.sub.hand.creditors.len().max(1) as u64;
        let most = free.min(room).min(HANDOUT_MAX);
        // More than everybody's most changes no share.
        let counted = most.saturating_mul(eligible).min(HANDOUT_MAX) as usize;
        self.open_due(counted as u64);
        let due = self.sub.retries.due().range(until).take(counted).count() as u64;
        let new = self.topic.next.saturating_sub(self.sub.hand.cursor) + self.sub.again.len();
        let share = (due + new).div_ceil(eligible).max(1);
        let share = share.min(most);
        let retries = if due > 0 { self.due(share) } else { Vec::new() };
        let mut fresh = Vec::new();
        if self.sub.retries.bytes() < self.retry_bytes_max {
            self.new_pieces(share, &mut fresh);
        }
        let new = total(&fresh);
        let retried = self.split(share, retries.len() as u64, new);
        let mut pieces = Vec::with_capacity(fresh.len() + 1);
        for (due, offset) in &retries[..retried as usize] {
            if let Some(piece) = self.piece_of_retry(*due, *offset) {
                push(&mut pieces, piece);
            }
        }
        cut_to(&mut fresh, share - retried);
        pieces.extend(fresh);
        self.give(id, &pieces);
        let given = total(&pieces);
        if given > 0 {
            self.sub.hand.served = id;
        }
        given
    }

    /// Opens shelves that a start left closed, until the first `wanted` retries that are due and open to be handed
    /// out stand in their order, or until it is enough for one turn.
    fn open_due(&mut self, wanted: u64) {
        let until = due_by(self.now);
        while self.shelves_left > 0
            && let Some(first) = self.sub.retries.first_closed()
            && first <= until
        {
            let open = self.due(wanted);
            let is_behind = open.last().is_some_and(|(due, _)| *due < first);
            if open.len() as u64 == wanted && is_behind {
                break;
            }
            self.shelves_left -= 1;
            self.sub.retries.open_first();
        }
        if self.sub.retries.take_opened()
            && let Some(due) = self.sub.retries.next_known_due(self.now)
        {
            self.timers.arm(Timer::Subscription(self.sub.id), due);
        }
    }

    /// How many of `share` hand-outs are retries.
    fn split(&mut self, share: u64, retries: u64, new: u64) -> u64 {
        if retries + new <= share {
            return retries;
        }
        let mut half = share / 2;
        if share % 2 == 1 && retries > half && new > half {
            half += u64::from(!self.sub.hand.new_first);
            self.sub.hand.new_first = !self.sub.hand.new_first;
        }
        retries.min(half.max(share - new.min(share)))
    }

    /// The session whose turn it is, with its room.
    fn next_session(&mut self) -> Option<(SessionId, u64)> {
        let hand = &mut self.sub.hand;
        let mut after = hand.served;
        for _ in 0..hand.creditors.len() {
            let behind = (Bound::Excluded(after), Bound::Unbounded);
            let next = hand
                .creditors
                .range(behind)
                .next()
                .or(hand.creditors.first());
            after = *next?;
            let Some(session) = self.sessions.get_mut(&after) else {
                hand.creditors.remove(&after);
                continue;
            };
            if session.live.alone.is_some() && session.is_empty() {
                session.live.alone = None;
            }
            match session.room(self.average_bytes) {
                0 => {
                    hand.creditors.remove(&after);
                }
                // One at a time shows whether it takes messages again.
                _ if session.live.stuck && !session.is_empty() => {}
                room if session.live.alone.is_none() && hand.draining != Some(after) => {
                    let room = if session.live.stuck { 1 } else { room };
                    return Some((after, room));
                }
                _ => {}
            }
        }
        None
    }

    /// Due retries that have not been proposed, by (due, offset).
    fn due(&self, most: u64) -> Vec<(Stamp, u64)> {
        let until = ..=(due_by(self.now), u64::MAX);
        let hand = &self.sub.hand;
        let due = self.sub.retries.due().range(until);
        let open = due.filter(|(_, offset)| {
            hand.proposed_until(*offset).is_none() && !self.is_retry_over(*offset)
        });
        open.take(most as usize).copied().collect()
    }

    /// Whether a waiting message has outlived its time; what was redriven has all the time it needs.
    fn is_retry_over(&self, offset: u64) -> bool {
        let redriven = |retry: &Retry| retry.redrives() > 0;
        self.is_over(offset) && !self.sub.retries.get(offset).is_some_and(redriven)
    }

    /// Whether a message has outlived its time: its expiry is on its way.
    fn is_over(&self, offset: u64) -> bool {
        offset < self.age_end
            || match self.topic.extra(offset).expires_at {
                Some(expires_at) => expires_at <= self.now,
                None => offset < self.ttl_end,
            }
    }

    fn piece_of_retry(&mut self, due: Stamp, offset: u64) -> Option<Piece> {
        let retry: &Retry = self.sub.retries.get(offset)?;
        if retry.failures > 0 {
            self.counters.redelivered(due, self.now);
        }
        Some(Piece {
            first: offset,
            end: offset + 1,
            delivery: retry.delivery.max(self.sub.delivery_base) + 1,
            attempt: retry.failures + 1,
            fresh: false,
        })
    }

    /// Messages that were never handed out, by offset: those that came due, then the cursor's.
    fn new_pieces(&mut self, most: u64, pieces: &mut Vec<Piece>) {
        let mut left = most;
        let mut at = 0;
        while left > 0
            && let Some(offset) = self.sub.again.next_present(at)
        {
            at = offset + 1;
            match self.sub.hand.proposed_until(offset) {
                Some(end) => at = end,
                None if self.is_over(offset) => {}
                None => {
                    push(pieces, self.first_piece(offset, offset + 1, false));
                    left -= 1;
                }
            }
        }
        // Due by now, though no record has come since that would say so.
        for (_, offset) in self.topic.delays.ready(self.now) {
            if left == 0 {
                return;
            }
            let is_mine = offset >= self.sub.start && !self.sub.is_finished(offset);
            let is_open = is_mine && !self.sub.retries.contains(offset) && !self.is_over(offset);
            if is_open && self.sub.hand.proposed_until(offset).is_none() {
                push(pieces, self.first_piece(offset, offset + 1, false));
                left -= 1;
            }
        }
        self.cursor_pieces(left, pieces);
    }

    fn cursor_pieces(&mut self, most: u64, pieces: &mut Vec<Piece>) {
        let cursor = self.sub.hand.cursor.max(self.topic.first);
        let (from, to) = self.sub.hand.skipped;
        let start = if from <= cursor {
            cursor.max(to)
        } else {
            cursor
        };
        let stop = self.topic.next.min(start.saturating_add(SCAN_MAX));
        let mut left = most;
        let mut at = start;
        let mut barren_to = None;
        while left > 0 && at < stop {
            let end = self.open_end(at, stop.min(at + left));
            if end > at {
                barren_to.get_or_insert(at);
                push(pieces, self.first_piece(at, end, true));
                left -= end - at;
                at = end;
            } else {
                at = self.skip(at);
            }
        }
        self.more = barren_to.is_none() && left > 0 && at < self.topic.next;
        self.sub.hand.skipped = (cursor, barren_to.unwrap_or(at));
    }

    /// Up to where, at most `end`, the cursor's messages can be handed out from `at` on.
    fn open_end(&self, at: u64, end: u64) -> u64 {
        if self.is_over(at) {
            return at;
        }
        let sub = &self.sub;
        // Among ends of life every message is asked for itself.
        let mut lives = self.topic.extras.range(at..end);
        let life = lives.find(|(_, extra)| extra.expires_at.is_some());
        let life = life.map(|(offset, _)| (*offset).max(at + 1));
        let old = (at < self.ttl_end).then_some(at + 1);
        let others = [
            sub.done.next_present(at),
            sub.again.next_present(at),
            sub.leases.next(at).map(|run| run.first.max(at)),
            self.topic.delays.next_in(at, end),
            sub.retries.next_in(at, end),
            life,
            old,
        ];
        others.into_iter().flatten().fold(end, u64::min)
    }

    /// The next offset to look at behind one that is not the cursor's.
    fn skip(&self, at: u64) -> u64 {
        if at < self.age_end {
            return self.age_end;
        }
        let sub = &self.sub;
        if sub.done.contains(at) {
            return sub.done.next_absent(at);
        }
        sub.leases.get(at).map_or(at + 1, |run| run.end)
    }

    fn first_piece(&self, first: u64, end: u64, fresh: bool) -> Piece {
        Piece {
            first,
            end,
            delivery: self.sub.delivery_base + 1,
            attempt: 1,
            fresh,
        }
    }

    fn give(&mut self, id: SessionId, pieces: &[Piece]) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if pieces.is_empty() {
            return;
        }
        let config = &self.sub.config;
        if session.is_empty() {
            // Clients renew only while they hold something.
            let deadline = self.now.plus_ms(config.lease_ms);
            session.live.deadline = session.live.deadline.max(deadline);
        }
        let mut ranges = Vec::with_capacity(pieces.len());
        let mut handouts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let count = piece.end - piece.first;
            let (offset, delivery) = (Offset(piece.first), Delivery(piece.delivery));
            ranges.push(LeaseRange {
                offset,
                count: count as u32,
                delivery,
            });
            handouts.push(Handout {
                offset,
                count: count as u32,
                delivery,
                attempt: piece.attempt,
            });
            let hand = &mut self.sub.hand;
            hand.propose(piece.first, piece.end, piece.delivery, id, piece.fresh);
            if piece.fresh {
                hand.cursor = hand.cursor.max(piece.end);
            }
            session.live.sent.push_back(Sent {
                ordinal: session.live.handed,
                first: piece.first,
                count,
                delivery: piece.delivery,
                at: self.now,
            });
            session.live.handed += count;
            session.live.proposed += count;
        }
        let next = session.next_deadline(config.processing_timeout_ms, config.hold_max_ms);
        self.timers.arm(Timer::Session(id), next);
        self.out.push(Proposal::Lease {
            record: Record::Lease {
                subscription: self.sub.id,
                session: id,
                ranges,
            },
            session: id,
            subscription: self.sub.id,
            topic: self.topic.id,
            ranges: handouts,
        });
    }
}

/// Adds a piece, to the one before if they are alike and adjacent.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(before) = pieces.last_mut() {
        let alike = (before.delivery, before.attempt, before.fresh)
            == (piece.delivery, piece.attempt, piece.fresh);
        if alike && before.end == piece.first {
            before.end = piece.end;
            return;
        }
    }
    pieces.push(piece);
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.end - piece.first).sum()
}

fn cut_to(pieces: &mut Vec<Piece>, most: u64) {
    let mut left = most;
    for piece in pieces.iter_mut() {
        piece.end = piece.end.min(piece.first + left);
        left -= piece.end - piece.first;
    }
    pieces.retain(|piece| piece.end > piece.first);
}
