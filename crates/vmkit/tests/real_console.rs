//! A program at a guest's console, by the library.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod real;

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::Instant;
use vmkit::spec::{Machine, VmName};
use vmkit::store::Home;
use vmkit::{BackendTag, Error, ErrorKind, QemuHypervisor, VmManager, VmState};
use vmkit_testkit::guest;

use real::{LONG, Place};

/// What the guest's shell says when it waits to be typed to.
const PROMPT: &str = "vmkit-guest# ";

fn soon() -> Instant {
    Instant::now() + LONG
}

async fn started(place: &Place) -> (VmManager<QemuHypervisor>, VmName) {
    let manager = VmManager::new(place.hypervisor(), BackendTag::Qemu, Home::at(place.path()).unwrap());
    let vm = manager.create(guest::tiny().spec("web", Machine::Q35, "").build().unwrap()).await.unwrap();
    manager.start(vm.name()).await.unwrap();
    (manager, vm.name().clone())
}

#[tokio::test(flavor = "current_thread")]
async fn a_program_types_and_waits_for_what_is_said() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let mut console = manager.attach_console(&name).await.unwrap();
    let boot = console.wait_for(PROMPT, soon()).await.unwrap();
    assert!(String::from_utf8_lossy(&boot).contains(&guest::tiny().ready_line));

    let second = manager.attach_console(&name).await.unwrap_err();
    assert!(matches!(second, Error::Busy { holder: Some(pid), .. } if pid == std::process::id()), "{second}");

    console.send("echo $((6 * 7)) it is; echo $((6 * 8)) too\n", soon()).await.unwrap();
    let said = console.wait_for("42 it is", soon()).await.unwrap();
    assert!(said.ends_with(b"42 it is"));
    let said = console.wait_for("48 too", soon()).await.unwrap();
    assert!(!String::from_utf8_lossy(&said).contains("42 it is"), "what was waited for is read");

    let error =
        console.wait_for("never said", Instant::now() + Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("\"never said\" on the console of the VM `web`"), "{error}");
    assert!(error.to_string().contains(PROMPT.trim()), "{error}");

    drop(console);
    let mut console = manager.attach_console(&name).await.unwrap();
    let mut first = [0; 1];
    console.read_exact(&mut first).await.unwrap();
    console.wait_for("48 too", soon()).await.expect("what this run has said before is there");
    console.send("poweroff -f\n", soon()).await.unwrap();
    let ended = console.wait_for("never said", soon()).await.unwrap_err();
    assert!(matches!(ended, Error::Ended { state: VmState::Stopped, .. }), "{ended}");

    let error = manager.attach_console(&name).await.unwrap_err();
    assert!(matches!(error, Error::NotLive { state: VmState::Stopped, .. }), "{error}");
    manager.remove(&name, false).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn what_an_earlier_run_said_is_not_this_ones() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let mut console = manager.attach_console(&name).await.unwrap();
    console.wait_for(PROMPT, soon()).await.unwrap();
    console.send("echo $((1000 + 1)) first\n", soon()).await.unwrap();
    console.wait_for("1001 first", soon()).await.unwrap();
    drop(console);
    manager.stop(&name, Duration::ZERO).await.unwrap();

    manager.start(&name).await.unwrap();
    // Before the guest has said anything, what it said last time is no cause of anything.
    let error = manager.wait(&name, vmkit::Condition::Stopped, Duration::ZERO).await.unwrap_err();
    assert!(!error.to_string().contains("1001 first"), "{error}");
    let mut console = manager.attach_console(&name).await.unwrap();
    let said = console.wait_for(PROMPT, soon()).await.unwrap();
    assert!(!String::from_utf8_lossy(&said).contains("1001 first"));

    drop(console);
    let vm = manager.stop(&name, Duration::ZERO).await.unwrap();
    let (log, since) =
        (vm.console_log.unwrap(), vm.console_since.expect("it is kept when the run has ended"));
    let last = vmkit::tail_of_log_since(&log, &since, u64::MAX).unwrap();
    let all = vmkit::tail_of_log(&log, 1 << 20).unwrap();
    let has = |said: &[u8]| String::from_utf8_lossy(said).contains("1001 first");
    assert!(has(&all) && !has(&last) && all.ends_with(&last));
    manager.remove(&name, false).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn whoever_waits_for_a_guest_whose_hypervisor_is_killed_learns_how_it_ended() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let mut console = manager.attach_console(&name).await.unwrap();
    console.wait_for(PROMPT, soon()).await.unwrap();
    let pid = manager.info(&name).await.unwrap().run.unwrap().pid.unwrap();
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let error = console.wait_for("never said", soon()).await.unwrap_err();
    assert!(matches!(error, Error::Ended { state: VmState::Failed { .. }, .. }), "{error:?}");
    assert!(error.to_string().contains("\"never said\" on the console of the VM `web`"), "{error}");
    manager.remove(&name, true).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_watcher_hears_at_once_that_somebody_killed_the_hypervisor() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let seen = manager.info(&name).await.unwrap();
    let pid = seen.run.as_ref().unwrap().pid.unwrap();
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let (changed, killed) = tokio::join!(manager.changed(&seen, LONG), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        Instant::now()
    });
    let changed = changed.unwrap();
    assert!(matches!(changed.state, VmState::Failed { .. }), "{}", changed.state);
    assert!(killed.elapsed() < Duration::from_secs(2), "heard of by the event, not at the next look");
    manager.remove(&name, true).await.unwrap();
}
