//! The simulated administrator: makes what the plan wants, then pauses, seeks, redrives and purges.

use std::collections::{BTreeSet, VecDeque};

use millpond_broker::shard::io::{Answer, Output, ResolvedRequest};
use millpond_protocol::control::{DeadFilter, RedriveTarget, Request};
use millpond_protocol::{ErrorCode, Offset, StartAt};
use millpond_queue::StartPosition;

use crate::client::Hands;
use crate::history::{Event, SubNo};
use crate::plan::Plan;
use crate::wire::{ConnId, Down, Up};

/// Typical wait between two looks, in microseconds.
const TICK_US: u64 = 30_000;
/// Furthest offset that a seek names.
const SEEK_MAX: u64 = 60;

#[derive(Debug)]
pub struct Admin {
    conn: Option<ConnId>,
    todo: VecDeque<Todo>,
    waiting: Option<u64>,
    paused: BTreeSet<SubNo>,
}

#[derive(Copy, Clone, Debug)]
enum Todo {
    Topic(usize),
    Subscription(SubNo),
    Pause(SubNo),
    Resume(SubNo),
    Seek(SubNo, u64),
    Redrive(SubNo),
    DeadPurge(SubNo),
    Purge(usize),
}

impl Admin {
    pub fn new(plan: &Plan) -> Self {
        let topics = (0..plan.topics.len()).map(Todo::Topic);
        let subs = (0..plan.subs.len()).map(Todo::Subscription);
        Self {
            conn: None,
            todo: topics.chain(subs).collect(),
            waiting: None,
            paused: BTreeSet::new(),
        }
    }

    pub fn is_done(&self) -> bool {
        self.todo.is_empty() && self.paused.is_empty()
    }

    pub fn tick(&mut self, hands: &mut Hands<'_>) {
        if self.todo.is_empty() {
            self.think(hands);
        }
        if self.waiting.is_none()
            && hands.is_up
            && let Some(todo) = self.todo.front()
        {
            let id = hands.new_id();
            let request = Box::new(todo.request(hands.plan));
            let up = Up::Request { id, request };
            match self.conn {
                Some(conn) => hands.send(conn, 0, up),
                None => self.conn = Some(hands.open(up)),
            }
            self.waiting = Some(id);
        }
        let wait = hands.rng.wait(TICK_US);
        hands.tick_after(wait.max(1));
    }

    /// Its connection is gone, if it is still this one.
    pub fn lost(&mut self, conn: ConnId) {
        if self.conn == Some(conn) {
            self.broken();
        }
    }

    fn broken(&mut self) {
        self.conn = None;
        self.waiting = None;
    }

    pub fn receive(&mut self, conn: ConnId, down: Down, hands: &mut Hands<'_>) {
        let Down::Answer(Output::Response { id, answer }) = down else {
            return;
        };
        if self.conn != Some(conn) || self.waiting != Some(id) {
            return;
        }
        self.waiting = None;
        let Answer::Ready(result) = *answer else {
            return;
        };
        let is_made = matches!(&*result, Err(error) if error.code == ErrorCode::AlreadyExists);
        let must_be = matches!(
            self.todo.front(),
            Some(Todo::Topic(_) | Todo::Subscription(_))
        );
        if let Err(error) = &*result
            && must_be
            && !is_made
        {
            let why = format!("what the plan wants cannot be made: {error}");
            hands.note(Event::Unserved { why });
        }
        match self.todo.pop_front() {
            Some(Todo::Pause(sub)) => {
                self.paused.insert(sub);
            }
            Some(Todo::Resume(sub)) => {
                self.paused.remove(&sub);
            }
            _ => {}
        }
    }

    fn think(&mut self, hands: &mut Hands<'_>) {
        if hands.is_calm {
            self.todo
                .extend(self.paused.iter().copied().map(Todo::Resume));
            return;
        }
        let often = hands.plan.faults.admin_permille;
        if !hands.trouble(often) {
            return;
        }
        let sub = hands.rng.below(hands.plan.subs.len() as u64) as usize;
        let topic = hands.rng.below(hands.plan.topics.len() as u64) as usize;
        self.todo.push_back(match hands.rng.below(20) {
            0..8 if self.paused.contains(&sub) => Todo::Resume(sub),
            0..8 => Todo::Pause(sub),
            8..12 => Todo::Seek(sub, hands.rng.below(SEEK_MAX)),
            12..18 => Todo::Redrive(sub),
            18 => Todo::DeadPurge(sub),
            _ => Todo::Purge(topic),
        });
        // The answer may be lost: what may have been paused is resumed in the end.
        if let Some(Todo::Pause(sub)) = self.todo.front() {
            self.paused.insert(*sub);
        }
    }
}

impl Todo {
    fn request(self, plan: &Plan) -> ResolvedRequest {
        let names = |sub: SubNo| {
            let sub = &plan.subs[sub];
            (plan.topics[sub.topic].name.clone(), sub.name.clone())
        };
        ResolvedRequest::Plain(match self {
            Self::Topic(topic) => Request::TopicCreate {
                name: plan.topics[topic].name.clone(),
                config: plan.topics[topic].config.clone(),
            },
            Self::Subscription(sub) => {
                let (topic, name) = names(sub);
                let create = Request::SubscriptionCreate {
                    topic,
                    name,
                    config: plan.subs[sub].config.clone(),
                    start: StartAt::Earliest,
                };
                return ResolvedRequest::At(create, StartPosition::Earliest);
            }
            Self::Seek(sub, to) => {
                let (topic, name) = names(sub);
                let to = Offset(to);
                let seek = Request::SubscriptionSeek {
                    topic,
                    name,
                    to: StartAt::Offset(to),
                };
                return ResolvedRequest::At(seek, StartPosition::At(to));
            }
            Self::Pause(sub) => {
                let (topic, name) = names(sub);
                Request::SubscriptionPause { topic, name }
            }
            Self::Resume(sub) => {
                let (topic, name) = names(sub);
                Request::SubscriptionResume { topic, name }
            }
            Self::Redrive(sub) => {
                let (topic, subscription) = names(sub);
                Request::DeadRedrive {
                    topic,
                    subscription,
                    filter: DeadFilter::default(),
                    rate_per_s: None,
                    target: RedriveTarget::Subscription,
                }
            }
            Self::DeadPurge(sub) => {
                let (topic, subscription) = names(sub);
                Request::DeadPurge {
                    topic,
                    subscription,
                    filter: DeadFilter::default(),
                }
            }
            Self::Purge(topic) => Request::TopicPurge {
                name: plan.topics[topic].name.clone(),
            },
        })
    }
}
