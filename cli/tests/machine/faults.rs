//! Single system calls of the broker that kill it, fail or take long; and then the power is cut.
//!
//! One world lives through all of them, in start-up and in operation. A call that fails must end the
//! process with a sentence, or do no harm; either way nothing acknowledged is lost.

use std::time::{Duration, Instant};

use crate::broker::Ended;
use crate::disk::LoopDisk;
use crate::order::fallback;
use crate::strace::Strace;
use crate::world::World;
use crate::{repeat, tell};

/// The Nth of these calls, in any one thread, kills the process as it is made.
const KILLS: [(&str, &[u32]); 8] = [
    ("pwrite64", &[1, 2, 3, 4, 5, 9, 17, 40]),
    ("fdatasync", &[1, 2, 3]),
    ("fsync", &[1, 2, 3, 4, 5]),
    ("rename", &[1, 2]),
    ("unlink", &[1, 2]),
    ("fallocate", &[1, 2]),
    ("openat", &[20, 30, 40]),
    ("sendmsg", &[20, 60]),
];
/// It fails.
const FAILURES: [(&str, &[u32]); 5] = [
    ("pwrite64", &[2, 4, 8, 20, 45]),
    ("fdatasync", &[1, 2, 3]),
    ("fsync", &[1, 2, 4]),
    ("rename", &[1]),
    ("fallocate", &[1]),
];
const ERRORS: [&str; 2] = ["EIO", "ENOSPC"];
/// Where the direct path is missing every commit is a write and then a sync; the Nth of these fails.
const LATE_SYNCS: [u32; 4] = [4, 8, 20, 45];
/// Every call takes that long, in microseconds.
const DELAYS: [(&str, u32); 3] = [
    ("pwrite64", 30_000),
    ("fdatasync", 50_000),
    ("fsync", 50_000),
];

/// Longest load under which a fault must be met.
const MET_WITHIN: Duration = Duration::from_secs(15);

/// So many processes one without a fault.
const WELL_EVERY: u64 = 4;

/// What a process says that ends because of its disk.
const SENTENCES: [&str; 4] = [
    "the process must stop now",
    "what the disk holds is unknown",
    "cannot ",
    "the disk of ",
];

#[derive(Debug, Default)]
struct Figures {
    kills: u64,
    failures: u64,
    failed_syncs: u64,
    delays: u64,
    missed: Vec<String>,
}

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn failed_by_any_system_call_nothing_acknowledged_is_lost_or_doubled() {
    let mut figures = Figures::default();
    repeat(1, |seed| {
        let disk = LoopDisk::new(512);
        let scratch = tempfile::tempdir().expect("a folder");
        let world = World::new(disk.path().join("data"), seed);
        let mut trial = Trial {
            disk,
            world,
            scratch,
            met: 0,
        };
        trial.run(&mut figures);
        trial.world.load_for_a_while();
        trial.world.finish_well();
    });
    println!("durability: syscall_kills {}", figures.kills);
    println!("durability: syscall_failures {}", figures.failures);
    println!("durability: failed_syncs {}", figures.failed_syncs);
    println!("durability: syscall_delays {}", figures.delays);
    assert!(figures.missed.is_empty(), "never met: {:?}", figures.missed);
}

struct Trial {
    disk: LoopDisk,
    world: World,
    scratch: tempfile::TempDir,
    met: u64,
}

impl Trial {
    fn run(&mut self, figures: &mut Figures) {
        self.world.load(Duration::ZERO);
        self.world.kill();
        for (call, numbers) in KILLS {
            for number in numbers {
                let what = format!("{call}:signal=KILL:when={number}");
                let (struck, ended) = self.meet(call, self.strace().inject(&what));
                assert!(!struck || ended.signal == Some(9), "{what}: {ended:?}");
                figures.note(struck, what, |figures| figures.kills += 1);
            }
        }
        for error in ERRORS {
            for (call, numbers) in FAILURES {
                for number in numbers {
                    let what = format!("{call}:error={error}:when={number}");
                    let (struck, ended) = self.meet(call, self.strace().inject(&what));
                    if struck {
                        assert_well_ended(&what, &ended);
                    }
                    figures.note(struck, what, |figures| figures.failures += 1);
                }
            }
        }
        for number in LATE_SYNCS {
            let what = format!("fdatasync:error=EIO:when={number}");
            let strace = fallback(&self.world.launch, self.scratch.path()).inject(&what);
            let (struck, ended) = self.meet("fdatasync", strace);
            if struck {
                assert_eq!(ended.code, Some(1), "{what}: {ended:?}");
                assert_well_ended(&what, &ended);
            }
            figures.note(struck, format!("late {what}"), |figures| {
                figures.failed_syncs += 1
            });
        }
        for (call, us) in DELAYS {
            let what = format!("{call}:delay_enter={us}:when=3+4");
            let (struck, _) = self.meet(call, self.strace().inject(&what));
            figures.note(struck, what, |figures| figures.delays += 1);
        }
        self.world.start_well();
    }

    /// One process under a fault, and the power cut at its end; whether it was met, and how that ended.
    /// Most of them recover from the one before.
    fn meet(&mut self, call: &str, strace: Strace) -> (bool, Ended) {
        self.met += 1;
        if self.met.is_multiple_of(WELL_EVERY) {
            self.world.start_well();
            self.world.load(Duration::ZERO);
            self.world.kill();
        }
        let began = Instant::now();
        let (by_itself, ended) = match self.world.start(&strace.words()) {
            Err(ended) => (true, ended),
            Ok(()) => {
                self.world.load(Duration::from_millis(150));
                while !self.world.is_gone()
                    && !strace.has_struck(call)
                    && began.elapsed() < MET_WITHIN
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                // Its end is looked for before the power is cut, which ends it too.
                let by_itself = self.world.is_gone();
                self.disk.cut();
                (by_itself, self.world.kill_if_there())
            }
        };
        let was_killed = by_itself && ended.signal == Some(9);
        let struck = was_killed || strace.has_struck(call);
        self.disk.cut_and_remount();
        let how = (ended.code, ended.signal);
        let (faults, took) = (&strace.injected, began.elapsed());
        tell(&format!("{faults:?}: met {struck}, {how:?}, {took:.1?}"));
        if !struck {
            tell(&format!("it said: {}", ended.stderr));
        }
        (struck, ended)
    }

    fn strace(&self) -> Strace {
        Strace::new(self.scratch.path().join("trace"))
    }
}

impl Figures {
    fn note(&mut self, struck: bool, what: String, count: impl FnOnce(&mut Self)) {
        if struck {
            count(self);
        } else {
            self.missed.push(what);
        }
    }
}

/// Ended by itself with a sentence, or not at all before it was killed.
fn assert_well_ended(what: &str, ended: &Ended) {
    let said = ended.stderr.lines().last().unwrap_or_default();
    let is_told = SENTENCES.iter().any(|sentence| said.contains(sentence));
    let is_right = match ended.code {
        Some(1) => is_told,
        Some(_) => false,
        None => ended.signal == Some(9),
    };
    assert!(
        is_right && !ended.stderr.contains("panicked"),
        "{what}: {ended:?}"
    );
}
