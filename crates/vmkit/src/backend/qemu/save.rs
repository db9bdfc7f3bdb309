//! Saving a guest to disk and continuing it from there.
//!
//! ```text
//!  pause ─▶ memory.unfinished ─▶ memory ─▶ saved.json ─▶ quit                          save
//!                      the guest is in QEMU ◀┴▶ the guest is on disk
//!  start with -incoming ─▶ load, paused ─▶ no saved.json ─▶ cont ─▶ no memory          load
//!                   the guest is on disk ◀┴▶ the guest is in QEMU
//! ```

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::time::Instant;

use super::devices::DeviceVersion;
use super::facts::descriptor;
use super::layout::QemuLayout;
use super::qmp::client::{QmpClient, RunState};
use super::saved::{self, SavedBy, SavedGuest};
use super::stop::mark_asked;
use super::switch::Accelerator;
use super::{PAUSE_LIMIT, QemuHypervisor, clock, parking, recovery, renewal, status, stop};
use crate::abilities::{ClockState, SaveToDisk};
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::runfile;
use crate::blocking::BlockingWork;
use crate::error::{Error, Peer, Result};
use crate::handle::VmHandle;
use crate::host::process::ProcessFd;
use crate::input_file::open_regular;
use crate::lifecycle::{Operation, VmState};
use crate::spec::{Mib, VmSpec};
use crate::steps::step;
use crate::store::refuse_other_user;

/// What QEMU needs to write or to read a guest without memory.
const LIMIT: Duration = Duration::from_secs(60);
/// The slowest disk that is waited for, in bytes per second.
const SLOWEST: u64 = 10 << 20;
/// What the devices take beside the memory, in bytes.
const DEVICES_BYTES: u64 = 32 << 20;

/// Returns the deadline for the memory of a guest to be written or read.
pub(super) fn deadline(bytes: u64) -> Instant {
    Instant::now() + LIMIT + Duration::from_secs(bytes / SLOWEST)
}

impl SaveToDisk for QemuHypervisor {
    async fn save(&self, vm: &VmHandle) -> Result<VmHandle> {
        let layout = self.details(vm)?.layout;
        let to = VmState::Saved;
        refuse_other_user(&layout.work)?;
        let from = self.allowed(vm, Operation::Save).await?;
        // A process that was killed after it had saved the guest did not end QEMU.
        if from != to {
            write(vm, &layout, from == VmState::Running).await?;
        }
        end(&layout).await?;
        self.paused().remove(&vm.id);
        Ok(Self::handle(vm, to, &layout, None))
    }

    async fn saved_bytes(&self, vm: &VmHandle) -> Result<Option<u64>> {
        saved::room(&self.details(vm)?.layout)
    }
}

/// Writes the guest to disk. On an error it is as it was.
async fn write(vm: &VmHandle, layout: &QemuLayout, was_running: bool) -> Result<()> {
    let limit = Instant::now() + PAUSE_LIMIT;
    if saved::was_begun(layout) {
        // QEMU refuses a second migration of a guest that is paused by the first.
        give_up(layout, true).await?;
    }
    recovery::recover_running(vm, layout).await?;
    let memory = create_memory(vm, layout).await?;
    let written = async {
        let mut qmp = QmpClient::connect(&status::monitor(layout), limit).await?;
        qmp.pause(limit).await?;
        drop(qmp);
        let (mut qmp, state) = QmpClient::with_status(&status::monitor(layout), limit).await?;
        if !matches!(state, RunState::Paused | RunState::Migrating) {
            let why = format!("the guest can't be saved while it is in the state {state:?}");
            return Err(Error::protocol(Peer::Qemu, why));
        }
        let by = saved_by(&mut qmp, layout, limit).await?;
        step("save: write the memory").map_err(Error::io("write", layout.memory_file()))?;
        qmp.write_memory(memory.as_fd(), deadline(vm.spec.memory().bytes())).await?;
        SavedGuest::keep(&vm.spec, layout, by, memory).await
    };
    let Err(error) = written.await else { return Ok(()) };
    // The record may be there although its directory could not be synced.
    if saved::is_saved(layout)
        && let Err(error) = saved::discard(layout)
    {
        tracing::warn!(vm = %layout.name(), %error, "cannot remove the record of a guest that could not be saved");
    }
    if !saved::is_saved(layout)
        && let Err(error) = give_up(layout, was_running).await
    {
        tracing::warn!(vm = %layout.name(), %error, "cannot undo a failed save: `resume` tries again");
    }
    Err(error)
}

/// Creates the file for the memory of a guest that lives.
///
/// # Errors
/// As [`saved::create_memory`]; `Protocol` if its process can't be found.
pub(super) async fn create_memory(vm: &VmHandle, layout: &QemuLayout) -> Result<File> {
    let ProcessState::Live(process) = process::look(&layout.place()).await? else {
        let why = format!("the process of the VM `{}` can't be found", vm.name());
        return Err(Error::protocol(Peer::Qemu, why));
    };
    saved::create_memory(layout, vm.name(), needed(vm.spec.memory(), &process))
}

/// Returns what the QEMU is that saves a guest.
///
/// # Errors
/// Those of the monitor; `Record` for a run of an earlier vmkit.
pub(super) async fn saved_by(qmp: &mut QmpClient, layout: &QemuLayout, limit: Instant) -> Result<SavedBy> {
    Ok(SavedBy {
        version: qmp.version(limit).await?,
        machine: qmp.machine(limit).await?,
        accel: accel(layout)?,
        devices: devices(layout)?,
    })
}

/// Ends the QEMU of a saved guest.
///
/// # Errors
/// `TimedOut`; `Io`.
pub(super) async fn end(layout: &QemuLayout) -> Result<()> {
    if let ProcessState::Live(process) = process::look(&layout.place()).await? {
        mark_asked(layout);
        match stop::force(layout, &process).await? {
            true => process::settled(&layout.place()).await?,
            false => process::kill(&layout.place()).await?,
        }
    }
    Ok(())
}

/// Puts an end to a save that was begun in this run and was interrupted, or has failed: the guest
/// is in QEMU. Resumes it if it shall run.
///
/// # Errors
/// Those of the monitor.
pub(super) async fn give_up(layout: &QemuLayout, resume: bool) -> Result<()> {
    let limit = Instant::now() + PAUSE_LIMIT;
    let mut qmp = QmpClient::connect(&status::monitor(layout), limit).await?;
    qmp.cancel_migration(resume, limit).await?;
    drop(qmp);
    if let Err(error) = saved::remove_leftovers(layout) {
        tracing::warn!(vm = %layout.name(), %error, "cannot remove the rest of an interrupted save; the next start will");
    }
    Ok(())
}

/// Loads a saved guest into the QEMU that was started for it, where it is paused then.
///
/// # Errors
/// `Record` for a memory that is damaged; what QEMU refuses. The guest is still saved then.
pub(super) async fn load(
    layout: &QemuLayout,
    saved: &SavedGuest,
    checked: BlockingWork<Result<()>>,
) -> Result<QmpClient> {
    let limit = deadline(saved.bytes);
    let mut qmp = QmpClient::connect(&status::monitor(layout), limit).await?;
    checked.outcome().await?;
    step("restore: load").map_err(Error::io("read", layout.memory_file()))?;
    qmp.read_memory(descriptor::MEMORY, limit).await?;
    // From here on the disks may change, so the memory does not fit any more.
    match saved::discard(layout) {
        Err(error) if saved::is_saved(layout) => return Err(error),
        Err(error) => {
            tracing::warn!(vm = %layout.name(), %error, "the VM continues, and a power cut may undo that")
        }
        Ok(()) => {}
    }
    Ok(qmp)
}

/// Lets a loaded guest run, gives it an identity of its own if it is a copy, and sets its clock.
///
/// # Errors
/// Those of the monitor. The guest is in QEMU then, paused: `start` and `resume` try again.
pub(super) async fn let_run(
    spec: &VmSpec,
    layout: &QemuLayout,
    qmp: &mut QmpClient,
    saved: &SavedGuest,
) -> Result<ClockState> {
    let limit = Instant::now() + PAUSE_LIMIT;
    step("restore: resume").map_err(Error::io("resume", &layout.work))?;
    qmp.cont(limit).await?;
    if let Err(error) = saved::remove_leftovers(layout) {
        tracing::warn!(vm = %layout.name(), %error, "cannot remove the memory of a guest that runs again; its next start will");
    }
    renewal::settle(spec, layout, qmp).await?;
    if layout.parked_mark().exists() {
        parking::unpark(layout).await;
    }
    Ok(clock::keep_right(qmp, &layout.agent_socket(), saved.age()).await)
}

/// Reads the memory of a saved guest on another thread, while QEMU starts.
pub(super) fn check_memory(layout: &QemuLayout, saved: &SavedGuest) -> Result<BlockingWork<Result<()>>> {
    let path = layout.memory_file();
    let memory: File = open_regular(&path).map_err(Error::io("open", &path))?;
    let saved = saved.clone();
    BlockingWork::begin(move || saved.check_memory(&path, &memory))
}

/// Returns how much the guest may take on disk, in bytes: what QEMU has in memory, at most the
/// guest's own.
fn needed(memory: Mib, process: &ProcessFd) -> u64 {
    let resident = fs::read_to_string(format!("/proc/{}/statm", process.id().pid)).ok();
    let pages = resident.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    let resident = pages.map_or(u64::MAX, |pages| pages * rustix::param::page_size() as u64);
    memory.bytes().min(resident) + DEVICES_BYTES
}

/// Returns what runs the guest's code.
fn accel(layout: &QemuLayout) -> Result<Accelerator> {
    let word = runfile::read(&layout.run_file())?.and_then(|run| run.accel);
    let known = [Accelerator::Kvm, Accelerator::Tcg];
    let found = known.into_iter().find(|accel| word.as_deref() == Some(accel.as_str()));
    found.ok_or_else(|| {
        let problem =
            "what runs the guest's code is not recorded: it was started by an earlier vmkit; restart it";
        Error::record(layout.run_file(), problem)
    })
}

/// Returns the devices of the run. A run that an earlier vmkit started has the first.
fn devices(layout: &QemuLayout) -> Result<DeviceVersion> {
    let number = runfile::read(&layout.run_file())?.and_then(|run| run.devices);
    DeviceVersion::try_from(number.unwrap_or(1)).map_err(|unknown| {
        Error::record(layout.run_file(), format!("{unknown}: the guest was started by a newer vmkit"))
    })
}
