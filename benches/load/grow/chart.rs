//! A line chart as SVG: x logarithmic, y linear from zero.

use std::fmt::Write;

use anyhow::Result;

use crate::grow::grouped;
use crate::report::Spread;

pub struct Chart {
    pub title: &'static str,
    /// What the values count.
    pub axis: &'static str,
    /// In ascending order; each has a mark below.
    pub values: Vec<u64>,
    pub curves: Vec<Curve>,
}

pub struct Curve {
    pub name: &'static str,
    /// One for each value, if it was found. A line goes on past those that were not.
    pub spreads: Vec<Option<Spread>>,
}

impl Chart {
    /// Draws nothing if nothing was found.
    pub fn draw(&self, svg: &mut String) -> Result<()> {
        let found = self.curves.iter().flat_map(|c| c.spreads.iter().flatten());
        let most = found.map(|spread| spread.max).fold(0.0, f64::max);
        if most <= 0.0 {
            return Ok(());
        }
        let (across, upwards) = (Across::of(&self.values), Upwards::to(most));
        writeln!(
            svg,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">",
            self.title, self.axis
        )?;
        text(svg, "title", 0.0, TITLE_Y, self.title)?;
        for step in 0..=upwards.steps {
            let value = f64::from(step) * upwards.step;
            let y = upwards.y(value);
            writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            )?;
            let label = upwards.label(value);
            text(svg, "right", LEFT - GAP, y + TEXT_DROP, &label)?;
        }
        for &value in &self.values {
            let x = across.x(value);
            text(svg, "middle", x, MARKS_Y, &grouped(value))?;
        }
        let middle = f64::midpoint(LEFT, RIGHT);
        text(svg, "middle", middle, AXIS_Y, self.axis)?;
        for (nth, curve) in self.curves.iter().enumerate() {
            let class = format!("curve{nth}");
            self.draw_curve(svg, curve, &class, &across, &upwards)?;
            if self.curves.len() > 1 {
                let x = RIGHT - NAME_WIDTH * (self.curves.len() - 1 - nth) as f64;
                text(svg, &format!("right {class}"), x, TITLE_Y, curve.name)?;
            }
        }
        writeln!(svg, "</svg>")?;
        Ok(())
    }

    fn draw_curve(
        &self,
        svg: &mut String,
        curve: &Curve,
        class: &str,
        across: &Across,
        upwards: &Upwards,
    ) -> Result<()> {
        let (mut path, mut marks) = (String::new(), String::new());
        for (&value, spread) in self.values.iter().zip(&curve.spreads) {
            let Some(spread) = spread else { continue };
            let (x, y) = (across.x(value), upwards.y(spread.median));
            let (low, high) = (upwards.y(spread.min), upwards.y(spread.max));
            write!(path, "{x:.1},{y:.1} ")?;
            writeln!(
                marks,
                "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>\
                 <circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{DOT}\">\
                 <title>{}, {}: {:.2} ({:.2}-{:.2})</title></circle>",
                grouped(value),
                curve.name,
                spread.median,
                spread.min,
                spread.max
            )?;
        }
        let path = path.trim_end();
        writeln!(svg, "<polyline class=\"{class}\" points=\"{path}\"/>")?;
        svg.push_str(&marks);
        Ok(())
    }
}

/// Where values stand from left to right.
struct Across {
    /// Where zero is, which has no logarithm: a decade before the first value that has one.
    nought: f64,
    first: f64,
    last: f64,
}

impl Across {
    fn of(values: &[u64]) -> Self {
        let least = values.iter().copied().find(|&value| value > 0);
        let nought = (least.unwrap_or(1) as f64).log10() - 1.0;
        let log = |value: Option<&u64>| value.map_or(nought, |&value| log(value, nought));
        Self {
            nought,
            first: log(values.first()),
            last: log(values.last()),
        }
    }

    fn x(&self, value: u64) -> f64 {
        // A single value has no width to be spread over.
        let width = (self.last - self.first).max(f64::MIN_POSITIVE);
        let part = (log(value, self.nought) - self.first) / width;
        LEFT + INSET + part * (RIGHT - LEFT - 2.0 * INSET)
    }
}

fn log(value: u64, nought: f64) -> f64 {
    if value == 0 {
        nought
    } else {
        (value as f64).log10()
    }
}

/// Where figures stand upwards: round steps from zero, the last at or above all of them.
struct Upwards {
    step: f64,
    steps: u32,
    unit: f64,
    unit_name: &'static str,
}

impl Upwards {
    fn to(most: f64) -> Self {
        let least = most / f64::from(STEPS_MAX);
        let decade = 10_f64.powf(least.log10().floor());
        let mut round = [1.0, 2.0, 5.0].into_iter().map(|digit| digit * decade);
        let step = round.find(|&step| step >= least).unwrap_or(10.0 * decade);
        let (unit, unit_name) = match most {
            1e6.. => (1e6, " M"),
            1e4.. => (1e3, " k"),
            _ => (1.0, ""),
        };
        Self {
            step,
            steps: (most / step).ceil() as u32,
            unit,
            unit_name,
        }
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - value / (self.step * f64::from(self.steps)) * (BOTTOM - TOP)
    }

    fn label(&self, value: f64) -> String {
        if value == 0.0 {
            return "0".to_owned();
        }
        let digits = (-(self.step / self.unit).log10().floor()).max(0.0) as usize;
        format!("{:.digits$}{}", value / self.unit, self.unit_name)
    }
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, words: &str) -> Result<()> {
    writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
    )?;
    Ok(())
}

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 240.0;
/// The edges of the plot.
const LEFT: f64 = 46.0;
const RIGHT: f64 = 450.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 194.0;
/// Room beside the first and the last value, for their marks.
const INSET: f64 = 28.0;
const TITLE_Y: f64 = 14.0;
const MARKS_Y: f64 = 210.0;
const AXIS_Y: f64 = 230.0;
const GAP: f64 = 6.0;
/// From a text's middle to its baseline.
const TEXT_DROP: f64 = 4.0;
/// Room for the name of a curve.
const NAME_WIDTH: f64 = 46.0;
const DOT: f64 = 3.0;
/// Lines above zero.
const STEPS_MAX: u32 = 5;
