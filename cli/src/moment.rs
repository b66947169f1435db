//! Points in time: read from RFC 3339 or `10m ago`, shown as RFC 3339 in UTC.

use jiff::{Timestamp, Unit};
use millpond_protocol::{Offset, Stamp, StartAt};

use crate::duration::{self, DurationError};

/// Why a text names no place to start at. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MomentError {
    #[error("{0:?} is no time: write 2026-01-31T09:30:00Z or `10m ago`")]
    Time(String),
    #[error("{0:?} is before 1970")]
    BeforeEpoch(String),
    #[error("{0}")]
    Duration(#[from] DurationError),
}

/// Reads `earliest`, `latest`, an offset, or a time.
pub fn parse_start(text: &str) -> Result<StartAt, MomentError> {
    match text {
        "earliest" => Ok(StartAt::Earliest),
        "latest" => Ok(StartAt::Latest),
        _ => match text.parse() {
            Ok(offset) => Ok(StartAt::Offset(Offset(offset))),
            Err(_) => parse(text, Timestamp::now()).map(StartAt::Time),
        },
    }
}

/// Reads a time: RFC 3339, or a duration followed by `ago`.
pub fn parse(text: &str, now: Timestamp) -> Result<Stamp, MomentError> {
    let stamp_us = match text.trim().strip_suffix("ago") {
        Some(before) => {
            let ms = duration::parse_ms(before)?;
            i128::from(now.as_microsecond()) - i128::from(ms) * 1_000
        }
        None => {
            let time: Timestamp = text
                .trim()
                .parse()
                .map_err(|_| MomentError::Time(text.to_owned()))?;
            i128::from(time.as_microsecond())
        }
    };
    u64::try_from(stamp_us)
        .map(Stamp)
        .map_err(|_| MomentError::BeforeEpoch(text.to_owned()))
}

/// RFC 3339 in UTC with all its microseconds, for scripts.
#[must_use]
pub fn rfc3339(stamp: Stamp) -> String {
    timestamp(stamp).map_or_else(|| stamp.to_string(), |time| time.to_string())
}

/// UTC to the second, for tables: a narrow column breaks it between date and time.
#[must_use]
pub fn short(stamp: Stamp) -> String {
    timestamp(stamp)
        .and_then(|time| time.round(Unit::Second).ok())
        .map_or_else(
            || stamp.to_string(),
            |time| time.to_string().replace('T', " "),
        )
}

fn timestamp(stamp: Stamp) -> Option<Timestamp> {
    let us = i64::try_from(stamp.0).ok()?;
    Timestamp::from_microsecond(us).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noon() -> Timestamp {
        "2026-01-31T12:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_time_is_absolute_or_so_long_ago() {
        let absolute = parse("2026-01-31T11:50:00Z", noon()).unwrap();
        assert_eq!(parse("10m ago", noon()), Ok(absolute));
        assert_eq!(parse("2026-01-31T12:50:00+01:00", noon()), Ok(absolute));
        assert_eq!(rfc3339(absolute), "2026-01-31T11:50:00Z");
    }

    #[test]
    fn a_start_is_a_word_an_offset_or_a_time() {
        assert_eq!(parse_start("latest"), Ok(StartAt::Latest));
        assert_eq!(parse_start("earliest"), Ok(StartAt::Earliest));
        assert_eq!(parse_start("17"), Ok(StartAt::Offset(Offset(17))));
        assert!(matches!(parse_start("1h ago"), Ok(StartAt::Time(_))));
        assert!(matches!(parse_start("teatime"), Err(MomentError::Time(_))));
        assert!(matches!(
            parse_start("1969-01-01T00:00:00Z"),
            Err(MomentError::BeforeEpoch(_))
        ));
        assert!(matches!(
            parse_start("soon ago"),
            Err(MomentError::Duration(_))
        ));
    }

    #[test]
    fn a_stamp_no_calendar_holds_is_shown_as_its_number() {
        assert_eq!(rfc3339(Stamp(u64::MAX)), u64::MAX.to_string());
        assert_eq!(short(Stamp(1_500_000)), "1970-01-01 00:00:02Z");
    }
}
