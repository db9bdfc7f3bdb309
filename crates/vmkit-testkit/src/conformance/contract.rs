//! One VM, one caller: the table of the contract, and what each method promises beside it.

use std::path::Path;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmkit::lifecycle::{Operation, VmState};
use vmkit::store::VmRecord;
use vmkit::{Backend, BackendTag, ConsoleEndpoint, ErrorKind, RunInfo, VmHandle};

use super::bench::{CaseBench, CaseStop, Situation, check, within};
use super::{CaseResult, ConformanceCase, cases};

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    let mut cases: Vec<ConformanceCase<H>> = cases![
        prepare_answers_a_prepared_vm,
        prepare_keeps_the_identity_of_the_spec,
        prepare_gives_an_identity_where_the_spec_has_none,
        prepare_refuses_a_name_in_use_and_leaves_its_vm_alone,
        a_name_is_free_again_after_destroy,
        start_of_a_running_vm_gives_the_facts_of_that_run_again,
        start_after_stop_gives_a_new_run,
        stop_with_no_time_kills_at_once,
        destroy_succeeds_on_what_is_gone,
        destroy_succeeds_on_what_prepare_never_began,
        destroy_finds_a_vm_by_what_its_prepare_began_with,
        only_destroy_is_legal_on_what_is_gone,
        old_handles_are_as_good_as_new_ones,
        a_handle_survives_its_record,
        another_instance_knows_the_vm,
        the_console_is_where_the_capabilities_say,
        the_console_of_another_backends_vm_is_an_error,
    ];
    for situation in Situation::ALL {
        for operation in [
            Operation::Start,
            Operation::Stop,
            Operation::Suspend,
            Operation::Resume,
            Operation::Save,
            Operation::Snapshot,
            Operation::Clone,
            Operation::Destroy,
        ] {
            cases.push(ConformanceCase {
                name: format!("the table holds for {operation} of a {situation:?} VM"),
                run: Box::new(move |bench| {
                    Box::pin(async move { the_table_holds(&bench, situation, operation).await })
                }),
            });
        }
        cases.push(ConformanceCase {
            name: format!("asking changes nothing of a {situation:?} VM"),
            run: Box::new(move |bench| {
                Box::pin(async move { asking_changes_nothing(&bench, situation).await })
            }),
        });
    }
    cases
}

async fn the_table_holds<H: Backend>(
    bench: &CaseBench<H>,
    situation: Situation,
    operation: Operation,
) -> CaseResult {
    let vm = bench.bring_to(situation).await?;
    let handle = bench.try_out(&vm, &vm.state, operation).await?;
    if let Some(handle) = &handle
        && handle.state == vm.state
    {
        check_same_run(&vm, handle)?;
    }
    let live = bench.state(&vm).await?.is_live();
    bench.check_guests(&vm, usize::from(live))
}

async fn asking_changes_nothing<H: Backend>(bench: &CaseBench<H>, situation: Situation) -> CaseResult {
    let vm = bench.bring_to(situation).await?;
    for _ in 0..3 {
        check_guest_ip(bench, &vm).await?;
        let _ = bench.backend.console_endpoint(&vm)?;
        let found = bench.state(&vm).await?;
        check(found == vm.state, || {
            format!("the VM was {:?} and is {found:?} after some questions", vm.state)
        })?;
    }
    Ok(())
}

async fn check_guest_ip<H: Backend>(bench: &CaseBench<H>, vm: &VmHandle) -> CaseResult {
    let answer = within("guest_ip", bench.options.grace, bench.backend.guest_ip(vm)).await?;
    let can = bench.capabilities().guest_ip;
    let kind = answer.as_ref().err().map(vmkit::Error::kind);
    let holds = match (&answer, kind) {
        (Ok(address), _) => can && vm.state.is_live() && !address.is_empty(),
        (_, Some(ErrorKind::InvalidState)) => !vm.state.is_live(),
        // The spec may have no network, and then even a capable backend has no address.
        (_, Some(ErrorKind::Unsupported)) => true,
        (_, Some(ErrorKind::NotFound)) => can && vm.state.is_live(),
        _ => false,
    };
    check(holds, || {
        format!(
            "guest_ip of a VM that is {} answered {answer:?}; guest_ip in the capabilities: {can}",
            vm.state
        )
    })
}

async fn prepare_answers_a_prepared_vm<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let spec = bench.spec();
    let vm = bench.prepare(&spec).await??;
    check(vm.state == VmState::Prepared, || format!("prepare answered a handle in {}", vm.state))?;
    check(vm.backend == bench.backend.tag(), || format!("its handle is of the backend {}", vm.backend))?;
    check(vm.name() == spec.name(), || format!("its handle has the name {}", vm.name()))?;
    check(vm.spec.id() == Some(vm.id), || format!("the id is {}, in the spec {:?}", vm.id, vm.spec.id()))?;
    check(vm.run.is_none(), || format!("nothing runs, but the handle says {:?}", vm.run))?;
    let found = bench.state(&vm).await?;
    check(found == VmState::Prepared, || format!("the backend says {found:?}"))?;
    bench.check_guests(&vm, 0)
}

async fn prepare_keeps_the_identity_of_the_spec<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let id = Uuid::new_v4();
    let vm = bench.prepare(&bench.spec().with_id(id)).await??;
    check(vm.id == id, || format!("the spec's id is {id}, the handle's {}", vm.id))
}

async fn prepare_gives_an_identity_where_the_spec_has_none<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (one, two) = (bench.prepared().await?, bench.prepared().await?);
    check(one.id != two.id, || format!("two VMs have the id {}", one.id))
}

async fn prepare_refuses_a_name_in_use_and_leaves_its_vm_alone<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let spec = bench.spec();
    let mut vm = bench.prepare(&spec).await??;
    for _ in 0..2 {
        let again = bench.prepare(&spec).await?;
        let kind = again.as_ref().err().map(vmkit::Error::kind);
        check(kind == Some(ErrorKind::AlreadyExists), || {
            format!("prepare of a name in use answered {again:?}, not AlreadyExists")
        })?;
        let found = bench.state(&vm).await?;
        check(found == vm.state, || format!("the VM was {:?} and is {found:?} now", vm.state))?;
        vm = bench.apply(&vm, Operation::Start).await??;
    }
    Ok(())
}

async fn a_name_is_free_again_after_destroy<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let spec = bench.spec();
    let first = bench.prepare(&spec).await??;
    bench.check_destroyed(&first).await?;
    let second = bench.prepare(&spec).await??;
    check(first.id != second.id, || "the second VM has the first one's identity".into())?;
    let found = bench.state(&first).await?;
    check(found == VmState::Destroyed, || format!("the first VM is {found:?} since there is a second one"))
}

async fn start_of_a_running_vm_gives_the_facts_of_that_run_again<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let prepared = bench.prepared().await?;
    let first = bench.apply(&prepared, Operation::Start).await??;
    // The old handle has no run in it: a caller that lost the facts gets them back.
    let again = bench.apply(&prepared, Operation::Start).await??;
    check_same_run(&first, &again)?;
    bench.check_guests(&first, 1)
}

async fn start_after_stop_gives_a_new_run<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Stopped).await?;
    check(vm.run.is_none(), || format!("nothing runs, but the handle says {:?}", vm.run))?;
    let vm = bench.try_out(&vm, &vm.state, Operation::Start).await?;
    check(vm.is_some_and(|vm| vm.run.is_some()), || "the handle tells nothing of the run".into())
}

async fn stop_with_no_time_kills_at_once<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    for situation in [Situation::Running, Situation::Suspended] {
        let vm = match bench.bring_to(situation).await {
            Err(CaseStop::Skipped(_)) => continue,
            vm => vm?,
        };
        let start = Instant::now();
        let stopped = within("stop", bench.options.grace, bench.backend.stop(&vm, Duration::ZERO)).await??;
        let took = start.elapsed();
        check(stopped.state == VmState::Stopped, || format!("stop answered a handle in {}", stopped.state))?;
        check(took <= bench.options.grace, || format!("stop with no time took {took:?}"))?;
        bench.check_guests(&vm, 0)?;
    }
    Ok(())
}

async fn destroy_succeeds_on_what_is_gone<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    for _ in 0..3 {
        bench.check_destroyed(&vm).await?;
    }
    Ok(())
}

async fn destroy_succeeds_on_what_prepare_never_began<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    bench.check_destroyed(&bench.preparing(&bench.spec(), Uuid::new_v4())).await
}

async fn destroy_finds_a_vm_by_what_its_prepare_began_with<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (spec, id) = (bench.spec(), Uuid::new_v4());
    let vm = bench.prepare(&spec.clone().with_id(id)).await??;
    bench.check_destroyed(&bench.preparing(&spec, id)).await?;
    let found = bench.state(&vm).await?;
    check(found == VmState::Destroyed, || format!("by its own handle it is {found:?}"))?;
    bench.prepare(&spec).await??;
    Ok(())
}

async fn only_destroy_is_legal_on_what_is_gone<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    bench.check_destroyed(&vm).await?;
    for operation in [Operation::Start, Operation::Stop, Operation::Suspend, Operation::Resume] {
        bench.try_out(&vm, &VmState::Destroyed, operation).await?;
    }
    bench.check_guests(&vm, 0)
}

async fn old_handles_are_as_good_as_new_ones<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let old = bench.prepared().await?;
    let mut state = old.state.clone();
    let mut way = vec![Operation::Start];
    if bench.capabilities().suspend {
        way.extend([Operation::Suspend, Operation::Resume]);
    }
    way.extend([Operation::Stop, Operation::Start, Operation::Destroy]);
    for operation in way {
        if let Some(handle) = bench.try_out(&old, &state, operation).await? {
            state = handle.state;
        }
    }
    Ok(())
}

async fn a_handle_survives_its_record<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    let bytes = VmRecord::settled(vm.clone()).encode()?;
    let read = VmRecord::decode(Path::new("vm.json"), &bytes)?.handle;
    check(read == vm, || format!("a handle came back from its record as another one: {read:?}"))?;
    bench.try_out(&read, &vm.state, Operation::Stop).await?;
    Ok(())
}

async fn another_instance_knows_the_vm<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    let found = within("state", bench.options.grace, bench.another().state(&vm)).await??;
    check(found == vm.state, || format!("another instance says the VM is {found:?}"))?;
    let again = within("prepare", bench.options.grace, bench.another().prepare(&vm.spec)).await?;
    check(again.is_err(), || "another instance made a second VM of that name".into())?;
    bench.another().destroy(vm.clone()).await?;
    bench.check_destroyed(&vm).await
}

async fn the_console_is_where_the_capabilities_say<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let vm = bench.bring_to(Situation::Running).await?;
    let console = bench.backend.console_endpoint(&vm)?;
    let has = bench.capabilities().console;
    check(has == (console != ConsoleEndpoint::None), || {
        format!("the console is at {console:?}; console in the capabilities: {has}")
    })
}

async fn the_console_of_another_backends_vm_is_an_error<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let mut vm = bench.prepared().await?;
    vm.backend = BackendTag::custom("nobodys")?;
    let answer = bench.backend.console_endpoint(&vm);
    check(answer.is_err(), || format!("it answered {answer:?}"))
}

/// Fails unless two handles tell of the same run; in which order the forwards are listed means
/// nothing.
fn check_same_run(one: &VmHandle, two: &VmHandle) -> CaseResult {
    let sorted = |vm: &VmHandle| {
        vm.run.clone().map(|mut run: RunInfo| {
            run.forwards.sort_by_key(|it| (it.host, it.guest_port));
            run
        })
    };
    check(sorted(one) == sorted(two), || {
        format!("nothing was done, but the run was {:?} and is {:?} now", one.run, two.run)
    })
}
