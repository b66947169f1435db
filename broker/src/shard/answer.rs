//! From what `apply` decided to what each stream is told.

use bytes::Bytes;
use millpond_protocol::control::{ConsumerNotice, MessageState, OpenConsumer, Response};
use millpond_protocol::message::MessageView;
use millpond_protocol::{ErrorCode, ProducerHandle, SessionId, Stamp, SubscriptionMode, WireError};
use millpond_queue::{Effect, Outcome, PUBLISH_FIXED_BYTES, Place, Refusal, StartPosition};
use millpond_wal::Row;
use millpond_wal::storage::Storage;

use super::io::{Answer, Fresh, Opened, Output, StreamId};
use super::{Attachment, Outbox, Shard};
use crate::clock::Clock;

/// Who asked for a record, and what the answer needs beside its outcome.
#[derive(Debug)]
pub(super) enum Origin {
    /// The shard's own: nobody waits.
    Own,
    OpenProducer {
        stream: StreamId,
        handle: ProducerHandle,
        anonymous: bool,
    },
    Publish {
        stream: StreamId,
        handle: ProducerHandle,
        previous: millpond_protocol::Sequence,
        count: u32,
        bytes: u64,
    },
    /// A missing subscription is created first, then the consumer is opened.
    CreateForConsumer {
        stream: StreamId,
        open: Box<OpenConsumer>,
        token: u64,
        start: StartPosition,
    },
    OpenSession {
        stream: StreamId,
        session: SessionId,
        token: u64,
        names: Box<OpenConsumer>,
    },
    Settle {
        stream: StreamId,
        plan: SettlePlan,
    },
    Commit {
        stream: StreamId,
    },
    CloseSession {
        stream: StreamId,
        session: SessionId,
    },
    Request {
        stream: StreamId,
        id: u64,
        then: Then,
    },
}

/// What a request's success is answered with.
#[derive(Debug)]
pub(super) enum Then {
    Done,
    ShowTopic(String),
    ShowSubscription(String, String),
    Revoked(String),
}

/// Which of a frame's settlements went into the record; the others were answered by the shard.
#[derive(Debug, Default)]
pub(super) struct SettlePlan {
    /// Everything that was asked.
    pub count: u64,
    /// Ordinals, within what was asked, of the items in the record; acks come first and need none.
    pub item_ordinals: Vec<u64>,
    pub acks: u64,
    /// Extends that were refused.
    pub refused: Vec<(u64, ErrorCode, MessageState)>,
}

impl SettlePlan {
    fn merge(self, refused: Vec<Refusal>) -> Output {
        let mut all = self.refused;
        all.reserve_exact(refused.len());
        for Refusal {
            ordinal,
            code,
            state,
        } in refused
        {
            let asked = match ordinal.checked_sub(self.acks) {
                None => ordinal,
                Some(item) => self
                    .item_ordinals
                    .get(item as usize)
                    .copied()
                    .unwrap_or(ordinal),
            };
            all.push((asked, code, state));
        }
        all.sort_unstable_by_key(|&(ordinal, ..)| ordinal);
        Output::Settled {
            count: self.count,
            refused: all,
        }
    }
}

impl<S: Storage, C: Clock> Shard<S, C> {
    /// Tells the log where the accepted messages of a publish stand, and the cache what they are.
    pub(super) fn note_row(
        &mut self,
        place: Place,
        stamp: Stamp,
        body: &Bytes,
        outcome: &Outcome,
        out: &mut Outbox<S>,
    ) {
        let Outcome::Published {
            appended: Some(run),
            ..
        } = outcome
        else {
            return;
        };
        let at = millpond_wal::Place {
            index: millpond_wal::LogIndex(place.index.0),
            record: place.record,
        };
        row_of(at, stamp, outcome)
            .into_iter()
            .for_each(|row| self.log.add_row(row));
        out.fresh.push(Fresh {
            topic: run.topic,
            base: run.base,
            count: run.count,
            stamp,
            place,
            messages: skip_messages(&body.slice(PUBLISH_FIXED_BYTES..), run.skip),
            is_wanted: self.queue.has_subscriptions(run.topic),
        });
    }

    pub(super) fn answer(&mut self, origin: Origin, outcome: Outcome, out: &mut Outbox<S>) {
        match (origin, outcome) {
            (Origin::Own, outcome) => log_own_failure(&outcome),
            (
                Origin::OpenProducer {
                    stream,
                    handle,
                    anonymous,
                },
                Outcome::ProducerOpened {
                    topic,
                    producer,
                    epoch,
                    last_sequence,
                },
            ) => {
                let opened = Output::ProducerOpened {
                    handle,
                    topic,
                    producer,
                    epoch,
                    last_sequence,
                    anonymous,
                };
                out.replies.push((stream, opened));
            }
            (
                Origin::Publish {
                    stream,
                    handle,
                    count,
                    bytes,
                    ..
                },
                Outcome::Published { rows, .. },
            ) => {
                let messages = u64::from(count);
                out.replies.push((
                    stream,
                    Output::Published {
                        handle,
                        rows,
                        messages,
                        bytes,
                    },
                ));
            }
            (
                Origin::Publish {
                    stream,
                    handle,
                    previous,
                    count,
                    bytes,
                },
                Outcome::PublishRefused {
                    last_accepted,
                    error,
                },
            ) => {
                let refused = Output::PublishRefused {
                    handle,
                    previous,
                    count,
                    bytes,
                    last_accepted,
                    error,
                };
                out.replies.push((stream, refused));
            }
            (
                Origin::CreateForConsumer {
                    stream,
                    mut open,
                    token,
                    start,
                },
                outcome,
            ) => {
                if let Outcome::Error(error) = outcome
                    && error.code != ErrorCode::AlreadyExists
                {
                    out.replies.push((stream, Output::End(error)));
                } else {
                    open.create = None;
                    self.open_consumer(stream, *open, token, start, out);
                }
            }
            (
                Origin::OpenSession {
                    stream,
                    session,
                    token,
                    names,
                },
                Outcome::SessionOpened { .. },
            ) => {
                self.session_opened(stream, session, token, &names, false, out);
            }
            (Origin::Settle { stream, plan }, Outcome::Settled { refused, .. }) => {
                out.replies.push((stream, plan.merge(refused)));
            }
            (
                Origin::Commit { stream },
                outcome @ (Outcome::Committed { .. } | Outcome::Error(_)),
            ) => {
                let refused = match outcome {
                    Outcome::Error(error) => vec![(0, error.code, MessageState::Gone)],
                    _ => Vec::new(),
                };
                out.replies
                    .push((stream, Output::Settled { count: 1, refused }));
            }
            (Origin::CloseSession { stream, session }, _) => {
                if let Some(gone) = self.attached.remove(&session) {
                    out.replies.push((gone.deliveries, Output::SessionClosed));
                }
                out.replies.push((stream, Output::SessionClosed));
            }
            (Origin::Request { stream, id, then }, outcome) => {
                let result = self.respond(then, outcome, out);
                out.replies.push((stream, ready(id, result)));
            }
            (origin, outcome) => self.answer_unexpected(origin, outcome, out),
        }
    }

    /// Attaches a session that stands in the state to the stream that asked for it.
    pub(super) fn session_opened(
        &mut self,
        stream: StreamId,
        session: SessionId,
        token: u64,
        names: &OpenConsumer,
        resumed: bool,
        out: &mut Outbox<S>,
    ) -> bool {
        let now = self.stamper.now();
        let Some(attached) = self.queue.attach(session, token, now) else {
            return false;
        };
        let before = self.attached.insert(
            session,
            Attachment {
                deliveries: stream,
                settlements: None,
                token,
                subscription: attached.subscription,
            },
        );
        if let Some(old) = before
            && old.deliveries != stream
        {
            let moved = WireError::new(
                ErrorCode::SessionEnded,
                "the session was taken up on another stream",
            );
            out.replies
                .push((old.deliveries, Output::End(moved.clone())));
            out.replies
                .extend(old.settlements.map(|stream| (stream, Output::End(moved))));
        }
        tracing::debug!(
            session = session.0,
            topic = names.topic,
            subscription = names.subscription,
            resumed,
            "session attached"
        );
        out.replies.push((
            stream,
            Output::ConsumerOpened(Box::new(Opened {
                session,
                token,
                topic: attached.topic,
                subscription: attached.subscription,
                mode: attached.mode,
                lease_ms: attached.lease_ms,
                leases: attached.leases,
                resumed,
                position: attached.position,
            })),
        ));
        if attached.mode == SubscriptionMode::Stream {
            let active = ConsumerNotice::Active {
                from: attached.position,
            };
            let notice = if attached.active {
                active
            } else {
                ConsumerNotice::Standby
            };
            out.replies.push((stream, Output::Notice(notice)));
        }
        true
    }

    pub(super) fn route_effects(&mut self, out: &mut Outbox<S>) {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::LeasesLost {
                    session,
                    leases,
                    reason,
                } => {
                    self.tell(
                        session,
                        Output::Notice(ConsumerNotice::LeasesLost { leases, reason }),
                        out,
                    );
                }
                Effect::SessionEnded { session, code } => self.end_session(session, code, out),
                Effect::Active { session, from } => {
                    self.tell(
                        session,
                        Output::Notice(ConsumerNotice::Active { from }),
                        out,
                    );
                }
                Effect::Standby { session } => {
                    self.tell(session, Output::Notice(ConsumerNotice::Standby), out)
                }
                // A fenced or forgotten producer learns it from the answer to its next publish.
                Effect::ProducerFenced { .. }
                | Effect::ProducerGone { .. }
                | Effect::TopicGone { .. }
                | Effect::SubscriptionGone { .. } => {}
            }
        }
    }

    fn end_session(&mut self, session: SessionId, code: ErrorCode, out: &mut Outbox<S>) {
        if let Some(gone) = self.attached.remove(&session) {
            let error = WireError::new(code, "the session has ended; open a new one");
            out.replies.extend(
                gone.settlements
                    .map(|stream| (stream, Output::End(error.clone()))),
            );
            out.replies.push((gone.deliveries, Output::End(error)));
        }
    }

    fn respond(
        &mut self,
        then: Then,
        outcome: Outcome,
        out: &mut Outbox<S>,
    ) -> Result<Response, WireError> {
        match (then, outcome) {
            (_, Outcome::Error(error)) => Err(error),
            (_, Outcome::Redrive(view)) => Ok(Response::Redrive(view)),
            (_, Outcome::Purged { count }) => Ok(Response::Purged { count }),
            (Then::ShowTopic(name), _) => self.show_topic(&name),
            (Then::ShowSubscription(topic, name), _) => self.show_subscription(&topic, &name),
            (Then::Revoked(name), _) => {
                out.revoked.push(name);
                Ok(Response::Done)
            }
            (Then::Done, _) => Ok(Response::Done),
        }
    }

    /// `apply` refused what was asked: the asker is told, whatever it was.
    fn answer_unexpected(&mut self, origin: Origin, outcome: Outcome, out: &mut Outbox<S>) {
        let error = match outcome {
            Outcome::Error(error) => error,
            Outcome::PublishRefused { error, .. } => error,
            other => {
                debug_assert!(false, "no answer for {other:?}");
                WireError::new(
                    ErrorCode::Busy,
                    "the broker has no answer for this; report it",
                )
            }
        };
        match origin {
            Origin::Publish {
                stream,
                handle,
                previous,
                count,
                bytes,
            } => {
                let last_accepted = millpond_protocol::Sequence::default();
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
            Origin::OpenProducer { stream, handle, .. } => {
                let error = Some(error);
                out.replies
                    .push((stream, Output::ProducerEnded { handle, error }));
            }
            Origin::OpenSession { stream, .. }
            | Origin::Settle { stream, .. }
            | Origin::Commit { stream } => out.replies.push((stream, Output::End(error))),
            Origin::Own
            | Origin::CreateForConsumer { .. }
            | Origin::CloseSession { .. }
            | Origin::Request { .. } => {
                unreachable!("answered above whatever the outcome")
            }
        }
    }
}

/// Where the log finds the messages that a publish appended, if it did.
pub(super) fn row_of(place: millpond_wal::Place, stamp: Stamp, outcome: &Outcome) -> Option<Row> {
    let Outcome::Published {
        appended: Some(run),
        ..
    } = outcome
    else {
        return None;
    };
    Some(Row {
        topic: run.topic.0,
        base: run.base.0,
        count: run.count,
        skip: run.skip,
        place,
        stamp: stamp.0,
    })
}

pub(super) fn ready(id: u64, result: Result<Response, WireError>) -> Output {
    Output::Response {
        id,
        answer: Box::new(Answer::Ready(Box::new(result))),
    }
}

fn log_own_failure(outcome: &Outcome) {
    if let Outcome::Error(error) = outcome {
        tracing::debug!(%error, "a proposal was overtaken by another record");
    }
}

/// The messages behind the first `skip`. They were verified before they were logged.
pub(crate) fn skip_messages(messages: &Bytes, skip: u32) -> Bytes {
    let mut rest: &[u8] = messages;
    for _ in 0..skip {
        match MessageView::split(rest) {
            Ok((_, behind)) => rest = behind,
            Err(_) => return Bytes::new(),
        }
    }
    messages.slice(messages.len() - rest.len()..)
}
