//! The series for people at a terminal: a line for each point, a bar beside its rate.

use std::io::Write;

use anyhow::Result;

use crate::grow::{Grown, Growth, Point, grouped};
use crate::report::table::median;

pub fn print(growth: &Growth) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for fact in growth.facts.lines() {
        writeln!(out, "{fact}")?;
    }
    writeln!(
        out,
        "medians of the rounds, (lowest-highest); bars within a series; CPU s per million, server + client; MiB, server's anonymous peak"
    )?;
    for grown in &growth.series {
        write_series(&mut out, grown)?;
    }
    out.flush()?;
    Ok(())
}

fn write_series(out: &mut impl Write, grown: &Grown) -> Result<()> {
    writeln!(out, "\n{}: {}", grown.name, grown.what)?;
    writeln!(
        out,
        "{:>16} {:>9} {:<BAR$} {:>17} {:>8} {:>15} {:>6}",
        grown.axis, "k/s", "", "(k/s)", "MB/s", "CPU s/M", "MiB"
    )?;
    let rates = grown.points.iter().filter_map(Point::rate);
    let most = rates.map(|rate| rate.median).fold(0.0, f64::max);
    for point in &grown.points {
        let value = grouped(point.value);
        match numbers(point, most) {
            Some(numbers) => writeln!(out, "{value:>16} {numbers}")?,
            None => writeln!(out, "{value:>16} {:>9}", "failed")?,
        }
        for error in point.failures() {
            writeln!(out, "{:>16} failed: {error}", "")?;
        }
    }
    Ok(())
}

/// `most` is the highest rate of the series: its bar is the longest.
fn numbers(point: &Point, most: f64) -> Option<String> {
    let (summary, rate) = (point.summary.as_ref()?, point.rate()?);
    let bar = "#".repeat((rate.median / most * BAR as f64).round() as usize);
    let cpu = format!(
        "{} + {:.2}",
        median(&summary.server_cpu_s_per_million, 2),
        summary.client_cpu_s_per_million.median
    );
    Some(format!(
        "{:>9.1} {bar:<BAR$} {:>17} {:>8.1} {cpu:>15} {:>6}",
        rate.median / 1e3,
        format!("({:.1}-{:.1})", rate.min / 1e3, rate.max / 1e3),
        summary.mb_per_second.median,
        median(&summary.server_anon_mib, 0),
    ))
}

/// Characters of the longest bar.
const BAR: usize = 20;
