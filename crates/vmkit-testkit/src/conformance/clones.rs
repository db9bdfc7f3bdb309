//! Clones, as far as the backend has them.

use uuid::Uuid;
use vmkit::abilities::{CloneMode, CloneRequest, DynClones, IdentityPolicy, MemoryMode, SnapshotKind};
use vmkit::lifecycle::Operation;
use vmkit::spec::SnapshotName;
use vmkit::{Backend, ErrorKind, VmState};

use super::bench::{CaseBench, CaseStop, Situation, check, new_clone_name, new_snapshot_name, within};
use super::{CaseResult, ConformanceCase, cases};

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    cases![
        a_clone_is_a_vm_of_its_own,
        a_clone_with_memory_is_saved_and_continues,
        a_clone_of_a_name_in_use_is_refused,
        a_clone_of_a_snapshot_that_is_not_there_is_refused,
    ]
}

fn of<H: Backend>(bench: &CaseBench<H>) -> Result<DynClones<'_>, CaseStop> {
    let tag = bench.backend.tag();
    let clones = bench.backend.abilities(&tag).clones();
    clones.ok_or_else(|| CaseStop::Skipped("the backend can't clone VMs".into()))
}

fn request<H: Backend>(bench: &CaseBench<H>) -> CloneRequest {
    CloneRequest::new((bench.options.spec)(new_clone_name()).with_id(Uuid::new_v4()))
}

async fn a_clone_is_a_vm_of_its_own<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let clones = of(bench)?;
    let grace = bench.options.grace;
    let source = bench.prepared().await?;
    let mut made = Vec::new();
    for mode in [CloneMode::Linked, CloneMode::Full] {
        let mut request = request(bench);
        request.mode = mode;
        let clone = within("create_clone", grace, clones.create_clone(&source, &request)).await??;
        bench.remember(&clone);
        check(Some(clone.id) == request.spec.id() && clone.state == VmState::Prepared, || {
            format!("the clone of {:?} is {clone:?}", request.spec.id())
        })?;
        made.push(clone);
    }
    let found = bench.state(&source).await?;
    check(found == VmState::Prepared, || format!("the source of clones is {found:?}"))?;
    let source = bench.lead_to(source, Situation::Running).await?;
    for clone in &made {
        let clone = bench.lead_to(clone.clone(), Situation::Running).await?;
        bench.check_guests(&clone, 1)?;
    }
    bench.check_guests(&source, 1)?;
    let source_id = source.clone();
    within("destroy", grace, bench.backend.destroy(source)).await??;
    bench.check_destroyed(&source_id).await?;
    for clone in &made {
        let found = bench.state(clone).await?;
        check(found == VmState::Running, || format!("without its source the clone is {found:?}"))?;
    }
    Ok(())
}

async fn a_clone_with_memory_is_saved_and_continues<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let clones = of(bench)?;
    let tag = bench.backend.tag();
    let Some(snapshots) = bench.backend.abilities(&tag).snapshots() else {
        return Err(CaseStop::Skipped("the backend can't take snapshots".into()));
    };
    let (source, grace) = (bench.bring_to(Situation::Running).await?, bench.options.grace);
    let name = new_snapshot_name();
    let taken = snapshots.create_snapshot(&source, &name, MemoryMode::Include);
    if within("create_snapshot", grace, taken).await??.kind != SnapshotKind::Memory {
        return Err(CaseStop::Skipped("the backend's snapshots have no memory".into()));
    }
    let mut request = request(bench);
    request.snapshot = Some(name);
    request.memory = MemoryMode::Include;
    // The suite's guests may have no agent.
    request.identity = IdentityPolicy::MayShare;
    let clone = within("create_clone", grace, clones.create_clone(&source, &request)).await??;
    bench.remember(&clone);
    check(clone.state == VmState::Saved && clone.run.is_none(), || {
        format!("a clone with memory is {clone:?}")
    })?;
    bench.check_guests(&clone, 0)?;
    let clone = bench.try_out(&clone, &VmState::Saved, Operation::Start).await?;
    check(clone.is_some_and(|clone| clone.state == VmState::Running), || {
        "the clone does not continue".to_owned()
    })?;
    let found = bench.state(&source).await?;
    check(found == VmState::Running, || format!("beside its clone the source is {found:?}"))
}

async fn a_clone_of_a_name_in_use_is_refused<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let clones = of(bench)?;
    let (source, grace) = (bench.prepared().await?, bench.options.grace);
    // Itself.
    let request = CloneRequest::new(source.spec.clone().with_id(source.id));
    let refused = within("create_clone", grace, clones.create_clone(&source, &request)).await?;
    check(refused.as_ref().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists), || {
        format!("a clone of the name and the identity of its source: {refused:?}")
    })?;
    let found = bench.state(&source).await?;
    check(found == VmState::Prepared, || format!("then the VM is {found:?}"))
}

async fn a_clone_of_a_snapshot_that_is_not_there_is_refused<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let clones = of(bench)?;
    let (source, grace) = (bench.prepared().await?, bench.options.grace);
    let mut request = request(bench);
    request.snapshot = Some(SnapshotName::new("missing").expect("letters"));
    let refused = within("create_clone", grace, clones.create_clone(&source, &request)).await?;
    check(refused.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), || {
        format!("a clone of a snapshot that is not there: {refused:?}")
    })?;
    bench.check_destroyed(&bench.preparing(&request.spec, request.spec.id().unwrap_or_default())).await
}
