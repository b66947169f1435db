//! The report for programs: everything, every round.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

pub fn print(report: &impl Serialize) -> Result<()> {
    write_to(report, &mut std::io::stdout().lock())
}

pub fn save(report: &impl Serialize, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("{} cannot be made", path.display()))?;
    write_to(report, &mut BufWriter::new(file))
}

fn write_to(report: &impl Serialize, out: &mut impl Write) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}
