//! The page: for each series line charts of what was found, within one HTML file that needs no other.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::grow::chart::{Chart, Curve};
use crate::grow::{Grown, Growth, grouped};
use crate::report::{Spread, Summary};

pub fn save(growth: &Growth, path: &Path) -> Result<()> {
    let page = draw(growth)?;
    std::fs::write(path, page).with_context(|| format!("{} cannot be written", path.display()))
}

fn draw(growth: &Growth) -> Result<String> {
    let mut html = String::new();
    writeln!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n\
         <title>{TITLE}</title>\n<style>{STYLE}</style></head><body>\n<h1>{TITLE}</h1>"
    )?;
    for fact in growth.facts.lines() {
        writeln!(html, "<p>{}</p>", escape(&fact))?;
    }
    writeln!(html, "<p>{HOW_TO_READ}</p>")?;
    for grown in &growth.series {
        draw_series(&mut html, grown)?;
    }
    html.push_str("</body></html>\n");
    Ok(html)
}

fn draw_series(html: &mut String, grown: &Grown) -> Result<()> {
    writeln!(
        html,
        "<h2>{}</h2>\n<p>{}</p>\n<div class=\"charts\">",
        grown.name,
        escape(grown.what)
    )?;
    for chart in charts(grown) {
        chart.draw(html)?;
    }
    writeln!(html, "</div>")?;
    for point in &grown.points {
        for error in point.failures() {
            let value = grouped(point.value);
            writeln!(html, "<p>Failed at {value}: {}</p>", escape(error))?;
        }
    }
    Ok(())
}

fn charts(grown: &Grown) -> [Chart; 4] {
    let chart = |title, curves| Chart {
        title,
        axis: grown.axis,
        values: grown.points.iter().map(|point| point.value).collect(),
        curves,
    };
    let curve = |name, figure: fn(&Summary) -> Option<Spread>| Curve {
        name,
        spreads: grown.points.iter().map(|point| point.of(figure)).collect(),
    };
    [
        chart(
            "messages a second",
            vec![curve("rate", |summary| Some(summary.per_second))],
        ),
        chart(
            "MB a second",
            vec![curve("payload", |summary| Some(summary.mb_per_second))],
        ),
        chart(
            "CPU seconds per million messages",
            vec![
                curve("broker", |summary| summary.server_cpu_s_per_million),
                curve("client", |summary| Some(summary.client_cpu_s_per_million)),
            ],
        ),
        chart(
            "broker's anonymous memory, MiB, peak",
            vec![curve("memory", |summary| summary.server_anon_mib)],
        ),
    ]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

const TITLE: &str = "How Millpond's cost grows";
const HOW_TO_READ: &str = "Points are medians of the rounds, upright lines their range. To the right each \
    step is a multiple, and 0 stands a decade before the first that is more; upwards it is linear, from \
    zero. Each point has a broker of its own.";
const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;\
    padding:0 1rem;color:#1a2b33}h2{margin:2rem 0 0}p{margin:.3rem 0}\
    .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}\
    svg{width:100%}text{font-size:11px;fill:#1a2b33}.title{font-size:13px;font-weight:600}\
    .right{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#dde4e7}\
    polyline{fill:none;stroke-width:2}.curve0{stroke:#0b7a75;fill:#0b7a75}\
    .curve1{stroke:#b8621b;fill:#b8621b}polyline.curve0,polyline.curve1{fill:none}\
    text.curve0,text.curve1{stroke:none}";
