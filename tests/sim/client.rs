//! What every simulated client has in common: how it acts on the world.

use crate::history::{Event, History};
use crate::plan::Plan;
use crate::rng::Rng;
use crate::stats::{Mishaps, Stats};
use crate::wire::{ConnId, Slot, Up};

/// What a client may see and do when it is called. What it does happens after the call, in order.
pub struct Hands<'a> {
    pub rng: &'a mut Rng,
    pub plan: &'a Plan,
    pub history: &'a mut History,
    pub stats: &'a mut Stats,
    /// The broker takes connections.
    pub is_up: bool,
    /// Nothing goes wrong any more: finish what there is.
    pub is_calm: bool,
    /// Microseconds since the world began.
    pub now: u64,
    pub next_conn: &'a mut u64,
    pub next_id: &'a mut u64,
    pub acts: Vec<Act>,
}

#[derive(Debug)]
pub enum Act {
    Open(ConnId),
    Send(ConnId, Slot, Up),
    /// The client drops its connection; the broker will notice.
    Break(ConnId),
    /// Calls `tick` again.
    Tick(u64),
}

impl Hands<'_> {
    /// A new connection, with this as the first thing on its main stream.
    pub fn open(&mut self, first: Up) -> ConnId {
        let conn = ConnId(*self.next_conn);
        *self.next_conn += 1;
        self.acts.push(Act::Open(conn));
        self.send(conn, 0, first);
        conn
    }

    pub fn send(&mut self, conn: ConnId, slot: Slot, up: Up) {
        self.acts.push(Act::Send(conn, slot, up));
    }

    pub fn drop_conn(&mut self, conn: ConnId) {
        self.acts.push(Act::Break(conn));
    }

    pub fn tick_after(&mut self, us: u64) {
        self.acts.push(Act::Tick(us));
    }

    pub fn new_id(&mut self) -> u64 {
        *self.next_id += 1;
        *self.next_id
    }

    pub fn note(&mut self, event: Event) {
        self.history.events.push(event);
    }

    /// Something has gone wrong with this client.
    pub fn mishap(&mut self, which: impl Fn(&mut Mishaps) -> &mut u64) {
        self.stats.mishap(self.is_up, which);
    }

    /// Something that happens in `permille` of 1,000 cases while things go wrong.
    pub fn trouble(&mut self, permille: u64) -> bool {
        !self.is_calm && self.rng.permille(permille)
    }
}
