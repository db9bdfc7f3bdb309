//! What of a VM is, or seems to be, in another place: the sockets of another session, the VM of the
//! home that this one is a copy of.
//!
//! A copy of a home has the identities of the original's VMs, and where both use one runtime
//! directory, the same place for their sockets. What runs for the original is not the copy's: its
//! processes, its sockets and its lock are left alone, and the same VM is not started twice.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::layout::QemuLayout;
use super::parts;
use crate::backend::supervise::files::{is_held, remove_file};
use crate::backend::supervise::process::ProcessState;
use crate::backend::supervise::{ALIVE_DESCRIPTOR, process, runfile};
use crate::error::{Error, PartProblem, Result};
use crate::handle::VmHandle;
use crate::lifecycle::{InvalidTransition, Operation, VmState};

/// Returns where the sockets of a VM's run are: its keeper has written down where they were made.
/// That may be another session's directory, or one that is not there under this name, such as that
/// of a home which has been moved since. Or it is that of the home which this one is a copy of, and
/// then nothing runs here.
pub(super) fn run_dir(layout: &QemuLayout) -> PathBuf {
    let recorded = recorded_run_dir(layout);
    let is_ours = |run: &PathBuf| run.is_dir() && is_held(&layout.place()).unwrap_or(false);
    recorded.filter(|run| *run != layout.run).filter(is_ours).unwrap_or_else(|| layout.run.clone())
}

/// Returns where the sockets of a VM's last run were, as its keeper has written it down; `None` for
/// what is no directory of this VM.
pub(super) fn recorded_run_dir(layout: &QemuLayout) -> Option<PathBuf> {
    let run_file = layout.run_file();
    let run = runfile::read(&run_file).ok().flatten()?.run_dir?;
    let run = runfile::run_dir_in_full(&run_file, &run);
    (run.file_name() == layout.run.file_name()).then_some(run)
}

/// Refuses to start a VM that runs already in another directory, which this one is a copy of, or
/// the other way round. The caller holds the lock `alive`, so nothing runs here.
///
/// # Errors
/// [`Error::SameVm`], with the other directory where it can be known.
pub(super) fn refuse_twin(vm: &VmHandle, layout: &QemuLayout) -> Result<()> {
    let twin = twin(vm, layout)?;
    if twin.is_none() && !is_served(layout) {
        return Ok(());
    }
    let (pid, work) = twin.map_or((None, None), |(pid, work)| (Some(pid), work));
    Err(Error::SameVm { vm: vm.name().clone(), here: layout.work.clone(), other: work, pid })
}

/// Refuses to start a VM whose lock, by a hard link, another directory's VM runs with: the two
/// would write to the same disks.
///
/// # Errors
/// [`Error::SameVm`].
pub(super) fn refuse_linked(vm: &VmHandle, layout: &QemuLayout) -> Result<()> {
    // One process has it at a start already: looking through all of them takes time.
    let is_linked = fs::metadata(layout.alive_lock()).is_ok_and(|lock| lock.nlink() > 1);
    let holder = if is_linked { process::linked_holder(&layout.place())? } else { None };
    holder.map_or(Ok(()), |(pid, work)| {
        Err(Error::SameVm {
            vm: vm.name().clone(),
            here: layout.work.clone(),
            other: Some(work),
            pid: Some(pid),
        })
    })
}

/// Leaves a lock to the directory that runs a VM with it, so that this one, a copy of that by hard
/// links, can be removed meanwhile.
pub(super) fn leave_linked(layout: &QemuLayout) -> Result<()> {
    let lock = layout.alive_lock();
    let is_linked = fs::metadata(&lock).is_ok_and(|lock| lock.nlink() > 1);
    if is_linked && process::linked_holder(&layout.place())?.is_some() {
        remove_file(&lock)?;
    }
    Ok(())
}

/// Refuses an operation on a directory that is not known to be this VM's, and a start of a VM that
/// lacks a part.
///
/// # Errors
/// `InvalidState` where the VM is gone; `VmPart` and `Record` with the file that is missing.
pub(super) fn check_owner(vm: &VmHandle, layout: &QemuLayout, operation: Operation) -> Result<()> {
    let (owner, missing) = (parts::owner(layout)?, parts::missing_part(&vm.spec, layout));
    match (owner, missing) {
        (Some(owner), None) if owner == vm.id => Ok(()),
        (Some(owner), Some(path)) if owner == vm.id && operation == Operation::Start => {
            Err(Error::VmPart { path, problem: PartProblem::Missing })
        }
        (Some(owner), _) if owner == vm.id => Ok(()),
        // A removal takes the disks first.
        (None, None) if vm.spec.disk().is_some() => {
            let problem = format!(
                "this file, which records the owner of the disks beside it, is missing: create it with {} \
                 in it",
                vm.id
            );
            Err(Error::record(layout.owner_mark(), problem))
        }
        _ => Err(InvalidTransition { state: VmState::Destroyed, operation }.into()),
    }
}

/// Returns whether a process with the identity of this VM runs in its directory: then it is this
/// VM's, though the file that says so may be lost.
pub(super) async fn runs_here(vm: &VmHandle, layout: &QemuLayout) -> Result<bool> {
    Ok(match process::look(&layout.place()).await? {
        ProcessState::Live(process) => runs(&Path::new("/proc").join(process.id().pid.to_string()), vm),
        _ => false,
    })
}

/// Finds a process of this user's that runs the same VM with the lock of another directory, and
/// that directory.
fn twin(vm: &VmHandle, layout: &QemuLayout) -> Result<Option<(u32, Option<PathBuf>)>> {
    let lock = layout.alive_lock();
    let own = fs::metadata(&lock).map_err(Error::io("examine", &lock))?;
    let entries = fs::read_dir("/proc").map_err(Error::io("read", "/proc"))?;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let held = entry.path().join("fd").join(ALIVE_DESCRIPTOR.to_string());
        let Ok(link) = fs::read_link(&held) else { continue };
        let is_other =
            fs::metadata(&held).is_ok_and(|file| (file.dev(), file.ino()) != (own.dev(), own.ino()));
        let bytes = link.as_os_str().as_bytes();
        // Of a directory that was removed under its VM, the name stays. Source: proc_pid_fd(5).
        let removed = bytes.strip_suffix(b" (deleted)");
        let name = Path::new(OsStr::from_bytes(removed.unwrap_or(bytes)));
        if is_other && name.file_name() == lock.file_name() && runs(&entry.path(), vm) {
            return Ok(Some((pid, name.parent().map(Path::to_owned))));
        }
    }
    Ok(None)
}

/// Returns whether a process, by its directory in `/proc`, is a QEMU with the identity of this VM.
///
/// Source: proc_pid_cmdline(5).
fn runs(process: &Path, vm: &VmHandle) -> bool {
    let cmdline = fs::read(process.join("cmdline")).unwrap_or_default();
    let mut words = cmdline.split(|byte| *byte == 0).skip_while(|word| *word != b"-uuid").skip(1);
    words.next() == Some(vm.id.to_string().as_bytes())
}

/// Returns whether another VM's process listens at the sockets. The caller holds the lock `alive`,
/// so it is none of this VM's.
pub(super) fn is_served(layout: &QemuLayout) -> bool {
    let Ok(address) = SocketAddrUnix::new(layout.monitor_socket()) else { return false };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let Ok(socket) = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None) else { return false };
    match connect(&socket, &address) {
        // A socket that this process has bound itself was for a start that has failed.
        Ok(()) => {
            let peer = sockopt::socket_peercred(&socket).map(|peer| peer.pid.as_raw_nonzero().get());
            !peer.is_ok_and(|pid| u32::try_from(pid) == Ok(std::process::id()))
        }
        // Others wait there already.
        Err(errno) => errno == Errno::AGAIN,
    }
}
