//! What has happened in one or many worlds, in numbers; and which faults have to be among it.

use std::ops::AddAssign;

use millpond_broker::shard::{Done, Recovered};
use millpond_wal::sim::Fired;

use crate::disk::Disk;

macro_rules! counts {
    ($(#[$of:meta])* $struct:ident { $($(#[$doc:meta])* $name:ident),* $(,)? }) => {
        $(#[$of])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $struct {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl AddAssign for $struct {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl $struct {
            /// Every number with its name.
            pub fn all(self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counts! {
    Counts {
        histories,
        events,
        rounds,
        commits,
        accepted,
        refused,
        delivered,
        settled,
        recoveries,
        /// Recoveries after a power loss that put unsynced data at risk, which replayed something.
        crash_recoveries,
        replayed_records,
        torn_tails,
        clean_stops,
        snapshots,
        seals,
        spares,
        cleanings,
        unlinks,
    }
}

counts! {
    /// Faults that are none of the disk's.
    Mishaps {
        process_deaths,
        /// One copy of a sealed segment's directory was damaged.
        directories_rotted,
        clock_forward,
        clock_back,
        consumer_crashes,
        consumer_stalls,
        consumer_nacks,
        consumer_late_answers,
        producer_crashes,
        connection_breaks,
    }
}

/// All faults, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub disk: Fired,
    pub others: Mishaps,
}

impl Faults {
    pub fn all(self) -> impl Iterator<Item = (&'static str, u64)> {
        self.disk.all().chain(self.others.all())
    }
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.disk += other.disk;
        self.others += other.others;
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub counts: Counts,
    pub faults: Faults,
    /// Those of them that hit while the broker was down or coming up.
    pub while_recovering: Faults,
    /// Crashes during recovery, by how many had gone before without a recovery that came to its end.
    pub recovery_crashes: [u64; CRASHES_DEEP],
}

/// Most crashes in a row while starting.
pub const CRASHES_DEEP: usize = 3;

impl AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        self.counts += other.counts;
        self.faults += other.faults;
        self.while_recovering += other.while_recovering;
        for (sum, more) in self.recovery_crashes.iter_mut().zip(other.recovery_crashes) {
            *sum += more;
        }
    }
}

impl Stats {
    pub fn recovered(&mut self, recovered: &Recovered, was_at_risk: bool) {
        let counts = &mut self.counts;
        counts.recoveries += 1;
        counts.crash_recoveries += u64::from(was_at_risk && recovered.replayed_records > 0);
        counts.replayed_records += recovered.replayed_records;
        counts.torn_tails += recovered.report.torn.len() as u64;
    }

    pub fn count_job(&mut self, done: &Done<Disk>) {
        let counts = &mut self.counts;
        match done {
            Done::Snapshot(done) => counts.snapshots += u64::from(done.is_ok()),
            Done::Seal(done) => counts.seals += u64::from(done.is_ok()),
            Done::Spare(done) => counts.spares += u64::from(done.is_ok()),
            Done::Clean(done) => counts.cleanings += u64::from(done.is_ok()),
            Done::Unlink => counts.unlinks += 1,
        }
    }

    /// Something went wrong that is none of the disk's doing.
    pub fn mishap(&mut self, is_up: bool, which: impl Fn(&mut Mishaps) -> &mut u64) {
        *which(&mut self.faults.others) += 1;
        if !is_up {
            *which(&mut self.while_recovering.others) += 1;
        }
    }

    /// Every number with its name.
    pub fn all(&self) -> Vec<(String, u64)> {
        let plain = self.counts.all().map(|(name, n)| (name.to_owned(), n));
        plain.chain(self.all_faults()).collect()
    }

    /// The names of faults that never were.
    pub fn missing(&self) -> Vec<String> {
        let never = self.all_faults().filter(|(_, n)| *n == 0);
        never.map(|(name, _)| name).collect()
    }

    fn all_faults(&self) -> impl Iterator<Item = (String, u64)> {
        let named = |prefix: &'static str| {
            move |(name, n): (&'static str, u64)| (format!("{prefix}_{name}"), n)
        };
        let faults = self.faults.all().map(named("fault"));
        let recovering = self.while_recovering.all().map(named("fault_in_recovery"));
        let deep = (1..).zip(self.recovery_crashes);
        let deep = deep.map(|(deep, n)| (format!("recovery_crashes_{deep}_deep"), n));
        faults.chain(recovering).chain(deep)
    }
}
