//! Values that several commands read, parsed into the library's own types.

use std::str::FromStr;
use std::time::Duration;

use vmkit::Error;

/// Parses a value of this field, which an error names.
pub(crate) fn value<T: FromStr<Err = Error>>(field: &'static str, text: &str) -> Result<T, Error> {
    text.parse().map_err(|error: Error| error.in_field(field))
}

/// Reads a number of seconds, with a fraction or without.
pub(crate) fn seconds(text: &str) -> Result<Duration, Error> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| {
        let value: String = text.chars().take(40).collect();
        Error::invalid("timeout", value, "a timeout is a number of seconds, 0 or more, such as 30 or 0.5")
    })
}

/// Reads an age: a whole number of seconds, minutes, hours or days, such as 90m.
pub(crate) fn age(text: &str) -> Result<Duration, Error> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let age = number.parse::<u64>().ok().zip(seconds).and_then(|(number, unit)| number.checked_mul(unit));
    age.map(Duration::from_secs).ok_or_else(|| {
        let value: String = text.chars().take(40).collect();
        Error::invalid(
            "if-older-than",
            value,
            "an age is a whole number with s, m, h or d, such as 90m or 12h",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmkit::spec::Mib;

    #[test]
    fn timeouts_are_read_with_fractions_and_bounds() {
        assert_eq!(seconds("0").unwrap(), Duration::ZERO);
        assert_eq!(seconds("0.25").unwrap(), Duration::from_millis(250));
        for text in ["-1", "", "soon", "nan", "inf", "1e300"] {
            let error = seconds(text).unwrap_err().to_string();
            assert!(error.starts_with("timeout: "), "{text}: {error}");
        }
    }

    #[test]
    fn ages_are_read_with_their_unit() {
        for (text, seconds) in [("0s", 0), ("90m", 5400), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(age(text).unwrap(), Duration::from_secs(seconds), "{text}");
        }
        for text in ["", "1", "h", "1.5h", "-1h", "1w", "99999999999999999999d", "18446744073709551615d"] {
            let error = age(text).unwrap_err().to_string();
            assert!(error.starts_with("if-older-than: "), "{text}: {error}");
        }
    }

    #[test]
    fn a_bad_size_is_named_by_its_field() {
        let error = value::<Mib>("memory", "4 GB?").unwrap_err().to_string();
        assert!(error.starts_with("memory: \"4 GB?\": unknown unit"), "{error}");
    }
}
