//! The broker's only clock, and the stamps made from it.
//!
//! Invariants of [`Stamper`]:
//!
//! ```text
//! stamp = max(last + 1, anchor + CLOCK_BOOTTIME elapsed, slewed by at most 500 ppm toward the wall)
//! last durable stamp < every stamp given out after a restart
//! ```
//!
//! The wall clock is wrong more often than a machine is restarted: somebody sets it, or it is
//! fetched late. So within one boot only elapsed time counts, also over restarts of the broker,
//! and the wall clock is trusted only when the boot id has changed. Even then stamps go on from
//! the last durable one if that is later, at the pace of elapsed time: a machine that wakes up in
//! 1970 still runs its retries on time.
//!
//! Deadlines and timers inside the broker use the same clock; nothing else in it reads one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millpond_protocol::Stamp;
use parking_lot::Mutex;
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::small_file::{Readers, read_if_there, replace};

/// Where time comes from. All zeros as a boot id means "not known": no two such boots are equal.
pub trait Clock: Send + Sync + 'static {
    /// Microseconds since the machine started, sleep included. Never goes back.
    fn boottime_us(&self) -> u64;
    /// Microseconds since 1970 by the clock on the wall. May be set to anything at any time.
    fn wall_us(&self) -> u64;
    /// Changes exactly when the machine starts.
    fn boot_id(&self) -> [u8; 16];
}

/// The machine's clocks.
#[derive(Clone, Debug)]
pub struct SystemClock {
    boot_id: [u8; 16],
}

impl SystemClock {
    /// Reads the boot id; where there is none, every start of the broker counts as a reboot.
    #[must_use]
    pub fn new() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot_id: parse_boot_id(&text).unwrap_or(BOOT_ID_UNKNOWN),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn boottime_us(&self) -> u64 {
        micros(clock_gettime(ClockId::Boottime))
    }

    fn wall_us(&self) -> u64 {
        micros(clock_gettime(ClockId::Realtime))
    }

    fn boot_id(&self) -> [u8; 16] {
        self.boot_id
    }
}

fn micros(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000) + nanos / 1_000
}

/// 32 hexadecimal digits, dashes anywhere.
fn parse_boot_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok()?;
    (digits.len() == 32).then(|| number.to_be_bytes())
}

/// A clock that stands still until it is told to move. Clones are the same clock.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Manual>);

#[derive(Debug)]
struct Manual {
    boottime_us: AtomicU64,
    wall_us: AtomicU64,
    boot_id: Mutex<[u8; 16]>,
}

impl ManualClock {
    /// A machine that started one second ago.
    #[must_use]
    pub fn new(wall_us: u64) -> Self {
        Self(Arc::new(Manual {
            boottime_us: AtomicU64::new(1_000_000),
            wall_us: AtomicU64::new(wall_us),
            boot_id: Mutex::new([1; 16]),
        }))
    }

    /// Lets time pass on both clocks.
    pub fn advance_us(&self, us: u64) {
        self.0.boottime_us.fetch_add(us, Ordering::SeqCst);
        self.0.wall_us.fetch_add(us, Ordering::SeqCst);
    }

    /// Sets the clock on the wall, and nothing else.
    pub fn set_wall_us(&self, us: u64) {
        self.0.wall_us.store(us, Ordering::SeqCst);
    }

    /// The machine starts again: a new boot id, and time since the start from zero.
    pub fn reboot(&self) {
        let mut id = self.0.boot_id.lock();
        *id = (u128::from_be_bytes(*id) + 1).to_be_bytes();
        self.0.boottime_us.store(0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn boottime_us(&self) -> u64 {
        self.0.boottime_us.load(Ordering::SeqCst)
    }

    fn wall_us(&self) -> u64 {
        self.0.wall_us.load(Ordering::SeqCst)
    }

    fn boot_id(&self) -> [u8; 16] {
        *self.0.boot_id.lock()
    }
}

/// Gives out stamps that never go back.
#[derive(Debug)]
pub struct Stamper<C> {
    clock: C,
    anchor: Anchor,
    /// How far the wall was ahead when the anchor was set; worked off at most at [`SLEW_PPM`].
    ahead_us: i64,
    last: Stamp,
}

impl<C: Clock> Stamper<C> {
    /// Goes on after `last`, the last durable stamp, from the anchor that `saved` holds. Without
    /// a readable one this counts as a reboot.
    #[must_use]
    pub fn restore(clock: C, saved: Option<&[u8]>, last: Stamp) -> Self {
        let boottime_us = clock.boottime_us();
        let boot_id = clock.boot_id();
        let stamp_us = saved
            .and_then(Anchor::decode)
            .filter(|saved| saved.is_of_boot(boot_id) && saved.boottime_us <= boottime_us)
            .map_or_else(|| clock.wall_us(), |saved| saved.at(boottime_us))
            .max(last.0);
        let anchor = Anchor {
            boot_id,
            stamp_us,
            boottime_us,
        };
        let ahead_us = ahead_us(clock.wall_us(), stamp_us);
        Self {
            clock,
            anchor,
            ahead_us,
            last,
        }
    }

    /// The next stamp: later than every one before.
    #[expect(clippy::should_implement_trait, reason = "stamps do not end")]
    pub fn next(&mut self) -> Stamp {
        self.last = self.now().max(self.last.next());
        self.last
    }

    /// The present, which [`Self::next`] will not go below. Uses up nothing.
    pub fn now(&mut self) -> Stamp {
        let boottime_us = self.clock.boottime_us();
        if boottime_us.saturating_sub(self.anchor.boottime_us) >= ANCHOR_EVERY_US {
            self.anchor.stamp_us = self.at(boottime_us);
            self.anchor.boottime_us = boottime_us;
            self.ahead_us = ahead_us(self.clock.wall_us(), self.anchor.stamp_us);
        }
        Stamp(self.at(boottime_us)).max(self.last)
    }

    /// As [`Self::now`], for those who only look.
    #[must_use]
    pub fn peek(&self) -> Stamp {
        Stamp(self.at(self.clock.boottime_us())).max(self.last)
    }

    /// The clock below.
    #[must_use]
    pub fn clock(&self) -> &C {
        &self.clock
    }

    /// What [`Self::restore`] needs after a restart of the broker. Save it when serving starts
    /// and when it ends.
    #[must_use]
    pub fn anchor(&self) -> [u8; ANCHOR_BYTES] {
        self.anchor.encode()
    }

    /// Continuous and rising: it never works off more than there is, nor faster than allowed.
    fn at(&self, boottime_us: u64) -> u64 {
        let elapsed_us = boottime_us.saturating_sub(self.anchor.boottime_us);
        let slew_us = (elapsed_us / 1_000_000)
            .saturating_mul(SLEW_PPM)
            .saturating_add(elapsed_us % 1_000_000 * SLEW_PPM / 1_000_000)
            .min(self.ahead_us.unsigned_abs());
        let plain_us = self.anchor.stamp_us.saturating_add(elapsed_us);
        if self.ahead_us < 0 {
            plain_us.saturating_sub(slew_us)
        } else {
            plain_us.saturating_add(slew_us)
        }
    }
}

/// A stamp and the elapsed time at which it was the present.
///
/// ```text
/// 0 magic "MPCLOCK1" [8] | 8 boot id [16] | 24 stamp u64 | 32 boottime u64 | 40 crc32 of 0..40 | 44
/// ```
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Anchor {
    boot_id: [u8; 16],
    stamp_us: u64,
    boottime_us: u64,
}

/// Length of a saved anchor.
pub const ANCHOR_BYTES: usize = 44;
const ANCHOR_MAGIC: [u8; 8] = *b"MPCLOCK1";

impl Anchor {
    fn encode(&self) -> [u8; ANCHOR_BYTES] {
        let mut out = [0; ANCHOR_BYTES];
        out[..8].copy_from_slice(&ANCHOR_MAGIC);
        out[8..24].copy_from_slice(&self.boot_id);
        out[24..32].copy_from_slice(&self.stamp_us.to_le_bytes());
        out[32..40].copy_from_slice(&self.boottime_us.to_le_bytes());
        let crc = crc32fast::hash(&out[..40]);
        out[40..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` for bytes that are not an anchor: losing one is no more than a reboot.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ANCHOR_BYTES] = bytes.try_into().ok()?;
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (boot_id, rest) = rest.split_first_chunk::<16>()?;
        let (stamp_us, boottime_us) = rest.split_first_chunk::<8>()?;
        (*magic == ANCHOR_MAGIC).then_some(Self {
            boot_id: *boot_id,
            stamp_us: u64::from_le_bytes(*stamp_us),
            boottime_us: u64::from_le_bytes(boottime_us.try_into().ok()?),
        })
    }

    fn is_of_boot(&self, boot_id: [u8; 16]) -> bool {
        self.boot_id == boot_id && boot_id != BOOT_ID_UNKNOWN
    }

    fn at(&self, boottime_us: u64) -> u64 {
        self.stamp_us
            .saturating_add(boottime_us.saturating_sub(self.boottime_us))
    }
}

/// The file of the anchor in the data folder.
#[must_use]
pub fn anchor_path(data: &Path) -> PathBuf {
    data.join("clock")
}

/// The saved anchor, if there is one.
///
/// # Errors
/// The file is there and cannot be read.
pub fn load_anchor(data: &Path) -> io::Result<Option<Vec<u8>>> {
    read_if_there(&anchor_path(data))
}

/// Replaces the saved anchor; durable when it returns.
///
/// # Errors
/// The file cannot be written; the old one stays.
pub fn save_anchor(data: &Path, anchor: &[u8; ANCHOR_BYTES]) -> io::Result<()> {
    replace(&anchor_path(data), anchor, Readers::Everyone)
}

fn ahead_us(wall_us: u64, stamp_us: u64) -> i64 {
    i64::try_from(i128::from(wall_us) - i128::from(stamp_us)).unwrap_or(0)
}

const BOOT_ID_UNKNOWN: [u8; 16] = [0; 16];
/// How fast stamps may approach the wall clock: less than a clock's own drift is never noticed.
const SLEW_PPM: u64 = 500;
/// How often the wall clock is looked at.
const ANCHOR_EVERY_US: u64 = 1_000_000;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WALL: u64 = 1_767_225_600_000_000;
    const SECOND: u64 = 1_000_000;
    const DAY: u64 = 24 * 3_600 * SECOND;

    fn fresh() -> (ManualClock, Stamper<ManualClock>) {
        let clock = ManualClock::new(WALL);
        let stamper = Stamper::restore(clock.clone(), None, Stamp(0));
        (clock, stamper)
    }

    #[test]
    fn a_fresh_store_starts_at_the_wall_clock() {
        let (_, mut stamper) = fresh();
        assert_eq!(stamper.peek(), Stamp(WALL));
        assert_eq!(stamper.next(), Stamp(WALL));
        assert_eq!(stamper.next(), Stamp(WALL + 1), "no two stamps are equal");
        assert_eq!(stamper.now(), Stamp(WALL + 1), "looking uses up nothing");
    }

    #[test]
    fn a_wall_clock_that_jumps_changes_the_pace_by_500_ppm_at_most() {
        for wall in [0, WALL - DAY, WALL + DAY, u64::MAX] {
            let (clock, mut stamper) = fresh();
            clock.set_wall_us(wall);
            let mut last = stamper.next();
            for _ in 0..1_000 {
                clock.advance_us(SECOND);
                let stamp = stamper.next();
                let step = stamp.0 - last.0;
                assert!(
                    (SECOND - 500..=SECOND + 500).contains(&step),
                    "{wall}: {step}"
                );
                last = stamp;
            }
        }
    }

    #[test]
    fn a_small_error_is_worked_off_and_not_overshot() {
        let (clock, mut stamper) = fresh();
        clock.set_wall_us(WALL + 2_000);
        stamper.next();
        for _ in 0..10 {
            clock.advance_us(SECOND);
            stamper.next();
        }
        assert_eq!(stamper.now(), Stamp(clock.wall_us()));
        clock.advance_us(30 * DAY);
        assert_eq!(stamper.now(), Stamp(clock.wall_us()));
    }

    #[test]
    fn a_restart_in_the_same_boot_ignores_the_wall_clock() {
        let (clock, mut stamper) = fresh();
        let last = stamper.next();
        let saved = stamper.anchor();
        clock.advance_us(60 * SECOND);
        clock.set_wall_us(5);
        let stamper = Stamper::restore(clock, Some(&saved), last);
        assert_eq!(stamper.peek(), Stamp(WALL + 60 * SECOND));
    }

    #[test]
    fn a_reboot_trusts_the_wall_clock() {
        let (clock, mut stamper) = fresh();
        let last = stamper.next();
        let saved = stamper.anchor();
        clock.reboot();
        clock.set_wall_us(WALL + DAY);
        let stamper = Stamper::restore(clock, Some(&saved), last);
        assert_eq!(stamper.peek(), Stamp(WALL + DAY));
    }

    #[test]
    fn after_a_reboot_into_1970_time_goes_on_from_the_last_durable_stamp_at_its_pace() {
        let clock = ManualClock::new(WALL);
        clock.reboot();
        clock.set_wall_us(0);
        let mut stamper = Stamper::restore(clock.clone(), None, Stamp(WALL));
        assert_eq!(stamper.next(), Stamp(WALL + 1));
        clock.advance_us(100 * SECOND);
        let elapsed = stamper.next().0 - WALL;
        assert!(elapsed >= 100 * SECOND - 100 * 500, "{elapsed}");
    }

    #[test]
    fn a_boot_clock_behind_the_anchor_counts_as_a_reboot() {
        let (clock, mut stamper) = fresh();
        clock.advance_us(DAY);
        stamper.now();
        let saved = stamper.anchor();
        let (other, _) = fresh();
        assert_eq!(clock.boot_id(), other.boot_id());
        let stamper = Stamper::restore(other, Some(&saved), Stamp(0));
        assert_eq!(stamper.peek(), Stamp(WALL));
    }

    #[test]
    fn no_damaged_anchor_is_believed() {
        let (_, stamper) = fresh();
        let good = stamper.anchor();
        assert_eq!(Anchor::decode(&good).unwrap().encode(), good);
        for bit in 0..ANCHOR_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Anchor::decode(&bad), None, "bit {bit}");
        }
        assert_eq!(Anchor::decode(&good[..43]), None);
        assert_eq!(Anchor::decode(&[]), None);
    }

    #[test]
    fn the_anchor_survives_in_its_file() {
        let data = tempfile::tempdir().unwrap();
        let (_, stamper) = fresh();
        assert_eq!(load_anchor(data.path()).unwrap(), None);
        save_anchor(data.path(), &stamper.anchor()).unwrap();
        assert_eq!(load_anchor(data.path()).unwrap().unwrap(), stamper.anchor());
    }

    #[test]
    fn the_machine_has_a_boot_id_and_two_clocks() {
        let clock = SystemClock::new();
        assert_ne!(clock.boot_id(), BOOT_ID_UNKNOWN);
        assert!(clock.boottime_us() > 0);
        assert!(clock.wall_us() > WALL - 3 * 365 * DAY);
    }

    #[test]
    fn a_boot_id_is_32_digits_or_nothing() {
        let text = "8a5b6c7d-0000-1111-2222-333344445555\n";
        assert_eq!(parse_boot_id(text).unwrap()[..2], [0x8a, 0x5b]);
        for bad in ["", "8a5b", "zz5b6c7d-0000-1111-2222-333344445555"] {
            assert_eq!(parse_boot_id(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn stamps_rise_whatever_the_clocks_and_restarts_do(
            steps in proptest::collection::vec((0u8..5, 0u64..10 * DAY), 1..200)
        ) {
            let (clock, mut stamper) = fresh();
            let mut saved = stamper.anchor();
            let mut last = stamper.next();
            for (step, us) in steps {
                match step {
                    0 => clock.advance_us(us),
                    1 => clock.set_wall_us(us * 1_000),
                    2 => clock.reboot(),
                    3 => saved = stamper.anchor(),
                    _ => stamper = Stamper::restore(clock.clone(), Some(&saved), last),
                }
                let present = stamper.peek();
                prop_assert!(present >= last);
                prop_assert!(stamper.now() >= present);
                let stamp = stamper.next();
                prop_assert!(stamp > last && stamp >= present);
                last = stamp;
            }
        }
    }
}
