//! The intervals at which a guest is probed.

use std::time::Duration;

use tokio::time::Instant;

/// The pause after a refusal.
const REFUSED: Duration = Duration::from_millis(20);
/// The longest pause after a reply that is not SSH.
const ANSWERED: Duration = Duration::from_secs(2);
/// The shortest and the longest pause for a silent guest.
const SILENT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// The maximum number of connections without a reply. At the longest pause they cover the 12 s
/// after which QEMU repeats each SYN.
const MOST: usize = 10;
/// The minimum pause between a probe and another one because of the guest's output.
const PRINTED: Duration = Duration::from_millis(40);
/// How many probes in a row the guest's output may cause, and after which time there is one more.
/// It has no common divisor with QEMU's 12 s, so that the repeated SYNs don't come all at once.
const SPARE: (u32, Duration) = (2, Duration::from_secs(7));

/// The reply to a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ProbeReply {
    /// An SSH server's greeting.
    Greeting,
    /// The guest is up, and nothing listens.
    Refusal,
    /// The server sends this instead of a greeting.
    Words(String),
    /// No useful reply.
    Silence,
}

/// When the next probe is due.
#[derive(Debug)]
pub(super) struct ProbeBackoff {
    silent_since: Instant,
    next: Instant,
    /// The time of the last probe.
    probed: Instant,
    /// The next probe is because of a reply or output, and does not depend on how many have no
    /// reply.
    is_asked_for: bool,
    /// How many probes the guest's output may still cause, and since when.
    spare: (u32, Instant),
    /// How often something else than an SSH server has replied.
    answered: u32,
    is_up: bool,
}

impl ProbeBackoff {
    /// Creates a pace whose first probe is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            silent_since: now,
            next: now,
            probed: now,
            is_asked_for: false,
            spare: (SPARE.0, now),
            answered: 0,
            is_up: false,
        }
    }

    /// Returns whether the guest has replied before.
    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// Returns when the next probe is due, with this number of connections without a reply; `None`
    /// if that is after the end of one of them.
    pub(super) fn due(&self, unanswered: usize) -> Option<Instant> {
        (self.is_asked_for || unanswered < MOST).then_some(self.next)
    }

    /// Records a probe.
    pub(super) fn probed(&mut self, now: Instant) {
        let pause = match self.is_up {
            true => SILENT.1,
            false => now.saturating_duration_since(self.silent_since).clamp(SILENT.0, SILENT.1),
        };
        (self.probed, self.next, self.is_asked_for) = (now, now + pause, false);
    }

    /// Records a reply that is not a greeting.
    pub(super) fn replied(&mut self, answer: &ProbeReply, now: Instant) {
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

    /// Records output of the guest: the next probe is soon. A guest with endless output causes no
    /// more probes than any other.
    pub(super) fn printed(&mut self, now: Instant) {
        let (left, since) = self.spare;
        let more = now.saturating_duration_since(since).as_millis() / SPARE.1.as_millis();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.spare = (left.saturating_add(more).min(SPARE.0), now);
        }
        let soon = now.max(self.probed + PRINTED);
        if self.spare.0 > 0 && !self.is_asked_for {
            self.spare.0 -= 1;
            (self.next, self.is_asked_for) = (soon, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When QEMU sends SYNs to a silent guest for one connection, in seconds, until it gives up
    /// after 75 s.
    const SYNS: [u64; 7] = [0, 6, 18, 30, 42, 54, 66];
    /// How long a connection is kept.
    const HELD: Duration = super::super::HELD;

    /// Returns when a guest without a reply is probed within four minutes, in ms, if it prints this
    /// often.
    fn probes(prints_every: u64) -> Vec<u64> {
        let began = Instant::now();
        let (mut pace, mut probes) = (ProbeBackoff::new(began), Vec::new());
        for ms in (0..240_000).step_by(10) {
            let now = began + Duration::from_millis(ms);
            if ms % prints_every == 0 {
                pace.printed(now);
            }
            let unanswered = probes.iter().filter(|&&probe| Duration::from_millis(ms - probe) < HELD).count();
            if pace.due(unanswered).is_some_and(|due| due <= now) {
                pace.probed(now);
                probes.push(ms);
            }
        }
        probes
    }

    /// Returns when connections reach a server that starts to listen at this time, in ms: all of
    /// them are of earlier probes.
    fn visits(probes: &[u64], listens: u64) -> Vec<u64> {
        let before = probes.iter().filter(|&&probe| probe < listens);
        let mut visits: Vec<u64> = before
            .filter_map(|probe| SYNS.iter().map(|syn| probe + syn * 1000).find(|&syn| syn >= listens))
            .collect();
        visits.sort_unstable();
        visits
    }

    /// Returns the highest penalty of OpenSSH 9.8 for the connections: 1 s each, which decreases
    /// with time.
    fn penalty(visits: &[u64]) -> u64 {
        let (mut most, mut ends) = (0, 0);
        for visit in visits {
            ends = visit.max(&ends) + 1000;
            most = most.max(ends - visit);
        }
        most
    }

    #[test]
    fn a_server_that_listens_late_gets_few_connections_whenever_that_is() {
        for prints_every in [10, 1000, 1_000_000] {
            let probes = probes(prints_every);
            for listens in (1000..230_000).step_by(100) {
                let visits = visits(&probes, listens);
                let at_once =
                    |from: &u64| visits.iter().filter(|v| (*from..from + 1600).contains(*v)).count();
                let crowd = visits.iter().map(at_once).max().unwrap_or(0);
                // OpenSSH admits ten without a login; the rest are the user's.
                assert!(crowd <= 8, "{crowd} connections at once to a server that listens at {listens} ms");
                let penalty = penalty(&visits);
                assert!(penalty <= 12_000, "{penalty} ms of penalty at {listens} ms; 15 s are too many");
            }
        }
    }

    #[test]
    fn a_greeting_is_detected_within_little_more_than_two_seconds_however_long_the_silence() {
        let probes = probes(1_000_000);
        for listens in (1000..230_000).step_by(100) {
            let late = visits(&probes, listens).first().copied().unwrap_or(u64::MAX);
            let probe = probes.iter().copied().find(|&probe| probe >= listens).unwrap_or(u64::MAX);
            let late = late.min(probe) - listens;
            assert!(late <= 2500, "{late} ms late for a server that listens at {listens} ms");
        }
    }

    #[test]
    fn a_refusal_is_probed_again_at_once_however_many_have_no_reply() {
        let now = Instant::now();
        let mut pace = ProbeBackoff::new(now);
        pace.probed(now);
        assert_eq!(pace.due(MOST), None);
        pace.replied(&ProbeReply::Refusal, now);
        assert_eq!(pace.due(MOST), Some(now + REFUSED));
    }
}
