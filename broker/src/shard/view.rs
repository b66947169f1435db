//! Looking without taking: answers from what is durable and applied.

use millpond_protocol::control::{Response, StatusView};
use millpond_protocol::limits::PAGE_ROWS_MAX;
use millpond_protocol::{ErrorCode, Offset, TopicId, WireError};
use millpond_wal::storage::Storage;

use super::Shard;
use super::answer::ready;
use super::input::{unknown_subscription, unknown_topic};
use super::io::{Answer, Elsewhere, Output};
use crate::clock::Clock;

/// Topics, and subscriptions, that a status shows; more are cut with a remark.
const STATUS_ROWS_MAX: usize = 5_000;
/// Offsets without a message that one page of a peek passes over; looking for each takes as long as finding one.
pub const PEEK_HOLES_MAX: u32 = 1_000;

impl<S: Storage, C: Clock> Shard<S, C> {
    pub(super) fn show_topic(&self, name: &str) -> Result<Response, WireError> {
        let view = self
            .queue
            .topic_view(self.topic(name)?)
            .ok_or_else(|| unknown_topic(name))?;
        Ok(Response::Topic(view))
    }

    pub(super) fn show_subscription(&self, topic: &str, name: &str) -> Result<Response, WireError> {
        let id = self.subscription(topic, name)?;
        let view = self.queue.subscription_view(id, self.stamper.peek());
        view.map(Response::Subscription)
            .ok_or_else(|| unknown_subscription(topic, name))
    }

    pub(super) fn list_subscriptions(&self, topic: &str) -> Result<Response, WireError> {
        let topic = self.topic(topic)?;
        Ok(Response::Subscriptions(self.queue.subscriptions(
            [topic],
            self.stamper.peek(),
            usize::MAX,
        )))
    }

    pub(super) fn show_redrive(&self, job: u64) -> Result<Response, WireError> {
        let view = self.queue.redrive_view(job);
        let unknown = || {
            WireError::new(
                ErrorCode::OffsetOutOfRange,
                format!("there is no redrive job {job}"),
            )
        };
        view.map(Response::Redrive).ok_or_else(unknown)
    }

    pub(super) fn peek(&self, id: u64, topic: &str, from: Offset, limit: u32) -> Output {
        let Some(view) = self
            .queue
            .topic_id(topic)
            .and_then(|id| self.queue.topic_view(id))
        else {
            return ready(id, Err(unknown_topic(topic)));
        };
        let limit = limit.clamp(1, PAGE_ROWS_MAX);
        let first = from.max(view.first);
        let (mut elsewhere, mut end) = (Vec::new(), view.next);
        if self.queue.has_references(view.id) {
            // No page has more than that.
            let most = u64::from(limit + PEEK_HOLES_MAX);
            end = end.min(Offset(first.0.saturating_add(most)));
            let offsets = (first.0..end.0).map(Offset);
            let found =
                offsets.filter_map(|offset| Some((offset, self.elsewhere(view.id, offset)?)));
            elsewhere.extend(found.take(limit as usize));
        }
        let answer = Answer::Peek {
            topic: view.id,
            first,
            end,
            next: view.next,
            elsewhere,
            limit,
        };
        Output::Response {
            id,
            answer: Box::new(answer),
        }
    }

    pub(super) fn list_dead(
        &self,
        id: u64,
        topic: &str,
        subscription: &str,
        from: Offset,
        limit: u32,
    ) -> Output {
        // The letters of a subscription that was deleted are still there.
        let Some(dead) = self.queue.dead_topic(topic, subscription) else {
            let missing = self
                .subscription(topic, subscription)
                .map(|_| Response::DeadLetters {
                    letters: Vec::new(),
                    next: from,
                    more: false,
                });
            return ready(id, missing);
        };
        let limit = limit.clamp(1, PAGE_ROWS_MAX) as usize;
        let page = self
            .queue
            .dead_letters(dead, topic, subscription, from, limit);
        let answer = Answer::DeadLetters {
            letters: page.letters,
            next: page.next,
            more: page.more,
        };
        Output::Response {
            id,
            answer: Box::new(answer),
        }
    }

    /// Where the body of an offset stands, if not in its own place.
    pub(super) fn elsewhere(&self, topic: TopicId, offset: Offset) -> Option<Elsewhere> {
        let letter = self.queue.letter(topic, offset).cloned();
        let body = self.queue.body_of(topic, offset);
        (letter.is_some() || body != (topic, offset)).then_some(Elsewhere {
            topic: body.0,
            offset: body.1,
            letter,
        })
    }

    /// What the shard knows for a status; the broker fills in the rest.
    pub fn status(&self) -> StatusView {
        let now = self.stamper.peek();
        let mut topics = self.queue.topics(None, STATUS_ROWS_MAX + 1);
        let cut = topics.len() > STATUS_ROWS_MAX;
        topics.truncate(STATUS_ROWS_MAX);
        let ids = topics.iter().map(|topic| topic.id);
        let mut subscriptions = self.queue.subscriptions(ids, now, STATUS_ROWS_MAX + 1);
        let cut = cut || subscriptions.len() > STATUS_ROWS_MAX;
        subscriptions.truncate(STATUS_ROWS_MAX);
        let mut remarks = self.remarks();
        let ready = remarks.is_empty();
        if cut {
            remarks.push(format!(
                "only the first {STATUS_ROWS_MAX} topics and subscriptions are shown"
            ));
        }
        let stats = self.log.stats();
        StatusView {
            broker_version: env!("CARGO_PKG_VERSION").to_owned(),
            store_id: self.log.store_id(),
            recovery_epoch: self.log.recovery_epoch(),
            ready,
            remarks,
            now,
            uptime_ms: 0,
            topics,
            subscriptions,
            connections: 0,
            log_bytes: stats.log_bytes,
            segments: stats.segments as u32,
            appended: self.log.appended().0,
            durable: self.log.durable().0,
            memory_used: 0,
            memory_budget: 0,
            disk_free: 0,
            disk_total: 0,
        }
    }

    /// Why the shard is not ready, if it is not.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        let gates = self.gates;
        let mut remarks = Vec::new();
        let mut remark = |holds: bool, text: &str| {
            if holds {
                remarks.push(text.to_owned());
            }
        };
        remark(
            gates.read_only,
            "the log is damaged above its snapshot: nothing can be written until it is salvaged",
        );
        remark(
            gates.no_leases,
            "the disk reserve is used up: nothing is handed out",
        );
        remark(
            self.held_until_us.is_some(),
            "the disk is full: nothing is committed until space is freed",
        );
        remark(gates.draining, "the broker is shutting down");
        remarks
    }
}
