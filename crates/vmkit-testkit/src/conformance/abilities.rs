//! What a backend can do beside the contract, as far as its abilities say that it can: a case about
//! an ability that is not there has nothing to find.

use std::time::Duration;

use tokio::time::timeout;
use vmkit::abilities::{Abilities, ClockState};
use vmkit::lifecycle::Operation;
use vmkit::store::Home;
use vmkit::{Backend, BackendTag, Error, ErrorKind, VmHandle, VmManager, VmState};

use super::bench::{CaseBench, CaseStop, Situation, check, within};
use super::{CaseResult, ConformanceCase, cases};

/// How long an agent that may not be there has to respond.
const AGENT_LIMIT: Duration = Duration::from_millis(200);
/// How long a guest that is not reset is watched.
const RESET_LIMIT: Duration = Duration::from_millis(100);
/// How long a clock may take beside the resume.
const CLOCK_LIMIT: Duration = Duration::from_secs(20);
/// How much of a console's past is read, in bytes.
const TAIL_BYTES: u64 = 64;

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    cases![
        preflight_accepts_what_prepare_and_start_accept,
        a_forward_is_in_force_until_it_is_removed,
        an_agent_responds_or_not_in_time,
        a_guest_that_is_not_reset_is_not_reported_as_reset,
        a_resume_that_sets_the_clock_is_a_resume,
        the_room_of_a_guest_on_disk_is_known_while_it_is_saved,
        the_past_of_a_console_is_there_while_the_vm_lives,
        a_line_printed_before_attaching_is_heard_over_the_manager,
    ]
}

fn abilities<H: Backend>(bench: &CaseBench<H>) -> Abilities<'_> {
    let tag: BackendTag = bench.backend.tag();
    bench.backend.abilities(&tag)
}

async fn preflight_accepts_what_prepare_and_start_accept<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(preflight) = abilities(bench).preflight() else { return Ok(()) };
    let spec = bench.spec();
    within("check_spec", bench.options.grace, preflight.check_spec(&spec)).await??;
    let vm = bench.prepare(&spec).await??;
    let started = bench.apply(&vm, Operation::Start).await??;
    for vm in [&vm, &started] {
        within("check_restart", bench.options.grace, preflight.check_restart(vm)).await??;
        let found = bench.state(vm).await?;
        check(found == started.state, || format!("the VM is {found:?} after it was checked"))?;
    }
    bench.check_guests(&started, 1)
}

async fn a_forward_is_in_force_until_it_is_removed<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(forwarding) = abilities(bench).port_forwarding() else { return Ok(()) };
    let Some(forward) = &bench.options.forward else {
        return Err(CaseStop::Skipped("the suite was not told a port to forward".into()));
    };
    let leads = |vm: &VmHandle| {
        let forwards = vm.run.iter().flat_map(|run| &run.forwards);
        forwards.filter(|it| it.guest_port == forward.guest_port).count()
    };
    let mut vm = bench.bring_to(Situation::Running).await?;
    // Twice each: what is so already is success.
    for _ in 0..2 {
        vm = within("add_forward", bench.options.grace, forwarding.add_forward(&vm, forward)).await??;
        check(leads(&vm) == 1, || format!("added, and in force are {:?}", vm.run))?;
    }
    for _ in 0..2 {
        vm = within("remove_forward", bench.options.grace, forwarding.remove_forward(&vm, forward)).await??;
        check(leads(&vm) == 0, || format!("removed, and in force are {:?}", vm.run))?;
    }
    let vm = bench.apply(&vm, Operation::Stop).await??;
    let late = within("add_forward", bench.options.grace, forwarding.add_forward(&vm, forward)).await?;
    check_refused("add_forward of a stopped VM", &late)
}

async fn an_agent_responds_or_not_in_time<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(agent) = abilities(bench).guest_agent() else { return Ok(()) };
    let vm = bench.bring_to(Situation::Running).await?;
    let asked = agent.agent_responds(&vm, AGENT_LIMIT);
    let asked = within("agent_responds", AGENT_LIMIT + bench.options.grace, asked).await?;
    let kind = asked.as_ref().err().map(Error::kind);
    check(matches!(kind, None | Some(ErrorKind::Unsupported)), || {
        format!("agent_responds returned {asked:?}, neither yes nor no nor Unsupported")
    })
}

async fn a_guest_that_is_not_reset_is_not_reported_as_reset<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(events) = abilities(bench).reset_events() else { return Ok(()) };
    let vm = bench.bring_to(Situation::Running).await?;
    match timeout(RESET_LIMIT, events.guest_reset(&vm)).await {
        Err(_) => Ok(()),
        Ok(reported) => Err(CaseStop::Failed(format!("guest_reset returned {reported:?}"))),
    }
}

async fn a_resume_that_sets_the_clock_is_a_resume<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(clock) = abilities(bench).guest_clock() else { return Ok(()) };
    let vm = bench.bring_to(Situation::Suspended).await?;
    let limit = CLOCK_LIMIT + bench.options.grace;
    for what in ["suspended", "running"] {
        let resumed = clock.resume_and_set_clock(&vm, None);
        let resumed = within("resume_and_set_clock", limit, resumed).await??;
        let found = bench.state(&vm).await?;
        check(resumed.vm.state == VmState::Running && found == VmState::Running, || {
            format!("a {what} VM was resumed to {:?}, and is {found:?}", resumed.vm.state)
        })?;
        check(what == "suspended" || resumed.clock == ClockState::Right, || {
            "the clock of a VM that was running already is said to be unknown".to_owned()
        })?;
    }
    let vm = bench.apply(&vm, Operation::Stop).await??;
    let late = within("resume_and_set_clock", limit, clock.resume_and_set_clock(&vm, None)).await?;
    check_refused("resume_and_set_clock of a stopped VM", &late)
}

async fn the_room_of_a_guest_on_disk_is_known_while_it_is_saved<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let Some(disk) = abilities(bench).save_to_disk() else { return Ok(()) };
    let saved = bench.bring_to(Situation::Saved).await?;
    let bytes = within("saved_bytes", bench.options.grace, disk.saved_bytes(&saved)).await??;
    check(bytes.is_some(), || "the room of a saved guest is unknown".to_owned())?;
    let started = bench.apply(&saved, Operation::Start).await??;
    let bytes = within("saved_bytes", bench.options.grace, disk.saved_bytes(&started)).await??;
    check(bytes.is_none(), || format!("a guest that runs takes {bytes:?} bytes on disk"))
}

async fn the_past_of_a_console_is_there_while_the_vm_lives<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let Some(history) = abilities(bench).console_history() else { return Ok(()) };
    let vm = bench.bring_to(Situation::Running).await?;
    let tail = within("console_tail", bench.options.grace, history.console_tail(&vm, TAIL_BYTES)).await??;
    check(tail.len() as u64 <= TAIL_BYTES, || format!("console_tail returned {} bytes", tail.len()))?;
    for _ in 0..2 {
        let attached = history.attach_console(&vm, TAIL_BYTES);
        drop(within("attach_console", bench.options.grace, attached).await??);
    }
    let found = bench.state(&vm).await?;
    check(found == vm.state, || format!("the VM is {found:?} after its console was attached"))
}

/// The line is in the past of the console, or comes by it: a caller that waits for it hears it in
/// either case.
async fn a_line_printed_before_attaching_is_heard_over_the_manager<H: Backend + 'static>(
    bench: &CaseBench<H>,
) -> CaseResult {
    if !bench.capabilities().console {
        return Ok(());
    }
    let Some(print) = &bench.options.print else {
        return Err(CaseStop::Skipped("the suite was not told how to have a guest print a line".into()));
    };
    let temporary = tempfile::tempdir().map_err(Error::io("create", "a temporary directory"))?;
    let home = bench.options.home.as_deref().unwrap_or(temporary.path());
    let manager = VmManager::new(bench.another(), Home::at(home)?);
    let vm = manager.create(bench.spec()).await?;
    bench.remember(&vm);
    let name = vm.name().clone();
    let vm = manager.start(&name).await?;
    let line = print(&vm);
    for client in ["first", "second"] {
        let mut console = manager.attach_console(&name).await?;
        let heard = console.wait_for(&line, bench.options.start_limit).await;
        heard.map_err(|error| {
            CaseStop::Failed(format!("the {client} client did not hear {line:?}: {error}"))
        })?;
    }
    Ok(manager.remove(&name, true).await?)
}

fn check_refused<T: std::fmt::Debug>(what: &str, answer: &vmkit::Result<T>) -> CaseResult {
    let kind = answer.as_ref().err().map(Error::kind);
    check(kind == Some(ErrorKind::InvalidState), || format!("{what} returned {answer:?}, not InvalidState"))
}
