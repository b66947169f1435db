//! What goes wrong with the broker's machine: crashes between and within calls to the disk, failed calls,
//! power losses, clocks that jump; and how it starts again, crashing while it does.

use std::fmt;

use millpond_broker::clock::Clock;
use millpond_broker::shard::{Fatal, Outbox, Recovered, Shard};
use millpond_wal::sim::{Call, Failure, Fault};

use super::{Happening, World};
use crate::history::Event;
use crate::observe::{self, SimShard};
use crate::stats::CRASHES_DEEP;

/// Furthest jump of the clock on the wall: an hour.
const JUMP_US: u64 = 3_600_000_000;

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
        self.after(wait, Happening::Crash);
    }

    pub(super) fn plan_disk_error(&mut self) {
        let every = self.plan.faults.disk_error_every_us;
        let wait = self.rng.between(every / 2, every * 3 / 2);
        self.after(wait, Happening::DiskError);
    }

    pub(super) fn plan_clock_jump(&mut self) {
        let every = self.plan.faults.clock_jump_every_us;
        let wait = self.rng.between(every / 2, every * 3 / 2);
        self.after(wait, Happening::ClockJump);
    }

    /// The clock on the wall goes forward or back.
    pub(super) fn jump_clock(&mut self) {
        let is_up = self.shard.is_some();
        let by = 1 + self.rng.below(JUMP_US);
        let wall = self.clock.wall_us();
        let wall = if self.rng.percent(50) {
            self.stats
                .mishap(is_up, |mishaps| &mut mishaps.clock_forward);
            wall + by
        } else {
            self.stats.mishap(is_up, |mishaps| &mut mishaps.clock_back);
            wall.saturating_sub(by)
        };
        self.tell(|| format!("the wall clock says {wall}"));
        self.clock.set_wall_us(wall);
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
            Call::Remove,
            Call::Preallocate,
            Call::SetLen,
            Call::OpenRead,
            Call::Read,
        ]);
        let failure = self.failure(call, 4);
        // A session that cannot read a body says so to its consumer, which is not what is tried here.
        if matches!(call, Call::OpenRead | Call::Read) {
            self.job_failure = Some(failure);
        } else {
            self.disk.fail(failure);
        }
    }

    fn failure(&mut self, call: Call, skip: u64) -> Failure {
        let fault = *self
            .rng
            .pick(&[Fault::Io, Fault::Io, Fault::NoSpace, Fault::Short]);
        let skip = self.rng.below(skip);
        self.tell(|| format!("plan {fault:?} at {call:?} after {skip}"));
        Failure {
            call: Some(call),
            skip,
            fault,
        }
    }

    /// A call of recovery fails.
    fn fail_a_call_of_starting(&mut self) {
        let (call, skip) = *self.rng.pick(&[
            (Call::List, 1),
            (Call::Open, 6),
            (Call::OpenRead, 6),
            (Call::Read, 30),
            (Call::ReadUncached, 6),
            (Call::Create, 3),
            (Call::Write, 3),
            (Call::WriteDurable, 4),
            (Call::WriteDurable, 4),
            (Call::Sync, 4),
            (Call::SyncDir, 4),
            (Call::Rename, 2),
            (Call::Preallocate, 2),
        ]);
        let failure = self.failure(call, skip);
        self.disk.fail(failure);
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
        self.job_failure = None;
        self.fall();
        let wait = self.rng.wait(20_000);
        self.after(wait, Happening::Start { deep: 0 });
    }

    /// What a crash does to the disk and the clocks.
    pub(super) fn fall(&mut self) {
        if self.rng.percent(self.plan.faults.power_percent) {
            self.tell(|| "the power goes".to_owned());
            self.was_at_risk |= self.disk.is_at_risk();
            self.disk.lose_power();
            self.clock.reboot();
            if self.rng.percent(50) {
                self.anchor = None;
            }
        } else {
            self.tell(|| "the process dies".to_owned());
            self.stats.faults.others.process_deaths += 1;
            self.disk.kill_process();
        }
        if self.rng.percent(self.plan.faults.wall_jump_percent) {
            self.jump_clock();
        }
        if self.rng.percent(self.plan.faults.rot_percent) {
            let has_rotted = self.disk.rot(&mut self.rng);
            if has_rotted.expect("nothing is planned right after a crash") {
                self.tell(|| "a directory rots".to_owned());
                self.stats
                    .mishap(false, |mishaps| &mut mishaps.directories_rotted);
            }
        }
    }

    pub(super) fn start(&mut self, deep: usize) {
        if !self.is_calm {
            if deep < CRASHES_DEEP && self.rng.percent(self.plan.faults.crash_again_percent) {
                let calls = self.rng.below(25);
                self.tell(|| format!("crash in {calls} calls of starting"));
                self.disk.lose_power_after(calls);
            }
            if self.rng.percent(self.plan.faults.start_error_percent) {
                self.fail_a_call_of_starting();
            }
        }
        let before = self.disk.fired();
        let opened = Shard::open(
            self.disk.clone(),
            self.clock.clone(),
            self.anchor.as_deref(),
            self.plan.log.clone(),
        );
        let during = self.disk.fired().since(before);
        self.stats.while_recovering.disk += during;
        match opened {
            Ok((shard, recovered)) => self.opened(shard, &recovered),
            Err(error) => {
                let why = format!("it does not open: {error:?}");
                self.not_started(why, deep);
            }
        }
    }

    fn opened(&mut self, mut shard: SimShard, recovered: &Recovered) {
        self.disk.forget_plans();
        if recovered.damaged || shard.gates().read_only {
            let why = format!("damage is reported: {:?}", recovered.report);
            return self.not_started(why, CRASHES_DEEP);
        }
        self.anchor = Some(shard.anchor().to_vec());
        let was_at_risk = std::mem::take(&mut self.was_at_risk);
        self.stats.recovered(recovered, was_at_risk);
        self.tell(|| format!("started: {recovered:?}"));
        self.started(&mut shard);
        self.shard = Some(shard);
        self.wake();
    }

    /// Either the disk had a part in it, and another start follows, or nothing can go on.
    fn not_started(&mut self, why: String, deep: usize) {
        let seen = self.disk.seen();
        self.tell(|| format!("not started: {why}; {}", seen.last_failure));
        if seen.failed_calls == 0 {
            self.note(Event::Unserved { why });
            self.is_over = true;
            return;
        }
        if let Some(crashes) = self.stats.recovery_crashes.get_mut(deep) {
            *crashes += u64::from(seen.is_off);
        }
        let before = self.disk.fired();
        let others = self.stats.faults.others;
        self.fall();
        let now = self.stats.faults.others;
        self.stats.while_recovering.disk += self.disk.fired().since(before);
        self.stats.while_recovering.others.process_deaths +=
            now.process_deaths - others.process_deaths;
        let wait = self.rng.wait(20_000);
        self.after(wait, Happening::Start { deep: deep + 1 });
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
                        self.stats.counts.clean_stops += 1;
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
