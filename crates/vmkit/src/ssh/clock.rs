//! A guest's clock set right over a session.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::process::{ProcessInput, ProcessOutput};
use super::{ProcessEvent, Session};
use crate::clock::{self, ClockReading};
use crate::error::Result;

/// How often the clock is set: each time by what is known of the way from the time before.
const TRIES: usize = 8;
/// How often it is read for one look, where an answer was slow.
const READINGS: usize = 3;
/// A round trip that is quick enough to be believed at once.
const QUICK: Duration = Duration::from_millis(20);
/// How far a time without its fraction may be from the middle of its second.
const HALF: Duration = Duration::from_millis(500);
/// The longest answer, in bytes.
const MOST_ANSWER: usize = 200;

/// Returns each line with the time, after having set it where the line has one. Whole seconds:
/// busybox knows no others.
const SET: &str = "while read -r at; do
[ \"$at\" = get ] || date -u -s \"@$at\" >/dev/null || exit
date -u +%s.%N || exit
done";

/// Runs that as root, by whatever means the user has.
const AS_ROOT: &str = "[ \"$(id -u)\" = 0 ] && exec /bin/sh -c \"$1\"
for means in sudo doas; do \"$means\" -n true 2>/dev/null && exec \"$means\" -n /bin/sh -c \"$1\"; done
echo 'neither sudo nor doas lets this user set the clock' >&2; exit 1";

impl Session {
    /// Sets the guest's clock to the time of this host, unless it is right.
    ///
    /// # Errors
    /// `Guest` where the user may not set it, or it does not become right; `TimedOut`.
    pub(crate) async fn set_clock(&self, deadline: Instant) -> Result<()> {
        let (mut input, mut output) =
            self.spawn_own(&["/bin/sh", "-c", AS_ROOT, "sh", SET], deadline).await?.split();
        let mut way = ClockProgram { session: self, input: &mut input, output: &mut output, is_exact: true };
        self.within(deadline, "the guest's clock", way.set()).await
    }
}

/// The way to the program that reads and sets the clock.
struct ClockProgram<'a> {
    session: &'a Session,
    input: &'a mut ProcessInput,
    output: &'a mut ProcessOutput,
    /// Whether the guest's `date` prints fractions of a second.
    is_exact: bool,
}

impl ClockProgram<'_> {
    /// Sets the clock until it is right, unless it is.
    async fn set(&mut self) -> Result<()> {
        let mut reading = self.best().await?;
        if !reading.is_to_be_set() || self.is_near(&reading) {
            return Ok(());
        }
        // A `date` that knows no fractions is told the time once, and believed.
        let rounds = if self.is_exact { TRIES } else { 1 };
        let mut lag = reading.round_trip / 2;
        for tries in 1..=rounds {
            // Sent so that it comes when that second begins.
            let second = (clock::now() + lag).as_secs() + 1;
            sleep(Duration::from_secs(second).saturating_sub(lag).saturating_sub(clock::now())).await;
            self.ask(&second.to_string()).await?;
            reading = self.best().await?;
            if reading.is_right_after(tries) || self.is_near(&reading) {
                return Ok(());
            }
            let off = Duration::from_nanos(u64::try_from(reading.ahead.unsigned_abs()).unwrap_or(u64::MAX));
            if off < clock::SET {
                lag = if reading.ahead < 0 { lag + off } else { lag.saturating_sub(off) };
            }
        }
        Err(self.session.problem(format!("the clock was set {rounds} times, and is {}", reading.described())))
    }

    /// Checks whether the clock is as right as a time without its fraction shows.
    fn is_near(&self, reading: &ClockReading) -> bool {
        !self.is_exact && reading.ahead.unsigned_abs() <= (HALF + reading.round_trip).as_nanos()
    }

    /// Reads the clock, and again where the answer was too slow to say much.
    async fn best(&mut self) -> Result<ClockReading> {
        let mut best = self.ask("get").await?;
        for _ in 1..READINGS {
            if best.round_trip < QUICK {
                break;
            }
            let reading = self.ask("get").await?;
            if reading.round_trip < best.round_trip {
                best = reading;
            }
        }
        Ok(best)
    }

    async fn ask(&mut self, what: &str) -> Result<ClockReading> {
        let asked = clock::now();
        self.input.write(format!("{what}\n").as_bytes()).await?;
        let (mut line, mut complaint) = (Vec::new(), Vec::new());
        while !line.ends_with(b"\n") && line.len() < MOST_ANSWER {
            match self.output.next().await? {
                ProcessEvent::Stdout(data) => line.extend(data),
                ProcessEvent::Stderr(data) => complaint.extend(data),
                ProcessEvent::Ended(exit) => {
                    let words = String::from_utf8_lossy(&complaint);
                    return Err(self
                        .session
                        .problem(format!("the clock can't be set ({exit}): {}", words.trim())));
                }
            }
        }
        let answered = clock::now();
        let text = String::from_utf8_lossy(&line);
        let (guest, is_exact) =
            seconds(text.trim()).ok_or_else(|| self.session.problem(format!("{text:?} is not a time")))?;
        self.is_exact = is_exact;
        Ok(ClockReading::of(guest, asked, answered))
    }
}

/// Parses a time such as `1700000000.250000000`, and tells whether it has a fraction; without one
/// it is the middle of its second.
fn seconds(text: &str) -> Option<(Duration, bool)> {
    let (whole, fraction) = text.split_once('.')?;
    let whole = Duration::from_secs(whole.parse().ok()?);
    match format!("{fraction:0<9}").get(..9)?.parse() {
        Ok(nanos) => Some((whole + Duration::from_nanos(nanos), true)),
        Err(_) => Some((whole + HALF, false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_the_guest_is_read_with_its_fraction_and_nothing_else_is_one() {
        assert_eq!(seconds("1700000000.25"), Some((Duration::from_millis(1_700_000_000_250), true)));
        assert_eq!(seconds("7.000000001"), Some((Duration::new(7, 1), true)));
        // As a busybox prints it that was built without.
        assert_eq!(seconds("7.%N"), Some((Duration::from_millis(7500), false)));
        for bad in ["", "7", "x.1", "-7.5"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
