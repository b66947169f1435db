//! Sizes as people write them: `4096`, `10MiB`, `1.5GB`. Always bytes underneath.

/// Why a text is no size. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("{0:?} is no number: write a size like 4096, 10MiB or 1.5GB")]
    Number(String),
    #[error("{0:?} is no unit of size: use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")]
    Unit(String),
    #[error("the size is too large")]
    TooLarge,
}

/// Reads a size in bytes. Units do not care about case.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim();
    let factor = UNITS
        .into_iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))
        .map(|(_, factor)| factor)
        .ok_or_else(|| SizeError::Unit(unit.to_owned()));
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor?).ok_or(SizeError::TooLarge);
    }
    let value: f64 = number
        .parse()
        .map_err(|_| SizeError::Number(text.to_owned()))?;
    let bytes = value * factor? as f64;
    if bytes < EXACT_MAX {
        Ok(bytes.round() as u64)
    } else {
        Err(SizeError::TooLarge)
    }
}

/// A size for people: `512 B`, `1.5 KiB`, `20.0 GiB`.
#[must_use]
pub fn format(bytes: u64) -> String {
    if bytes < 1 << 10 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    for unit in ["KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("B", 1),
    ("k", 1_000),
    ("kB", 1_000),
    ("M", 1_000_000),
    ("MB", 1_000_000),
    ("G", 1_000_000_000),
    ("GB", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Above this a double skips whole numbers.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4_096),
            ("10MiB", 10 << 20),
            ("10 mib", 10 << 20),
            ("1.5GB", 1_500_000_000),
            ("2k", 2_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        assert!(matches!(parse("big"), Err(SizeError::Number(_))));
        assert!(matches!(parse("-1"), Err(SizeError::Number(_))));
        assert_eq!(parse("10 parsecs"), Err(SizeError::Unit("parsecs".into())));
        assert_eq!(parse("99999999TiB"), Err(SizeError::TooLarge));
    }

    #[test]
    fn sizes_are_shown_with_one_decimal() {
        assert_eq!(format(0), "0 B");
        assert_eq!(format(1_023), "1023 B");
        assert_eq!(format(1_536), "1.5 KiB");
        assert_eq!(format(20 << 30), "20.0 GiB");
    }
}
