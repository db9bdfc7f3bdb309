//! How often a guest is knocked at.

use std::time::Duration;

use tokio::time::Instant;

use super::ProbeReply;

/// After how long a guest that refuses is asked again.
const REFUSED: Duration = Duration::from_millis(20);
/// The longest pause before the next attempt at a port that replies with something else than SSH.
const ANSWERED: Duration = Duration::from_secs(2);
/// The shortest and the longest pause after which a silent guest is asked again.
const SILENT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How many connections a silent guest is left with. At the longest pause they cover the 12 s after
/// which QEMU repeats each.
const MOST: usize = 10;
/// How soon after a knock what the guest prints leads to another.
const PRINTED: Duration = Duration::from_millis(40);
/// How many knocks in a row what the guest prints may lead to, and after how long there is one more
/// of them. This has no common divisor with QEMU's 12 s, so that what is repeated does not come all
/// at once.
const SPARE: (u32, Duration) = (2, Duration::from_secs(7));

/// When the next knock is due.
#[derive(Debug)]
pub(super) struct ProbeBackoff {
    silent_since: Instant,
    next: Instant,
    /// When the last knock was.
    knocked: Instant,
    /// The next knock is for something that was heard, and does not depend on how many are
    /// unanswered.
    is_asked_for: bool,
    /// How many knocks what the guest prints may still lead to, and since when.
    spare: (u32, Instant),
    /// How often something else than an SSH server has replied.
    answered: u32,
    is_up: bool,
}

impl ProbeBackoff {
    /// Starts with an attempt that is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            silent_since: now,
            next: now,
            knocked: now,
            is_asked_for: false,
            spare: (SPARE.0, now),
            answered: 0,
            is_up: false,
        }
    }

    /// Returns whether the guest has answered before.
    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// Returns when to knock, where so many knocks are unanswered; not before one of them has ended
    /// where it is none.
    pub(super) fn due(&self, unanswered: usize) -> Option<Instant> {
        (self.is_asked_for || unanswered < MOST).then_some(self.next)
    }

    /// Notes a knock.
    pub(super) fn knocked(&mut self, now: Instant) {
        let pause = match self.is_up {
            true => SILENT.1,
            false => now.saturating_duration_since(self.silent_since).clamp(SILENT.0, SILENT.1),
        };
        (self.knocked, self.next, self.is_asked_for) = (now, now + pause, false);
    }

    /// Notes an answer that was no greeting.
    pub(super) fn heard(&mut self, answer: &ProbeReply, now: Instant) {
        let pause = match answer {
            ProbeReply::Greeting | ProbeReply::Silence => return,
            ProbeReply::Refusal => REFUSED,
            ProbeReply::Words(_) => {
                self.answered += 1;
                (REFUSED * 2u32.saturating_pow(self.answered)).min(ANSWERED)
            }
        };
        (self.is_up, self.silent_since, self.next, self.is_asked_for) = (true, now, now + pause, true);
    }

    /// Notes that the guest has printed something: there is a knock soon. For a guest that prints
    /// without end there are no more.
    pub(super) fn printed(&mut self, now: Instant) {
        let (left, since) = self.spare;
        let more = now.saturating_duration_since(since).as_millis() / SPARE.1.as_millis();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.spare = (left.saturating_add(more).min(SPARE.0), now);
        }
        let soon = now.max(self.knocked + PRINTED);
        if self.spare.0 > 0 && !self.is_asked_for {
            self.spare.0 -= 1;
            (self.next, self.is_asked_for) = (soon, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a knock leads to in a guest that is silent: QEMU's SYN at once and its repetitions,
    /// until it gives up after 75 s.
    const SYNS: [u64; 7] = [0, 6, 18, 30, 42, 54, 66];
    /// For how long a knock is held.
    const HELD: Duration = super::super::HELD;

    /// Returns when a guest that does not answer and prints so often was knocked at within four
    /// minutes, in ms.
    fn knocks(prints_every: u64) -> Vec<u64> {
        let began = Instant::now();
        let (mut pace, mut knocks) = (ProbeBackoff::new(began), Vec::new());
        for ms in (0..240_000).step_by(10) {
            let now = began + Duration::from_millis(ms);
            if ms % prints_every == 0 {
                pace.printed(now);
            }
            let unanswered = knocks.iter().filter(|&&knock| Duration::from_millis(ms - knock) < HELD).count();
            if pace.due(unanswered).is_some_and(|due| due <= now) {
                pace.knocked(now);
                knocks.push(ms);
            }
        }
        knocks
    }

    /// Returns when visitors come to a server that begins to listen at a moment, in ms: all of them
    /// are of knocks before it.
    fn visits(knocks: &[u64], listens: u64) -> Vec<u64> {
        let before = knocks.iter().filter(|&&knock| knock < listens);
        let mut visits: Vec<u64> = before
            .filter_map(|knock| SYNS.iter().map(|syn| knock + syn * 1000).find(|&syn| syn >= listens))
            .collect();
        visits.sort_unstable();
        visits
    }

    /// The penalty that OpenSSH 9.8 has laid on the visitors at most: 1 s each, of which time takes
    /// off as much as passes.
    fn penalty(visits: &[u64]) -> u64 {
        let (mut most, mut ends) = (0, 0);
        for visit in visits {
            ends = visit.max(&ends) + 1000;
            most = most.max(ends - visit);
        }
        most
    }

    #[test]
    fn a_guest_whose_server_comes_late_has_few_visitors_whenever_that_is() {
        for prints_every in [10, 1000, 1_000_000] {
            let knocks = knocks(prints_every);
            for listens in (1000..230_000).step_by(100) {
                let visits = visits(&knocks, listens);
                let at_once =
                    |from: &u64| visits.iter().filter(|v| (*from..from + 1600).contains(*v)).count();
                let crowd = visits.iter().map(at_once).max().unwrap_or(0);
                // Of the ten that OpenSSH admits without a login, the user has the rest.
                assert!(crowd <= 8, "{crowd} visitors at once for a server that listens at {listens} ms");
                let penalty = penalty(&visits);
                assert!(penalty <= 12_000, "{penalty} ms of penalty at {listens} ms; 15 s are too many");
            }
        }
    }

    #[test]
    fn a_silent_guest_is_heard_within_little_more_than_two_seconds_for_as_long_as_it_is_silent() {
        let knocks = knocks(1_000_000);
        for listens in (1000..230_000).step_by(100) {
            let late = visits(&knocks, listens).first().copied().unwrap_or(u64::MAX);
            let knock = knocks.iter().copied().find(|&knock| knock >= listens).unwrap_or(u64::MAX);
            let late = late.min(knock) - listens;
            assert!(late <= 2500, "{late} ms late for a server that listens at {listens} ms");
        }
    }

    #[test]
    fn one_that_refuses_is_asked_again_at_once_however_many_are_unanswered() {
        let now = Instant::now();
        let mut pace = ProbeBackoff::new(now);
        pace.knocked(now);
        assert_eq!(pace.due(MOST), None);
        pace.heard(&ProbeReply::Refusal, now);
        assert_eq!(pace.due(MOST), Some(now + REFUSED));
    }
}
