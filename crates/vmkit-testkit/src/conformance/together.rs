//! One VM, several callers at once.

use vmkit::lifecycle::{Operation, VmState};
use vmkit::{Backend, ErrorKind, RunInfo};

use super::bench::{CaseBench, Situation, apply, check};
use super::{CaseResult, ConformanceCase, cases};

/// How a caller may fail because of another one.
const BESIDES: [ErrorKind; 4] =
    [ErrorKind::Busy, ErrorKind::InvalidState, ErrorKind::NotFound, ErrorKind::TimedOut];

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    cases![
        starts_at_once_end_in_one_guest,
        stops_at_once_all_end_in_stopped,
        start_and_destroy_at_once_leave_nothing_that_destroy_does_not_find,
        prepares_of_one_name_at_once_make_one_vm,
    ]
}

async fn starts_at_once_end_in_one_guest<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.prepared().await?;
    let others = [bench.another(), bench.another(), bench.another()];
    let [one, two, three] = &others;
    let answers = tokio::join!(
        apply(one, &bench.options, &vm, Operation::Start),
        apply(two, &bench.options, &vm, Operation::Start),
        apply(three, &bench.options, &vm, Operation::Start),
    );
    let mut runs: Vec<RunInfo> = Vec::new();
    for answer in [answers.0?, answers.1?, answers.2?] {
        match answer {
            Ok(handle) => runs.extend(handle.run),
            Err(error) => check(BESIDES.contains(&error.kind()), || format!("a start failed: {error}"))?,
        }
    }
    check(!runs.is_empty(), || "no start succeeded".into())?;
    check(runs.iter().all(|run| run.pid == runs[0].pid), || format!("there were several runs: {runs:?}"))?;
    let found = bench.state(&vm).await?;
    check(found == VmState::Running, || format!("after all starts the VM is {found:?}"))?;
    bench.check_guests(&vm, 1)
}

async fn stops_at_once_all_end_in_stopped<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    let (one, two) = (bench.another(), bench.another());
    let answers = tokio::join!(
        apply(&one, &bench.options, &vm, Operation::Stop),
        apply(&two, &bench.options, &vm, Operation::Stop),
    );
    for answer in [answers.0?, answers.1?] {
        match answer {
            Ok(handle) => check(handle.state == VmState::Stopped, || format!("one is {}", handle.state))?,
            Err(error) => check(BESIDES.contains(&error.kind()), || format!("a stop failed: {error}"))?,
        }
    }
    let found = bench.state(&vm).await?;
    check(found == VmState::Stopped, || format!("after all stops the VM is {found:?}"))?;
    bench.check_guests(&vm, 0)
}

async fn start_and_destroy_at_once_leave_nothing_that_destroy_does_not_find<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let vm = bench.prepared().await?;
    let (one, two) = (bench.another(), bench.another());
    let (started, destroyed) = tokio::join!(
        apply(&one, &bench.options, &vm, Operation::Start),
        apply(&two, &bench.options, &vm, Operation::Destroy),
    );
    // Which of them comes first, and how the other one fails, is not promised. That both end is.
    let _ = (started?, destroyed?);
    bench.check_destroyed(&vm).await
}

async fn prepares_of_one_name_at_once_make_one_vm<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let spec = bench.spec();
    let (one, two) = (bench.another(), bench.another());
    let answers = tokio::join!(one.prepare(&spec), two.prepare(&spec));
    let mut made = 0;
    for answer in [answers.0, answers.1] {
        match answer {
            Ok(vm) => {
                bench.remember(&vm);
                made += 1;
            }
            Err(error) => {
                let refused = matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::Busy);
                check(refused, || format!("a prepare failed: {error}"))?;
            }
        }
    }
    check(made == 1, || format!("{made} VMs were made"))
}
