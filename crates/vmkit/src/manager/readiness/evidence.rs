//! Signs of the state of a guest without SSH: a reply of its agent, or its console.
//!
//! Pure.

use crate::ssh::cloud_init_status;

/// Prints those of `ended`, `no-cloud-init` and `no-sshd` that apply, a line each, and then
/// cloud-init's status.
pub(super) const ASK: &str = "\
[ -e /run/cloud-init/result.json ] && echo ended
command -v cloud-init >/dev/null || [ -e /run/cloud-init ] || echo no-cloud-init
PATH=$PATH:/usr/sbin:/sbin:/usr/local/sbin
command -v sshd >/dev/null || command -v dropbear >/dev/null || command -v tinysshd >/dev/null || echo no-sshd
echo status
cat /run/cloud-init/status.json 2>/dev/null
exit 0";

/// The maximum number of errors in a message.
const MOST_ERRORS: usize = 5;
/// The maximum number of characters of each.
const MOST_CHARS: usize = 300;

/// The state of a guest without SSH.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ReadinessEvidence {
    /// Whether the guest itself reported it.
    pub(super) is_certain: bool,
    /// Whether it has booted.
    pub(super) is_up: bool,
    has_ended: bool,
    has_cloud_init: bool,
    has_sshd: bool,
    /// The errors of cloud-init.
    pub(super) errors: Vec<String>,
}

impl ReadinessEvidence {
    /// Returns whether cloud-init has ended with errors.
    pub(super) fn has_failed(&self) -> bool {
        self.has_ended && !self.errors.is_empty()
    }

    /// Returns cloud-init's errors in one line.
    pub(super) fn told(&self) -> String {
        self.errors.join("; ")
    }

    /// Returns what is missing in the guest for vmkit to log in, if nothing is going to install it
    /// any more.
    pub(super) fn lacks(&self) -> Option<String> {
        let is_settled = self.is_certain && (self.has_ended || !self.has_cloud_init);
        match (is_settled, self.has_cloud_init, self.has_sshd) {
            (true, false, false) => {
                Some("the guest is up, and has neither cloud-init nor an SSH server".to_owned())
            }
            (true, true, false) => Some("the guest is up, and has no SSH server".to_owned()),
            (true, false, true) => {
                Some("the guest is up, and has no cloud-init, so vmkit's key is not in it".to_owned())
            }
            _ => None,
        }
    }
}

/// Parses the agent's reply to [`ASK`].
pub(super) fn of_answer(answer: &[u8]) -> Option<ReadinessEvidence> {
    let text = String::from_utf8_lossy(answer);
    let (flags, status) = text.split_once("status\n").or_else(|| Some((text.strip_suffix("status")?, "")))?;
    let has = |flag: &str| flags.lines().any(|line| line == flag);
    let errors = cloud_init_status(status.trim().as_bytes()).map(|status| status.errors).unwrap_or_default();
    Some(ReadinessEvidence {
        is_certain: true,
        is_up: has("ended"),
        has_ended: has("ended"),
        has_cloud_init: !has("no-cloud-init"),
        has_sshd: !has("no-sshd"),
        errors: errors.iter().map(|error| shortened(error)).take(MOST_ERRORS).collect(),
    })
}

/// Parses what a guest has printed in this run.
///
/// The texts are those of cloud-init's programs, of systemd's units for them, and of agetty.
pub(super) fn of_console(said: &str) -> ReadinessEvidence {
    let mut errors: Vec<String> = Vec::new();
    let (mut has_ended, mut is_up) = (false, false);
    let mut in_traceback = false;
    for line in said.lines().map(str::trim_end) {
        let of_cloud_init = ["cloud-init", "Cloud-init", "cloud-config", "cloud-final", "Cloud-config"]
            .iter()
            .any(|name| line.contains(name));
        has_ended |= line.contains("Cloud-init v.") && line.contains(" finished at ");
        is_up |= line.trim_end().ends_with("login:");
        let message = without_origin(line);
        let found = if line.contains("Traceback (most recent call last)") {
            in_traceback = true;
            None
        } else if in_traceback && !message.starts_with(' ') && !message.is_empty() {
            // The last line of a traceback is the error; the lines before it are indented.
            in_traceback = false;
            Some(message)
        } else if !in_traceback
            && ((of_cloud_init
                && (line.contains("Failed to start") || line.contains("ERROR") || line.contains("CRITICAL")))
                || line.contains("failed run of"))
        {
            Some(message)
        } else {
            None
        };
        let Some(found) = found.map(|found| shortened(found.trim())) else { continue };
        if !errors.contains(&found) && errors.len() < MOST_ERRORS {
            errors.push(found);
        }
    }
    // A login prompt is printed when everything else was started: what has failed by then is not
    // retried.
    has_ended |= is_up;
    ReadinessEvidence { is_certain: false, is_up, has_ended, has_cloud_init: true, has_sshd: true, errors }
}

/// Returns the line without its origin, such as `[   41.2] cloud-init[412]: `.
fn without_origin(line: &str) -> &str {
    let rest = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((time, rest)) if time.trim().parse::<f64>().is_ok() => rest,
        _ => line,
    };
    match rest.split_once("]: ") {
        Some((origin, message)) if origin.starts_with("cloud-init[") => message,
        _ => rest,
    }
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(MOST_CHARS).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_reply_shows_what_failed_and_what_is_missing() {
        let status = r#"{"v1": {"stage": null, "init": {"errors": ["no such host"]}}}"#;
        let found = of_answer(format!("ended\nstatus\n{status}").as_bytes()).unwrap();
        assert!(found.has_failed() && found.is_certain && found.lacks().is_none());
        assert_eq!(found.told(), "init: no such host");
        let running = of_answer(format!("status\n{status}").as_bytes()).unwrap();
        assert!(!running.has_failed() && !running.is_up);
        let none = of_answer(b"no-cloud-init\nno-sshd\nstatus\n").unwrap();
        assert_eq!(none.lacks().unwrap(), "the guest is up, and has neither cloud-init nor an SSH server");
        assert!(of_answer(b"ended\nno-sshd\nstatus\n{}").unwrap().lacks().unwrap().contains("no SSH server"));
        assert!(
            of_answer(b"no-sshd\nstatus\n{}").unwrap().lacks().is_none(),
            "it may be about to be installed"
        );
        assert_eq!(of_answer(b"sh: not found\n"), None);
    }

    #[test]
    fn a_console_shows_the_last_line_of_a_traceback_and_what_failed_to_start() {
        let said = "[   40.1] cloud-init[412]: Traceback (most recent call last):\n\
            [   40.2] cloud-init[412]:   File \"/usr/lib/x.py\", line 7, in f\n\
            [   40.3] cloud-init[412]:     raise Exception(message)\n\
            [   40.4] cloud-init[412]: Exception: Connection refused for url: http://127.0.0.1:1/x\n\
            [FAILED] Failed to start cloud-init.service - Initial cloud-init job.\n\
            [   41.0] cloud-init[500]: 2024-01-01 - util.py[WARNING]: failed run of runcmd\n";
        let found = of_console(said);
        assert_eq!(found.errors[0], "Exception: Connection refused for url: http://127.0.0.1:1/x");
        assert!(found.errors[1].contains("Failed to start cloud-init.service"), "{found:?}");
        assert_eq!(found.errors.len(), 3);
        assert!(!found.has_failed(), "it is still at work");
        assert!(of_console(&format!("{said}\ndeb login: ")).has_failed());
        assert!(of_console(&format!("{said}Cloud-init v. 22.4.2 finished at Sat\n")).has_failed());
        assert!(!of_console("deb login: ").has_failed() && of_console("deb login: ").is_up);
    }

    proptest::proptest! {
        #[test]
        fn no_output_of_a_guest_makes_it_panic(text in "(Traceback \\(most recent call last\\)|cloud-init\\[|\\]: |\\[ 1.2\\] |ü|\n| |ended|status|\\{\\})*") {
            let _ = (of_console(&text).told(), of_answer(text.as_bytes()));
        }
    }
}
