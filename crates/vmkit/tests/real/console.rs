//! A program at a guest's console, by the library.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::Instant;
use vmkit::spec::{MachineType, VmName};
use vmkit::store::Home;
use vmkit::{Error, ErrorKind, QemuHypervisor, VmManager, VmState};
use vmkit_testkit::guest;

use crate::harness::{LONG, Place};

/// What the guest's shell says when it waits to be typed to.
const PROMPT: &str = "vmkit-guest# ";

fn soon() -> Duration {
    LONG
}

async fn started(place: &Place) -> (VmManager<QemuHypervisor>, VmName) {
    let manager = VmManager::new(place.hypervisor(), Home::at(place.path()).unwrap());
    let vm = manager.create(guest::tiny().spec("web", MachineType::Q35, "").build().unwrap()).await.unwrap();
    manager.start(vm.name()).await.unwrap();
    (manager, vm.name().clone())
}

#[tokio::test(flavor = "current_thread")]
async fn a_program_types_and_waits_for_output() {
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

    let error = console.wait_for("never said", Duration::from_millis(200)).await.unwrap_err();
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

/// Compares what was handed over with the log byte for byte, and returns where in the log it ends.
///
/// QEMU logs a byte twice when it could not send it to a client at first, which then gets it once.
fn follows(said: &[u8], log: &[u8]) -> usize {
    let mut at = 0;
    for (index, byte) in said.iter().enumerate() {
        while at > 0 && at < log.len() && log[at] != *byte && log[at] == log[at - 1] {
            at += 1;
        }
        let around = |bytes: &[u8], at: usize| {
            let near = &bytes[at.saturating_sub(40).min(bytes.len())..(at + 40).min(bytes.len())];
            String::from_utf8_lossy(near).into_owned()
        };
        assert_eq!(log.get(at), Some(byte), "{:?}, and not {:?}", around(said, index), around(log, at));
        at += 1;
    }
    at
}

#[tokio::test(flavor = "current_thread")]
async fn a_console_delivers_the_log_byte_for_byte_however_often_a_client_attaches() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let mut console = manager.attach_console(&name).await.unwrap();
    console.wait_for(PROMPT, soon()).await.unwrap();
    let count = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done; echo all of $((2 * 1000))\n";
    console.send(count, soon()).await.unwrap();
    // What the guest has not taken when a client leaves, QEMU throws away.
    console.wait_for("line 9", soon()).await.unwrap();
    drop(console);
    let mut seen = Vec::new();
    for _ in 0..6 {
        let mut console = manager.attach_console(&name).await.unwrap();
        let mut said = Vec::new();
        let reading = async { while console.read_buf(&mut said).await.unwrap() > 0 {} };
        let _ = tokio::time::timeout(Duration::from_millis(150), reading).await;
        seen.push(said);
    }
    let mut console = manager.attach_console(&name).await.unwrap();
    let mut all = console.wait_for("all of 2000", soon()).await.unwrap();
    console.send("poweroff -f\n", soon()).await.unwrap();
    console.read_to_end(&mut all).await.unwrap();
    let vm = manager.wait(&name, vmkit::WaitCondition::Stopped, LONG).await.unwrap();
    let since = vm.console_since.expect("it is kept when the run has ended");
    let log = vmkit::tail_of_log_since(&vm.console_log.unwrap(), &since, u64::MAX).unwrap();
    seen.push(all);
    for said in &seen {
        follows(said, &log);
    }
    assert!(follows(seen.last().unwrap(), &log) == log.len(), "all of the log was handed over");
    manager.remove(&name, false).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn the_output_of_an_earlier_run_is_not_that_of_this_one() {
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
    let error = manager.wait(&name, vmkit::WaitCondition::Stopped, Duration::ZERO).await.unwrap_err();
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
async fn a_wait_for_a_guest_whose_hypervisor_is_killed_reports_how_it_ended() {
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
async fn a_watcher_notices_at_once_that_the_hypervisor_was_killed() {
    let place = Place::new();
    let (manager, name) = started(&place).await;
    let seen = manager.info(&name).await.unwrap();
    let pid = seen.run.as_ref().unwrap().pid.unwrap();
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let (changed, killed) = tokio::join!(manager.changed(&seen, LONG), async {
        // Time for the first look, which would see the end without an event.
        tokio::time::sleep(Duration::from_millis(100)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        Instant::now()
    });
    let changed = changed.unwrap();
    assert!(matches!(changed.state, VmState::Failed { .. }), "{}", changed.state);
    assert!(killed.elapsed() < Duration::from_secs(2), "heard of by the event, not at the next look");
    manager.remove(&name, true).await.unwrap();
}
