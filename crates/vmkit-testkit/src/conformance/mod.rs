//! The conformance suite, which every backend passes.
//!
//! [`run`] runs a list of named cases against a backend and returns a [`ConformanceReport`]. Each
//! case makes VMs of its own and destroys them. The legal operations come from
//! [`vmkit::lifecycle::next`], so the suite has no table of its own to get out of step.
//!
//! What the suite can't see from inside the trait, it asks hooks for: [`Conformance::breaking`],
//! without which no VM becomes `Failed` and those cases are skipped;
//! [`Conformance::counting_guests`] and [`Conformance::finding_leftovers`], without which "one
//! guest" and "nothing left behind" mean only what the backend itself says;
//! [`Conformance::printing`], [`Conformance::forwarding`], [`Conformance::powering_off`] and
//! [`Conformance::serving_ssh`], without which consoles, forwards, a guest's own end and SSH are
//! not tried.

mod abilities;
mod bench;
mod clones;
mod contract;
mod drops;
mod export;
mod options;
mod report;
mod runs;
mod snapshots;
mod together;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use vmkit::Backend;

use bench::CaseBench;
pub(crate) use bench::{CaseResult, CaseStop, apply, check, judge};
pub use options::Conformance;
pub use report::{CaseOutcome, CaseReport, ConformanceReport};

/// Runs the whole suite, one case after the other.
///
/// `make` is called often, and each answer must stand for the same VMs, as two processes over one
/// store do: for a backend that keeps its books in memory, clone one.
///
/// A case that fails or panics does not end the run; it is in the report.
pub async fn run<H>(make: impl Fn() -> H + Send + Sync + 'static, options: Conformance) -> ConformanceReport
where
    H: Backend + 'static,
{
    let make: Arc<dyn Fn() -> H + Send + Sync> = Arc::new(make);
    let mut cases = contract::cases();
    cases.extend(together::cases());
    cases.extend(drops::cases());
    cases.extend(abilities::cases());
    cases.extend(runs::cases());
    cases.extend(snapshots::cases());
    cases.extend(export::cases());
    cases.extend(clones::cases());
    let mut report = ConformanceReport::default();
    for case in cases {
        let bench = Arc::new(CaseBench::new(Arc::clone(&make), options.clone()));
        let start = Instant::now();
        let verdict = guarded((case.run)(Arc::clone(&bench))).await;
        let cleaned = guarded(async move { bench.clean().await }).await;
        let outcome = match (verdict, cleaned) {
            (Err(CaseStop::Failed(what)), _) | (_, Err(CaseStop::Failed(what))) => CaseOutcome::Failed(what),
            (Err(CaseStop::Skipped(why)), _) | (_, Err(CaseStop::Skipped(why))) => CaseOutcome::Skipped(why),
            (Ok(()), Ok(())) => CaseOutcome::Passed,
        };
        report.cases.push(CaseReport { name: case.name, outcome, took: start.elapsed() });
    }
    report
}

/// Runs a part of a case as a task of its own: a panic ends the task, not the run.
async fn guarded(part: impl Future<Output = CaseResult> + Send + 'static) -> CaseResult {
    let ended = tokio::spawn(part).await;
    ended.unwrap_or_else(|error| Err(CaseStop::Failed(format!("it panicked: {error}"))))
}

type CaseFuture = Pin<Box<dyn Future<Output = CaseResult> + Send>>;

/// One named check.
struct ConformanceCase<H> {
    name: String,
    run: Box<dyn FnOnce(Arc<CaseBench<H>>) -> CaseFuture + Send>,
}

/// Creates cases of functions; a function's name, as a sentence, is the case's.
macro_rules! cases {
    ($($function:ident),* $(,)?) => {
        vec![$(crate::conformance::ConformanceCase {
            name: stringify!($function).replace('_', " "),
            run: Box::new(|bench| Box::pin(async move { $function(&bench).await })),
        }),*]
    };
}
use cases;
