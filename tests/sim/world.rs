//! The world: one thread, one seed, one order of events.
//!
//! Owns simulated time and everything that happens in it: packets that arrive, rounds of the shard,
//! jobs that finish, crashes, starts. A round does what the shard thread of the broker does, in the
//! same order, so that an answer leaves only where it leaves there. While things go wrong for
//! `Plan::chaos_us`; then the faults stop and everything has to come to rest. Crashes and starts are in
//! `crash.rs`.

mod crash;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;
use std::sync::{Arc, Mutex};

use millpond_broker::clock::ManualClock;
use millpond_broker::shard::io::{Input, StreamId};
use millpond_broker::shard::{Done, Job, Outbox};
use millpond_wal::sim::Failure;

use self::crash::Death;
use crate::admin::Admin;
use crate::client::{Act, Hands};
use crate::consumer::Consumer;
use crate::disk::Disk;
use crate::door::Note;
use crate::history::{Admin as Upset, End, Event, History};
use crate::observe::{self, SimShard};
use crate::plan::Plan;
use crate::producer::Producer;
use crate::rng::Rng;
use crate::stats::Stats;
use crate::wire::{ClientNo, Conn, ConnId, Conns, Down, Slot, Up};

/// Wall time when a world begins: 2026-01-01.
const WALL_US: u64 = 1_767_225_600_000_000;
/// I11: once the faults have stopped, everything comes to rest within what has to be waited for (the
/// grace of a session, the longest lease, the longest delay or backoff, clients that come back) and
/// the time that each message takes. In microseconds.
const GRACE_US: u64 = 10_000_000;
const LONGEST_LEASE_US: u64 = 8_000_000;
const LONGEST_WAIT_US: u64 = 8_000_000;
const COMING_BACK_US: u64 = 10_000_000;
/// Of a consumer that takes one message at a time, in typical waits: few are much longer.
const WAITS_PER_MESSAGE: u64 = 12;
/// Most events of one world; more means that it turns in circles.
const EVENTS_MAX: u64 = 400_000;

/// How a world is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Gets a line for everything that happens, and survives a panic.
    pub trace: Option<Trace>,
    pub cut: Cut,
}

/// What is left out of a world, so that a failure shows in a smaller one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Things go wrong for so long at most, in microseconds.
    pub chaos_us: Option<u64>,
    /// Clients that do nothing.
    pub silent: BTreeSet<ClientNo>,
}

pub type Trace = Arc<Mutex<String>>;

/// What came of it.
pub struct Outcome {
    pub history: History,
    pub stats: Stats,
}

pub struct World {
    pub(crate) rng: Rng,
    pub(crate) plan: Plan,
    pub(crate) disk: Disk,
    clock: ManualClock,
    /// Microseconds since the world began.
    pub(crate) now: u64,
    pub(crate) shard: Option<SimShard>,
    /// The clock's anchor in its file.
    anchor: Option<Vec<u8>>,
    /// Counts processes.
    process: u64,
    pub(crate) inbox: VecDeque<Message>,
    pub(crate) out: Outbox<Disk>,
    next_round: Option<u64>,
    events: BTreeMap<(u64, u64), Happening>,
    next_event: u64,
    pub(crate) conns: Conns,
    next_conn: u64,
    next_id: u64,
    clients: Vec<Option<Client>>,
    silent: BTreeSet<ClientNo>,
    is_calm: bool,
    /// Nothing can go on.
    is_over: bool,
    /// A power loss since the broker last served could take something.
    was_at_risk: bool,
    /// What a call of the next job shall suffer.
    job_failure: Option<Failure>,
    /// Rounds after which it was last seen whether all is at rest.
    looked_after: u64,
    pub(crate) history: History,
    pub(crate) stats: Stats,
    /// Up to where each topic has been seen.
    seen_until: Vec<u64>,
    /// What the administrator asked for in this round.
    pub(crate) upsets: Vec<Upset>,
    /// Subscriptions whose beginning has been shown.
    begun: Vec<bool>,
    trace: Option<Trace>,
}

/// For the shard.
pub enum Message {
    Input(Box<Input<()>>, Note),
    Done(bool, Box<Done<Disk>>),
}

enum Client {
    Producer(Box<Producer>),
    Consumer(Box<Consumer>),
    Admin(Box<Admin>),
}

enum Happening {
    Tick(ClientNo),
    Arrive(ConnId, Slot, Up),
    Return(ConnId, Down),
    /// A client notices that its connection is gone.
    ClientNotices(ConnId),
    BrokerNotices(ConnId),
    JobRuns(u64, Job<Disk>),
    /// With whether a sync failed in it.
    JobDone(u64, bool, Done<Disk>),
    Crash,
    DiskError,
    ClockJump,
    Start {
        deep: usize,
    },
    Calm,
}

impl World {
    pub fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let mut plan = Plan::draw(&mut rng);
        let cut = options.cut;
        plan.chaos_us = plan.chaos_us.min(cut.chaos_us.unwrap_or(u64::MAX));
        let history = plan.history();
        let mut clients = vec![Client::Admin(Box::new(Admin::new(&plan)))];
        for (number, producer) in (0..).zip(&plan.producers) {
            let producer = Producer::new(producer.clone(), number);
            clients.push(Client::Producer(Box::new(producer)));
        }
        for (number, sub) in (0..).zip(&plan.consumers) {
            let window = rng.between(1, 30);
            clients.push(Client::Consumer(Box::new(Consumer::new(
                *sub, number, window,
            ))));
        }
        let disk = Disk::new(rng.next());
        Self {
            disk,
            clock: ManualClock::new(WALL_US),
            now: 0,
            shard: None,
            anchor: None,
            process: 0,
            inbox: VecDeque::new(),
            out: Outbox::default(),
            next_round: None,
            events: BTreeMap::new(),
            next_event: 0,
            conns: BTreeMap::new(),
            next_conn: 0,
            next_id: 0,
            clients: clients.into_iter().map(Some).collect(),
            silent: cut.silent,
            is_calm: false,
            is_over: false,
            was_at_risk: false,
            job_failure: None,
            looked_after: 0,
            history,
            stats: Stats::default(),
            seen_until: vec![0; plan.topics.len()],
            upsets: Vec::new(),
            begun: vec![false; plan.subs.len()],
            trace: options.trace,
            rng,
            plan,
        }
    }

    /// How many clients the world of a seed has.
    pub fn clients_of(seed: u64) -> usize {
        let plan = Plan::draw(&mut Rng::new(seed));
        1 + plan.producers.len() + plan.consumers.len()
    }

    /// How long things go wrong in the world of a seed.
    pub fn chaos_us_of(seed: u64) -> u64 {
        Plan::draw(&mut Rng::new(seed)).chaos_us
    }

    /// Lets everything happen.
    pub fn run(mut self) -> Outcome {
        self.start(0);
        for client in 0..self.clients.len() {
            let wait = self.rng.below(10_000);
            if !self.silent.contains(&client) {
                self.after(wait, Happening::Tick(client));
            }
        }
        self.after(self.plan.chaos_us, Happening::Calm);
        self.plan_crash();
        self.plan_disk_error();
        self.plan_clock_jump();
        let mut rest_until = u64::MAX;
        let mut steps = 0;
        loop {
            if self.is_calm && rest_until == u64::MAX {
                rest_until = self.now + self.rest_us();
            }
            let is_over = self.is_over || self.now > rest_until;
            if is_over || (self.is_calm && self.has_come_to_rest()) {
                break;
            }
            steps += 1;
            if steps > EVENTS_MAX {
                break;
            }
            self.step();
        }
        self.stats.counts.events += steps;
        self.stats.faults.disk += self.disk.fired();
        self.end();
        Outcome {
            history: self.history,
            stats: self.stats,
        }
    }

    /// A line of the trace.
    pub(crate) fn tell(&mut self, line: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &self.trace {
            let mut trace = trace.lock().expect("a panic ends the run");
            writeln!(trace, "{now} {}", line()).expect("a string takes everything");
        }
    }

    pub(crate) fn note(&mut self, event: Event) {
        if self.trace.is_some() {
            let line = format!("{event:?}");
            self.tell(|| line);
        }
        self.history.events.push(event);
    }

    /// A round soon.
    pub(crate) fn wake(&mut self) {
        let at = self.now + self.rng.below(self.plan.pace.round_us);
        self.next_round = Some(self.next_round.map_or(at, |next| next.min(at)));
    }

    pub(crate) fn take_in(&mut self, input: Input<()>, note: Note) {
        self.inbox.push_back(Message::Input(Box::new(input), note));
        self.wake();
    }

    /// Sends something back to a client, behind what is on its way on that stream.
    pub(crate) fn send_back(&mut self, stream: StreamId, down: Down) {
        let (id, slot) = ConnId::of(stream);
        let arrives = self.now + self.rng.wait(self.plan.pace.network_us);
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let at = arrives.max(conn.down_until[slot]);
        conn.down_until[slot] = at;
        self.at(at, Happening::Return(id, down));
    }

    fn after(&mut self, us: u64, happening: Happening) {
        self.at(self.now + us, happening);
    }

    fn at(&mut self, at: u64, happening: Happening) {
        self.next_event += 1;
        self.events.insert((at, self.next_event), happening);
    }

    fn step(&mut self) {
        let event = self
            .events
            .first_key_value()
            .map_or(u64::MAX, |((at, _), _)| *at);
        let round = match &self.shard {
            Some(_) => self.next_round.unwrap_or(u64::MAX),
            None => u64::MAX,
        };
        let at = event.min(round).max(self.now);
        self.clock.advance_us(at - self.now);
        self.now = at;
        if round <= event {
            self.round();
        } else if let Some((_, happening)) = self.events.pop_first() {
            self.happen(happening);
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Tick(client) => self.with_client(client, |client, hands| client.tick(hands)),
            Happening::Arrive(conn, slot, up) => self.arrive(conn, slot, up),
            Happening::Return(id, down) => {
                if let Some(conn) = self.conns.get(&id).filter(|conn| conn.client_open) {
                    let client = conn.client;
                    self.with_client(client, |client, hands| client.receive(id, down, hands));
                }
            }
            Happening::ClientNotices(id) => {
                if let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.client_open) {
                    conn.client_open = false;
                    let client = conn.client;
                    self.with_client(client, |client, _| client.broken(id));
                }
                self.forget_conn(id);
            }
            Happening::BrokerNotices(id) => self.broker_notices(id),
            Happening::JobRuns(process, job) if process == self.process && self.shard.is_some() => {
                self.run_job(job);
            }
            Happening::JobDone(process, failed, done) if process == self.process => {
                self.stats.count_job(&done);
                self.inbox.push_back(Message::Done(failed, Box::new(done)));
                self.wake();
            }
            Happening::JobRuns(..) | Happening::JobDone(..) => {}
            Happening::Crash => {
                if !self.is_calm {
                    self.plan_crash();
                    self.crash_soon();
                }
            }
            Happening::DiskError => {
                if !self.is_calm {
                    self.plan_disk_error();
                    self.fail_a_call();
                }
            }
            Happening::ClockJump => {
                if !self.is_calm {
                    self.plan_clock_jump();
                    self.jump_clock();
                }
            }
            Happening::Start { deep } => self.start(deep),
            Happening::Calm => self.calm_down(),
        }
    }

    fn with_client(&mut self, no: ClientNo, call: impl FnOnce(&mut Client, &mut Hands<'_>)) {
        let Some(mut client) = self.clients[no].take() else {
            return;
        };
        let told = self.history.events.len();
        let mut hands = Hands {
            rng: &mut self.rng,
            plan: &self.plan,
            history: &mut self.history,
            stats: &mut self.stats,
            is_up: self.shard.is_some(),
            is_calm: self.is_calm,
            now: self.now,
            next_conn: &mut self.next_conn,
            next_id: &mut self.next_id,
            acts: Vec::new(),
        };
        call(&mut client, &mut hands);
        let acts = hands.acts;
        self.clients[no] = Some(client);
        if self.trace.is_some() {
            for at in told..self.history.events.len() {
                let line = format!("{:?}", self.history.events[at]);
                self.tell(|| line);
            }
        }
        for act in acts {
            self.act(no, act);
        }
    }

    fn act(&mut self, client: ClientNo, act: Act) {
        match act {
            Act::Open(id) => {
                self.conns.insert(id, Conn::new(client));
            }
            Act::Send(id, slot, up) => {
                let arrives = self.now + self.rng.wait(self.plan.pace.network_us);
                if let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.client_open) {
                    let at = arrives.max(conn.up_until[slot]);
                    conn.up_until[slot] = at;
                    self.at(at, Happening::Arrive(id, slot, up));
                }
            }
            Act::Break(id) => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.client_open = false;
                    let wait = self.rng.wait(self.plan.pace.network_us * 2);
                    self.after(wait, Happening::BrokerNotices(id));
                }
            }
            Act::Tick(us) => self.after(us, Happening::Tick(client)),
        }
    }

    pub(crate) fn forget_conn(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get(&id)
            && !conn.client_open
            && !conn.broker_open
        {
            self.conns.remove(&id);
        }
    }

    /// One round of the shard's thread.
    fn round(&mut self) {
        self.next_round = None;
        let Some(mut shard) = self.shard.take() else {
            return;
        };
        match self.try_round(&mut shard) {
            Ok(()) => {
                let wait = match shard.wait_us() {
                    0 if self.inbox.is_empty() => 1 + self.rng.below(self.plan.pace.round_us),
                    _ if !self.inbox.is_empty() => 1,
                    us => us,
                };
                let at = self.now + wait;
                self.next_round = Some(self.next_round.map_or(at, |next| next.min(at)));
                self.shard = Some(shard);
                self.stats.counts.rounds += 1;
            }
            Err(death) => {
                drop(shard);
                self.died(&death);
            }
        }
    }

    fn try_round(&mut self, shard: &mut SimShard) -> Result<(), Death> {
        shard.wake();
        while let Some(message) = self.inbox.pop_front() {
            match message {
                Message::Input(input, note) => {
                    self.note_taken(note, shard);
                    shard.input(*input, &mut self.out);
                }
                Message::Done(failed, done) => {
                    if failed {
                        self.disk.set_unknown();
                    }
                    shard.job_done(*done)?;
                }
            }
            if shard.is_group_full() {
                break;
            }
        }
        shard.dispatch_early(&mut self.out);
        self.flush(shard);
        shard.commit_if_due(&mut self.out)?;
        shard.wake();
        self.is_powered()?;
        let is_committed = !self.out.commits.is_empty();
        self.flush(shard);
        if is_committed {
            // Applied by now; some answers were from before. A full disk holds the group back.
            for admin in std::mem::take(&mut self.upsets) {
                self.note(Event::Admin(admin));
            }
        }
        self.show_beginnings(shard);
        shard.dispatch(&mut self.out);
        shard.upkeep(&mut self.out)?;
        self.is_powered()?;
        self.flush(shard);
        shard.vouch_if_due()?;
        self.is_powered()?;
        if self.rng.percent(5) {
            self.show_floors(shard);
        }
        Ok(())
    }

    pub(crate) fn start_job(&mut self, job: Job<Disk>) {
        let wait = self.rng.wait(self.plan.pace.job_us);
        self.after(wait, Happening::JobRuns(self.process, job));
    }

    /// Where subscriptions begin that have just been made.
    fn show_beginnings(&mut self, shard: &SimShard) {
        for sub in 0..self.plan.subs.len() {
            if !self.begun[sub]
                && let Some(floor) = observe::floor(shard.queue(), &self.plan, sub)
            {
                self.begun[sub] = true;
                self.note(Event::Floor { sub, floor });
            }
        }
    }

    /// The shard's thread learns of a failure in a job when it takes the result in.
    fn run_job(&mut self, job: Job<Disk>) {
        let before = self.disk.take_unknown();
        let failure = self.job_failure.take();
        failure
            .into_iter()
            .for_each(|failure| self.disk.fail(failure));
        let done = job.run();
        if failure.is_some() {
            self.disk.forget_plans();
        }
        let failed = self.disk.take_unknown();
        if before {
            self.disk.set_unknown();
        }
        if self.disk.is_off() {
            self.tell(|| "the power goes during a job".to_owned());
            self.shard = None;
            self.stop();
            return;
        }
        let wait = self.rng.wait(self.plan.pace.round_us);
        self.after(wait, Happening::JobDone(self.process, failed, done));
    }

    fn show_floors(&mut self, shard: &SimShard) {
        for sub in 0..self.plan.subs.len() {
            if let Some(floor) = observe::floor(shard.queue(), &self.plan, sub) {
                self.note(Event::Floor { sub, floor });
            }
        }
    }

    /// How long it may take until all is done. A topic with a limit that holds a message which waits takes
    /// no more until that one is done, so every filling of it may last as long as the longest wait.
    fn rest_us(&self) -> u64 {
        let waits = GRACE_US + LONGEST_LEASE_US + LONGEST_WAIT_US + COMING_BACK_US;
        let messages: u64 = self.plan.producers.iter().map(|plan| plan.messages).sum();
        let pace = &self.plan.pace;
        let message_us = (pace.consume_us + pace.network_us) * WAITS_PER_MESSAGE;
        let fillings: u64 = self
            .plan
            .producers
            .iter()
            .map(|plan| {
                let limit = self.plan.topics[plan.topic].config.max_messages;
                limit.map_or(0, |limit| plan.messages.div_ceil(limit))
            })
            .sum();
        let filling_us = fillings * LONGEST_WAIT_US;
        waits + filling_us + messages * self.plan.subs.len() as u64 * message_us
    }

    /// Looks again only after a round: nothing else moves the queue.
    fn has_come_to_rest(&mut self) -> bool {
        let rounds = self.stats.counts.rounds;
        if std::mem::replace(&mut self.looked_after, rounds) == rounds {
            return false;
        }
        self.is_at_rest()
    }

    fn is_at_rest(&self) -> bool {
        let Some(shard) = &self.shard else {
            return false;
        };
        let clients = self.clients.iter().flatten();
        let done = clients.enumerate().all(|(no, client)| match client {
            _ if self.silent.contains(&no) => true,
            Client::Producer(producer) => producer.is_done(),
            Client::Admin(admin) => admin.is_done(),
            Client::Consumer(_) => true,
        });
        done && (0..self.plan.subs.len())
            .all(|sub| observe::backlog(shard.queue(), &self.plan, sub) == Some(0))
    }

    fn end(&mut self) {
        let mut end = End::default();
        if !self.is_at_rest() {
            end.stuck = self.stuck();
        }
        self.disk.forget_plans();
        if let Some(shard) = self.shard.take() {
            for no in 0..self.plan.topics.len() {
                end.topics.extend(observe::topic(&shard, &self.plan, no, 0));
            }
            for sub in 0..self.plan.subs.len() {
                end.subs
                    .extend(observe::subscription(shard.queue(), &self.plan, sub));
            }
        }
        self.note(Event::End(end));
    }

    fn stuck(&self) -> Vec<String> {
        let mut all = Vec::new();
        match &self.shard {
            None => all.push("the broker does not serve".to_owned()),
            Some(shard) => {
                for sub in 0..self.plan.subs.len() {
                    let end = observe::subscription(shard.queue(), &self.plan, sub);
                    all.push(format!("subscription {sub}: {end:?}"));
                }
            }
        }
        for (no, client) in self.clients.iter().flatten().enumerate() {
            match client {
                _ if self.silent.contains(&no) => {}
                Client::Producer(producer) if !producer.is_done() => all.push(producer.describe()),
                Client::Consumer(consumer) => all.push(consumer.describe()),
                Client::Admin(admin) if !admin.is_done() => all.push(format!("{admin:?}")),
                _ => {}
            }
        }
        all
    }
}

impl Client {
    fn tick(&mut self, hands: &mut Hands<'_>) {
        match self {
            Self::Producer(producer) => producer.tick(hands),
            Self::Consumer(consumer) => consumer.tick(hands),
            Self::Admin(admin) => admin.tick(hands),
        }
    }

    fn receive(&mut self, conn: ConnId, down: Down, hands: &mut Hands<'_>) {
        match self {
            Self::Producer(producer) => producer.receive(conn, down, hands),
            Self::Consumer(consumer) => consumer.receive(conn, down, hands),
            Self::Admin(admin) => admin.receive(conn, down, hands),
        }
    }

    fn broken(&mut self, conn: ConnId) {
        match self {
            Self::Producer(producer) => producer.lost(conn),
            Self::Consumer(consumer) => consumer.lost(conn),
            Self::Admin(admin) => admin.lost(conn),
        }
    }
}
