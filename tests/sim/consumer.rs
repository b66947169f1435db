//! A simulated consumer, in queue mode and in stream mode: takes, works, settles in every way there
//! is, stalls, breaks its connection, comes back with its token, or dies and comes back as another.

use std::collections::{BTreeSet, VecDeque};

use millpond_broker::shard::io::{Opened, Output};
use millpond_protocol::control::{
    ConsumerNotice, LeaseName, OpenConsumer, Outcome, RejectKind, SessionResume, SettleItem,
};
use millpond_protocol::hot::{AckRun, ConsumerCredit, Credit};
use millpond_protocol::{Delivery, Offset, SessionId, SubscriptionMode};

use crate::client::Hands;
use crate::history::{Event, How, Settling, SubNo};
use crate::wire::{ConnId, Down, Message, Up};

/// Byte credit is never what holds a simulated consumer back.
const BYTES: u64 = 1 << 40;

#[derive(Debug)]
pub struct Consumer {
    sub: SubNo,
    number: u64,
    conn: Option<ConnId>,
    session: Option<(SessionId, u64)>,
    /// Both streams are open.
    is_ready: bool,
    window: u64,
    /// Since the streams were opened: deliveries received, begun, and allowed.
    received: u64,
    begun: u64,
    allowed: u64,
    told_begun: u64,
    /// Begun, and not yet told.
    fresh: Vec<Lease>,
    /// Received, not begun.
    held: VecDeque<Lease>,
    /// Begun, not settled.
    working: Vec<Lease>,
    /// Held ones whose lease was lost: their turn comes, and they are passed over.
    lost: Vec<LeaseName>,
    /// Leases known to be over on which it goes on working.
    late: BTreeSet<(u64, u32)>,
    /// Settled, not answered.
    settling: VecDeque<Vec<(Lease, How)>>,
    stalled_until: u64,
    renewed_at: u64,
    is_closing: bool,
    stream: Reading,
}

/// Stream mode: what has been read.
#[derive(Debug, Default)]
struct Reading {
    is_active: bool,
    next: u64,
    committed: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Lease {
    offset: u64,
    delivery: u32,
}

impl Lease {
    fn name(self) -> LeaseName {
        LeaseName {
            offset: Offset(self.offset),
            delivery: Delivery(self.delivery),
        }
    }
}

impl Consumer {
    pub fn new(sub: SubNo, number: u64, window: u64) -> Self {
        Self {
            sub,
            number,
            conn: None,
            session: None,
            is_ready: false,
            window,
            received: 0,
            begun: 0,
            allowed: 0,
            told_begun: 0,
            fresh: Vec::new(),
            held: VecDeque::new(),
            working: Vec::new(),
            lost: Vec::new(),
            late: BTreeSet::new(),
            settling: VecDeque::new(),
            stalled_until: 0,
            renewed_at: 0,
            is_closing: false,
            stream: Reading::default(),
        }
    }

    pub fn describe(&self) -> String {
        format!(
            "consumer {} of subscription {}: ready {}, {} held, {} begun, {} settling",
            self.number,
            self.sub,
            self.is_ready,
            self.held.len(),
            self.working.len(),
            self.settling.len()
        )
    }

    pub fn tick(&mut self, hands: &mut Hands<'_>) {
        if hands.is_calm || hands.now >= self.stalled_until {
            self.act(hands);
        }
        let wait = hands.rng.wait(hands.plan.pace.consume_us);
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
        self.is_ready = false;
        if self.is_closing {
            self.forget();
        }
    }

    pub fn receive(&mut self, conn: ConnId, down: Down, hands: &mut Hands<'_>) {
        if self.conn != Some(conn) {
            return;
        }
        match down {
            Down::Messages(messages) => self.take(messages),
            Down::Answer(Output::ConsumerOpened(opened)) => self.opened(conn, *opened, hands),
            Down::Answer(Output::SettlementsOpened) => self.is_ready = true,
            Down::Answer(Output::Notice(notice)) => self.notice(notice, hands),
            Down::Answer(Output::Settled { .. }) => {
                self.settling.pop_front();
            }
            Down::Answer(Output::SessionClosed) => {
                hands.drop_conn(conn);
                self.conn = None;
                self.is_ready = false;
                self.forget();
            }
            Down::Answer(Output::End(_)) => {
                hands.drop_conn(conn);
                self.broken();
                // The session may have ended, or the subscription is not made yet.
                if hands.rng.percent(50) {
                    self.forget();
                }
            }
            Down::Answer(_) => {}
        }
    }

    fn forget(&mut self) {
        self.session = None;
        self.is_closing = false;
        self.held.clear();
        self.working.clear();
        self.lost.clear();
        self.late.clear();
        self.settling.clear();
        self.stream = Reading::default();
    }

    fn act(&mut self, hands: &mut Hands<'_>) {
        let Some(conn) = self.conn else {
            if hands.is_up {
                self.open(hands);
            }
            return;
        };
        let (Some((session, _)), true) = (self.session, self.is_ready) else {
            return;
        };
        if self.goes_wrong(conn, session, hands) || self.is_closing {
            return;
        }
        match hands.plan.subs[self.sub].config.mode {
            SubscriptionMode::Queue => self.work(conn, session, hands),
            SubscriptionMode::Stream => self.commit(conn, session, hands),
        }
        self.grant(conn, session, hands);
    }

    /// True: it did, and nothing else happens now.
    fn goes_wrong(&mut self, conn: ConnId, session: SessionId, hands: &mut Hands<'_>) -> bool {
        let faults = &hands.plan.faults;
        let (breaks, dies, stalls) = (
            faults.break_permille,
            faults.client_crash_permille,
            faults.stall_permille,
        );
        if hands.trouble(breaks) {
            hands.mishap(|mishaps| &mut mishaps.connection_breaks);
            hands.drop_conn(conn);
            self.broken();
            return true;
        }
        if hands.trouble(dies) {
            if hands.rng.percent(50) {
                hands.send(conn, 1, Up::CloseSession(session));
                self.is_closing = true;
                return true;
            }
            hands.mishap(|mishaps| &mut mishaps.consumer_crashes);
            hands.drop_conn(conn);
            self.broken();
            self.forget();
            return true;
        }
        if hands.trouble(stalls) {
            hands.mishap(|mishaps| &mut mishaps.consumer_stalls);
            let lease_us = hands.plan.subs[self.sub].config.lease_ms * 1_000;
            self.stalled_until = hands.now + hands.rng.below(lease_us * 2);
            return true;
        }
        false
    }

    fn open(&mut self, hands: &mut Hands<'_>) {
        let sub = &hands.plan.subs[self.sub];
        let open = OpenConsumer {
            topic: hands.plan.topics[sub.topic].name.clone(),
            subscription: sub.name.clone(),
            create: None,
            resume: self
                .session
                .map(|(session, token)| SessionResume { session, token }),
            consumer_name: format!("c{}", self.number),
        };
        self.conn = Some(hands.open(Up::OpenConsumer(Box::new(open))));
    }

    fn opened(&mut self, conn: ConnId, opened: Opened, hands: &mut Hands<'_>) {
        let (session, token) = (opened.session, opened.token);
        (self.received, self.begun, self.told_begun, self.allowed) = (0, 0, 0, 0);
        self.fresh.clear();
        self.lost.clear();
        if opened.resumed {
            self.resume(conn, &opened, hands);
        } else {
            self.forget();
        }
        self.session = Some((session, token));
        self.stream = Reading {
            is_active: false,
            next: opened.position.0,
            committed: opened.position.0,
        };
        hands.send(conn, 1, Up::OpenSettlements { session, token });
    }

    /// Keeps what still stands; of the rest some is settled all the same, late.
    fn resume(&mut self, conn: ConnId, opened: &Opened, hands: &mut Hands<'_>) {
        let mut kept: Vec<_> = self.working.drain(..).chain(self.held.drain(..)).collect();
        kept.extend(self.settling.drain(..).flatten().map(|(lease, _)| lease));
        let stands = |lease: &Lease| opened.leases.contains(&lease.name());
        kept.retain(|lease| stands(lease) || hands.rng.percent(30));
        let over = kept.iter().filter(|lease| !stands(lease));
        self.late = over.map(|lease| (lease.offset, lease.delivery)).collect();
        // What was handed out and never arrived has no body here.
        let is_lost = |name: &&LeaseName| !kept.iter().any(|lease| lease.name() == **name);
        let lost = opened.leases.iter().filter(is_lost).map(|name| {
            let lease = Lease {
                offset: name.offset.0,
                delivery: name.delivery.0,
            };
            (lease, How::Release { delay_ms: None })
        });
        let lost: Vec<_> = lost.collect();
        self.working = kept;
        if !lost.is_empty() {
            self.send_settle(conn, opened.session, lost, hands);
        }
    }

    fn take(&mut self, messages: Vec<Message>) {
        for message in messages {
            self.received += 1;
            if message.delivery > 0 {
                self.held.push_back(Lease {
                    offset: message.offset,
                    delivery: message.delivery,
                });
            } else if self.stream.is_active && message.offset >= self.stream.next {
                self.stream.next = message.offset + 1;
            }
        }
    }

    fn notice(&mut self, notice: ConsumerNotice, hands: &mut Hands<'_>) {
        match notice {
            ConsumerNotice::LeasesLost { leases, .. } => {
                let is_late = hands.rng.percent(50);
                let gone = |lease: &Lease| leases.contains(&lease.name());
                // Handlers that do not notice go on, and settle late.
                if is_late {
                    let over = self.working.iter().filter(|lease| gone(lease));
                    let over = over.map(|lease| (lease.offset, lease.delivery));
                    self.late.extend(over);
                } else {
                    self.working.retain(|lease| !gone(lease));
                    self.lost.extend(leases);
                }
            }
            ConsumerNotice::Active { from } => {
                self.stream.is_active = true;
                self.stream.next = from.0;
                self.stream.committed = from.0;
            }
            ConsumerNotice::Standby => self.stream.is_active = false,
            _ => {}
        }
    }

    fn work(&mut self, conn: ConnId, session: SessionId, hands: &mut Hands<'_>) {
        while self.working.len() < 6 && (hands.is_calm || hands.rng.percent(70)) {
            let Some(lease) = self.held.pop_front() else {
                break;
            };
            self.begun += 1;
            self.fresh.push(lease);
            match self.lost.iter().position(|name| *name == lease.name()) {
                Some(at) => drop(self.lost.swap_remove(at)),
                None => self.working.push(lease),
            }
        }
        if self.begun > self.told_begun {
            self.grant(conn, session, hands);
        }
        let mut done = Vec::new();
        let mut nth = 0;
        while nth < self.working.len() {
            let lease = self.working[nth];
            match self.verdict(hands) {
                Some(how @ How::Extend) => done.push((lease, how)),
                Some(how) => {
                    done.push((lease, how));
                    self.working.remove(nth);
                    continue;
                }
                None => {}
            }
            nth += 1;
        }
        if !done.is_empty() {
            self.send_settle(conn, session, done, hands);
        }
        self.renew(conn, session, hands);
    }

    /// None: still working.
    fn verdict(&mut self, hands: &mut Hands<'_>) -> Option<How> {
        if hands.is_calm {
            return Some(How::Ack);
        }
        match hands.rng.below(100) {
            0..45 => Some(How::Ack),
            45..55 => Some(How::Nack { delay_ms: None }),
            55..57 => Some(How::Nack {
                delay_ms: Some(hands.rng.below(3_000)),
            }),
            57..58 => Some(How::Reject),
            58..61 => Some(How::Release { delay_ms: None }),
            61..62 => Some(How::Release {
                delay_ms: Some(hands.rng.below(2_000)),
            }),
            62..65 => Some(How::Extend),
            _ => None,
        }
    }

    fn send_settle(
        &mut self,
        conn: ConnId,
        session: SessionId,
        done: Vec<(Lease, How)>,
        hands: &mut Hands<'_>,
    ) {
        for (lease, how) in &done {
            if self.late.remove(&(lease.offset, lease.delivery)) {
                hands.mishap(|mishaps| &mut mishaps.consumer_late_answers);
            }
            if matches!(how, How::Nack { .. }) {
                hands.mishap(|mishaps| &mut mishaps.consumer_nacks);
            }
        }
        let id = hands.new_id();
        let (acks, rest): (Vec<_>, Vec<_>) = done.iter().partition(|(_, how)| *how == How::Ack);
        let mut runs: Vec<AckRun> = Vec::new();
        for (lease, _) in &acks {
            match runs.last_mut() {
                Some(run)
                    if run.delivery.0 == lease.delivery
                        && run.offset.0 + u64::from(run.run) == lease.offset =>
                {
                    run.run += 1;
                }
                _ => runs.push(AckRun {
                    offset: Offset(lease.offset),
                    delivery: Delivery(lease.delivery),
                    run: 1,
                }),
            }
        }
        let items = rest.iter().map(|(lease, how)| SettleItem {
            lease: lease.name(),
            outcome: outcome(*how),
        });
        let items = items.collect();
        let ordered: Vec<_> = acks.into_iter().chain(rest).collect();
        let told = ordered.iter().map(|(lease, how)| Settling {
            offset: lease.offset,
            delivery: lease.delivery,
            how: *how,
        });
        let told = told.collect();
        hands.send(
            conn,
            1,
            Up::Settle {
                id,
                session,
                acks: runs,
                items,
                told,
            },
        );
        self.settling.push_back(ordered);
    }

    /// Lets the broker send, and tells how far the user has taken it.
    fn grant(&mut self, conn: ConnId, session: SessionId, hands: &mut Hands<'_>) {
        let busy = self.held.len() as u64;
        let allowed = self.received + self.window.saturating_sub(busy);
        if allowed <= self.allowed && self.begun == self.told_begun {
            return;
        }
        self.allowed = self.allowed.max(allowed);
        for lease in self.fresh.drain(..) {
            hands.history.events.push(Event::Begun {
                sub: self.sub,
                offset: lease.offset,
                delivery: lease.delivery,
            });
        }
        self.told_begun = self.begun;
        let credit = ConsumerCredit {
            credit: Credit {
                max_messages: self.allowed,
                max_bytes: BYTES,
            },
            begun: self.begun,
        };
        hands.send(conn, 0, Up::Credit { session, credit });
    }

    fn renew(&mut self, conn: ConnId, session: SessionId, hands: &mut Hands<'_>) {
        let lease_us = hands.plan.subs[self.sub].config.lease_ms * 1_000;
        let has_some = !self.held.is_empty() || !self.working.is_empty();
        if has_some && hands.now >= self.renewed_at + lease_us / 3 {
            self.renewed_at = hands.now;
            hands.send(conn, 1, Up::Renew(session));
        }
    }

    fn commit(&mut self, conn: ConnId, session: SessionId, hands: &mut Hands<'_>) {
        let reading = &mut self.stream;
        if reading.is_active
            && reading.next > reading.committed
            && (hands.is_calm || hands.rng.percent(40))
        {
            let next = match hands.is_calm {
                true => reading.next,
                false => hands.rng.between(reading.committed + 1, reading.next),
            };
            reading.committed = next;
            let id = hands.new_id();
            let next = Offset(next);
            hands.send(conn, 1, Up::Commit { id, session, next });
            self.settling.push_back(Vec::new());
        }
        let lease_us = hands.plan.subs[self.sub].config.lease_ms * 1_000;
        if hands.now >= self.renewed_at + lease_us / 3 {
            self.renewed_at = hands.now;
            hands.send(conn, 1, Up::Renew(session));
        }
    }
}

fn outcome(how: How) -> Outcome {
    match how {
        How::Ack => unreachable!("acks go as runs"),
        How::Nack { delay_ms } => Outcome::Nack {
            delay_ms,
            code: 7,
            reason: "it did not work".to_owned(),
        },
        How::Reject => Outcome::Reject {
            kind: RejectKind::Rejected,
            code: 9,
            reason: "it never will".to_owned(),
        },
        How::Release { delay_ms } => Outcome::Release { delay_ms },
        How::Extend => Outcome::Extend,
    }
}
