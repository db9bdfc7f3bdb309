//! The status of cloud-init in a guest, and how its file is read.
//!
//! Pure.

use serde_json::Value;

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

/// Parses `status.json`; without a file, cloud-init is about to run.
pub(crate) fn cloud_init_status(document: &[u8]) -> Option<CloudInitStatus> {
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

    #[test]
    fn a_recoverable_error_of_cloud_init_is_a_warning_and_is_reported_beside_an_error() {
        let text = br#"{"v1": {"stage": null, "init": {"errors": [], "recoverable_errors":
            {"WARNING": ["Failed loading yaml blob"], "DEPRECATED": ["old key"], "ERROR": ["no key"]}},
            "modules-final": {"errors": [], "recoverable_errors": {}}}}"#;
        let mut found = cloud_init_status(text).unwrap();
        found.warnings.sort();
        assert_eq!(found.warnings, ["init: Failed loading yaml blob", "init: no key"]);
        assert_eq!((found.failure(), found.errors.len()), (None, 0));
        found.errors.push("init: no disk".to_owned());
        let expected = "init: no disk; before, it warned: init: Failed loading yaml blob; init: no key";
        assert_eq!(found.failure().as_deref(), Some(expected));
        found.warnings.clear();
        assert_eq!(found.failure().as_deref(), Some("init: no disk"));
        assert_eq!(
            cloud_init_status(br#"{"v1": {"init": {"recoverable_errors": [1]}}}"#).unwrap().warnings.len(),
            0
        );
    }

    #[test]
    fn a_status_is_read_with_its_stage_and_every_error() {
        let text = br#"{"v1": {"datasource": null, "stage": "modules-config",
            "init": {"errors": ["no such disk"], "finished": 1.5, "start": 1.0},
            "modules-config": {"errors": [], "finished": null, "start": 2.0}}}"#;
        let found = cloud_init_status(text).unwrap();
        assert_eq!(found.stage.as_deref(), Some("modules-config"));
        assert_eq!(found.errors, ["init: no such disk"]);
        assert_eq!(cloud_init_status(b"").unwrap(), CloudInitStatus::default());
        for bad in [&b"{"[..], b"[]", b"{\"v1\": 3}"] {
            assert_eq!(cloud_init_status(bad), None);
        }
    }
}
