//! What goes wrong with the broker's machine: crashes between and within calls to the disk, failed calls,
//! power losses, clocks that jump; and how it starts again, crashing while it does.

use std::fmt;

use millpond_broker::shard::{Fatal, Outbox, Shard};
use millpond_wal::sim::{Call, Failure, Fault};

use super::{Happening, WALL_US, World};
use crate::history::Event;
use crate::observe::{self, SimShard};

/// Most crashes in a row while starting.
const CRASHES_DEEP: u64 = 3;

/// Why a round did not come to its end.
#[derive(Debug)]
pub(super) enum Death {
    Fatal(Fatal),
    Power,
}

impl From<Fatal> for Death {
    fn from(fatal: Fatal) -> Self {
        Self::Fatal(fatal)
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fatal(fatal) => fatal.fmt(f),
            Self::Power => f.write_str("the power is gone"),
        }
    }
}

impl World {
    pub(super) fn plan_crash(&mut self) {
        let every = self.plan.faults.crash_every_us;
        let wait = self.rng.between(every / 4, every * 7 / 4);
        self.after(wait, Happening::Crash(self.process));
    }

    pub(super) fn plan_disk_error(&mut self) {
        let every = self.plan.faults.disk_error_every_us;
        let wait = self.rng.between(every / 2, every * 3 / 2);
        self.after(wait, Happening::DiskError);
    }

    /// At once between two rounds, or in the middle of one of the next calls to the disk.
    pub(super) fn crash_soon(&mut self) {
        if self.shard.is_none() {
            return;
        }
        if self.rng.percent(20) {
            self.tell(|| "crash now".to_owned());
            self.shard = None;
            self.stop();
        } else {
            let calls = match self.rng.percent(70) {
                true => self.rng.below(8),
                false => self.rng.below(80),
            };
            self.tell(|| format!("crash in {calls} calls"));
            self.disk.lose_power_after(calls);
        }
    }

    pub(super) fn fail_a_call(&mut self) {
        let call = *self.rng.pick(&[
            Call::Write,
            Call::WriteDurable,
            Call::WriteDurable,
            Call::Sync,
            Call::SyncDir,
            Call::Create,
            Call::Rename,
            Call::Preallocate,
        ]);
        let fault = *self
            .rng
            .pick(&[Fault::Io, Fault::Io, Fault::NoSpace, Fault::Short]);
        let skip = self.rng.below(4);
        self.tell(|| format!("plan {fault:?} at {call:?} after {skip}"));
        self.disk.fail(Failure {
            call: Some(call),
            skip,
            fault,
        });
    }

    /// Some failures are none of the log's business, but without power nothing goes on.
    pub(super) fn is_powered(&self) -> Result<(), Death> {
        match self.disk.is_off() {
            true => Err(Death::Power),
            false => Ok(()),
        }
    }

    pub(super) fn died(&mut self, death: &Death) {
        let seen = self.disk.seen();
        self.tell(|| format!("died: {death}; {}", seen.last_failure));
        assert!(
            seen.failed_calls > 0,
            "the shard died although the disk did nothing wrong: {death}"
        );
        self.stop();
    }

    /// The process is gone: so are its inbox, its jobs and, soon, its connections.
    pub(super) fn stop(&mut self) {
        self.note(Event::Stopped);
        self.process += 1;
        self.inbox.clear();
        self.upsets.clear();
        self.out = Outbox::default();
        self.next_round = None;
        let ids: Vec<_> = self.conns.keys().copied().collect();
        for id in ids {
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.broker_open = false;
            }
            let wait = self.rng.wait(self.plan.pace.network_us * 4);
            self.after(wait, Happening::ClientNotices(id));
        }
        self.fall();
        let wait = self.rng.wait(20_000);
        self.after(wait, Happening::Start { deep: 0 });
    }

    /// What a crash does to the disk and the clocks.
    pub(super) fn fall(&mut self) {
        let at_risk = self.disk.is_at_risk();
        if self.rng.percent(self.plan.faults.power_percent) {
            self.tell(|| "the power goes".to_owned());
            self.stats.power_losses += 1;
            self.stats.at_risk += u64::from(at_risk);
            self.disk.lose_power();
            self.clock.reboot();
            if self.rng.percent(50) {
                self.anchor = None;
            }
        } else {
            self.tell(|| "the process dies".to_owned());
            self.stats.process_deaths += 1;
            self.disk.kill_process();
        }
        if self.rng.percent(self.plan.faults.wall_jump_percent) {
            let hour = 3_600_000_000;
            let wall = WALL_US + self.now - hour.min(self.now) + self.rng.below(2 * hour);
            self.stats.wall_jumps += 1;
            self.clock.set_wall_us(wall);
        }
    }

    pub(super) fn start(&mut self, deep: u64) {
        if !self.is_calm
            && deep < CRASHES_DEEP
            && self.rng.percent(self.plan.faults.crash_again_percent)
        {
            let calls = self.rng.below(25);
            self.tell(|| format!("crash in {calls} calls of starting"));
            self.disk.lose_power_after(calls);
        }
        let opened = Shard::open(
            self.disk.clone(),
            self.clock.clone(),
            self.anchor.as_deref(),
            self.plan.log.clone(),
        );
        match opened {
            Ok((mut shard, recovered)) => {
                assert!(
                    !recovered.damaged && !shard.gates().read_only,
                    "damage although no byte was damaged: {:?}",
                    recovered.report
                );
                self.anchor = Some(shard.anchor().to_vec());
                self.stats.recovered(&recovered, deep);
                self.tell(|| format!("started: {recovered:?}"));
                self.started(&mut shard);
                self.shard = Some(shard);
                self.wake();
            }
            Err(error) => {
                let seen = self.disk.seen();
                self.tell(|| format!("not started: {error:?}; {}", seen.last_failure));
                assert!(
                    seen.failed_calls > 0,
                    "the shard does not open although the disk did nothing wrong: {error:?}"
                );
                self.fall();
                let wait = self.rng.wait(20_000);
                self.after(wait, Happening::Start { deep: deep + 1 });
            }
        }
    }

    pub(super) fn started(&mut self, shard: &mut SimShard) {
        let mut topics = Vec::new();
        for no in 0..self.plan.topics.len() {
            if let Some(seen) = observe::topic(shard, &self.plan, no, self.seen_until[no]) {
                self.seen_until[no] = seen.next;
                topics.push(seen);
            }
        }
        let at = shard.now().0;
        self.note(Event::Started { at, topics });
        self.show_beginnings(shard);
        self.show_floors(shard);
    }

    /// The faults stop. The process is stopped cleanly or killed once more, so that no planned
    /// failure is left.
    pub(super) fn calm_down(&mut self) {
        self.is_calm = true;
        self.tell(|| "calm".to_owned());
        if let Some(mut shard) = self.shard.take() {
            if self.rng.percent(50) {
                self.flush(&mut shard);
                let mut out = Outbox::default();
                match shard.close(&mut out) {
                    Ok(anchor) => {
                        self.anchor = Some(anchor.to_vec());
                        self.stats.clean_stops += 1;
                    }
                    Err(fatal) => self.tell(|| format!("not closed: {fatal}")),
                }
            }
            self.stop();
        } else {
            self.disk.kill_process();
        }
    }
}
