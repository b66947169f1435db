//! What has happened in one or many worlds, in numbers.

use std::ops::AddAssign;

use millpond_broker::shard::{Done, Recovered};

use crate::disk::Disk;

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl AddAssign for Stats {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl Stats {
            /// Every number with its name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

stats! {
    histories,
    /// Histories with something wrong that is known.
    known,
    events,
    rounds,
    commits,
    accepted,
    refused,
    delivered,
    settled,
    recoveries,
    /// Recoveries that replayed something.
    replays,
    replayed_records,
    recoveries_deep,
    torn_tails,
    power_losses,
    /// Power losses while bytes or names were not synced.
    at_risk,
    process_deaths,
    clean_stops,
    wall_jumps,
    snapshots,
    seals,
    spares,
    cleanings,
}

impl Stats {
    pub fn recovered(&mut self, recovered: &Recovered, deep: u64) {
        self.recoveries += 1;
        self.replays += u64::from(recovered.replayed_records > 0);
        self.replayed_records += recovered.replayed_records;
        self.recoveries_deep += u64::from(deep > 0);
        self.torn_tails += recovered.report.torn.len() as u64;
    }

    pub fn count_job(&mut self, done: &Done<Disk>) {
        match done {
            Done::Snapshot(done) => self.snapshots += u64::from(done.is_ok()),
            Done::Seal(done) => self.seals += u64::from(done.is_ok()),
            Done::Spare(done) => self.spares += u64::from(done.is_ok()),
            Done::Clean(done) => self.cleanings += u64::from(done.is_ok()),
        }
    }
}
