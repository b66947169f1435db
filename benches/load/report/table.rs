//! The report for people: a line for each floor and scenario, then the verdicts.

use std::io::Write;

use anyhow::Result;

use crate::report::{Line, Report, Round, Spread, Summary};

pub fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for fact in report.facts.lines() {
        writeln!(out, "{fact}")?;
    }
    writeln!(
        out,
        "medians of the rounds, (lowest-highest); CPU s per million, server + client\n"
    )?;
    for (title, lines) in [("floors", &report.floors), ("scenarios", &report.scenarios)] {
        if lines.is_empty() {
            continue;
        }
        writeln!(
            out,
            "{title:<16} {:>9} {:>21} {:>8} {:>9} {:>9} {:>9} {:>13}",
            "k/s", "(k/s)", "MB/s", "p50 us", "p99 us", "p99.9 us", "CPU s/M"
        )?;
        for line in lines {
            write_line(&mut out, line)?;
        }
        writeln!(out)?;
    }
    for verdict in &report.verdicts {
        let met = if verdict.met { "met" } else { "NOT met" };
        let ratio = ratio(&verdict.ratio);
        writeln!(
            out,
            "{met:>7}: {} >= {}: {ratio}",
            verdict.claim, verdict.least
        )?;
    }
    out.flush()?;
    Ok(())
}

fn write_line(out: &mut impl Write, line: &Line) -> Result<()> {
    match &line.summary {
        Some(summary) => writeln!(out, "{:<16} {}", line.name, numbers(summary))?,
        None => writeln!(out, "{:<16} failed", line.name)?,
    }
    writeln!(out, "    {}", line.what)?;
    if let Some(found) = &line.floor_ratio {
        writeln!(out, "    {}: {}", found.floor, ratio(&found.ratio))?;
    }
    for round in &line.rounds {
        if let Round::Failed(error) = round {
            writeln!(out, "    failed: {error}")?;
        }
    }
    Ok(())
}

fn numbers(summary: &Summary) -> String {
    let rate = &summary.per_second;
    let spread = format!("({:.1}-{:.1})", rate.min / 1e3, rate.max / 1e3);
    let us = |spread: &Option<Spread>| median(spread, 0);
    format!(
        "{:>9.1} {spread:>21} {:>8.1} {:>9} {:>9} {:>9} {:>13}",
        rate.median / 1e3,
        summary.mb_per_second.median,
        us(&summary.p50_us),
        us(&summary.p99_us),
        us(&summary.p999_us),
        format!(
            "{} + {:.2}",
            median(&summary.server_cpu_s_per_million, 2),
            summary.client_cpu_s_per_million.median
        ),
    )
}

fn median(spread: &Option<Spread>, digits: usize) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |spread| format!("{:.digits$}", spread.median),
    )
}

fn ratio(spread: &Spread) -> String {
    format!("{:.2} ({:.2}-{:.2})", spread.median, spread.min, spread.max)
}
