//! The report for programs: everything, every round.

use std::io::Write;

use anyhow::Result;

use crate::report::Report;

pub fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, report)?;
    writeln!(out)?;
    Ok(())
}
