//! The progress of cloud-init in a guest, from its status files.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::cloud_init_status::{CloudInitProgress, CloudInitStatus, cloud_init_status};
use super::{ProcessEvent, Session};
use crate::deadline::later;
use crate::error::Result;

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
                    || self.problem(format!("the guest has printed nothing for {} s", SILENCE.as_secs()));
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
                            found = cloud_init_status(&document[..end])
                                .ok_or_else(|| self.problem("cloud-init's status is invalid"))?;
                            progressed(&found);
                        }
                    }
                }
                if pending.len() > MOST_STATUS_BYTES {
                    return Err(self.problem("cloud-init's status is incomplete"));
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

/// The largest size of a status, in bytes.
const MOST_STATUS_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Stdio;

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
}
