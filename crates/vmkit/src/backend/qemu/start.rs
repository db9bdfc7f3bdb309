//! Starting a planned VM: lock, sockets, tap, keeper, greeting, in this order, each with its undo.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use serde_json::json;
use tokio::time::Instant;

use super::facts::descriptor;
use super::layout::{QemuLayout, short_id};
use super::plan::QemuPlan;
use super::prepare::{check_port, remove_run_dir};
use super::qmp::client::QmpClient;
use super::qmp::wire::bind;
use super::saved::{ClaimedGuest, SavedGuest};
use super::stop::{LAUNCH_LIMIT, mark_asked};
use super::{QemuDetails, QemuHypervisor, wanted_disk, wanted_run};
use super::{disks, elsewhere, events, layers, prepare, recovery, renewal, save, saved, status, words};
use crate::abilities::{ClockState, ClockedVm};
use crate::backend::supervise::alive;
use crate::backend::supervise::files::{make_private_dir, remove_file};
use crate::backend::supervise::keeper::KeeperRequest;
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::{runfile, spawn};
use crate::blocking::BlockingWork;
use crate::boundedlog::tail_of_file;
use crate::error::{Error, ErrorKind, Peer, Result};
use crate::handle::{ActiveForward, ConsoleEndpoint, RunInfo, VmHandle, VncAddress};
use crate::host::holder::file_holder;
use crate::input_file::open_regular;
use crate::lifecycle::{FailureKind, Operation, VmState};
use crate::network::open_tap;
use crate::spec::{Accel, MachineType, NetworkConfig, VmSpec, Vnc};
use crate::steps::step;
use crate::store::refuse_other_user;

/// The size limit of QEMU's own log.
const QEMU_LOG_BYTES: u64 = 1 << 20;
/// VNC uses only this many letters of a password. Source: RFC 6143, 7.2.2.
const VNC_PASSWORD_LETTERS: usize = 8;
/// How much of the end of QEMU's log is in an error.
const LAST_WORDS_BYTES: u64 = 2048;

impl QemuHypervisor {
    /// Starts a VM: boots it, or continues its saved guest and sets the guest's clock.
    pub(super) async fn start_and_set_clock(&self, vm: &VmHandle) -> Result<ClockedVm> {
        let details = self.details(vm)?;
        let layout = &details.layout;
        let deadline = Instant::now() + self.0.start_limit;
        refuse_other_user(&layout.work)?;
        let lock = self.start_lock(vm.id);
        let _one = lock.lock().await;
        let mut saved = None;
        match self.allowed(vm, Operation::Start).await {
            Ok(VmState::Running) => {
                recovery::recover_running(vm, layout).await?;
                return self.adopted(vm, deadline).await;
            }
            // The guest waits for space on its disk, and still has unwritten data.
            Ok(VmState::Failed { cause })
                if cause.kind == FailureKind::DiskError && status::go_on(vm, layout).await =>
            {
                return self.adopted(vm, deadline).await;
            }
            // The QEMU of a panicked guest still runs.
            Ok(VmState::Failed { .. }) => process::kill(&layout.place()).await?,
            Ok(VmState::Saved) => saved = Some(ClaimedGuest::claim(layout, vm.name())?),
            Ok(_) => {}
            // An interrupted save, or the start of a saved guest, has left it paused.
            Err(Error::Transition(refused))
                if refused.state == VmState::Suspended && saved::was_begun(layout) =>
            {
                return self.unpause(vm, None).await;
            }
            // Another process is starting the VM: the lock shows with which result.
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) => return Err(error),
        }
        self.start_process(vm, details, saved, deadline).await
    }

    /// Returns a VM that another process has started, or is starting.
    pub(super) async fn adopted(&self, vm: &VmHandle, deadline: Instant) -> Result<ClockedVm> {
        // The other start may have used another directory.
        let layout = self.details(vm)?.layout;
        let run = adopt(vm, &layout, deadline).await?;
        let vm = Self::handle(vm, VmState::Running, &layout, Some(run));
        Ok(ClockedVm { vm, clock: ClockState::Right })
    }

    /// Starts a VM of which no process runs.
    async fn start_process(
        &self,
        vm: &VmHandle,
        mut details: QemuDetails,
        saved: Option<ClaimedGuest>,
        deadline: Instant,
    ) -> Result<ClockedVm> {
        let keeper = spawn::keeper_program(self.0.keeper.as_deref())?;
        let facts = self.facts(&vm.spec).await?;
        elsewhere::refuse_linked(vm, &details.layout)?;
        let place = details.layout.place();
        let alive = match &saved {
            // What runs is the rest of an interrupted save or start.
            Some(_) => Some(alive::take_and_silence(&place, deadline).await?),
            None => alive::take_unless_live(&place, deadline).await?,
        };
        let Some(alive) = alive else { return self.adopted(vm, deadline).await };
        // A process that removed the VM in the meantime held the lock for it.
        elsewhere::check_owner(vm, &details.layout, Operation::Start)?;
        elsewhere::refuse_twin(vm, &details.layout)?;
        refuse_half_restored(&details.layout)?;
        layers::settle(&layers::own_disks(&vm.spec, &details.layout))?;
        remove_file(&details.layout.frozen_mark())?;
        disks::check_own_files(&vm.spec, &details.layout)?;
        prepare::check_network(&vm.spec).await?;
        details.base = disks::check_files(&vm.spec, &details.media, details.base.as_ref()).await?;
        let guest = saved.as_ref().map(|saved| &saved.guest);
        match guest {
            Some(guest) => guest.check(&vm.spec, &details.layout, &facts)?,
            None => {
                saved::remove_leftovers(&details.layout)?;
                // It boots, and cloud-init gives it an identity.
                remove_file(&details.layout.identity_mark())?;
                remove_file(&details.layout.parked_mark())?;
            }
        }
        let plan = self.plan_run(vm, &details, &facts, guest)?;
        // Remains of an earlier run, or of a crash: nothing runs now, since this process holds the
        // lock.
        self.remove_sockets(vm)?;
        prepare::update(&plan)?;
        if let Some(guest) = guest.filter(|_| !plan.update.is_empty()) {
            guest.clone().keep_disks(&vm.spec, &plan.layout)?;
        }
        details.layout = plan.layout.clone();
        details.seed_run = wanted_run(&vm.spec);
        details.disk = wanted_disk(&vm.spec).or(details.disk);
        let checked = guest.map(|guest| save::check_memory(&plan.layout, guest)).transpose()?;
        let run = start(vm, &plan, &keeper, alive, deadline).await?;
        let mut clock = ClockState::Right;
        if let (Some(guest), Some(checked)) = (guest, checked) {
            clock = continue_guest(vm, &plan.layout, guest, checked).await?;
        }
        let mut started = vm.clone();
        details.keep_in(&mut started);
        let vm = Self::handle(&started, VmState::Running, &details.layout, Some(run));
        Ok(ClockedVm { vm, clock })
    }
}

/// Loads a saved guest into the QEMU that was started for it, and lets it run.
async fn continue_guest(
    vm: &VmHandle,
    layout: &QemuLayout,
    guest: &SavedGuest,
    checked: BlockingWork<Result<()>>,
) -> Result<ClockState> {
    let mut qmp = match save::load(layout, guest, checked).await {
        Ok(qmp) => qmp,
        Err(error) => return Err(refused(vm, layout, error).await),
    };
    // From here on the guest is nowhere else.
    match save::let_run(&vm.spec, layout, &mut qmp, guest).await {
        // It must not run with the identity of another.
        Err(error) if renewal::is_due(layout) => {
            drop(qmp);
            mark_asked(layout);
            Err(refused(vm, layout, error).await)
        }
        clock => clock,
    }
}

/// Refuses a VM of which some disks are those of a snapshot, and some are not.
fn refuse_half_restored(layout: &QemuLayout) -> Result<()> {
    let mark = layout.restore_mark();
    match fs::read_to_string(&mark) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        name => {
            let name = name.unwrap_or_default();
            Err(Error::record(
                mark,
                format!("the restore of the snapshot `{}` was interrupted: repeat it", name.trim()),
            ))
        }
    }
}

/// Starts QEMU by its plan and returns the information on the run.
///
/// # Errors
/// `QemuExited` with the end of QEMU's log; `Host`, `Io` for what the host refused; `TimedOut` if
/// QEMU does not reply by the deadline, after killing it.
async fn start(
    vm: &VmHandle,
    plan: &QemuPlan,
    keeper: &Path,
    alive: OwnedFd,
    deadline: Instant,
) -> Result<RunInfo> {
    let layout = &plan.layout;
    make_private_dir(&layout.run)?;
    let mut descriptors = vec![(alive, descriptor::ALIVE)];
    // Created after the lock, so that it is dropped first: nothing else has its sockets there yet.
    let undo = UndoRunDir { layout, armed: true };
    for socket in &plan.sockets {
        let listener = match socket.descriptor {
            descriptor::SPARE => listen_spare(layout)?,
            _ => listen(&socket.path)?,
        };
        descriptors.push((listener, socket.descriptor));
    }
    if let Some(bridge) = &plan.bridge {
        step("start: tap").map_err(Error::io("open", "/dev/net/tun"))?;
        let tap = open_tap(bridge, &tap_name(vm)).await?;
        descriptors.push((tap.fd, descriptor::TAP));
    }
    if let Some(restore) = &plan.restore {
        let path = &restore.memory;
        let memory = open_regular(path).map_err(Error::io("open", path))?;
        descriptors.push((memory.into(), descriptor::MEMORY));
    }
    let launch = launch(&vm.spec, plan, descriptors.iter().map(|(_, number)| *number).collect());
    let fds: Vec<OwnedFd> = descriptors.into_iter().map(|(fd, _)| fd).collect();
    // Not earlier: a start that fails before this point does not change how the previous run ended.
    let was_asked = remove_stop_mark(layout)?;
    let launched = match spawn::launch(keeper, &launch, &fds) {
        Ok(launched) => launched,
        Err(error) => {
            if was_asked {
                mark_asked(layout);
            }
            return Err(error);
        }
    };
    // From here on the sockets and the lock are the keeper's: our descriptors would keep both
    // alive.
    undo.disarm();
    drop(fds);
    let pid = match launched.started(deadline).await {
        Ok((pid, _)) => pid,
        // The keeper reports that it started nothing.
        Err(error) if error.kind() == ErrorKind::Host => {
            if was_asked {
                mark_asked(layout);
            }
            return Err(error);
        }
        // The keeper reports nothing, and may have started QEMU.
        Err(error) => return Err(refused(vm, layout, error).await),
    };
    match greet(vm, layout, pid, deadline).await {
        Ok(run) => Ok(run),
        Err(error) => Err(refused(vm, layout, error).await),
    }
}

/// Returns the information on a run that another process has started, or is starting.
///
/// # Errors
/// `Busy` if nothing listens for the VM yet, or no longer.
async fn adopt(vm: &VmHandle, layout: &QemuLayout, deadline: Instant) -> Result<RunInfo> {
    let busy = || Error::Busy { what: format!("VM `{}`", vm.name()), holder: None };
    // The sockets are bound before QEMU starts, so its greeting is the event that it runs.
    let mut met = meet(vm, layout, deadline).await.map_err(|error| match error.kind() {
        ErrorKind::Io | ErrorKind::Hypervisor => busy(),
        _ => error,
    })?;
    protect_screen(vm, layout, &mut met.qmp, deadline).await?;
    match process::look(&layout.place()).await? {
        ProcessState::Live(process) => run_info(vm, layout, process.id().pid, met, deadline).await,
        _ => Err(busy()),
    }
}

async fn greet(vm: &VmHandle, layout: &QemuLayout, pid: u32, deadline: Instant) -> Result<RunInfo> {
    let mut met = meet(vm, layout, deadline).await?;
    protect_screen(vm, layout, &mut met.qmp, deadline).await?;
    run_info(vm, layout, pid, met, deadline).await
}

/// A QEMU that has greeted, and the forwards that it reported.
struct ConnectedQemu {
    qmp: QmpClient,
    forwards: Vec<ActiveForward>,
}

async fn meet(vm: &VmHandle, layout: &QemuLayout, deadline: Instant) -> Result<ConnectedQemu> {
    let socket = status::monitor(layout);
    match vm.spec.network() {
        NetworkConfig::User(user) if !user.forwards.is_empty() => {
            let (qmp, forwards) = QmpClient::with_user_forwards(&socket, deadline).await?;
            Ok(ConnectedQemu { qmp, forwards })
        }
        NetworkConfig::User(_)
        | NetworkConfig::Tap { .. }
        | NetworkConfig::Vnic { .. }
        | NetworkConfig::None => {
            let qmp = QmpClient::connect(&socket, deadline).await?;
            Ok(ConnectedQemu { qmp, forwards: Vec::new() })
        }
    }
}

async fn run_info(
    vm: &VmHandle,
    layout: &QemuLayout,
    pid: u32,
    mut met: ConnectedQemu,
    deadline: Instant,
) -> Result<RunInfo> {
    Ok(RunInfo {
        pid: Some(pid),
        accel: accel(vm, layout),
        console: ConsoleEndpoint::UnixSocket(layout.console_socket()),
        agent: Some(layout.agent_socket()),
        monitor: Some(layout.monitor_socket()),
        vnc: vnc_address(&vm.spec, layout, &mut met.qmp, deadline).await?,
        forwards: met.forwards,
    })
}

/// Returns what runs the guest's code, from the run file. For a run that an earlier version
/// started, only the VM's record has it.
fn accel(vm: &VmHandle, layout: &QemuLayout) -> Option<Accel> {
    let recorded = runfile::read(&layout.run_file()).ok().flatten().and_then(|run| run.accel);
    match recorded {
        Some(word) => [Accel::Kvm, Accel::Tcg].into_iter().find(|accel| accel.as_str() == word),
        None => vm.run.as_ref().and_then(|run| run.accel),
    }
}

fn has_screen(spec: &VmSpec) -> bool {
    spec.machine() != MachineType::Microvm
}

async fn vnc_address(
    spec: &VmSpec,
    layout: &QemuLayout,
    qmp: &mut QmpClient,
    deadline: Instant,
) -> Result<Option<VncAddress>> {
    match spec.vnc() {
        _ if !has_screen(spec) => Ok(None),
        Vnc::Off => Ok(None),
        Vnc::Unix => Ok(Some(VncAddress::Unix(layout.vnc_socket()))),
        Vnc::Loopback => {
            let answer = qmp.execute("query-vnc", None, deadline).await?;
            let port = answer["service"].as_str().and_then(|port| port.parse().ok());
            let port = port.ok_or_else(|| {
                Error::protocol(Peer::Qemu, format!("missing port in the reply to query-vnc: {answer}"))
            })?;
            let addr = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
            Ok(Some(VncAddress::Tcp { addr, password_file: layout.vnc_password() }))
        }
    }
}

/// Sets the password of this run if the VM has VNC over TCP: before that, QEMU accepts no client.
/// The process that started the run may have been killed before it did.
async fn protect_screen(
    vm: &VmHandle,
    layout: &QemuLayout,
    qmp: &mut QmpClient,
    deadline: Instant,
) -> Result<()> {
    if vm.spec.vnc() != Vnc::Loopback || !has_screen(&vm.spec) {
        return Ok(());
    }
    let password = vnc_password(layout)?;
    let arguments = json!({"protocol": "vnc", "password": password});
    qmp.execute("set_password", Some(arguments), deadline).await.map(drop)
}

/// Returns the password of this run, created at the first call.
fn vnc_password(layout: &QemuLayout) -> Result<String> {
    let path = layout.vnc_password();
    match fs::read_to_string(&path) {
        Ok(password) if password.len() == VNC_PASSWORD_LETTERS => return Ok(password),
        // The process that wrote it was killed.
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", &path)(error)),
    }
    let password = draw_password();
    step("start: vnc password").map_err(Error::io("create", &path))?;
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let written = file.and_then(|mut file| file.write_all(password.as_bytes()));
    written.map_err(Error::io("write", &path))?;
    Ok(password)
}

/// Returns a new password of 48 random bits, the most that VNC's eight letters hold if they are to
/// be typed easily.
fn draw_password() -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let random = uuid::Uuid::new_v4().into_bytes();
    // The bytes 6 and 8 of a UUID are not entirely random.
    let drawn = random[..6].iter().chain(&random[9..]).take(VNC_PASSWORD_LETTERS);
    drawn.map(|byte| char::from(LETTERS[usize::from(byte % 64)])).collect()
}

/// Finds out why a start failed after QEMU was spawned, and ends what runs.
async fn refused(vm: &VmHandle, layout: &QemuLayout, error: Error) -> Error {
    // A QEMU that refuses its arguments closes everything and exits: wait until its output is
    // logged.
    let found = match process::look(&layout.place()).await {
        Ok(ProcessState::Live(_)) if matches!(error, Error::Protocol { .. }) => {
            let _ = process::settled(&layout.place()).await;
            process::look(&layout.place()).await
        }
        found => found,
    };
    if let Ok(ProcessState::Ended(ended)) = found {
        let status = ended.map_or_else(|| "unknown exit status".to_owned(), |ended| ended.to_string());
        let stderr = last_words(layout);
        return held_by_another(vm, &stderr).unwrap_or(Error::QemuExited {
            status,
            stderr,
            log: layout.qemu_log(),
        });
    }
    // Not only what runs now: a slow keeper would start QEMU after this has reported that it does
    // not run.
    if let Err(kill) = alive::take_and_silence(&layout.place(), Instant::now() + LAUNCH_LIMIT).await {
        tracing::warn!(vm = %layout.name(), error = %kill, "could not end a QEMU that failed to start");
    }
    error
}

/// Returns the error for a disk or a port that another process has, if that is why QEMU did not
/// start.
fn held_by_another(vm: &VmHandle, words: &str) -> Option<Error> {
    if let Some(path) = words::locked_disk(words) {
        let holder = file_holder(&path);
        let by = match holder.as_ref().map(|holder| (&holder.vm, &holder.program)) {
            Some((Some(other), _)) => format!(", which the VM `{other}` runs with,"),
            Some((None, program)) => format!(", which the program `{program}` has open,"),
            None => String::new(),
        };
        let what = format!("the disk {} of the VM `{}`{by}", path.display(), vm.name());
        return Some(Error::Busy { what, holder: holder.map(|holder| holder.pid) });
    }
    let NetworkConfig::User(user) = vm.spec.network() else { return None };
    // It was taken after the check before the start.
    let refused = |forward| check_port(forward).err();
    words::is_port_refused(words).then(|| user.forwards.iter().find_map(refused)).flatten()
}

/// Returns the end of QEMU's log of the last run.
pub(super) fn last_words(layout: &QemuLayout) -> String {
    let tail = tail_of_file(&layout.qemu_log(), LAST_WORDS_BYTES).unwrap_or_default();
    String::from_utf8_lossy(&tail).trim().to_owned()
}

fn launch(spec: &VmSpec, plan: &QemuPlan, descriptors: Vec<i32>) -> KeeperRequest {
    let layout = &plan.layout;
    KeeperRequest {
        program: plan.program.clone(),
        args: plan.args.clone(),
        work_dir: None,
        copy_log: false,
        descriptors,
        console_log_descriptor: Some(descriptor::CONSOLE_LOG),
        console_log: layout.console_log(),
        console_log_bytes: spec.console_log().bytes(),
        log: layout.qemu_log(),
        log_bytes: QEMU_LOG_BYTES,
        run_file: layout.run_file(),
        sockets: layout.run_files(),
        run_dir: layout.run.clone(),
        accel: Some(plan.accel.as_str().to_owned()),
        devices: Some(plan.devices.number()),
        events: Some(events::request(layout)),
    }
}

/// Binds a socket that only this user can connect to, and listens on it before any client looks for
/// it.
fn listen(path: &Path) -> Result<OwnedFd> {
    step("start: listen").map_err(Error::io("listen on", path))?;
    let listener = bind(path).map_err(Error::io("listen on", path))?;
    // QEMU uses the listener with its flags, and sometimes accepts a client that another of its
    // threads has accepted already: a blocking listener would stop its main loop for good (seen
    // with 7.2.22: the main thread was in accept4, and did not read `quit`).
    listener.set_nonblocking(true).map_err(Error::io("listen on", path))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(Error::io("protect", path))?;
    Ok(listener.into())
}

/// Binds the spare monitor; in the runtime directory if the work directory's file system does not
/// support sockets.
fn listen_spare(layout: &QemuLayout) -> Result<OwnedFd> {
    listen(&layout.spare_socket()).or_else(|error| {
        tracing::debug!(%error, "without its runtime directory this run can't be queried");
        listen(&layout.run.join("spare.sock"))
    })
}

/// Returns the tap's name, from the VM's id: an interface's name has 15 bytes.
fn tap_name(vm: &VmHandle) -> String {
    format!("vmk{}", short_id(vm.id))
}

/// Removes the mark of an earlier request to stop, and returns whether there was one.
fn remove_stop_mark(layout: &QemuLayout) -> Result<bool> {
    let mark = layout.stop_mark();
    match fs::remove_file(&mark) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", &mark)(error)),
    }
}

/// Removes the run's directory if the start failed before a keeper took it over.
struct UndoRunDir<'a> {
    layout: &'a QemuLayout,
    armed: bool,
}

impl UndoRunDir<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for UndoRunDir<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = remove_run_dir(self.layout)
        {
            tracing::warn!(run = %self.layout.run.display(), %error, "could not remove a run's directory; the next start will");
        }
    }
}
