//! What a run of the suite found.

use std::fmt;
use std::time::Duration;

/// What a run of the suite found, case by case.
#[derive(Debug, Clone, Default)]
pub struct ConformanceReport {
    /// The cases in the order in which they ran.
    pub cases: Vec<CaseReport>,
}

/// What one case found.
#[derive(Debug, Clone)]
pub struct CaseReport {
    /// The case, as a sentence.
    pub name: String,
    /// How it ended.
    pub outcome: CaseOutcome,
    /// How long it took.
    pub took: Duration,
}

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaseOutcome {
    /// The backend does as the contract says.
    Passed,
    /// It could not be tried, and why.
    Skipped(String),
    /// The backend does not do as the contract says, and what it does.
    Failed(String),
}

impl ConformanceReport {
    /// Panics unless every case passed or was skipped; the panic shows each case.
    #[track_caller]
    pub fn assert(&self) {
        assert!(self.failed() == 0, "{self}");
    }

    /// Returns how many cases failed.
    pub fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, CaseOutcome::Failed(_)))
    }

    /// Returns how many cases were skipped.
    pub fn skipped(&self) -> usize {
        self.count(|outcome| matches!(outcome, CaseOutcome::Skipped(_)))
    }

    fn count(&self, which: impl Fn(&CaseOutcome) -> bool) -> usize {
        self.cases.iter().filter(|case| which(&case.outcome)).count()
    }
}

impl fmt::Display for ConformanceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for case in &self.cases {
            let millis = case.took.as_millis();
            match &case.outcome {
                CaseOutcome::Passed => writeln!(f, "passed   {} ({millis} ms)", case.name)?,
                CaseOutcome::Skipped(why) => writeln!(f, "skipped  {}: {why}", case.name)?,
                CaseOutcome::Failed(what) => {
                    let what = what.replace('\n', "\n             ");
                    writeln!(f, "FAILED   {} ({millis} ms):\n             {what}", case.name)?;
                }
            }
        }
        let (failed, skipped) = (self.failed(), self.skipped());
        let passed = self.cases.len() - failed - skipped;
        write!(f, "conformance: {passed} passed, {skipped} skipped, {failed} failed")
    }
}
