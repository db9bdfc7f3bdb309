//! The paths of one VM.
//!
//! Pure: paths only. A VM has two directories: the work directory exists from `prepare` to
//! `destroy`; the runtime directory has the sockets of one run, on a path that is short enough for
//! them.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::backend::supervise::{SupervisionPaths, unfinished};
use crate::error::{Error, Result};
use crate::log_position::older_log;
use crate::network::MacAddr;
use crate::spec::{SnapshotName, VmName};

/// The maximum length of a Unix socket's path in bytes (`sun_path` without its NUL). Source:
/// unix(7).
pub(crate) const MAX_SOCKET_PATH_BYTES: usize = 107;

/// The paths of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct QemuLayout {
    /// The work directory: disks, seed, logs, the record of the run.
    pub work: PathBuf,
    /// The runtime directory: sockets.
    pub run: PathBuf,
}

impl QemuLayout {
    /// Returns the paths of a VM below the backend's two roots.
    ///
    /// # Errors
    /// `InvalidInput` if a root is relative or not UTF-8, or the runtime root is too long for a
    /// socket.
    pub(crate) fn of(work_root: &Path, run_root: &Path, name: &VmName, id: Uuid) -> Result<Self> {
        for root in [work_root, run_root] {
            // The keeper's current directory is `/`. Handles and QEMU's monitor contain paths as
            // JSON.
            if !root.is_absolute() {
                return Err(Error::invalid("home", root.display(), "the path must be absolute"));
            }
            if root.to_str().is_none() {
                return Err(Error::invalid("home", root.display(), "the path must be UTF-8"));
            }
        }
        let layout = Self { work: work_root.join(name.as_str()), run: run_root.join(short_id(id)) };
        let longest = layout.console_socket();
        let bytes = longest.as_os_str().len();
        if bytes > MAX_SOCKET_PATH_BYTES {
            let bound = format!(
                "the path of a socket in it would have {bytes} bytes (expected at most \
                 {MAX_SOCKET_PATH_BYTES}, the limit of a Unix socket): choose a shorter home"
            );
            return Err(Error::invalid("home", run_root.display(), bound));
        }
        Ok(layout)
    }

    /// Returns the VM's name, for a log: the last part of the work directory.
    pub(crate) fn name(&self) -> std::borrow::Cow<'_, str> {
        self.work.file_name().unwrap_or_default().to_string_lossy()
    }

    /// Returns the files by which a run is supervised.
    pub(crate) fn place(&self) -> SupervisionPaths {
        SupervisionPaths {
            alive: self.alive_lock(),
            run_file: self.run_file(),
            run_dir: self.run.clone(),
            program: "QEMU",
            killer: None,
        }
    }

    pub(crate) fn root_disk(&self) -> PathBuf {
        self.work.join("root.qcow2")
    }

    pub(crate) fn data_disk(&self, index: usize) -> PathBuf {
        self.work.join(format!("data-{index}.qcow2"))
    }

    pub(crate) fn seed(&self) -> PathBuf {
        self.work.join("seed.iso")
    }

    pub(crate) fn efi_vars(&self) -> PathBuf {
        self.work.join("efivars.fd")
    }

    /// The newer half of the console's log; the older is beside it, see [`older_log`].
    pub(crate) fn console_log(&self) -> PathBuf {
        self.work.join("console.log")
    }

    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.work.join("qemu.log")
    }

    /// The events that QEMU has reported in this run.
    pub(crate) fn events_log(&self) -> PathBuf {
        self.work.join("events.log")
    }

    /// The memory and the devices of a saved guest.
    pub(crate) fn memory_file(&self) -> PathBuf {
        self.work.join("memory")
    }

    /// Exists exactly while a guest is saved: what fits to its memory.
    pub(crate) fn saved_file(&self) -> PathBuf {
        self.work.join("saved.json")
    }

    /// The records and the memory of snapshots. Their disks are layers beside the VM's own.
    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.work.join("snapshots")
    }

    /// The record of a snapshot, which exists exactly as long as this.
    pub(crate) fn snapshot_file(&self, name: &SnapshotName) -> PathBuf {
        self.snapshots_dir().join(format!("{name}.json"))
    }

    pub(crate) fn snapshot_memory(&self, name: &SnapshotName) -> PathBuf {
        self.snapshots_dir().join(format!("{name}.memory"))
    }

    /// The firmware's variables of a snapshot.
    pub(crate) fn snapshot_vars(&self, name: &SnapshotName) -> PathBuf {
        self.snapshots_dir().join(format!("{name}.efivars"))
    }

    /// Exists while a restore replaces the VM's disks; contains the snapshot's name.
    pub(crate) fn restore_mark(&self) -> PathBuf {
        self.work.join("restoring")
    }

    /// Exists while the agent may have frozen the guest's file systems.
    pub(crate) fn frozen_mark(&self) -> PathBuf {
        self.work.join("frozen")
    }

    /// Exists while the guest has the identity of the one that it is a copy of.
    pub(crate) fn identity_mark(&self) -> PathBuf {
        self.work.join("identity")
    }

    /// Exists while the agent may have stopped the guest's programs.
    pub(crate) fn parked_mark(&self) -> PathBuf {
        self.work.join("parked")
    }

    /// The record of the last run, written by the keeper.
    pub(crate) fn run_file(&self) -> PathBuf {
        self.work.join("qemu.json")
    }

    /// Locked by the process that starts or runs the VM. QEMU inherits the lock, so it is free
    /// exactly when nothing runs.
    pub(crate) fn alive_lock(&self) -> PathBuf {
        self.work.join("alive")
    }

    /// Exists if the end of the run was requested.
    pub(crate) fn stop_mark(&self) -> PathBuf {
        self.work.join("stop-asked")
    }

    /// The id of the VM that the directory belongs to; created first by `prepare`.
    pub(crate) fn owner_mark(&self) -> PathBuf {
        self.work.join("owner")
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    /// A second monitor for vmkit, in the work directory. What cleans up runtime directories, at
    /// logout or by age, does not remove it, so a VM can be queried and stopped as long as its
    /// disks exist.
    pub(crate) fn spare_socket(&self) -> PathBuf {
        self.work.join("spare.sock")
    }

    pub(crate) fn monitor_socket(&self) -> PathBuf {
        self.run.join("monitor.sock")
    }

    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    pub(crate) fn console_socket(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    /// Locked by the process that is attached to the console; contains its PID.
    pub(crate) fn console_lock(&self) -> PathBuf {
        self.run.join("console.sock.lock")
    }

    pub(crate) fn vnc_socket(&self) -> PathBuf {
        self.run.join("vnc.sock")
    }

    pub(crate) fn vnc_password(&self) -> PathBuf {
        self.run.join("vnc.password")
    }

    /// Returns every file that this backend may have created in the work directory, including the
    /// unfinished ones of a killed process, in the order of their removal. The owner's mark is
    /// late: until it is removed, the directory is known to be this VM's. The lock is last: a
    /// process that takes a new one finds no owner.
    pub(crate) fn work_files(&self, data_disks: usize) -> Vec<PathBuf> {
        let (saved, memory) = (self.saved_file(), self.memory_file());
        let mut files = self.run_inputs(data_disks);
        files.extend([saved.clone(), unfinished(&saved), unfinished(&memory), memory]);
        files.extend([unfinished(&self.seed()), unfinished(&self.run_file()), self.spare_socket()]);
        files.extend([self.restore_mark(), self.frozen_mark(), self.parked_mark()]);
        files.extend([self.identity_mark(), unfinished(&self.identity_mark())]);
        files.extend([self.run_file(), self.stop_mark(), self.owner_mark(), self.alive_lock()]);
        files
    }

    /// Returns the disks and logs in the work directory that QEMU and the keeper open at each
    /// start.
    pub(crate) fn run_inputs(&self, data_disks: usize) -> Vec<PathBuf> {
        let mut files = vec![self.root_disk(), self.seed(), self.efi_vars()];
        files.extend((0..data_disks).map(|index| self.data_disk(index)));
        for log in [self.console_log(), self.qemu_log(), self.events_log()] {
            files.push(older_log(&log));
            files.push(log);
        }
        files
    }

    /// Returns every file of a run: those of the runtime directory, and the spare monitor.
    pub(crate) fn run_files(&self) -> Vec<PathBuf> {
        vec![
            self.spare_socket(),
            self.run.join("spare.sock"),
            self.qmp_socket(),
            self.monitor_socket(),
            self.agent_socket(),
            self.console_socket(),
            self.console_lock(),
            self.vnc_socket(),
            self.vnc_password(),
        ]
    }
}

/// Returns ten letters for short names, the same that distinguish the VM's MAC address.
///
/// They depend on the whole id: ids that were created one after the other have a common start or
/// end.
pub(crate) fn short_id(id: Uuid) -> String {
    let [_, own @ ..] = MacAddr::of_vm(id).bytes();
    own.map(|byte| format!("{byte:02x}")).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_with_a_common_start_have_different_runtime_directories() {
        let name = VmName::new("web").unwrap();
        let of = |id| QemuLayout::of(Path::new("/w"), Path::new("/r"), &name, Uuid::from_u128(id)).unwrap();
        assert_ne!(of(1).run, of(2).run);
        assert_ne!(of(1 << 127).run, of(1 << 127 | 1 << 126).run);
        assert_eq!(of(1), of(1));
    }

    #[test]
    fn a_relative_root_is_refused() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let name = VmName::new("web").unwrap();
        let absolute = Path::new("/w");
        for (root, why) in [(Path::new("vms"), "absolute"), (Path::new(OsStr::from_bytes(b"/\xff")), "UTF-8")]
        {
            for (work, run) in [(root, absolute), (absolute, root)] {
                let error = QemuLayout::of(work, run, &name, Uuid::nil()).unwrap_err().to_string();
                assert!(error.contains(why), "{error}");
            }
        }
    }

    #[test]
    fn a_runtime_root_too_long_for_a_socket_is_refused_with_both_numbers() {
        let name = VmName::new("web").unwrap();
        let root = PathBuf::from(format!("/{}", "r".repeat(100)));
        let error = QemuLayout::of(Path::new("/w"), &root, &name, Uuid::nil()).unwrap_err().to_string();
        assert!(error.contains("125 bytes") && error.contains("at most 107"), "{error}");
    }
}
