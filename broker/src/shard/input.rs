//! From inputs to records in the open group. Checks here are a courtesy: `apply` decides.

use millpond_protocol::control::{LeaseName, OpenConsumer, OpenProducer, Outcome, SettleItem};
use millpond_protocol::hot::AckRun;
use millpond_protocol::{
    ErrorCode, Offset, ProducerHandle, ProducerKey, Sequence, SessionId, TopicId, WireError,
};
use millpond_queue::{OffsetRun, Record, SettleEntry, StartPosition};
use millpond_wal::storage::Storage;

use super::answer::{Origin, SettlePlan};
use super::io::{Input, Output, StreamId};
use super::{Outbox, Shard};
use crate::clock::Clock;

/// How long a producer should wait before it tries a full disk again, in milliseconds.
const DISK_RETRY_MS: u32 = 1_000;

/// A publish that never came near the log.
pub(super) struct Refused {
    stream: StreamId,
    handle: ProducerHandle,
    producer: ProducerKey,
    previous: Sequence,
    count: u32,
    bytes: u64,
    error: WireError,
}

impl<S: Storage, C: Clock> Shard<S, C> {
    pub(super) fn handle<K>(&mut self, input: Input<K>, out: &mut Outbox<S>) {
        match input {
            Input::Publish {
                stream,
                handle,
                topic,
                producer,
                epoch,
                previous,
                count,
                messages,
                keep: _,
            } => {
                let bytes = messages.len() as u64;
                if let Some(error) = self.refuse_writes() {
                    self.refuse_publish(
                        Refused {
                            stream,
                            handle,
                            producer,
                            previous,
                            count,
                            bytes,
                            error,
                        },
                        out,
                    );
                    return;
                }
                let record = Record::Publish {
                    topic,
                    producer,
                    epoch,
                    previous,
                    count,
                    messages: &messages,
                };
                self.push(
                    &record,
                    Origin::Publish {
                        stream,
                        handle,
                        previous,
                        count,
                        bytes,
                    },
                );
            }
            Input::Settle {
                stream,
                session,
                acks,
                items,
            } => self.settle(stream, session, acks, items, out),
            Input::Credit {
                stream,
                session,
                credit,
            } => {
                if self.is_attached(session, stream) {
                    let now = self.stamper.now();
                    self.queue.credit(session, credit, now);
                    self.more_to_dispatch = true;
                }
            }
            Input::Renew { session } => {
                let now = self.stamper.now();
                self.queue.renew(session, now);
            }
            Input::Sent {
                stream,
                session,
                messages,
                bytes,
            } => {
                if self.is_attached(session, stream) {
                    self.queue.sent(session, messages, bytes);
                }
            }
            Input::Dropped {
                stream,
                session,
                ranges,
            } => {
                if self.is_attached(session, stream) {
                    self.queue.dropped(session, &ranges);
                    self.more_to_dispatch = true;
                }
            }
            Input::Commit {
                stream,
                session,
                next,
            } => self.commit_offset(stream, session, next, out),
            Input::OpenProducer {
                stream,
                open,
                owner,
            } => self.open_producer(stream, &open, owner, out),
            Input::CloseProducer { producer, epoch } => {
                if !self.gates.read_only {
                    self.push_unawaited(&Record::CloseProducer { producer, epoch });
                }
            }
            Input::OpenConsumer {
                stream,
                open,
                token,
                start,
            } => self.open_consumer(stream, open, token, start, out),
            Input::OpenSettlements {
                stream,
                session,
                token,
            } => self.open_settlements(stream, session, token, out),
            Input::Detach { session, stream } => self.detach(session, stream),
            Input::CloseSession { stream, session } => self.close_session(stream, session, out),
            Input::Request {
                stream,
                id,
                request,
            } => self.request(stream, id, request, out),
            Input::Authenticate { stream, hash } => self.authenticate(stream, hash, out),
            Input::Damaged { topic, first, next } => self.damaged(topic, first, next),
            Input::Drain => {
                self.gates.draining = true;
                self.queue.drain();
            }
        }
    }

    /// Why nothing may be published now, if so.
    fn refuse_writes(&self) -> Option<WireError> {
        if self.gates.read_only {
            return Some(read_only());
        }
        if self.gates.draining {
            return Some(WireError::new(
                ErrorCode::Draining,
                "the broker is shutting down; reconnect and send again",
            ));
        }
        let is_full = self.gates.disk_low || self.held_until_us.is_some();
        is_full.then(|| {
            let text =
                "the broker's disk is nearly full; free space or raise the limit, then send again";
            WireError::new(ErrorCode::DiskLow, text).retry_after(DISK_RETRY_MS)
        })
    }

    /// Answers behind what is already in the open group, so that answers keep the order of questions.
    fn refuse_publish(&mut self, refused: Refused, out: &mut Outbox<S>) {
        self.refused.push(refused);
        if self.pending.is_empty() {
            self.answer_refused(out);
        }
    }

    pub(super) fn answer_refused(&mut self, out: &mut Outbox<S>) {
        for Refused {
            stream,
            handle,
            producer,
            previous,
            count,
            bytes,
            error,
        } in std::mem::take(&mut self.refused)
        {
            let last_accepted = self.queue.last_accepted(producer);
            out.replies.push((
                stream,
                Output::PublishRefused {
                    handle,
                    previous,
                    count,
                    bytes,
                    last_accepted,
                    error,
                },
            ));
        }
    }

    fn open_producer(
        &mut self,
        stream: StreamId,
        open: &OpenProducer,
        owner: u64,
        out: &mut Outbox<S>,
    ) {
        let handle = open.handle;
        let mut refuse = |error| {
            let error = Some(error);
            out.replies
                .push((stream, Output::ProducerEnded { handle, error }));
        };
        if self.gates.read_only {
            return refuse(read_only());
        }
        let Some(topic) = self.queue.topic_id(&open.topic) else {
            return refuse(unknown_topic(&open.topic));
        };
        let record = Record::OpenProducer {
            topic,
            producer_id: open.producer_id.as_deref(),
            resume: open.resume,
            owner,
        };
        let anonymous = open.producer_id.is_none();
        let origin = Origin::OpenProducer {
            stream,
            handle,
            anonymous,
        };
        self.push(&record, origin);
    }

    /// Takes a session up again, or creates what is missing and opens a new one.
    pub(super) fn open_consumer(
        &mut self,
        stream: StreamId,
        open: OpenConsumer,
        token: u64,
        start: StartPosition,
        out: &mut Outbox<S>,
    ) {
        if let Some(resume) = open.resume
            && self.session_opened(stream, resume.session, resume.token, &open, true, out)
        {
            return;
        }
        if self.gates.read_only {
            out.replies.push((stream, Output::End(read_only())));
            return;
        }
        let Some(topic) = self.queue.topic_id(&open.topic) else {
            out.replies
                .push((stream, Output::End(unknown_topic(&open.topic))));
            return;
        };
        match (
            self.queue.subscription_id(topic, &open.subscription),
            &open.create,
        ) {
            (Some(subscription), _) => {
                let session = self.new_session();
                let record = Record::SessionOpen {
                    subscription,
                    session,
                    token,
                    consumer_name: &open.consumer_name,
                };
                let names = Box::new(open.clone());
                self.push(
                    &record,
                    Origin::OpenSession {
                        stream,
                        session,
                        token,
                        names,
                    },
                );
            }
            (None, Some(create)) => {
                let record = Record::SubscriptionCreate {
                    topic,
                    name: &open.subscription,
                    config: create.config.clone(),
                    start,
                };
                let origin = Origin::CreateForConsumer {
                    stream,
                    open: Box::new(open.clone()),
                    token,
                    start,
                };
                self.push(&record, origin);
            }
            (None, None) => {
                let error = unknown_subscription(&open.topic, &open.subscription);
                out.replies.push((stream, Output::End(error)));
            }
        }
    }

    fn open_settlements(
        &mut self,
        stream: StreamId,
        session: SessionId,
        token: u64,
        out: &mut Outbox<S>,
    ) {
        match self.attached.get_mut(&session) {
            Some(attachment) if attachment.token == token => {
                attachment.settlements = Some(stream);
                out.replies.push((stream, Output::SettlementsOpened));
            }
            _ => out.replies.push((stream, Output::End(session_ended()))),
        }
    }

    /// Settlements that go into the log, and extends, which do not; answered together.
    fn settle(
        &mut self,
        stream: StreamId,
        session: SessionId,
        acks: Vec<AckRun>,
        items: Vec<SettleItem>,
        out: &mut Outbox<S>,
    ) {
        let Some(subscription) = self.attached.get(&session).map(|a| a.subscription) else {
            out.replies.push((stream, Output::End(session_ended())));
            return;
        };
        if self.gates.read_only {
            out.replies.push((stream, Output::End(read_only())));
            return;
        }
        let acked: u64 = acks.iter().map(|run| u64::from(run.run)).sum();
        let mut plan = SettlePlan {
            count: acked + items.len() as u64,
            acks: acked,
            ..SettlePlan::default()
        };
        let mut entries = Vec::new();
        for (ordinal, item) in (acked..).zip(items) {
            match item.outcome {
                Outcome::Extend => self.extend(session, item.lease, ordinal, &mut plan),
                outcome => {
                    plan.item_ordinals.push(ordinal);
                    entries.push(SettleEntry {
                        lease: item.lease,
                        outcome,
                        begun_at: None,
                        history: Vec::new(),
                    });
                }
            }
        }
        self.queue.enrich(session, &mut entries);
        self.group_offsets += acked;
        let record = Record::Settle {
            subscription,
            session,
            acks,
            items: entries,
        };
        self.push(&record, Origin::Settle { stream, plan });
    }

    fn extend(
        &mut self,
        session: SessionId,
        lease: LeaseName,
        ordinal: u64,
        plan: &mut SettlePlan,
    ) {
        let now = self.stamper.now();
        if let Err((code, state)) = self.queue.extend(session, lease, now) {
            plan.refused.push((ordinal, code, state));
        }
    }

    fn commit_offset(
        &mut self,
        stream: StreamId,
        session: SessionId,
        next: Offset,
        out: &mut Outbox<S>,
    ) {
        match self.attached.get(&session) {
            Some(attachment) if !self.gates.read_only => {
                let record = Record::Commit {
                    subscription: attachment.subscription,
                    session,
                    next,
                };
                self.push(&record, Origin::Commit { stream });
            }
            Some(_) => out.replies.push((stream, Output::End(read_only()))),
            None => out.replies.push((stream, Output::End(session_ended()))),
        }
    }

    /// Whether this stream is the one that the session is delivered to.
    fn is_attached(&self, session: SessionId, stream: StreamId) -> bool {
        let attached = self.attached.get(&session);
        attached.is_some_and(|attached| attached.deliveries == stream)
    }

    fn detach(&mut self, session: SessionId, stream: StreamId) {
        if self.is_attached(session, stream) {
            self.attached.remove(&session);
            let now = self.stamper.now();
            self.queue.detach(session, now);
        }
    }

    fn close_session(&mut self, stream: StreamId, session: SessionId, out: &mut Outbox<S>) {
        if !self.attached.contains_key(&session) || self.gates.read_only {
            out.replies.push((stream, Output::SessionClosed));
            return;
        }
        let record = Record::SessionEnd {
            session,
            clean: true,
            begun: Vec::new(),
            story: None,
        };
        self.push(&record, Origin::CloseSession { stream, session });
    }

    fn authenticate(&mut self, stream: StreamId, hash: Option<[u8; 32]>, out: &mut Outbox<S>) {
        let name = hash
            .and_then(|hash| self.queue.token_by_hash(&hash))
            .map(str::to_owned);
        out.replies.push((stream, Output::Authenticated { name }));
    }

    fn damaged(&mut self, topic: TopicId, first: Offset, next: Offset) {
        let count = u32::try_from(next.0.saturating_sub(first.0)).unwrap_or(u32::MAX);
        if !self.gates.read_only {
            self.push_unawaited(&Record::Damaged {
                topic,
                ranges: vec![OffsetRun {
                    offset: first,
                    count,
                }],
            });
        }
    }

    fn new_session(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(u64::from(self.log.recovery_epoch()) << 32 | u64::from(self.next_session))
    }
}

pub(super) fn read_only() -> WireError {
    let text = "the log is damaged above its snapshot, so nothing can be written; stop the broker, run `millpond log verify DIR` on its data folder, then `millpond log salvage DIR`";
    WireError::new(ErrorCode::ReadOnly, text)
}

pub(super) fn unknown_topic(name: &str) -> WireError {
    let text = format!("there is no topic {name:?}; create it with `millpond topic create {name}`");
    WireError::new(ErrorCode::UnknownTopic, text)
}

pub(super) fn unknown_subscription(topic: &str, name: &str) -> WireError {
    let text = format!(
        "topic {topic:?} has no subscription {name:?}; create it with `millpond subscription create {topic} {name}`"
    );
    WireError::new(ErrorCode::UnknownSubscription, text)
}

fn session_ended() -> WireError {
    WireError::new(
        ErrorCode::SessionEnded,
        "the session has ended; open a new one",
    )
}
