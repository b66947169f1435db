//! The page: for each workload bars of what was found, drawn as SVG within one HTML file.

use std::fmt::Write;

use anyhow::Result;

use super::{Report, Row, Spread};
use crate::load::Workload;

pub fn draw(report: &Report) -> Result<String> {
    let mut html = String::new();
    write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">"
    )?;
    writeln!(
        html,
        "<title>Millpond beside other queues</title>\n<style>{STYLE}</style>"
    )?;
    writeln!(html, "<h1>Millpond beside other queues</h1>")?;
    writeln!(
        html,
        "<p>{}; {}.",
        escape(&report.machine),
        escape(&report.date)
    )?;
    writeln!(
        html,
        "{} rounds of {} s each; bars are medians, thin lines the range. Strict: an answer comes \
         after a sync. Default: as the server is commonly run. Millpond is encrypted, the others speak \
         in clear text.</p>\n<ul>",
        report.rounds, report.seconds_each
    )?;
    for (name, version) in &report.versions {
        writeln!(html, "<li>{name}: {}</li>", escape(version))?;
    }
    writeln!(html, "</ul>")?;
    for workload in Workload::ALL {
        writeln!(
            html,
            "<h2>{}</h2><p>{}</p>",
            workload.name(),
            workload.what()
        )?;
        let rows: Vec<&Row> = report
            .results
            .iter()
            .filter(|row| row.workload == workload && !row.rounds.is_empty())
            .collect();
        let is_paced = matches!(workload, Workload::EndToEnd | Workload::Redelivery);
        if !is_paced {
            bars(&mut html, "messages a second", &rows, |row| {
                row.of(|f| Some(f.per_second))
            })?;
        }
        bars(&mut html, "latency p50, us", &rows, |row| {
            row.of(|f| f.p50_us)
        })?;
        bars(&mut html, "latency p99, us", &rows, |row| {
            row.of(|f| f.p99_us)
        })?;
        bars(&mut html, "server memory, MiB", &rows, |row| {
            row.of(|f| f.server_anon_mib)
        })?;
    }
    html.push_str("</html>\n");
    Ok(html)
}

fn bars(
    html: &mut String,
    title: &str,
    rows: &[&Row],
    value: impl Fn(&Row) -> Option<Spread>,
) -> Result<()> {
    let found: Vec<_> = rows
        .iter()
        .filter_map(|row| Some((row.name(), value(row)?)))
        .collect();
    let most = found
        .iter()
        .map(|(_, spread)| spread.max)
        .fold(0.0, f64::max);
    if found.is_empty() || most <= 0.0 {
        return Ok(());
    }
    let height = found.len() * ROW + ROW;
    writeln!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">"
    )?;
    writeln!(
        html,
        "<text x=\"0\" y=\"14\" class=\"title\">{title}</text>"
    )?;
    for (nth, (name, spread)) in found.iter().enumerate() {
        let (y, scale) = ((nth + 1) * ROW, BAR / most);
        let class = if name.starts_with("millpond") {
            "own"
        } else {
            "other"
        };
        let (bar, low, high) = (
            spread.median * scale,
            spread.min * scale,
            spread.max * scale,
        );
        writeln!(
            html,
            "<text x=\"0\" y=\"{}\">{}</text>",
            y + 14,
            escape(name)
        )?;
        writeln!(
            html,
            "<rect x=\"{LEFT}\" y=\"{}\" width=\"{bar:.1}\" height=\"14\" class=\"{class}\"/>",
            y + 3
        )?;
        writeln!(
            html,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{2}\" y2=\"{2}\"/>",
            LEFT + low,
            LEFT + high,
            y + 10
        )?;
        writeln!(
            html,
            "<text x=\"{:.1}\" y=\"{}\">{}</text>",
            LEFT + high + 6.0,
            y + 14,
            number(spread.median)
        )?;
    }
    writeln!(html, "</svg>")?;
    Ok(())
}

/// Three digits that matter.
fn number(value: f64) -> String {
    if value >= 1e6 {
        format!("{:.2} M", value / 1e6)
    } else if value >= 1e4 {
        format!("{:.0} k", value / 1e3)
    } else if value >= 10.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;\
    padding:0 1rem;color:#1a2b33}svg{width:100%;margin:.5rem 0 1.2rem}text{font-size:13px;\
    fill:#1a2b33}.title{font-weight:600}.own{fill:#0b7a75}.other{fill:#b9c4c9}\
    line{stroke:#1a2b33;stroke-width:1}";
const WIDTH: usize = 820;
const ROW: usize = 22;
const LEFT: f64 = 170.0;
const BAR: f64 = 540.0;
