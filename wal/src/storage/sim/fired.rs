//! What has gone wrong so far, by name. A fault counts when it has happened and had something to bite
//! on: a failed sync with nothing to sync, or a power loss with everything synced, is no test of anybody.

use super::{Call, Fault};

macro_rules! fired {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts since the beginning; [`Fired::since`] tells those of a stretch.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Fired {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Fired {
            /// What was added since `earlier`.
            pub fn since(self, earlier: Fired) -> Fired {
                Fired { $($name: self.$name - earlier.$name,)* }
            }

            /// Every count with its name.
            pub fn all(self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }

        impl std::ops::AddAssign for Fired {
            fn add_assign(&mut self, more: Fired) {
                $(self.$name += more.$name;)*
            }
        }
    };
}

fired! {
    /// Power losses while sectors, lengths or names were not synced.
    power_losses_at_risk,
    /// Files that lost all of their unsynced sectors in a power loss.
    unsynced_lost,
    /// Files that kept all of them.
    unsynced_kept,
    /// Files that kept some of them.
    torn_writes,
    /// Of those, files that kept a sector behind a lost one.
    holes_left,
    /// Sectors that a power loss left with noise.
    noise_left,
    /// Sectors that a power loss left with what another file held there.
    stale_bytes_left,
    /// Files that kept another than their current length.
    lengths_lost,
    /// Power losses that took changes of names.
    names_lost,
    /// Calls that failed with EIO.
    eio,
    /// Calls that failed with ENOSPC or EDQUOT.
    enospc,
    /// Writes that the device took only a part of.
    short_writes,
    /// Syncs that failed, lost bytes or names, and left nothing to sync.
    failed_syncs_marked_clean,
}

impl Fired {
    pub(super) fn failed(&mut self, call: Call, fault: Fault) {
        match fault {
            Fault::NoSpace | Fault::Quota => self.enospc += 1,
            Fault::Short if call.is_write() => self.short_writes += 1,
            Fault::Io | Fault::Short => self.eio += 1,
        }
    }

    pub(super) fn lost_power(&mut self, loss: Loss) {
        self.noise_left += loss.noise;
        self.stale_bytes_left += loss.stale;
        self.lengths_lost += u64::from(loss.length);
        match (loss.kept, loss.lost) {
            (0, 0) => {}
            (0, _) => self.unsynced_lost += 1,
            (_, 0) => self.unsynced_kept += 1,
            _ => {
                self.torn_writes += 1;
                self.holes_left += u64::from(loss.hole);
            }
        }
    }
}

/// What a power loss did to one file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loss {
    pub kept: u64,
    pub lost: u64,
    /// A sector was kept behind a lost one.
    pub hole: bool,
    pub noise: u64,
    pub stale: u64,
    /// Another length than the current one remained.
    pub length: bool,
}
