//! Load on a broker, and the floors under it, measured in one run on one machine.
//!
//! ```text
//! cargo bench --bench load -- [--quick] [--rounds N] [--only NAME,…] [--json FILE] [--output json]
//!                             [--dir DIR] [--mtu N]
//! cargo bench --bench load -- --grow [--html FILE] [the same options]
//! ```
//!
//! Owns: what is measured and in which order. A run is some rounds; a round measures every floor
//! and then every scenario, because such a machine drifts: a ratio compares neighbours in time, and
//! what is reported is the median of the rounds with their spread. The load generator is this
//! process; each broker is a child process with a folder of its own, so that CPU seconds are told
//! apart and nothing is left behind by the scenario before.
//!
//! With `--grow` a run measures series instead: the same work with larger messages, more producers,
//! topics, subscriptions or waiting messages, to show how its cost grows. `--html` draws them.
//!
//! Every acknowledgement waits for the disk: there is no setting to the contrary, here or in the
//! broker. Not here: other systems, and brokers on other machines.

mod args;
mod backlog;
mod child;
mod crowd;
mod disk;
mod floors;
mod grow;
mod idle;
mod latency;
mod machine;
mod open_loop;
mod proc_stat;
mod publish;
mod raw_disk;
mod raw_quic;
mod replay;
mod report;
mod restart;
mod retries;
mod rounds;
mod sample;
mod scenarios;
mod scheduled;
mod server;
mod spread;
mod verdict;
mod waiting;

use std::num::NonZeroUsize;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use crate::args::{Args, Output, Plan};
use crate::grow::Growth;
use crate::machine::Facts;
use crate::report::Report;

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if let Some(role) = args.child {
        millpond_broker::runtime()?.block_on(server::serve(role, &args))?;
        return Ok(ExitCode::SUCCESS);
    }
    give_large_blocks_back()?;
    // Both sides share the machine, so each takes half of it.
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).max(1))
        .enable_all()
        .build()?;
    let plan = args.plan()?;
    let facts = Facts::gather(&plan)?;
    // Publishing is driven from this thread, which is no worker of the runtime: a task that enqueues
    // without a pause would hold back the tasks that it wakes. What consumes much is a task.
    let is_complete = if let Some(grow) = &plan.grow {
        let measured = runtime.block_on(grow::run(&plan, &grow.series));
        let growth = Growth::new(facts, measured);
        tell(&plan, &growth, grow::table::print)?;
        if let Some(path) = &grow.html {
            grow::page::save(&growth, path)?;
        }
        growth.is_complete()
    } else {
        let measured = runtime.block_on(rounds::run(&plan))?;
        let report = Report::new(facts, measured);
        tell(&plan, &report, report::table::print)?;
        report.is_complete()
    };
    // A claim that is not met is a result; something that could not be measured is a failure.
    Ok(if is_complete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Each client of a crowd has a socket of its own, with 3 MB to receive into that an idle one never touches. As a rule
/// the allocator keeps such blocks once one was freed, and clears them when they are used again: ten thousand are
/// 28 GB then, and what is measured beside them is a machine without memory. So this program starts
/// itself again, with an allocator that maps them.
fn give_large_blocks_back() -> Result<()> {
    if std::env::var_os(TUNABLES).is_some() {
        return Ok(());
    }
    let mut again = Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1));
    again.env(TUNABLES, "glibc.malloc.mmap_threshold=1048576");
    Err(again.exec()).context("the program cannot be started again")
}

/// Writes what was found to where it is wanted.
fn tell<R: Serialize>(plan: &Plan, found: &R, print_table: fn(&R) -> Result<()>) -> Result<()> {
    if let Some(path) = &plan.json {
        report::json::save(found, path)?;
    }
    match plan.output {
        Output::Table => print_table(found),
        Output::Json => report::json::print(found),
    }
}

/// Of the C library's allocator. Those who serve are started without.
pub const TUNABLES: &str = "GLIBC_TUNABLES";
