//! Pure: pairs of times, and what they are judged by.

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::Result;

/// All figures, in the order in which they are printed.
pub(crate) const NAMES: [&str; 13] = [
    "start",
    "stop_idle",
    "suspend",
    "resume",
    "save",
    "restore",
    "prepare",
    "launch",
    "prompt",
    "ls_500_stopped",
    "ls_20_running",
    "version",
    "pull",
];

/// What a figure has to reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// At most so many times what it takes by hand.
    Times(f64),
    /// At most so many milliseconds more than by hand.
    MsMore(f64),
    /// At most so many milliseconds, whatever it takes by hand.
    Ms(f64),
}

/// The medians of one pair.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    #[serde(serialize_with = "in_microseconds")]
    ours_ms: f64,
    #[serde(serialize_with = "in_microseconds")]
    bare_ms: f64,
    #[serde(serialize_with = "in_microseconds")]
    ratio: f64,
    runs: u32,
    #[serde(skip)]
    target: Target,
}

/// Something that vmkit does and that can be done by hand.
pub(crate) trait Pair {
    /// Lets vmkit do it once and returns how long that took.
    fn ours(&mut self) -> Result<Duration>;
    /// Does it once by hand and returns how long that took.
    fn bare(&mut self) -> Result<Duration>;
}

impl Figure {
    /// Measures both sides of a pair in turns, after one turn that doesn't count.
    pub(crate) fn measure(
        name: &'static str,
        target: Target,
        runs: u32,
        pair: &mut dyn Pair,
    ) -> Result<Self> {
        pair.ours()?;
        pair.bare()?;
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for run in 0..runs {
            if run % 2 == 0 {
                ours.push(pair.ours()?);
                bare.push(pair.bare()?);
            } else {
                bare.push(pair.bare()?);
                ours.push(pair.ours()?);
            }
        }
        let (ours_ms, bare_ms) = (median_ms(ours), median_ms(bare));
        Ok(Self { name, ours_ms, bare_ms, ratio: ours_ms / bare_ms, runs, target })
    }

    /// Returns the most that vmkit may take, in milliseconds.
    fn most_ms(&self) -> f64 {
        match self.target {
            Target::Times(times) => self.bare_ms * times,
            Target::MsMore(ms) => self.bare_ms + ms,
            Target::Ms(ms) => ms,
        }
    }
}

fn median_ms(mut times: Vec<Duration>) -> f64 {
    times.sort();
    let (low, high) = (times[(times.len() - 1) / 2], times[times.len() / 2]);
    (low + high).as_secs_f64() * 500.0
}

/// Digits below a microsecond are noise.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn in_microseconds<S: Serializer>(number: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_f64((number * 1000.0).round() / 1000.0)
}

/// Returns the figures as a person reads them.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<16}{:>10}{:>10}{:>8}{:>6}   {:<22}\n",
        "", "ours ms", "bare ms", "ratio", "runs", "target"
    );
    for figure in figures {
        let target = match figure.target {
            Target::Times(times) => format!("{times} x bare"),
            Target::MsMore(ms) => format!("bare + {ms} ms"),
            Target::Ms(ms) => format!("{ms} ms"),
        };
        let verdict = if figure.ours_ms <= figure.most_ms() { "holds" } else { "MISSED" };
        let Figure { name, ours_ms, bare_ms, ratio, runs, .. } = figure;
        let _ = writeln!(
            text,
            "{name:<16}{ours_ms:>10.2}{bare_ms:>10.2}{ratio:>8.2}{runs:>6}   {target:<14} {verdict}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scripted(Vec<&'static str>);

    impl Pair for Scripted {
        fn ours(&mut self) -> Result<Duration> {
            self.0.push("ours");
            Ok(Duration::from_millis(self.0.len() as u64))
        }

        fn bare(&mut self) -> Result<Duration> {
            self.0.push("bare");
            Ok(Duration::from_millis(2))
        }
    }

    #[test]
    fn the_sides_take_turns_at_being_first_and_the_first_turn_is_not_counted() {
        let mut pair = Scripted(Vec::new());
        let figure = Figure::measure("start", Target::Times(2.0), 2, &mut pair).unwrap();
        assert_eq!(pair.0, ["ours", "bare", "ours", "bare", "bare", "ours"]);
        assert_eq!((figure.ours_ms, figure.bare_ms, figure.most_ms()), (4.5, 2.0, 4.0));
        assert!(table(&[figure]).contains("MISSED"));
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let ms = |ms| Duration::from_millis(ms);
        assert_eq!(median_ms(vec![ms(9), ms(1), ms(2)]), 2.0);
        assert_eq!(median_ms(vec![ms(9), ms(1), ms(2), ms(3)]), 2.5);
    }

    #[test]
    fn a_figure_has_the_documented_shape() {
        let figure = Figure {
            name: "start",
            ours_ms: 1.23456,
            bare_ms: 1.0,
            ratio: 1.23456,
            runs: 3,
            target: Target::Ms(5.0),
        };
        let text = serde_json::to_string(&figure).unwrap();
        assert_eq!(text, r#"{"name":"start","ours_ms":1.235,"bare_ms":1.0,"ratio":1.235,"runs":3}"#);
    }
}
