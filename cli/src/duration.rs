//! Durations as people write them: `500ms`, `1s`, `10m`, `2h30m`, `1.5h`, `7d`.
//!
//! A number without a unit is refused except for `0`: seconds and milliseconds are guessed wrong too
//! often. The unit of everything here is the millisecond, as in the protocol.

use std::time::Duration;

/// Why a text is no duration. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    #[error("a duration is missing: write one like 500ms, 10s or 2h30m")]
    Empty,
    #[error("{0:?} is no number: write a duration like 500ms, 10s or 2h30m")]
    Number(String),
    #[error("{0:?} is no unit of time: use ms, s, m, h or d")]
    Unit(String),
    #[error("the duration is too long")]
    TooLong,
}

/// Reads a duration; parts add up (`1h30m`).
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(DurationError::Empty);
    }
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut total_ms: u64 = 0;
    while !rest.is_empty() {
        let (part_ms, after) = part(rest)?;
        total_ms = total_ms
            .checked_add(part_ms)
            .ok_or(DurationError::TooLong)?;
        rest = after;
    }
    Ok(Duration::from_millis(total_ms))
}

/// The same in milliseconds.
pub fn parse_ms(text: &str) -> Result<u64, DurationError> {
    let duration = parse(text)?;
    u64::try_from(duration.as_millis()).map_err(|_| DurationError::TooLong)
}

/// Milliseconds for people: the two largest units, `2h 30m`, `1s 500ms`, `0ms`.
#[must_use]
pub fn format_ms(ms: u64) -> String {
    let mut rest = ms;
    let mut parts = Vec::new();
    for (name, unit_ms) in UNITS {
        let count = rest / unit_ms;
        rest %= unit_ms;
        if count > 0 {
            parts.push(format!("{count}{name}"));
        } else if !parts.is_empty() {
            break;
        }
        if parts.len() == 2 {
            break;
        }
    }
    if parts.is_empty() {
        "0ms".to_owned()
    } else {
        parts.join(" ")
    }
}

fn part(text: &str) -> Result<(u64, &str), DurationError> {
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, after) = text.split_at(number_end);
    let value: f64 = number
        .parse()
        .map_err(|_| DurationError::Number(text.to_owned()))?;
    let unit_end = after
        .find(|c: char| !c.is_ascii_alphabetic())
        .unwrap_or(after.len());
    let (unit, rest) = after.split_at(unit_end);
    let (_, unit_ms) = UNITS
        .into_iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(|| DurationError::Unit(unit.to_owned()))?;
    let ms = value * unit_ms as f64;
    if ms > LONGEST_MS {
        return Err(DurationError::TooLong);
    }
    Ok((ms.round() as u64, rest.trim_start()))
}

const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// About 3,000 years; far below where a double loses milliseconds.
const LONGEST_MS: f64 = 1e14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("500ms", 500),
            ("1s", 1_000),
            ("10m", 600_000),
            ("2h30m", 9_000_000),
            ("1.5h", 5_400_000),
            ("1h 5s", 3_605_000),
            ("7d", 604_800_000),
            ("0", 0),
        ] {
            assert_eq!(parse_ms(text), Ok(ms), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_says_why() {
        assert_eq!(parse(""), Err(DurationError::Empty));
        assert_eq!(parse("10"), Err(DurationError::Unit(String::new())));
        assert_eq!(parse("10q"), Err(DurationError::Unit("q".into())));
        assert!(matches!(parse("fast"), Err(DurationError::Number(_))));
        assert!(matches!(parse("-1s"), Err(DurationError::Number(_))));
        assert!(matches!(parse("1.2.3s"), Err(DurationError::Number(_))));
        assert_eq!(parse("9999999999999d"), Err(DurationError::TooLong));
    }

    #[test]
    fn durations_are_shown_in_their_two_largest_units() {
        assert_eq!(format_ms(0), "0ms");
        assert_eq!(format_ms(1_500), "1s 500ms");
        assert_eq!(format_ms(9_000_000), "2h 30m");
        assert_eq!(format_ms(86_400_001), "1d");
        assert_eq!(format_ms(90_061_001), "1d 1h");
    }
}
