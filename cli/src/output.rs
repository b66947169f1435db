//! What goes to standard output: tables for people, JSON for scripts. A closed standard output is a
//! [`Failure`] that ends the command quietly.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

use crate::failure::Failure;

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Human,
    Json,
}

/// Writes one text and a line feed.
pub fn line(text: impl AsRef<str>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref().as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(Failure::Stdout)
}

/// Writes one JSON value on one line.
pub fn json(value: &Value) -> Result<(), Failure> {
    line(value.to_string())
}

/// Writes bytes as they are and makes sure that they left the process.
pub fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(Failure::Stdout)
}

/// Tells that something without an answer was done; scripts have the exit code.
pub fn done(format: Format, sentence: &str) -> Result<(), Failure> {
    match format {
        Format::Json => json(&serde_json::json!({"done": true})),
        Format::Human => line(sentence),
    }
}

/// Writes a note to standard error; a closed standard error is no reason to fail.
pub fn note(text: impl AsRef<str>) {
    let mut out = io::stderr().lock();
    if writeln!(out, "{}", text.as_ref()).is_err() {
        // Nobody listens: there is nowhere left to say so.
    }
}

/// How a column stands in a table.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Column {
    Left(&'static str),
    Right(&'static str),
}

impl Column {
    const fn title(self) -> &'static str {
        match self {
            Self::Left(title) | Self::Right(title) => title,
        }
    }
}

/// Writes a table of at most [`WIDTH`] columns, or `empty` if it has no rows.
pub fn table(
    columns: &[Column],
    rows: impl IntoIterator<Item = Vec<String>>,
    empty: &str,
) -> Result<(), Failure> {
    let table = render(columns, rows);
    match table {
        Some(text) => line(text),
        None => line(empty),
    }
}

/// Writes names and values below each other.
pub fn facts(facts: &[(&str, String)]) -> Result<(), Failure> {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = facts
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}"))
        .collect();
    line(lines.join("\n"))
}

/// Bytes in hexadecimal, for ids.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or_default();
    let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 0xf)];
    bytes.iter().flat_map(digits).collect()
}

fn render(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> Option<String> {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(columns.iter().map(|column| column.title()))
        .add_rows(rows);
    if table.is_empty() {
        return None;
    }
    for (at, column) in columns.iter().enumerate() {
        let Some(drawn) = table.column_mut(at) else {
            continue;
        };
        drawn.set_padding((0, 2));
        if matches!(column, Column::Right(_)) {
            drawn.set_cell_alignment(CellAlignment::Right);
        }
    }
    let trimmed: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    Some(trimmed.join("\n"))
}

/// Columns of a terminal that every table fits.
const WIDTH: u16 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_told_in_hexadecimal() {
        assert_eq!(hex(&[0, 0x0f, 0xff]), "000fff");
    }

    #[test]
    fn a_table_fits_its_width_whatever_is_in_it() {
        let columns = [Column::Left("NAME"), Column::Right("COUNT")];
        let rows = [vec!["n".repeat(300), "7".into()]];
        let text = render(&columns, rows).unwrap();
        assert!(text.lines().all(|line| line.len() <= usize::from(WIDTH)));
        assert!(text.lines().next().unwrap().starts_with("NAME"));
    }

    #[test]
    fn numbers_stand_at_the_right() {
        let columns = [Column::Left("NAME"), Column::Right("COUNT")];
        let rows = [
            vec!["a".into(), "7".into()],
            vec!["b".into(), "12345".into()],
        ];
        let text = render(&columns, rows).unwrap();
        assert_eq!(text, "NAME  COUNT\na         7\nb     12345");
    }

    #[test]
    fn a_table_without_rows_is_none() {
        assert_eq!(render(&[Column::Left("NAME")], []), None);
    }
}
