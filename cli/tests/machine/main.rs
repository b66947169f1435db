//! The release binary on a real machine: killed, cut off from its disk in the middle of a write, failed
//! by single system calls, out of space, stopped for seconds. Each time everything that it acknowledged
//! is compared with everything that is found, by the simulator's oracle.
//!
//! ```text
//! clients (they outlive the broker) ──▶ record ──▶ history ──▶ oracle ──▶ violations, by invariant
//!    └─ QUIC ─▶ millpond serve ─ system calls (strace) ─▶ ext4 on a loop device, tmpfs, or a folder
//! ```
//!
//! They need root, loop devices, strace and e2fsprogs, and fail where one is missing; so they run only when
//! they are asked for:
//!
//! ```text
//! MILLPOND_BINARY=$PWD/target/release/millpond unshare --mount --pid --fork --mount-proc --kill-child \
//!     cargo test --test machine -- --ignored --nocapture --test-threads 2
//! ```
//!
//! In namespaces of their own no mount and no broker outlives them, however they end. Without
//! `MILLPOND_BINARY` it is the debug build that is tried. `MILLPOND_MACHINE_SECONDS` repeats each test's
//! worlds for that long.

mod broker;
mod clients;
mod cuts;
mod disk;
mod faults;
mod full;
mod kills;
mod order;
mod record;
mod stopped;
mod strace;
mod world;

#[allow(dead_code, reason = "the simulator does more")]
#[path = "../../../tests/sim"]
mod shared {
    pub mod history;
    pub mod oracle;
}
use shared::{history, oracle};

use std::time::{Duration, Instant};

/// Tells what has just been tried.
#[expect(clippy::print_stdout, reason = "it is read in the log of a run")]
fn tell(what: &str) {
    println!("{what}");
}

/// Runs a world after another: so many, or for as long as `MILLPOND_MACHINE_SECONDS` says.
fn repeat(worlds: u64, mut world: impl FnMut(u64)) {
    let number = |text: String| text.parse().expect("MILLPOND_MACHINE_SECONDS is a number");
    let seconds = std::env::var("MILLPOND_MACHINE_SECONDS").ok().map(number);
    let until = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    for seed in 0.. {
        let is_over = match until {
            Some(until) => Instant::now() >= until,
            None => seed >= worlds,
        };
        if is_over {
            return;
        }
        let began = Instant::now();
        world(seed);
        tell(&format!("world {seed}: {:.1?}", began.elapsed()));
    }
}
