//! The manager is killed before every single step of every operation, and its files fail one by
//! one.

use std::io;
use std::path::Path;

use crate::common::{LIVES, World, operate, web};
use tokio::runtime::{Builder, Runtime};
use vmkit::{Error, ErrorKind};
use vmkit_testkit::crash::{self, FaultDuration, StepFault};

/// One thread, since steps are counted by thread.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn prepared(dir: &Path, words: &[&str]) -> World {
    let world = World::at(dir);
    for word in words {
        runtime().block_on(operate(&world.manager, word)).unwrap();
    }
    world
}

/// Returns the state that the list shows; `""` where it shows no VM.
fn listed(world: &World) -> &'static str {
    let list = runtime().block_on(world.manager.list()).unwrap();
    assert!(list.len() <= 1, "{list:?}");
    list.first().map_or("", |listed| listed.handle.as_ref().unwrap().state.name())
}

/// Checks that nothing but the empty directories is left once the VM is removed.
fn assert_removable(world: &World, place: &str) {
    match runtime().block_on(world.manager.remove(&web(), true)) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{place}: {error:?}"),
        _ => assert!(world.remains().is_empty(), "{place}: {:?}", world.remains()),
    }
}

/// The test that is killed: with a task it does what the task says, without one a whole life.
#[test]
fn a_whole_life_leaves_nothing() {
    let Some(task) = crash::task() else {
        let temp = tempfile::tempdir().unwrap();
        let words = ["create", "start", "suspend", "resume", "restart", "stop", "start", "remove"];
        let world = prepared(temp.path(), &words);
        assert!(world.remains().is_empty(), "{:?}", world.remains());
        return;
    };
    let world = World::at(&task.dir);
    task.arm();
    runtime().block_on(operate(&world.manager, &task.scenario)).unwrap();
}

#[test]
fn after_a_kill_the_state_is_true_and_the_vm_can_be_used_or_removed() {
    for (word, before, allowed) in LIVES {
        for goes_on in [true, false] {
            let check = |dir: &Path, place: &str| {
                let world = World::at(dir);
                let state = listed(&world);
                assert!(allowed.contains(&state), "{place}: {state}");
                if goes_on {
                    go_on(&world, word, state, place);
                }
                assert_removable(&world, place);
            };
            let prepare = |dir: &Path| drop(prepared(dir, before));
            crash::kill_at_every_step("crash::a_whole_life_leaves_nothing", word, prepare, check);
        }
    }
}

/// Does the same again, as a person would, and checks that it now is as if nothing had happened.
fn go_on(world: &World, word: &str, state: &str, place: &str) {
    let again = runtime().block_on(operate(&world.manager, word));
    let is_done = matches!((word, state), ("create", "prepared") | ("remove", ""));
    match again {
        Err(error) if is_done => {
            let kinds = [ErrorKind::AlreadyExists, ErrorKind::NotFound];
            assert!(kinds.contains(&error.kind()), "{place}: {error:?}");
        }
        again => again.unwrap_or_else(|error| panic!("{place}: {error:?}")),
    }
    let reached = match word {
        "create" => "prepared",
        "start" | "restart" | "resume" | "reconfigure" => "running",
        "stop" => "stopped",
        "suspend" => "suspended",
        _ => "",
    };
    assert_eq!(listed(world), reached, "{place}");
    assert!(world.temporaries().is_empty(), "{place}: {:?}", world.temporaries());
    if reached == "running" || reached == "suspended" {
        let vm = runtime().block_on(world.manager.info(&web())).unwrap();
        assert!(vm.run.is_some(), "{place}: the facts of the run are lost");
    }
}

#[test]
fn what_waits_for_the_next_start_outlives_a_kill_at_any_step_of_it() {
    let check = |dir: &Path, place: &str| {
        let world = World::at(dir);
        let vm = runtime().block_on(world.manager.info(&web())).unwrap();
        let is_so = vm.spec.cpus() == 2 && vm.next_spec.is_none();
        let waits = vm.spec.cpus() == 1 && vm.next_spec.is_some_and(|next| next.cpus() == 2);
        assert!(is_so || waits, "{place}");
        runtime().block_on(operate(&world.manager, "restart")).unwrap();
        let vm = runtime().block_on(world.manager.info(&web())).unwrap();
        assert_eq!((vm.spec.cpus(), vm.next_spec), (2, None), "{place}");
        assert_removable(&world, place);
    };
    let prepare = |dir: &Path| drop(prepared(dir, &["create", "start", "reconfigure"]));
    crash::kill_at_every_step("crash::a_whole_life_leaves_nothing", "restart", prepare, check);
}

#[test]
fn a_start_that_was_killed_can_be_followed_by_any_operation() {
    for (next, reached) in
        [("suspend", "suspended"), ("resume", "running"), ("stop", "stopped"), ("restart", "running")]
    {
        let check = |dir: &Path, place: &str| {
            let world = World::at(dir);
            let was = listed(&world);
            let outcome = runtime().block_on(operate(&world.manager, next));
            match outcome {
                // It had not come to the boot yet.
                Err(error) if was != "running" => {
                    assert_eq!(error.kind(), ErrorKind::InvalidState, "{place}")
                }
                outcome => {
                    outcome.unwrap_or_else(|error| panic!("{place}: {error:?}"));
                    assert_eq!(listed(&world), reached, "{place}");
                }
            }
            assert_removable(&world, place);
        };
        let prepare = |dir: &Path| drop(prepared(dir, &["create"]));
        crash::kill_at_every_step("crash::a_whole_life_leaves_nothing", "start", prepare, check);
    }
}

#[test]
fn a_failing_system_never_leaves_an_unfinished_or_a_lost_vm() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for lasting in [FaultDuration::Once, FaultDuration::FromThenOn] {
            for (word, before, allowed) in LIVES {
                fail_each_step(word, before, allowed, lasting, kind);
            }
        }
    }
}

fn fail_each_step(
    word: &str,
    before: &[&str],
    allowed: &[&str],
    lasting: FaultDuration,
    kind: io::ErrorKind,
) {
    for at in 1.. {
        let temp = tempfile::tempdir().unwrap();
        let world = prepared(temp.path(), before);
        let was = listed(&world);
        let fault = StepFault::at(at, lasting, kind);
        let outcome = runtime().block_on(operate(&world.manager, word));
        let Some(step) = fault.failed() else {
            assert!(at > 1, "`{word}` took no step");
            return outcome.unwrap();
        };
        drop(fault);
        let place = format!("{word}, step {at} `{step}` failed {lasting:?} with {kind}: {outcome:?}");
        check_after_fault(&world, word, was, allowed, lasting, &outcome, &place);
        assert_removable(&world, &place);
    }
}

fn check_after_fault(
    world: &World,
    word: &str,
    was: &str,
    allowed: &[&str],
    lasting: FaultDuration,
    outcome: &Result<(), Error>,
    place: &str,
) {
    let state = listed(world);
    assert!(allowed.contains(&state), "{place}: {state}");
    if let Err(error) = outcome {
        assert!(matches!(error.kind(), ErrorKind::Host | ErrorKind::Io), "{place}");
    }
    match word {
        "create" if lasting == FaultDuration::Once && outcome.is_err() => {
            assert!(world.remains().is_empty(), "{place}: {:?}", world.remains());
        }
        "create" | "remove" => {}
        // What could not be written down is asked of reality, and a guest is never ended for it.
        _ if was == "running" && word != "stop" && word != "restart" => {
            assert_ne!(state, "stopped", "{place}")
        }
        _ => go_on(world, word, state, place),
    }
}

#[test]
fn a_guest_that_runs_is_kept_when_that_can_not_be_written_down() {
    let temp = tempfile::tempdir().unwrap();
    let world = prepared(temp.path(), &["create"]);
    let last_write = (1..).find(|at| {
        let fault = StepFault::at(*at, FaultDuration::FromThenOn, io::ErrorKind::StorageFull);
        runtime().block_on(operate(&world.manager, "start")).is_ok() && fault.failed().is_some()
    });
    assert!(last_write.is_some());
    assert_eq!((listed(&world), world.boots()), ("running", 1));
    runtime().block_on(operate(&world.manager, "start")).unwrap();
    assert_eq!(world.boots(), 1);
    let vm = runtime().block_on(world.manager.info(&web())).unwrap();
    assert!(vm.run.is_some(), "the next command has healed the record");
}

#[test]
fn twenty_processes_that_start_one_vm_boot_it_once() {
    let temp = tempfile::tempdir().unwrap();
    let world = prepared(temp.path(), &["create"]);
    let begin = |_| crash::spawn("crash::a_whole_life_leaves_nothing", "start", temp.path(), 0).unwrap();
    let children: Vec<_> = (0..20).map(begin).collect();
    for child in children {
        crash::assert_passed(&child.wait_with_output().unwrap());
    }
    assert_eq!((listed(&world), world.boots()), ("running", 1));
}

#[test]
fn twenty_processes_that_create_one_name_make_one_vm() {
    let temp = tempfile::tempdir().unwrap();
    let begin = |_| crash::spawn("crash::a_whole_life_leaves_nothing", "create", temp.path(), 0).unwrap();
    let children: Vec<_> = (0..20).map(begin).collect();
    let outputs = children.into_iter().map(|child| child.wait_with_output().unwrap());
    let (made, refused): (Vec<_>, Vec<_>) = outputs.partition(|output| output.status.success());
    assert_eq!(made.len(), 1);
    for output in &refused {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("AlreadyExists"), "{said}");
    }
    let world = World::at(temp.path());
    assert_eq!(listed(&world), "prepared");
    assert_removable(&world, "after twenty creations");
}
