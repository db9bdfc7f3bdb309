//! The console of the no-op backend: a guest that is not there prints and echoes, for `VmManager`
//! and for a client of its own.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmkit::spec::VmName;
use vmkit::store::Home;
use vmkit::{ConsoleEndpoint, Error, ErrorKind, Hypervisor, NoopHypervisor, VmHandle, VmManager, VmState};

use crate::common::spec;

const LIMIT: Duration = Duration::from_secs(60);

struct Console {
    noop: NoopHypervisor,
    manager: VmManager<NoopHypervisor>,
    name: VmName,
    temp: tempfile::TempDir,
}

impl Console {
    /// Starts a VM whose guest has a console.
    async fn of_running_vm() -> (Self, VmHandle) {
        let temp = tempfile::tempdir().unwrap();
        let noop = NoopHypervisor::new().with_consoles(temp.path().join("c"));
        let manager = VmManager::new(noop.clone(), Home::at(temp.path().join("home")).unwrap());
        let name = manager.create(spec()).await.unwrap().name().clone();
        let vm = manager.start(&name).await.unwrap();
        (Self { noop, manager, name, temp }, vm)
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.temp.path().join("c")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn socket_of(vm: &VmHandle) -> &Path {
    let ConsoleEndpoint::UnixSocket(path) = &vm.run.as_ref().unwrap().console else { panic!("{vm:?}") };
    path
}

fn client_of(vm: &VmHandle) -> UnixStream {
    let client = UnixStream::connect(socket_of(vm)).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client
}

fn log_of(vm: &VmHandle) -> String {
    std::fs::read_to_string(vm.console_log.as_ref().unwrap()).unwrap()
}

#[tokio::test]
async fn what_is_typed_is_echoed_and_logged() {
    let (console, vm) = Console::of_running_vm().await;
    let mut first = console.manager.attach_console(&console.name).await.unwrap();
    let mut second = console.manager.attach_console(&console.name).await.unwrap();
    first.send("root\r", LIMIT).await.unwrap();
    for client in [&mut first, &mut second] {
        let printed = client.wait_for("root\r\n", LIMIT).await.unwrap();
        assert!(printed.ends_with(b"root\r\n"), "{printed:?}");
    }
    assert_eq!(log_of(&vm), "web login: root\r\n");
}

#[tokio::test]
async fn each_run_begins_where_its_handle_says() {
    let (console, vm) = Console::of_running_vm().await;
    console.noop.print(&vm, "the first run\r\n").unwrap();
    console.manager.stop(&console.name, Duration::ZERO).await.unwrap();
    let vm = console.manager.start(&console.name).await.unwrap();
    console.noop.print(&vm, "the second run\r\n").unwrap();
    let mut client = console.manager.attach_console(&console.name).await.unwrap();
    let printed = client.wait_for("run\r\n", LIMIT).await.unwrap();
    assert_eq!(String::from_utf8(printed).unwrap(), "web login: the second run\r\n");
    assert_eq!(log_of(&vm), "web login: the first run\r\nweb login: the second run\r\n");
}

#[tokio::test]
async fn a_suspended_guest_reads_nothing_until_it_is_resumed() {
    let (console, vm) = Console::of_running_vm().await;
    let mut client = console.manager.attach_console(&console.name).await.unwrap();
    client.wait_for("login: ", LIMIT).await.unwrap();
    console.manager.suspend(&console.name).await.unwrap();
    client.send("root\r", LIMIT).await.unwrap();
    let refused = console.noop.print(&vm, "no").unwrap_err();
    assert!(matches!(&refused, Error::NotLive { state: VmState::Suspended, .. }), "{refused}");
    // Served by the same thread, which a client shows to have run since.
    let mut other = client_of(&vm);
    other.write_all(b"x").unwrap();
    assert_eq!(log_of(&vm), "web login: ");
    console.manager.resume(&console.name).await.unwrap();
    client.wait_for("root\r\n", LIMIT).await.unwrap();
    let mut echoed = [0; 1];
    other.read_exact(&mut echoed).unwrap();
}

#[tokio::test]
async fn a_saved_guest_goes_on_without_another_login() {
    let (console, vm) = Console::of_running_vm().await;
    console.manager.save(&console.name).await.unwrap();
    assert!(!socket_of(&vm).exists());
    let vm = console.manager.start(&console.name).await.unwrap();
    console.noop.print(&vm, "on it goes").unwrap();
    assert_eq!(log_of(&vm), "web login: on it goes");
}

#[tokio::test]
async fn the_socket_is_gone_with_the_run_however_that_ends() {
    let (console, vm) = Console::of_running_vm().await;
    for end in ["stop", "power off", "fail"] {
        let vm = console.noop.start(&vm).await.unwrap();
        let mode = socket_of(&vm).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = client_of(&vm);
        match end {
            "stop" => drop(console.noop.stop(&vm, Duration::ZERO).await.unwrap()),
            "power off" => console.noop.power_off_guest(&vm).unwrap(),
            _ => {
                let VmState::Failed { cause } = VmState::failed(vmkit::lifecycle::FailureKind::Other, "so")
                else {
                    unreachable!("it was made so")
                };
                console.noop.break_vm(&vm, cause).unwrap();
            }
        }
        let mut printed = Vec::new();
        // A client that was not accepted yet is reset.
        let _ = client.read_to_end(&mut printed);
        assert!(!socket_of(&vm).exists(), "{end}");
        let refused = console.noop.print(&vm, "no").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidState, "{end}: {refused}");
    }
    console.manager.remove(&console.name, true).await.unwrap();
    assert_eq!(console.files(), Vec::<PathBuf>::new(), "the log goes with the VM");
}

#[tokio::test]
async fn the_socket_is_gone_with_the_last_clone_of_the_backend() {
    let (console, vm) = Console::of_running_vm().await;
    let Console { noop, manager, temp: _temp, .. } = console;
    let mut client = client_of(&vm);
    drop(manager);
    assert!(socket_of(&vm).exists());
    drop(noop);
    assert!(!socket_of(&vm).exists());
    let _ = client.read_to_end(&mut Vec::new());
}

#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected_and_the_guest_goes_on() {
    let (console, vm) = Console::of_running_vm().await;
    let mut reader = console.manager.attach_console(&console.name).await.unwrap();
    let mut idle = client_of(&vm);
    // The guest knows of the client once it has echoed.
    idle.write_all(b"here").unwrap();
    reader.wait_for("here", LIMIT).await.unwrap();
    let noop = console.noop.clone();
    let flood = std::thread::spawn(move || {
        let (begun, line) = (Instant::now(), [b'.'; 4096]);
        // More than a socket holds.
        for _ in 0..512 {
            noop.print(&vm, line).unwrap();
        }
        noop.print(&vm, "the end").unwrap();
        begun.elapsed()
    });
    reader.wait_for("the end", LIMIT).await.unwrap();
    assert!(flood.join().unwrap() < LIMIT);
    let mut printed = Vec::new();
    idle.read_to_end(&mut printed).unwrap();
    assert!(!printed.ends_with(b"the end"));
}

#[tokio::test]
async fn a_console_that_cannot_be_created_leaves_the_vm_as_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("a".repeat(120));
    let noop = NoopHypervisor::new().with_consoles(&dir);
    let vm = noop.prepare(&spec()).await.unwrap();
    let error = noop.start(&vm).await.unwrap_err();
    assert!(error.to_string().contains(dir.to_str().unwrap()), "{error}");
    assert_eq!(noop.state(&vm).await.unwrap(), VmState::Prepared);
    let without = NoopHypervisor::new();
    let vm = without.prepare(&spec()).await.unwrap();
    let refused = without.print(&without.start(&vm).await.unwrap(), "no").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
}
