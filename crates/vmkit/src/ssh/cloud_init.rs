//! How far cloud-init has come in a guest, as it writes it down itself.

use serde_json::Value;
use tokio::time::Instant;

use super::{Event, Session};
use crate::error::Result;

/// What cloud-init has done in this boot of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CloudInit {
    /// How far it is.
    pub progress: CloudInitProgress,
    /// The stage that it is in: `init-local`, `init`, `modules-config`, `modules-final`.
    pub stage: Option<String>,
    /// What went wrong, each with its stage before it.
    pub errors: Vec<String>,
    /// What it could not do and went on without, each with its stage before it: what it calls recoverable errors, and since version
    /// 23.4 is told of. What it finds deprecated is not among them.
    pub warnings: Vec<String>,
}

impl CloudInit {
    /// Answers what to say where it failed: its errors, and what it went on without on the way, which may be their cause.
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

/// How far cloud-init is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CloudInitProgress {
    /// It is at work, or about to be.
    #[default]
    Running,
    /// It has ended; whether well is told by the errors.
    Done,
    /// It is there and does not run in this boot.
    Disabled,
    /// The guest has none.
    Absent,
}

/// Tells of each change until there is none to come.
///
/// A guest has no event for it that every distribution's tools could wait for, so the loop looks ten times in a second;
/// `cloud-init status --wait` does the same, and loads a Python for it first. Source: cloud-init's documentation, "Status and
/// result files".
const WATCH: &str = "\
cd /run/cloud-init 2>/dev/null || command -v cloud-init >/dev/null || exit 100
last=
while :; do
  [ -e /run/cloud-init/disabled ] && exit 101
  done=; [ -e /run/cloud-init/result.json ] && done=1
  now=$(cat /run/cloud-init/status.json 2>/dev/null)
  [ \"$now\" = \"$last\" ] || { printf '%s\\0' \"$now\"; last=$now; }
  [ -z \"$done\" ] || exit 0
  sleep 0.1 || sleep 1
done";

impl Session {
    /// Waits until cloud-init has done all that it does in this boot, and tells `progressed` of each stage meanwhile.
    ///
    /// Its own failures are data in the answer.
    ///
    /// # Errors
    /// `TimedOut`; `Guest` where the connection is lost, or what it wrote makes no sense.
    pub async fn cloud_init_done(
        &self,
        deadline: Instant,
        mut progressed: impl FnMut(&CloudInit),
    ) -> Result<CloudInit> {
        let (_input, mut output) = self.spawn_own(&["sh", "-c", WATCH], deadline).await?.split();
        let watch = async {
            let (mut found, mut pending) = (CloudInit::default(), Vec::new());
            loop {
                match output.next().await? {
                    Event::Stdout(data) => pending.extend(data),
                    Event::Stderr(_) => {}
                    Event::Ended(exit) => {
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
                    found = status(&document[..end])
                        .ok_or_else(|| self.problem("cloud-init's status makes no sense"))?;
                    progressed(&found);
                }
                if pending.len() > MOST_STATUS_BYTES {
                    return Err(self.problem("cloud-init's status has no end"));
                }
            }
        };
        self.within(deadline, "the end of cloud-init", watch).await
    }
}

/// More than any status has, in bytes.
const MOST_STATUS_BYTES: usize = 1 << 20;

/// Reads `status.json`; before there is one, cloud-init is about to run.
fn status(document: &[u8]) -> Option<CloudInit> {
    if document.is_empty() {
        return Some(CloudInit::default());
    }
    let document: Value = serde_json::from_slice(document).ok()?;
    let stages = document.get("v1")?.as_object()?;
    let mut found = CloudInit {
        stage: stages.get("stage").and_then(Value::as_str).map(str::to_owned),
        ..CloudInit::default()
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

/// The level of what works, and will not for ever. Source: cloud-init's documentation, "Reported status".
const DEPRECATED: &str = "DEPRECATED";

/// Answers a list of texts, each with the stage before it.
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

    #[test]
    fn a_status_is_read_with_its_stage_and_every_error() {
        let text = br#"{"v1": {"datasource": null, "stage": "modules-config",
            "init": {"errors": ["no such disk"], "finished": 1.5, "start": 1.0},
            "modules-config": {"errors": [], "finished": null, "start": 2.0}}}"#;
        let found = status(text).unwrap();
        assert_eq!(found.stage.as_deref(), Some("modules-config"));
        assert_eq!(found.errors, ["init: no such disk"]);
        assert_eq!(status(b"").unwrap(), CloudInit::default());
        for bad in [&b"{"[..], b"[]", b"{\"v1\": 3}"] {
            assert_eq!(status(bad), None);
        }
    }
}
