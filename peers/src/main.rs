//! Millpond beside other queues: the same load on real servers, on one machine, in one run.
//!
//! ```text
//! cargo run --release -p millpond-peers -- [--quick] [--rounds N] [--only NAME,…] [--json FILE] [--html FILE]
//! ```
//!
//! Owns: which servers, in which durability, under which load. A server that is not installed is named
//! and left out. Every server runs alone, with a folder and a port of its own, and is ended before the
//! next one starts; the load comes from this process, by the crate that the server's users take.
//! "strict": an answer comes after a sync. "default": as the server is commonly run.

mod args;
mod child;
mod load;
mod measure;
mod peer;
mod report;
mod servers;

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Parser;

use crate::args::Args;
use crate::report::Report;

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(dir) = &args.serve {
        return millpond_broker::runtime()?.block_on(servers::millpond::serve(dir));
    }
    // Both sides share the machine, so each takes half of it.
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).max(1))
        .enable_all()
        .build()?;
    let mut report = Report::new(&args)?;
    for round in 1..=args.rounds {
        runtime.block_on(servers::run_all(&args, round, &mut report))?;
    }
    report.print()?;
    if let Some(path) = &args.json {
        report.save_json(path)?;
    }
    if let Some(path) = &args.html {
        report.save_html(path)?;
    }
    Ok(())
}
