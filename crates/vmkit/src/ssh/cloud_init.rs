//! The progress of cloud-init in a guest, from its status files.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::{ProcessEvent, Session};
use crate::deadline::later;
use crate::error::Result;

/// The state of cloud-init in this boot of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CloudInitStatus {
    /// The progress.
    pub progress: CloudInitProgress,
    /// The present stage: `init-local`, `init`, `modules-config`, `modules-final`.
    pub stage: Option<String>,
    /// The errors, each with its stage before it.
    pub errors: Vec<String>,
    /// The problems that it ignored, each with its stage before it: its recoverable errors, which
    /// it reports since version 23.4. Deprecations are left out.
    pub warnings: Vec<String>,
}

impl CloudInitStatus {
    /// Returns the message for a failure: the errors, and the preceding warnings, which may be the
    /// cause.
    #[cfg(any(test, feature = "images"))]
    pub(crate) fn failure(&self) -> Option<String> {
        let errors = self.errors.join("; ");
        match (self.errors.is_empty(), self.warnings.is_empty()) {
            (true, _) => None,
            (false, true) => Some(errors),
            (false, false) => Some(format!("{errors}; before, it warned: {}", self.warnings.join("; "))),
        }
    }
}

/// The progress of cloud-init.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CloudInitProgress {
    /// It is running, or about to.
    #[default]
    Running,
    /// It has ended, successfully if there are no errors.
    Done,
    /// It is installed but does not run in this boot.
    Disabled,
    /// The guest has no cloud-init.
    Absent,
}

/// Reports each change until no more can come.
///
/// A guest has no event for it that every distribution's tools could wait for, so the loop polls
/// ten times in a second; `cloud-init status --wait` does the same, and starts Python first.
/// Source: cloud-init's documentation, "Status and result files".
///
/// After its end cloud-init may still restart the guest or power it off: by a process that waits
/// for that end (`power_state`), or by an earlier command (`runcmd: [reboot]`). While that is
/// pending the loop continues until it ends with the guest. A heartbeat about every two seconds
/// shows that the guest still runs.
///
/// Source: cloud-init's `config/cc_power_state_change.py`; systemctl(1), `is-system-running`;
/// shutdown(8); logind's `PreparingForShutdown`; OpenRC's `RC_STOPPING`.
const WATCH: &str = "\
cd /run/cloud-init 2>/dev/null || command -v cloud-init >/dev/null || exit 100
last= turn=0
rest() {
  turn=$((turn + 1))
  [ $((turn % 20)) -ne 0 ] || printf '\\001\\0'
  sleep 0.1 || sleep 1
}
state() {
  said=$(sudo -n systemctl is-system-running 2>/dev/null)
  [ -n \"$said\" ] || said=$(systemctl is-system-running 2>/dev/null)
  echo \"$said\"
}
# A system that stops has soon no bus left to ask it by.
knows=
case $(state) in running | degraded | starting | initializing) knows=1;; esac
waits() {
  cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -qE '/cloud-init (modules|init|single|--all-stages)'
}
stops() {
  [ -e /run/openrc/rc.stopping ] && return 0
  [ -d /run/systemd/system ] || return 1
  case $(state) in
    running | degraded | starting | initializing | maintenance) ;;
    stopping) return 0;;
    *) [ -z \"$knows\" ] || return 0;;
  esac
  case $(busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager \
    PreparingForShutdown 2>/dev/null) in *true*) return 0;; esac
  return 1
}
powers() {
  sudo -n cat /var/lib/cloud/instance/cloud-config.txt 2>/dev/null | grep -q '^power_state:'
}
later() {
  usec=$(sed -n 's/^USEC=//p' /run/systemd/shutdown/scheduled 2>/dev/null)
  [ -n \"$usec\" ] || return 1
  left=$((${usec%??????} - $(date +%s)))
}
while :; do
  [ -e /run/cloud-init/disabled ] && exit 101
  done=; [ -e /run/cloud-init/result.json ] && done=1
  now=$(cat /run/cloud-init/status.json 2>/dev/null)
  [ \"$now\" = \"$last\" ] || { printf '%s\\0' \"$now\"; last=$now; }
  [ -z \"$done\" ] || break
  rest
done
tries=0
while waits && [ $tries -lt 300 ]; do
  tries=$((tries + 1))
  rest
done
# From the word to logind until the system stops is a second or more.
tries=0
if powers; then
  until later || stops || [ $tries -ge 20 ]; do
    tries=$((tries + 1))
    rest
  done
fi
while later || stops; do
  printf '\\002%s\\0' \"${left-}\"
  left=
  sleep 1
done
exit 0";

/// The first byte of a heartbeat, and of the message that the guest is about to restart or to power
/// off: in this many seconds, if known.
const ALIVE: u8 = 1;
const STOPPING: u8 = 2;
/// The time without a heartbeat after which a guest counts as gone. An emulated guest on a busy
/// host needs seconds for each.
const SILENCE: Duration = Duration::from_secs(25);

impl Session {
    /// Waits until cloud-init has completed its work in this boot, and calls `progressed` with each
    /// stage meanwhile.
    ///
    /// The failures of cloud-init are part of the result. A restart or power-off of the guest by
    /// cloud-init ends the session, which is an error here.
    ///
    /// # Errors
    /// `TimedOut`; `Guest` if the connection is lost, or the status can't be parsed.
    pub async fn cloud_init_done(
        &self,
        timeout: Duration,
        mut progressed: impl FnMut(&CloudInitStatus),
    ) -> Result<CloudInitStatus> {
        self.watch_cloud_init(later(timeout), &mut progressed).await
    }

    /// Waits as [`cloud_init_done`](Self::cloud_init_done) does. A restart that the guest has
    /// scheduled for after the deadline is a warning.
    ///
    /// # Errors
    /// The same; every lost connection is [`Error::Ssh`].
    pub(crate) async fn watch_cloud_init(
        &self,
        deadline: Instant,
        mut progressed: impl FnMut(&CloudInitStatus),
    ) -> Result<CloudInitStatus> {
        let (_input, mut output) = self.spawn_own(&["sh", "-c", WATCH], deadline).await?.split();
        let watch = async {
            let (mut found, mut pending) = (CloudInitStatus::default(), Vec::new());
            loop {
                let event = timeout(SILENCE, output.next()).await;
                let silent =
                    || self.problem(format!("the guest has said nothing for {} s", SILENCE.as_secs()));
                match event.map_err(|_| silent())?? {
                    ProcessEvent::Stdout(data) => pending.extend(data),
                    ProcessEvent::Stderr(_) => {}
                    ProcessEvent::Ended(exit) => {
                        found.progress = match exit.shell_code() {
                            0 => CloudInitProgress::Done,
                            100 => CloudInitProgress::Absent,
                            101 => CloudInitProgress::Disabled,
                            _ => return Err(self.problem(format!("cannot watch cloud-init: {exit}"))),
                        };
                        return Ok(found);
                    }
                }
                while let Some(end) = pending.iter().position(|&byte| byte == 0) {
                    let document: Vec<u8> = pending.drain(..=end).collect();
                    match document[0] {
                        ALIVE => {}
                        STOPPING => {
                            if let Some(warning) = set_for_later(&document[1..end], deadline) {
                                found.progress = CloudInitProgress::Done;
                                found.warnings.push(warning);
                                return Ok(found);
                            }
                        }
                        _ => {
                            found = status(&document[..end])
                                .ok_or_else(|| self.problem("cloud-init's status makes no sense"))?;
                            progressed(&found);
                        }
                    }
                }
                if pending.len() > MOST_STATUS_BYTES {
                    return Err(self.problem("cloud-init's status has no end"));
                }
            }
        };
        self.within(deadline, "the end of cloud-init", watch).await
    }
}

/// Returns a warning for a restart in this many seconds, if that is after the deadline.
fn set_for_later(seconds: &[u8], deadline: Instant) -> Option<String> {
    let seconds: u64 = std::str::from_utf8(seconds).ok()?.parse().ok()?;
    let is_later = Duration::from_secs(seconds) > deadline.saturating_duration_since(Instant::now());
    is_later.then(|| format!("the guest is set to restart or to power itself off in {seconds} s"))
}

/// Parses cloud-init's status, if there is a valid one.
#[cfg(feature = "images")]
pub(crate) fn cloud_init_status(document: &[u8]) -> Option<CloudInitStatus> {
    status(document)
}

/// The largest size of a status, in bytes.
const MOST_STATUS_BYTES: usize = 1 << 20;

/// Parses `status.json`; without a file, cloud-init is about to run.
fn status(document: &[u8]) -> Option<CloudInitStatus> {
    if document.is_empty() {
        return Some(CloudInitStatus::default());
    }
    let document: Value = serde_json::from_slice(document).ok()?;
    let stages = document.get("v1")?.as_object()?;
    let mut found = CloudInitStatus {
        stage: stages.get("stage").and_then(Value::as_str).map(str::to_owned),
        ..CloudInitStatus::default()
    };
    for (stage, status) in stages {
        found.errors.extend(texts(stage, status.get("errors")));
        let levels = status.get("recoverable_errors").and_then(Value::as_object).into_iter().flatten();
        for (_, texts_of_level) in levels.filter(|(level, _)| *level != DEPRECATED) {
            found.warnings.extend(texts(stage, Some(texts_of_level)));
        }
    }
    Some(found)
}

/// The level of deprecations. Source: cloud-init's documentation, "Reported status".
const DEPRECATED: &str = "DEPRECATED";

/// Returns a list of texts, each with its stage before it.
fn texts<'a>(stage: &'a str, list: Option<&'a Value>) -> impl Iterator<Item = String> + 'a {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.map(move |text| match text.as_str() {
        Some(text) => format!("{stage}: {text}"),
        None => format!("{stage}: {text}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Stdio;

    #[test]
    fn what_cloud_init_went_on_without_is_a_warning_and_told_beside_an_error() {
        let text = br#"{"v1": {"stage": null, "init": {"errors": [], "recoverable_errors":
            {"WARNING": ["Failed loading yaml blob"], "DEPRECATED": ["old key"], "ERROR": ["no key"]}},
            "modules-final": {"errors": [], "recoverable_errors": {}}}}"#;
        let mut found = status(text).unwrap();
        found.warnings.sort();
        assert_eq!(found.warnings, ["init: Failed loading yaml blob", "init: no key"]);
        assert_eq!((found.failure(), found.errors.len()), (None, 0));
        found.errors.push("init: no disk".to_owned());
        let expected = "init: no disk; before, it warned: init: Failed loading yaml blob; init: no key";
        assert_eq!(found.failure().as_deref(), Some(expected));
        found.warnings.clear();
        assert_eq!(found.failure().as_deref(), Some("init: no disk"));
        assert_eq!(status(br#"{"v1": {"init": {"recoverable_errors": [1]}}}"#).unwrap().warnings.len(), 0);
    }

    /// The loop, and the files that it reads, in a directory of its own.
    fn watch(dir: &Path, systemctl: &str) -> std::process::Child {
        let script = WATCH.replace("/run/", &format!("{}/", dir.display())).replace("/proc/", "/nowhere/");
        let script = script.replace("/var/lib/cloud/", &format!("{}/", dir.display()));
        fs::write(dir.join("systemctl"), systemctl).unwrap();
        fs::write(dir.join("sudo"), "#!/bin/sh\nshift\nexec \"$@\"\n").unwrap();
        for program in ["systemctl", "sudo"] {
            fs::set_permissions(dir.join(program), PermissionsExt::from_mode(0o755)).unwrap();
        }
        fs::create_dir_all(dir.join("cloud-init")).unwrap();
        let path = format!("{}:/usr/bin:/bin", dir.display());
        let mut sh = std::process::Command::new("/bin/sh");
        sh.args(["-c", &script]).env("PATH", path).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// Reads up to the next NUL.
    fn said(output: &mut impl BufRead) -> String {
        let mut bytes = Vec::new();
        output.read_until(0, &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned()
    }

    #[test]
    fn a_guest_that_is_about_to_restart_is_not_through_with_cloud_init() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::create_dir_all(dir.join("systemd/system")).unwrap();
        fs::create_dir_all(dir.join("systemd/shutdown")).unwrap();
        let systemctl = format!("#!/bin/sh\nexec cat {}\n", dir.join("state").display());
        fs::write(dir.join("state"), "starting\n").unwrap();
        let mut sh = watch(dir, &systemctl);
        let mut output = BufReader::new(sh.stdout.take().unwrap());
        assert_eq!(said(&mut output), "\u{1}", "a sign of life");
        fs::write(dir.join("cloud-init/status.json"), "{}").unwrap();
        let mut next = || loop {
            match said(&mut output) {
                alive if alive == "\u{1}" => {}
                other => return other,
            }
        };
        assert_eq!(next(), "{}");
        fs::write(dir.join("state"), "stopping\n").unwrap();
        fs::write(dir.join("cloud-init/result.json"), "{}").unwrap();
        assert_eq!(next(), "\u{2}", "the system is stopping");
        fs::remove_file(dir.join("state")).unwrap();
        for _ in 0..3 {
            assert_eq!(next(), "\u{2}", "there is no bus any more by which it could say so");
        }
        let in_an_hour =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 3600;
        fs::write(dir.join("systemd/shutdown/scheduled"), format!("USEC={in_an_hour}000000\nMODE=reboot\n"))
            .unwrap();
        let left = loop {
            match next() {
                stopping if stopping == "\u{2}" => {}
                set => break set,
            }
        };
        assert!(left.starts_with("\u{2}35") || left == "\u{2}3600", "{left:?}");
        fs::remove_file(dir.join("systemd/shutdown/scheduled")).unwrap();
        fs::write(dir.join("state"), "running\n").unwrap();
        assert!(sh.wait().unwrap().success(), "it was called off");
    }

    #[test]
    fn a_power_state_that_was_asked_for_is_waited_for_until_the_system_stops() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for made in ["systemd/system", "instance", "cloud-init"] {
            fs::create_dir_all(dir.join(made)).unwrap();
        }
        fs::write(dir.join("instance/cloud-config.txt"), "#cloud-config\n\npower_state:\n  mode: reboot\n")
            .unwrap();
        fs::write(dir.join("cloud-init/result.json"), "{}").unwrap();
        // It says that it is stopping when it is asked for the fifth time.
        let asked = dir.join("asked");
        let systemctl = format!(
            "#!/bin/sh\necho x >> {0}\n[ $(wc -l < {0}) -ge 5 ] && echo stopping || echo running\n",
            asked.display()
        );
        let mut sh = watch(dir, &systemctl);
        let mut output = BufReader::new(sh.stdout.take().unwrap());
        let stopping = loop {
            match said(&mut output) {
                alive if alive == "\u{1}" => {}
                other => break other,
            }
        };
        assert_eq!(stopping, "\u{2}");
        sh.kill().unwrap();
        sh.wait().unwrap();
    }

    #[tokio::test]
    async fn a_restart_after_the_deadline_is_a_warning_and_one_before_it_is_awaited() {
        let deadline = Instant::now() + Duration::from_secs(100);
        assert!(set_for_later(b"200", deadline).unwrap().contains("in 200 s"));
        for soon in [&b"50"[..], b"", b"-3"] {
            assert_eq!(set_for_later(soon, deadline), None);
        }
    }

    #[test]
    fn a_status_is_read_with_its_stage_and_every_error() {
        let text = br#"{"v1": {"datasource": null, "stage": "modules-config",
            "init": {"errors": ["no such disk"], "finished": 1.5, "start": 1.0},
            "modules-config": {"errors": [], "finished": null, "start": 2.0}}}"#;
        let found = status(text).unwrap();
        assert_eq!(found.stage.as_deref(), Some("modules-config"));
        assert_eq!(found.errors, ["init: no such disk"]);
        assert_eq!(status(b"").unwrap(), CloudInitStatus::default());
        for bad in [&b"{"[..], b"[]", b"{\"v1\": 3}"] {
            assert_eq!(status(bad), None);
        }
    }
}
