//! The report for people: a line for each floor and scenario, then the verdicts.

use std::io::Write;

use anyhow::Result;

use crate::report::{Line, Report, Round, Spread, Summary};
use crate::verdict::{Bound, Headline, Outcome};

pub fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for fact in report.facts.lines() {
        writeln!(out, "{fact}")?;
    }
    writeln!(
        out,
        "medians of the rounds, (lowest-highest); CPU s per million, server + client; MiB, server's anonymous peak;\n\
         bare: without a broker, see benches/load/raw_disk.rs; beyond: not met, nor by what is bare\n"
    )?;
    for (title, lines) in [("floors", &report.floors), ("scenarios", &report.scenarios)] {
        if lines.is_empty() {
            continue;
        }
        writeln!(
            out,
            "{title:<16} {:>9} {:>21} {:>8} {:>9} {:>9} {:>9} {:>13} {:>6}",
            "k/s", "(k/s)", "MB/s", "p50 us", "p99 us", "p99.9 us", "CPU s/M", "MiB"
        )?;
        for line in lines {
            write_line(&mut out, line)?;
        }
        writeln!(out)?;
    }
    for verdict in &report.verdicts {
        let outcome = match verdict.outcome {
            Outcome::Met => "met",
            Outcome::Beyond => "beyond",
            Outcome::NotMet => "NOT met",
        };
        let bound = match verdict.bound {
            Bound::AtLeast(least) => format!(">= {least}"),
            Bound::AtMost(most) => format!("<= {most}"),
        };
        let found = range(&verdict.found);
        write!(out, "{outcome:>7}: {} {bound}: {found}", verdict.claim)?;
        if let Some(bare) = &verdict.bare {
            write!(out, ", bare {}", range(bare))?;
        }
        writeln!(out)?;
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
    if let Some(found) = &line.headline {
        write_headline(out, found)?;
    }
    for (name, spread) in line.summary.iter().flat_map(|summary| &summary.figures) {
        writeln!(out, "    {name}: {}", range(spread))?;
    }
    for round in &line.rounds {
        if let Round::Failed(error) = round {
            writeln!(out, "    failed: {error}")?;
        }
    }
    Ok(())
}

fn write_headline(out: &mut impl Write, found: &Headline) -> Result<()> {
    write!(out, "    {}: {}", found.unit, range(&found.value))?;
    if let (Some(floor), Some(ratio)) = (&found.floor, &found.ratio) {
        write!(out, ", floor {}, ratio {}", range(floor), range(ratio))?;
    }
    if let (Some(bare), Some(of_bare)) = (&found.bare, &found.of_bare) {
        write!(out, ", bare {}, of that {}", range(bare), range(of_bare))?;
    }
    writeln!(out)?;
    Ok(())
}

fn numbers(summary: &Summary) -> String {
    let rate = &summary.per_second;
    let spread = format!("({:.1}-{:.1})", rate.min / 1e3, rate.max / 1e3);
    let us = |spread: &Option<Spread>| median(spread, 0);
    format!(
        "{:>9.1} {spread:>21} {:>8.1} {:>9} {:>9} {:>9} {:>13} {:>6}",
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
        median(&summary.server_anon_mib, 0),
    )
}

/// The median, or a dash if there is none.
pub fn median(spread: &Option<Spread>, digits: usize) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |spread| format!("{:.digits$}", spread.median),
    )
}

fn range(spread: &Spread) -> String {
    let digits = if spread.median < 100.0 { 2 } else { 0 };
    format!(
        "{:.digits$} ({:.digits$}-{:.digits$})",
        spread.median, spread.min, spread.max
    )
}
