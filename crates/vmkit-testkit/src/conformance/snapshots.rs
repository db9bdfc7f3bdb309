//! Snapshots, as far as the backend has them.

use vmkit::abilities::{DynSnapshots, MemoryMode, Snapshot, SnapshotKind};
use vmkit::lifecycle::Operation;
use vmkit::spec::SnapshotName;
use vmkit::{Backend, ErrorKind, VmState};

use super::bench::{CaseBench, CaseStop, Situation, check, new_snapshot_name as new_name, within};
use super::{CaseResult, ConformanceCase, cases};

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    let mut all = cases![
        snapshots_are_a_tree_by_unique_names,
        a_snapshot_with_memory_is_restored_as_saved,
        a_snapshot_of_nothing_is_not_found,
    ];
    all.extend(Situation::ALL.map(|situation| ConformanceCase {
        name: format!("a restore of a {situation:?} VM leads back"),
        run: Box::new(move |bench| Box::pin(async move { a_restore_leads_back(&bench, situation).await })),
    }));
    all
}

fn of<H: Backend>(bench: &CaseBench<H>) -> Result<DynSnapshots<'_>, CaseStop> {
    let tag = bench.backend.tag();
    let snapshots = bench.backend.abilities(&tag).snapshots();
    snapshots.ok_or_else(|| CaseStop::Skipped("the backend can't take snapshots".into()))
}

fn shown(all: &[Snapshot]) -> String {
    let one = |it: &Snapshot| {
        let parent = it.parent.as_ref().map_or("-", SnapshotName::as_str);
        format!("{parent}>{}{}", it.name, if it.is_current { "*" } else { "" })
    };
    all.iter().map(one).collect::<Vec<_>>().join(" ")
}

async fn snapshots_are_a_tree_by_unique_names<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let snapshots = of(bench)?;
    let vm = bench.prepared().await?;
    let grace = bench.options.grace;
    let name = |text: &str| SnapshotName::new(text).expect("a letter");
    let take = async |text: &str| {
        within("create_snapshot", grace, snapshots.create_snapshot(&vm, &name(text), MemoryMode::Include))
            .await
    };
    let tree = async |expected: &str| {
        let found = shown(&within("snapshots", grace, snapshots.snapshots(&vm)).await??);
        check(found == expected, || format!("the snapshots are {found:?}, not {expected:?}"))
    };
    let first = take("a").await??;
    check(first.kind == SnapshotKind::Stopped && first.parent.is_none(), || {
        format!("the first snapshot of a VM that does not run is {first:?}")
    })?;
    let again = take("a").await?;
    check(again.as_ref().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists), || {
        format!("a second snapshot of that name is {again:?}")
    })?;
    take("b").await??;
    take("c").await??;
    let has_disks = snapshots.snapshots(&vm).await?.iter().any(|it| it.parent.is_some());
    if !has_disks {
        return Err(CaseStop::Skipped(
            "the suite's VMs have no disks, so their snapshots are no tree".into(),
        ));
    }
    tree("->a a>b b>c*").await?;
    within("restore_snapshot", grace, snapshots.restore_snapshot(&vm, &name("a"))).await??;
    tree("->a* a>b b>c").await?;
    take("d").await??;
    tree("->a a>b b>c a>d*").await?;
    within("remove_snapshot", grace, snapshots.remove_snapshot(&vm, &name("b"))).await??;
    tree("->a a>c a>d*").await?;
    within("remove_snapshot", grace, snapshots.remove_snapshot(&vm, &name("a"))).await??;
    tree("->c ->d*").await
}

async fn a_snapshot_with_memory_is_restored_as_saved<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let snapshots = of(bench)?;
    let vm = bench.bring_to(Situation::Running).await?;
    let (grace, name) = (bench.options.grace, new_name());
    let taken = within("create_snapshot", grace, snapshots.create_snapshot(&vm, &name, MemoryMode::Include));
    let taken = taken.await??;
    if taken.kind != SnapshotKind::Memory {
        return Err(CaseStop::Skipped("the backend's snapshots have no memory".into()));
    }
    let found = bench.state(&vm).await?;
    check(found == VmState::Running, || format!("after its snapshot the VM is {found:?}"))?;
    bench.check_guests(&vm, 1)?;
    let restored = within("restore_snapshot", grace, snapshots.restore_snapshot(&vm, &name)).await??;
    check(restored.state == VmState::Saved && restored.run.is_none(), || {
        format!("a restore with memory answered {restored:?}")
    })?;
    let found = bench.state(&vm).await?;
    check(found == VmState::Saved, || format!("after a restore with memory the VM is {found:?}"))?;
    bench.check_guests(&vm, 0)?;
    bench.try_out(&restored, &VmState::Saved, Operation::Start).await?;
    bench.check_guests(&vm, 1)
}

async fn a_snapshot_of_nothing_is_not_found<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let snapshots = of(bench)?;
    let vm = bench.prepared().await?;
    let name = new_name();
    let restored = within("restore_snapshot", bench.options.grace, snapshots.restore_snapshot(&vm, &name));
    let restored = restored.await?.map(drop);
    let removed =
        within("remove_snapshot", bench.options.grace, snapshots.remove_snapshot(&vm, &name)).await?;
    for outcome in [restored, removed] {
        check(outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), || {
            format!("a snapshot that is not there: {outcome:?}")
        })?;
    }
    let found = bench.state(&vm).await?;
    check(found == VmState::Prepared, || format!("then the VM is {found:?}"))
}

async fn a_restore_leads_back<H: Backend>(bench: &CaseBench<H>, situation: Situation) -> CaseResult {
    let snapshots = of(bench)?;
    let (vm, name) = (bench.prepared().await?, new_name());
    let taken = snapshots.create_snapshot(&vm, &name, MemoryMode::DisksOnly);
    within("create_snapshot", bench.options.grace, taken).await??;
    let vm = bench.lead_to(vm, situation).await?;
    bench.try_out(&vm, &vm.state, Operation::Restore).await?;
    bench.check_guests(&vm, 0)?;
    let stopped = vm.clone().in_state(VmState::Stopped);
    bench.try_out(&stopped, &VmState::Stopped, Operation::Start).await?;
    bench.check_guests(&vm, 1)
}
