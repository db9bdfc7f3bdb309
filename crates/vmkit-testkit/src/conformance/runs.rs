//! What is known of a run: each field of [`RunInfo`], the SSH server at `guest_ip`, and a run that
//! its guest ends.

use std::io;
use std::net::TcpStream;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmkit::lifecycle::Operation;
use vmkit::spec::{Accel, NetworkConfig, Protocol};
use vmkit::store::Home;
use vmkit::{
    Backend, ConsoleEndpoint, Error, ErrorKind, RunInfo, VmHandle, VmManager, VmState, VncAddress,
    WaitCondition,
};

use super::bench::{CaseBench, CaseStop, Situation, check, within};
use super::{CaseResult, ConformanceCase, cases};

/// How long until a state is asked for again: the trait has no event for its end.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// How long a port of this host has to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn cases<H: Backend + 'static>() -> Vec<ConformanceCase<H>> {
    cases![
        the_process_of_a_run_lives_as_long_as_the_run,
        the_accelerator_of_a_run_is_the_one_in_use,
        the_console_of_a_run_is_the_one_of_console_endpoint,
        the_stream_of_a_console_ends_with_the_run_and_not_with_a_pause,
        the_sockets_of_a_run_are_there_while_it_lives,
        the_screen_of_a_run_is_where_the_run_says,
        the_forwards_of_a_run_are_those_of_its_spec,
        ssh_is_found_by_what_the_backend_says_of_the_guest,
        a_guest_that_powers_itself_off_is_stopped_and_starts_again,
    ]
}

/// Returns a running VM with its run.
async fn running<H: Backend>(bench: &CaseBench<H>) -> Result<(VmHandle, RunInfo), CaseStop> {
    let vm = bench.bring_to(Situation::Running).await?;
    let run = vm.run.clone().ok_or_else(|| CaseStop::Failed("a running VM has no run".into()))?;
    Ok((vm, run))
}

async fn the_process_of_a_run_lives_as_long_as_the_run<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (vm, run) = running(bench).await?;
    let Some(pid) = run.pid else { return Ok(()) };
    check(pid != std::process::id(), || "the process of the run is the caller's".to_owned())?;
    if !cfg!(target_os = "linux") {
        return Err(CaseStop::Skipped("only Linux shows whether a process has ended".into()));
    }
    check(lives(pid), || format!("the VM runs, and its process {pid} does not"))?;
    within("stop", bench.options.grace, bench.backend.stop(&vm, Duration::ZERO)).await??;
    let ended = async {
        while lives(pid) {
            sleep(ASK_AGAIN).await;
        }
    };
    within("the process of a stopped VM", bench.options.grace, ended).await
}

/// Returns whether a process runs; one that its parent has not waited for does not.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

async fn the_accelerator_of_a_run_is_the_one_in_use<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (vm, run) = running(bench).await?;
    check(run.accel != Some(Accel::Auto), || "the accelerator of a run is `auto`".to_owned())?;
    let wanted = vm.spec.accel();
    check(run.accel.is_none() || wanted == Accel::Auto || run.accel == Some(wanted), || {
        format!("the spec asks for {wanted:?}, and the run has {:?}", run.accel)
    })
}

async fn the_console_of_a_run_is_the_one_of_console_endpoint<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (vm, run) = running(bench).await?;
    let endpoint = bench.backend.console_endpoint(&vm)?;
    check(run.console == endpoint, || {
        format!("the run has the console {:?}, and console_endpoint returns {endpoint:?}", run.console)
    })?;
    match &run.console {
        ConsoleEndpoint::UnixSocket(path) => check_socket("the console", path),
        _ => Ok(()),
    }
}

async fn the_stream_of_a_console_ends_with_the_run_and_not_with_a_pause<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let (vm, run) = running(bench).await?;
    let ConsoleEndpoint::UnixSocket(path) = &run.console else { return Ok(()) };
    let mut client = UnixStream::connect(path).await.map_err(Error::io("connect to", path))?;
    let is_open = |client: &UnixStream| loop {
        match client.try_read(&mut [0; 4096]) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    };
    check(is_open(&client), || format!("the console at {path:?} of a VM that runs is closed"))?;
    if bench.capabilities().suspend {
        let vm = bench.apply(&vm, Operation::Suspend).await??;
        check(is_open(&client), || "the console's stream ended with a pause".to_owned())?;
        bench.apply(&vm, Operation::Resume).await??;
        check(is_open(&client), || "the console's stream ended with a resume".to_owned())?;
    }
    within("stop", bench.options.grace, bench.backend.stop(&vm, Duration::ZERO)).await??;
    let ended = async {
        let mut printed = vec![0; 4096];
        // A reset is an end as well: what was typed was not read.
        while client.read(&mut printed).await.is_ok_and(|bytes| bytes > 0) {}
    };
    within("the console's stream of a stopped VM", bench.options.grace, ended).await
}

async fn the_sockets_of_a_run_are_there_while_it_lives<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (_, run) = running(bench).await?;
    for (what, path) in [("the agent's channel", &run.agent), ("the monitor", &run.monitor)] {
        if let Some(path) = path {
            check_socket(what, path)?;
        }
    }
    Ok(())
}

async fn the_screen_of_a_run_is_where_the_run_says<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (_, run) = running(bench).await?;
    match &run.vnc {
        Some(VncAddress::Unix(path)) => check_socket("the screen", path),
        Some(VncAddress::Tcp { addr, password_file }) => {
            check(addr.ip().is_loopback(), || format!("the screen is served beyond loopback, at {addr}"))?;
            check(password_file.is_file(), || format!("there is no password file {password_file:?}"))?;
            let connected = TcpStream::connect_timeout(&(*addr).into(), CONNECT_LIMIT);
            check(connected.is_ok(), || format!("the screen at {addr} can't be connected to: {connected:?}"))
        }
        _ => Ok(()),
    }
}

fn check_socket(what: &str, path: &Path) -> CaseResult {
    let found = std::fs::metadata(path).map(|found| found.file_type().is_socket());
    check(path.is_absolute() && matches!(found, Ok(true)), || {
        format!("{what} of a VM that runs is not a socket at the absolute path {path:?}: {found:?}")
    })
}

async fn the_forwards_of_a_run_are_those_of_its_spec<H: Backend>(bench: &CaseBench<H>) -> CaseResult {
    let (vm, run) = running(bench).await?;
    let wanted = match vm.spec.network() {
        NetworkConfig::User(network) => network.forwards.as_slice(),
        _ => &[],
    };
    if run.forwards.is_empty() {
        return Ok(());
    }
    check(run.forwards.len() == wanted.len(), || {
        format!("the spec has the forwards {wanted:?}, and the run {:?}", run.forwards)
    })?;
    for wanted in wanted {
        let is_it = |active: &&vmkit::ActiveForward| {
            let port = wanted.host_port.is_none_or(|port| port.get() == active.host.port());
            active.protocol == wanted.protocol
                && active.guest_port == wanted.guest_port
                && *active.host.ip() == wanted.host_addr
                && port
                && active.host.port() != 0
        };
        let Some(active) = run.forwards.iter().find(is_it) else {
            return Err(CaseStop::Failed(format!("{wanted:?} is not among {:?}", run.forwards)));
        };
        if active.protocol == Protocol::Tcp {
            let connected = TcpStream::connect_timeout(&active.host.into(), CONNECT_LIMIT);
            check(connected.is_ok(), || format!("nothing listens at {}: {connected:?}", active.host))?;
        }
    }
    Ok(())
}

/// A caller finds the server by a forward to its port, else at the address of `guest_ip`.
async fn ssh_is_found_by_what_the_backend_says_of_the_guest<H: Backend + 'static>(
    bench: &CaseBench<H>,
) -> CaseResult {
    if !bench.options.serves_ssh {
        return Err(CaseStop::Skipped("the suite's guests run no SSH server".into()));
    }
    let temporary = tempfile::tempdir().map_err(Error::io("create", "a temporary directory"))?;
    let home = bench.options.home.as_deref().unwrap_or(temporary.path());
    let manager = VmManager::new(bench.another(), Home::at(home)?);
    let vm = manager.create(bench.spec()).await?;
    bench.remember(&vm);
    let name = vm.name().clone();
    manager.start(&name).await?;
    manager.wait(&name, WaitCondition::Ssh, bench.options.start_limit).await?;
    Ok(manager.remove(&name, true).await?)
}

async fn a_guest_that_powers_itself_off_is_stopped_and_starts_again<H: Backend>(
    bench: &CaseBench<H>,
) -> CaseResult {
    let Some(off) = &bench.options.power_off else {
        return Err(CaseStop::Skipped("the suite has no guest that powers itself off".into()));
    };
    let vm = bench.prepare(&(off.spec)(bench.spec().name().clone())).await??;
    let started = bench.apply(&vm, Operation::Start).await??;
    (off.trigger)(&started);
    let ended = async {
        loop {
            match bench.state(&vm).await? {
                VmState::Running => sleep(ASK_AGAIN).await,
                state => return Ok::<_, CaseStop>(state),
            }
        }
    };
    let limit = bench.options.start_limit + bench.options.grace;
    let Ok(state) = timeout(limit, ended).await else {
        let problem = format!("a guest that was to power itself off runs after {} s", limit.as_secs());
        return Err(CaseStop::Failed(problem));
    };
    let state = state?;
    check(state == VmState::Stopped, || format!("a guest powered itself off, and its VM is {state:?}"))?;
    let address = within("guest_ip", bench.options.grace, bench.backend.guest_ip(&started)).await?;
    let kind = address.as_ref().err().map(Error::kind);
    check(matches!(kind, Some(ErrorKind::InvalidState | ErrorKind::Unsupported)), || {
        format!("guest_ip of a VM whose guest powered itself off returned {address:?}")
    })?;
    bench.try_out(&started, &VmState::Stopped, Operation::Stop).await?;
    bench.check_guests(&started, 0)?;
    let again = bench.apply(&started, Operation::Start).await??;
    check(again.run.is_some(), || "a start after that has no run".to_owned())
}
