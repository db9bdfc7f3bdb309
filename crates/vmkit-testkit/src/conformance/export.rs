//! Exports and imports, as far as the backend has them.

use std::fs;
use std::path::Path;

use vmkit::abilities::{DynExport, FileContent, ImportedVm, MemoryMode};
use vmkit::lifecycle::Operation;
use vmkit::{Backend, ErrorKind, VmHandle, VmState};

use super::bench::{CaseBench, CaseStop, Situation, check, new_snapshot_name as new_name, within};
use super::{CaseResult, ConformanceCase, cases};

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    let mut all = cases![
        an_imported_vm_has_its_snapshots,
        a_saved_vm_is_imported_with_its_memory_or_without,
        files_that_are_no_vm_are_refused,
    ];
    all.extend(Situation::ALL.map(|situation| ConformanceCase {
        name: format!("an export of a {situation:?} VM is legal or refused"),
        run: Box::new(move |bench| Box::pin(async move { an_export_is_legal(&bench, situation).await })),
    }));
    all
}

fn of<H: Backend>(bench: &CaseBench<H>) -> Result<DynExport<'_>, CaseStop> {
    let tag = bench.backend.tag();
    let export = bench.backend.abilities(&tag).export();
    export.ok_or_else(|| CaseStop::Skipped("the backend can't export VMs".into()))
}

/// Exports a VM, removes it, and imports what was exported.
async fn moved<H: Backend>(
    bench: &CaseBench<H>,
    vm: &VmHandle,
    memory: MemoryMode,
) -> Result<ImportedVm, CaseStop> {
    let (export, grace) = (of(bench)?, bench.options.grace);
    let mut exported = within("export", grace, export.export(vm, memory)).await??;
    for file in &mut exported.files {
        if let FileContent::Path(path) = &file.content {
            let bytes = fs::read(path).map_err(|error| CaseStop::Failed(format!("{path:?}: {error}")))?;
            file.content = FileContent::Bytes(bytes);
        }
    }
    let found = bench.state(vm).await?;
    check(found == vm.state, || format!("after its export the VM is {found:?}"))?;
    let (handle, files) = (exported.vm.clone(), std::mem::take(&mut exported.files));
    // As long as it exists the VM is held.
    drop(exported);
    within("destroy", grace, bench.backend.destroy(vm.clone())).await??;
    let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
    let new = VmHandle::preparing(handle.id, handle.backend.clone(), handle.spec.clone());
    let dir = within("prepare_import", grace, export.prepare_import(&new, &names)).await??;
    for file in files {
        let FileContent::Bytes(bytes) = file.content else { continue };
        let path = dir.join(file.name);
        let written =
            fs::create_dir_all(path.parent().unwrap_or(Path::new(""))).and_then(|()| fs::write(&path, bytes));
        written.map_err(|error| CaseStop::Failed(format!("{}: {error}", path.display())))?;
    }
    Ok(within("finish_import", grace, export.finish_import(&handle)).await??)
}

async fn an_imported_vm_has_its_snapshots<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.prepared().await?;
    let (tag, name) = (bench.backend.tag(), new_name());
    let snapshots = bench.backend.abilities(&tag).snapshots();
    if let Some(snapshots) = snapshots {
        snapshots.create_snapshot(&vm, &name, MemoryMode::Include).await?;
    }
    let vm = vm.clone().in_state(bench.state(&vm).await?);
    let imported = moved(bench, &vm, MemoryMode::Include).await?;
    let found = bench.state(&imported.vm).await?;
    check(found == VmState::Prepared && imported.vm.state == found, || {
        format!("an imported VM that was prepared is {found:?}, and its handle {:?}", imported.vm.state)
    })?;
    check(imported.problems.is_empty(), || format!("on the same host: {:?}", imported.problems))?;
    if let Some(snapshots) = snapshots {
        let all = snapshots.snapshots(&imported.vm).await?;
        check(all.len() == 1 && all[0].name == name, || format!("its snapshots are {all:?}"))?;
    }
    bench.try_out(&imported.vm, &VmState::Prepared, Operation::Start).await?;
    bench.check_guests(&imported.vm, 1)
}

async fn a_saved_vm_is_imported_with_its_memory_or_without<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    of(bench)?;
    for (memory, expected) in
        [(MemoryMode::Include, VmState::Saved), (MemoryMode::DisksOnly, VmState::Stopped)]
    {
        let running = bench.bring_to(Situation::Running).await?;
        let Ok(saved) = bench.apply(&running, Operation::Save).await? else {
            return Err(CaseStop::Skipped(super::bench::CANT_SAVE.into()));
        };
        let imported = moved(bench, &saved, memory).await?;
        let found = bench.state(&imported.vm).await?;
        check(found == expected, || format!("imported with {memory:?}, the VM is {found:?}"))?;
        bench.try_out(&imported.vm, &expected, Operation::Start).await?;
        bench.check_guests(&imported.vm, 1)?;
    }
    Ok(())
}

async fn files_that_are_no_vm_are_refused<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let export = of(bench)?;
    let vm = bench.prepared().await?;
    within("destroy", bench.options.grace, bench.backend.destroy(vm.clone())).await??;
    let new = VmHandle::preparing(vm.id, vm.backend.clone(), vm.spec.clone());
    for name in ["alive", "qemu.json", "../root.qcow2", "snapshots/../../x", "/etc/passwd", "owner", ""] {
        let names = [name.to_owned()];
        let refused = within("prepare_import", bench.options.grace, export.prepare_import(&new, &names));
        let refused = refused.await?;
        check(refused.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidInput), || {
            format!("a file {name:?} of a VM: {refused:?}")
        })?;
    }
    Ok(())
}

async fn an_export_is_legal<H: Backend>(bench: &CaseBench<H>, situation: Situation) -> CaseResult {
    of(bench)?;
    let vm = bench.bring_to(situation).await?;
    bench.try_out(&vm, &vm.state, Operation::Export).await.map(drop)
}
