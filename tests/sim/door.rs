//! The broker's side of the simulated connections, between the network and the shard: what its QUIC
//! sessions do, without bytes. Packets become inputs, outputs become packets, and the history is told
//! what was taken in and what left.

use millpond_broker::shard::io::{Handout, Input, Output, ResolvedRequest, StreamId};
use millpond_protocol::Offset;
use millpond_protocol::control::{ConsumerNotice, Request};
use millpond_protocol::hot::AckKind;
use millpond_queue::StartPosition;

use crate::history::{Admin, Delivery, Event, Identity, Placed, Sent, Settling, SubNo, TopicNo};
use crate::observe::{Bodies, SimShard};
use crate::plan::Plan;
use crate::wire::{Asked, ClientNo, ConnId, Down, HANDLE, Message, Slot, Up};
use crate::world::World;

/// What the history is told when the shard takes an input in.
#[derive(Debug)]
pub enum Note {
    Nothing,
    Publish {
        conn: ConnId,
        producer: Identity,
        topic: TopicNo,
        messages: Vec<Sent>,
    },
    Settle {
        conn: ConnId,
        id: u64,
        sub: SubNo,
        session: u64,
        items: Vec<Settling>,
    },
    Commit {
        conn: ConnId,
        id: u64,
        sub: SubNo,
        next: u64,
    },
    Admin(Admin),
}

impl World {
    /// A packet has arrived at the broker.
    pub(crate) fn arrive(&mut self, id: ConnId, slot: Slot, up: Up) {
        let Some(conn) = self.conns.get(&id).filter(|conn| conn.broker_open) else {
            return;
        };
        if self.shard.is_none() {
            return;
        }
        let client = conn.client;
        let stream = id.stream(slot);
        let (input, note) = match up {
            Up::OpenProducer(open) => {
                let owner = self.rng.next();
                let input = Input::OpenProducer {
                    stream,
                    open,
                    owner,
                };
                (input, Note::Nothing)
            }
            Up::Publish {
                topic,
                producer,
                epoch,
                previous,
                count,
                messages,
                told,
            } => {
                let input = Input::Publish {
                    stream,
                    handle: HANDLE,
                    topic,
                    producer,
                    epoch,
                    previous,
                    count,
                    messages,
                    keep: (),
                };
                let note = Note::Publish {
                    conn: id,
                    producer: Identity {
                        key: producer.0,
                        epoch: epoch.0,
                    },
                    topic: self.topic_of(client),
                    messages: told,
                };
                (input, note)
            }
            Up::CloseProducer { producer, epoch } => {
                (Input::CloseProducer { producer, epoch }, Note::Nothing)
            }
            Up::OpenConsumer(open) => {
                let input = Input::OpenConsumer {
                    stream,
                    open: *open,
                    token: self.rng.next(),
                    start: StartPosition::Earliest,
                };
                (input, Note::Nothing)
            }
            Up::OpenSettlements { session, token } => {
                let input = Input::OpenSettlements {
                    stream,
                    session,
                    token,
                };
                (input, Note::Nothing)
            }
            Up::Credit { session, credit } => {
                let input = Input::Credit {
                    stream,
                    session,
                    credit,
                };
                (input, Note::Nothing)
            }
            Up::Renew(session) => (Input::Renew { session }, Note::Nothing),
            Up::Settle {
                id: settle,
                session,
                acks,
                items,
                told,
            } => {
                let input = Input::Settle {
                    stream,
                    session,
                    acks,
                    items,
                };
                let note = Note::Settle {
                    conn: id,
                    id: settle,
                    sub: self.sub_of(client),
                    session: session.0,
                    items: told,
                };
                (input, note)
            }
            Up::Commit {
                id: commit,
                session,
                next,
            } => {
                let input = Input::Commit {
                    stream,
                    session,
                    next,
                };
                let note = Note::Commit {
                    conn: id,
                    id: commit,
                    sub: self.sub_of(client),
                    next: next.0,
                };
                (input, note)
            }
            Up::CloseSession(session) => (Input::CloseSession { stream, session }, Note::Nothing),
            Up::Request { id, request } => {
                let note = admin(&self.plan, &request).map_or(Note::Nothing, Note::Admin);
                let request = *request;
                (
                    Input::Request {
                        stream,
                        id,
                        request,
                    },
                    note,
                )
            }
        };
        self.take_in(input, note);
    }

    /// The broker notices that a connection is gone.
    pub(crate) fn broker_notices(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if std::mem::replace(&mut conn.broker_open, false)
            && let Some(session) = conn.session
        {
            let stream = id.stream(0);
            self.take_in(Input::Detach { session, stream }, Note::Nothing);
        }
        self.forget_conn(id);
    }

    /// The shard takes an input in, now.
    pub(crate) fn note_taken(&mut self, note: Note, shard: &mut SimShard) {
        let at = shard.now().0;
        let (conn, slot, asked) = match note {
            Note::Nothing => return,
            Note::Admin(admin) => {
                self.upsets.push(admin);
                return self.note(Event::Admin(admin));
            }
            Note::Publish {
                conn,
                producer,
                topic,
                messages,
            } => {
                self.note(Event::SendTaken {
                    messages: messages.clone(),
                    at,
                });
                let asked = Asked::Publish {
                    producer,
                    topic,
                    messages,
                };
                (conn, 0, asked)
            }
            Note::Settle {
                conn,
                id,
                sub,
                session,
                items,
            } => {
                self.note(Event::SettleTaken {
                    id,
                    sub,
                    session,
                    items,
                    at,
                });
                (conn, 1, Asked::Settle(id))
            }
            Note::Commit {
                conn,
                id,
                sub,
                next,
            } => {
                self.note(Event::CommitTaken { id, sub, next });
                (conn, 1, Asked::Commit(id))
            }
        };
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.asked[slot].push_back(asked);
        }
    }

    /// Lets everything out that the round has produced.
    pub(crate) fn flush(&mut self, shard: &mut SimShard) {
        for _ in self.out.commits.drain(..) {
            self.stats.counts.commits += 1;
        }
        self.out.fresh.clear();
        self.out.revoked.clear();
        let replies = std::mem::take(&mut self.out.replies);
        if self.disk.is_unknown() && !replies.is_empty() {
            self.note(Event::SyncFailed);
            self.note(Event::AnsweredAfterFailure);
        }
        for (stream, output) in replies {
            self.let_out(shard, stream, output);
        }
        for job in std::mem::take(&mut self.out.jobs) {
            self.start_job(job);
        }
    }

    fn let_out(&mut self, shard: &mut SimShard, stream: StreamId, output: Output) {
        let (id, slot) = ConnId::of(stream);
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.broker_open) else {
            return;
        };
        let client = conn.client;
        match &output {
            Output::Published { .. } | Output::PublishRefused { .. } | Output::Settled { .. } => {
                let asked = conn.asked[slot].pop_front();
                let asked = asked.expect("every answer has a question");
                self.note_answer(asked, &output);
            }
            Output::ConsumerOpened(opened) => {
                let (session, floor) = (opened.session, opened.position.0);
                conn.session = Some(session);
                let sub = self.sub_of(client);
                if !opened.resumed {
                    let session = session.0;
                    self.note(Event::SessionOpened { session });
                }
                self.note(Event::Floor { sub, floor });
            }
            Output::Notice(ConsumerNotice::Active { from }) => {
                let session = conn.session.map_or(0, |session| session.0);
                let (sub, from) = (self.sub_of(client), from.0);
                self.note(Event::Active { sub, session, from });
            }
            Output::Notice(ConsumerNotice::LeasesLost { leases, .. }) => {
                let session = conn.session.map_or(0, |session| session.0);
                let leases = leases
                    .iter()
                    .map(|lease| (lease.offset.0, lease.delivery.0));
                let leases = leases.collect();
                let sub = self.sub_of(client);
                self.note(Event::Lost {
                    sub,
                    session,
                    leases,
                });
            }
            Output::Deliver(run) => {
                let run = run.clone();
                return self.deliver(shard, stream, client, &run);
            }
            _ => {}
        }
        self.send_back(stream, Down::Answer(output));
    }

    fn note_answer(&mut self, asked: Asked, output: &Output) {
        match (asked, output) {
            (
                Asked::Publish {
                    producer,
                    topic,
                    messages,
                },
                Output::Published { rows, .. },
            ) => {
                let mut rest = messages.iter();
                let mut placed = Vec::with_capacity(messages.len());
                for row in rows {
                    for (nth, message) in (0..u64::from(row.count)).zip(rest.by_ref()) {
                        let is_known = row.kind != AckKind::DuplicateUnknown;
                        placed.push(Placed {
                            sequence: message.sequence,
                            digest: message.digest,
                            offset: is_known.then_some(row.offset.0 + nth),
                            is_duplicate: row.kind != AckKind::Appended,
                        });
                    }
                }
                self.stats.counts.accepted += placed.len() as u64;
                self.note(Event::Accepted {
                    producer,
                    topic,
                    messages: placed,
                });
            }
            (Asked::Settle(id), Output::Settled { refused, .. }) => {
                let refused = refused
                    .iter()
                    .map(|(ordinal, ..)| *ordinal as usize)
                    .collect();
                self.stats.counts.settled += 1;
                self.note(Event::Settled { id, refused });
            }
            (Asked::Commit(id), Output::Settled { refused, .. }) => {
                let refused = !refused.is_empty();
                self.note(Event::Committed { id, refused });
            }
            (Asked::Publish { .. }, Output::PublishRefused { error, .. }) => {
                self.stats.counts.refused += 1;
                self.tell(|| format!("refused: {error}"));
            }
            (asked, output) => panic!("{output:?} is no answer to {asked:?}"),
        }
    }

    /// Reads the bodies and sends them, as the session of the broker does.
    fn deliver(&mut self, shard: &mut SimShard, stream: StreamId, client: ClientNo, run: &Handout) {
        let sub = self.sub_of(client);
        let reader = shard.log().reader();
        let at = shard.now().0;
        let (id, _) = ConnId::of(stream);
        let session = self.conns.get(&id).and_then(|conn| conn.session);
        let mut bodies = Bodies::default();
        let mut messages = Vec::new();
        for offset in (run.offset.0..).take(run.count as usize) {
            let (topic, place) = match &run.elsewhere {
                Some(elsewhere) => (elsewhere.topic, elsewhere.offset),
                None => (run.topic, Offset(offset)),
            };
            let digest = bodies.digest(&reader, topic, place);
            // Who reads while the power goes sends nothing more.
            if self.disk.is_off() {
                return;
            }
            self.note(Event::Delivered(Delivery {
                sub,
                session: session.map_or(0, |session| session.0),
                offset,
                delivery: run.delivery.0,
                attempt: run.attempt,
                digest,
                at,
            }));
            messages.push(Message {
                offset,
                delivery: run.delivery.0,
            });
        }
        self.stats.counts.delivered += messages.len() as u64;
        if let Some(session) = session {
            let sent = Input::Sent {
                stream,
                session,
                messages: messages.len() as u64,
                bytes: 100 * messages.len() as u64,
            };
            self.take_in(sent, Note::Nothing);
        }
        self.send_back(stream, Down::Messages(messages));
    }

    /// Clients stand in this order: the administrator, the producers, the consumers.
    fn topic_of(&self, client: ClientNo) -> TopicNo {
        self.plan.producers[client - 1].topic
    }

    fn sub_of(&self, client: ClientNo) -> SubNo {
        self.plan.consumers[client - 1 - self.plan.producers.len()]
    }
}

/// What the history is told of a request.
fn admin(plan: &Plan, request: &ResolvedRequest) -> Option<Admin> {
    let sub_named = |topic: &str, name: &str| {
        let is_it =
            |sub: &crate::plan::SubPlan| sub.name == name && plan.topics[sub.topic].name == topic;
        plan.subs.iter().position(is_it)
    };
    Some(match request {
        ResolvedRequest::At(Request::SubscriptionSeek { topic, name, .. }, _) => Admin::Seek {
            sub: sub_named(topic, name)?,
        },
        ResolvedRequest::Plain(Request::DeadRedrive {
            topic,
            subscription,
            ..
        }) => Admin::Redrive {
            sub: sub_named(topic, subscription)?,
        },
        ResolvedRequest::Plain(Request::DeadPurge {
            topic,
            subscription,
            ..
        }) => Admin::DeadPurge {
            sub: sub_named(topic, subscription)?,
        },
        ResolvedRequest::Plain(Request::TopicPurge { name }) => Admin::Purge {
            topic: plan.topics.iter().position(|topic| topic.name == *name)?,
        },
        _ => return None,
    })
}
