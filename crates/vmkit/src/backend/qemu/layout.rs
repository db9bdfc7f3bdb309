//! Where everything of one VM lies.
//!
//! Pure: paths only. Two directories a VM: the work directory is kept from `prepare` to `destroy`,
//! the runtime directory has the sockets of one run, on a path short enough for them.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::backend::supervise::{SupervisionPaths, unfinished};
use crate::boundedlog::older_log;
use crate::error::{Error, Result};
use crate::network::MacAddr;
use crate::spec::VmName;

/// The most bytes of a Unix socket's path (`sun_path` less its NUL). Source: unix(7).
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
    /// `InvalidInput` where a root is relative or not UTF-8, or the runtime root is too long for a
    /// socket.
    pub(crate) fn of(work_root: &Path, run_root: &Path, name: &VmName, id: Uuid) -> Result<Self> {
        for root in [work_root, run_root] {
            // The keeper works in `/`, and paths are kept in handles and told to QEMU's monitor,
            // which are JSON.
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
                "a socket below it would have a path of {bytes} bytes, and a Unix socket's path has at most \
                 {MAX_SOCKET_PATH_BYTES}: choose a shorter home"
            );
            return Err(Error::invalid("home", run_root.display(), bound));
        }
        Ok(layout)
    }

    /// Returns the VM's name, for a log: the work directory has it.
    pub(crate) fn name(&self) -> std::borrow::Cow<'_, str> {
        self.work.file_name().unwrap_or_default().to_string_lossy()
    }

    /// Returns where the run is supervised.
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

    /// The console's log; what was before the last cut lies beside it, see [`older_log`].
    pub(crate) fn console_log(&self) -> PathBuf {
        self.work.join("console.log")
    }

    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.work.join("qemu.log")
    }

    /// The record of the last run, written by the keeper.
    pub(crate) fn run_file(&self) -> PathBuf {
        self.work.join("qemu.json")
    }

    /// Locked by whoever runs the VM; QEMU itself inherits the lock, so it is free exactly when
    /// nothing runs.
    pub(crate) fn alive_lock(&self) -> PathBuf {
        self.work.join("alive")
    }

    /// Its presence says that the end of the run was asked for.
    pub(crate) fn stop_mark(&self) -> PathBuf {
        self.work.join("stop-asked")
    }

    /// Its presence says that `prepare` began here, and for which VM.
    pub(crate) fn owner_mark(&self) -> PathBuf {
        self.work.join("owner")
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    /// A second monitor of vmkit's, in the work directory. What cleans up runtime directories, at a
    /// logout or by age, does not reach it, so a VM can be asked and stopped as long as its disks
    /// are there.
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

    /// Locked by whoever is at the console; it has their PID.
    pub(crate) fn console_lock(&self) -> PathBuf {
        self.run.join("console.sock.lock")
    }

    pub(crate) fn vnc_socket(&self) -> PathBuf {
        self.run.join("vnc.sock")
    }

    pub(crate) fn vnc_password(&self) -> PathBuf {
        self.run.join("vnc.password")
    }

    /// Every file that this backend may have made in the work directory, those that a killed
    /// process left unfinished among them. The owner's mark comes late: until it goes, the
    /// directory is known to be this VM's. The lock is last: whoever gets a new one finds no owner
    /// any more.
    pub(crate) fn work_files(&self, data_disks: usize) -> Vec<PathBuf> {
        let mut files = self.run_inputs(data_disks);
        files.extend([unfinished(&self.seed()), unfinished(&self.run_file()), self.spare_socket()]);
        files.extend([self.run_file(), self.stop_mark(), self.owner_mark(), self.alive_lock()]);
        files
    }

    /// The disks and the logs of the work directory, which QEMU and the keeper open at each start.
    pub(crate) fn run_inputs(&self, data_disks: usize) -> Vec<PathBuf> {
        let mut files = vec![self.root_disk(), self.seed(), self.efi_vars()];
        files.extend((0..data_disks).map(|index| self.data_disk(index)));
        for log in [self.console_log(), self.qemu_log()] {
            files.push(older_log(&log));
            files.push(log);
        }
        files
    }

    /// Every file of a run: those of the runtime directory, and the spare monitor.
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

/// Returns ten letters for names that may have few: what tells the VM's MAC address from others.
///
/// They come from the whole id: ids that were made one after the other begin, or end, alike.
pub(crate) fn short_id(id: Uuid) -> String {
    let [_, own @ ..] = MacAddr::of_vm(id).bytes();
    own.map(|byte| format!("{byte:02x}")).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_begin_alike_have_different_runtime_directories() {
        let name = VmName::new("web").unwrap();
        let of = |id| QemuLayout::of(Path::new("/w"), Path::new("/r"), &name, Uuid::from_u128(id)).unwrap();
        assert_ne!(of(1).run, of(2).run);
        assert_ne!(of(1 << 127).run, of(1 << 127 | 1 << 126).run);
        assert_eq!(of(1), of(1));
    }

    #[test]
    fn a_root_that_means_another_place_elsewhere_is_refused() {
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
