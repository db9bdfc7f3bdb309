//! A future dropped midway leaves nothing behind that `destroy` does not remove.
//!
//! Each operation is polled once and dropped, then twice, and so on until it completes. The next
//! operation may fail with `Busy` for a moment, except for `destroy`, which must succeed at once.
//! succeed at once.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmkit::lifecycle::{Operation, VmState};
use vmkit::{Backend, ErrorKind, VmHandle};

use super::bench::{CANT_SAVE, CANT_SUSPEND, CaseBench, CaseStop, Situation, check, within};
use super::{CaseResult, ConformanceCase};

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    let operations = [
        (Operation::Start, Situation::Prepared),
        (Operation::Stop, Situation::Running),
        (Operation::Suspend, Situation::Running),
        (Operation::Resume, Situation::Suspended),
        (Operation::Save, Situation::Running),
        (Operation::Snapshot, Situation::Running),
        (Operation::Start, Situation::Saved),
        (Operation::Destroy, Situation::Running),
    ];
    let mut cases: Vec<ConformanceCase<H>> = vec![ConformanceCase {
        name: "a dropped prepare leaves nothing that destroy does not find".into(),
        run: Box::new(|bench| Box::pin(async move { dropped_prepare(&bench).await })),
    }];
    cases.extend(operations.map(|(operation, situation)| ConformanceCase {
        name: format!(
            "a dropped {operation} of a {situation:?} VM leaves nothing that destroy does not find"
        ),
        run: Box::new(move |bench: std::sync::Arc<CaseBench<H>>| {
            Box::pin(async move { dropped(&bench, operation, situation).await })
        }),
    }));
    cases
}

async fn dropped_prepare<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    for polls in polls(bench.options.polls) {
        let (spec, id) = (bench.spec(), Uuid::new_v4());
        let preparing = bench.preparing(&spec, id);
        bench.remember(&preparing);
        let ended = poll_then_drop(bench.backend.prepare(&preparing.spec), polls).await.transpose()?;
        bench.check_destroyed(&preparing).await?;
        check_name_is_free(bench, &preparing).await?;
        if ended.is_some() {
            break;
        }
    }
    Ok(())
}

async fn dropped<H: Backend>(bench: &CaseBench<H>, operation: Operation, situation: Situation) -> CaseResult {
    if operation == Operation::Suspend && !bench.capabilities().suspend {
        return Err(CaseStop::Skipped(CANT_SUSPEND.into()));
    }
    if operation == Operation::Snapshot && !bench.capabilities().snapshots {
        return Err(CaseStop::Skipped("the backend can't take snapshots".into()));
    }
    if operation == Operation::Save && !bench.capabilities().save_to_disk {
        return Err(CaseStop::Skipped(CANT_SAVE.into()));
    }
    for polls in polls(bench.options.polls) {
        let mut ended = false;
        for again in [false, true] {
            let vm = bench.bring_to(situation).await?;
            let applied = poll_then_drop(bench.apply(&vm, operation), polls).await;
            ended = applied.transpose()?.transpose()?.is_some();
            let found =
                settled(bench, || within("state", bench.options.grace, bench.backend.state(&vm))).await?;
            check(found != VmState::Destroyed || operation == Operation::Destroy, || {
                format!("after {polls} polls of {operation} the VM is gone")
            })?;
            if again {
                // The next operation needs no knowledge of the dropped one.
                let after = settled(bench, || bench.apply(&vm, operation)).await?.state;
                let found = bench.state(&vm).await?;
                check(found == after, || {
                    format!("after {polls} polls of {operation} and a whole one the VM is {found:?}")
                })?;
                bench.check_guests(&vm, usize::from(after.is_live()))?;
            }
            bench.check_destroyed(&vm).await?;
            check_name_is_free(bench, &vm).await?;
        }
        if ended {
            break;
        }
    }
    Ok(())
}

/// Retries while the result is `Busy`, within the grace: work that the dropped future started may
/// still be ending.
async fn settled<H, T, F>(bench: &CaseBench<H>, mut ask: impl FnMut() -> F) -> Result<T, CaseStop>
where
    H: Backend,
    F: Future<Output = Result<vmkit::Result<T>, CaseStop>>,
{
    let start = Instant::now();
    loop {
        match ask().await? {
            Err(error) if error.kind() == ErrorKind::Busy && start.elapsed() < bench.options.grace => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            answer => return Ok(answer?),
        }
    }
}

async fn check_name_is_free<H: Backend>(bench: &CaseBench<H>, vm: &VmHandle) -> CaseResult {
    let spec = vm.spec.clone().with_id(Uuid::new_v4());
    let vm = bench.prepare(&spec).await??;
    bench.check_destroyed(&vm).await
}

/// Returns how often a future is polled in each attempt: every number at first, then in growing
/// steps.
fn polls(limit: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |polls| Some(polls + 1 + polls / 8))
        .take_while(move |polls| *polls <= limit)
}

/// Polls a future at most `polls` times and drops it; returns its output if it completed.
async fn poll_then_drop<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|context| {
        left = left.saturating_sub(1);
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_future_is_dropped_after_so_many_polls() {
        let yields = |times| async move {
            for _ in 0..times {
                tokio::task::yield_now().await;
            }
            times
        };
        assert_eq!(poll_then_drop(yields(0), 1).await, Some(0));
        assert_eq!(poll_then_drop(yields(2), 2).await, None);
        assert_eq!(poll_then_drop(yields(2), 3).await, Some(2));
    }

    #[test]
    fn small_numbers_of_polls_are_all_tried() {
        assert_eq!(polls(12).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]);
    }
}
