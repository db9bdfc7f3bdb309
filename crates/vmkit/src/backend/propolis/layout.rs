//! The paths and names of everything that belongs to one VM.
//!
//! Pure: paths and names only.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::backend::supervise::{SupervisionPaths, unfinished};
use crate::log_position::older_log;
use crate::network::MacAddr;
use crate::spec::VmName;

/// The files of one VM, in one directory from `prepare` to `destroy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PropolisLayout {
    pub(super) work: PathBuf,
}

impl PropolisLayout {
    pub(super) fn of(work_root: &Path, name: &VmName) -> Self {
        Self { work: work_root.join(name.as_str()) }
    }

    /// The lock that every operation that changes something holds.
    pub(super) fn operation_lock(&self) -> PathBuf {
        self.work.join("operation")
    }

    /// The owner of this directory, and what was created for it on the host.
    pub(super) fn claim(&self) -> PathBuf {
        self.work.join("owner")
    }

    /// Where the server of the last run listens; written before its guest runs.
    pub(super) fn server_file(&self) -> PathBuf {
        self.work.join("server.json")
    }

    /// Exists if the end of the run was requested.
    pub(super) fn stop_mark(&self) -> PathBuf {
        self.work.join("stop-asked")
    }

    /// The server's working directory: it writes `debug.out` there.
    pub(super) fn server_dir(&self) -> PathBuf {
        self.work.join("server")
    }

    /// The id of a run that was seen to have ended.
    pub(super) fn ended_mark(&self) -> PathBuf {
        self.work.join("run-ended")
    }

    pub(super) fn console_log(&self) -> PathBuf {
        self.work.join("console.log")
    }

    /// How much of this run's console is in the log.
    pub(super) fn console_mark(&self) -> PathBuf {
        self.work.join("console.at")
    }

    pub(super) fn server_log(&self) -> PathBuf {
        self.work.join("propolis.log")
    }

    pub(super) fn root_disk(&self) -> PathBuf {
        self.work.join("root.raw")
    }

    pub(super) fn data_disk(&self, index: usize) -> PathBuf {
        self.work.join(format!("data-{index}.raw"))
    }

    /// Returns the files by which the server's process is supervised.
    pub(super) fn place(&self) -> SupervisionPaths {
        SupervisionPaths {
            alive: self.work.join("alive"),
            run_file: self.work.join("propolis.json"),
            run_dir: self.server_dir(),
            program: "propolis-server",
            killer: None,
        }
    }

    /// Returns every file that this backend may have created, in the order of their removal. The
    /// claim is late: until it is removed, the directory is known to be this VM's. The locks are
    /// last: a process that takes a new one finds no claim.
    pub(super) fn files(&self, data_disks: usize) -> Vec<PathBuf> {
        let place = self.place();
        let mut files = vec![self.root_disk()];
        files.extend((0..data_disks).map(|index| self.data_disk(index)));
        for log in [self.console_log(), self.server_log()] {
            files.push(older_log(&log));
            files.push(log);
        }
        let written = [
            self.server_file(),
            self.console_mark(),
            self.ended_mark(),
            place.run_file.clone(),
            self.claim(),
        ];
        files.extend(written.iter().map(|file| unfinished(file)));
        files.extend([self.console_mark(), self.server_file(), place.run_file, self.stop_mark()]);
        files.push(self.ended_mark());
        files.extend([self.claim(), place.alive, self.operation_lock()]);
        files
    }
}

/// Returns the name of a VM's own VNIC, such as `vmk52a0c1b2d3n0`.
///
/// It ends with a letter and a single digit: the digits at the end are the link's number, which has
/// no leading zeros.
pub(super) fn vnic_of(id: Uuid) -> String {
    let [_, own @ ..] = MacAddr::of_vm(id).bytes();
    format!("vmk{}n0", own.map(|byte| format!("{byte:02x}")).concat())
}

/// Returns the name of the volume of a VM's root disk.
pub(super) fn root_volume(dataset: &str, id: Uuid) -> String {
    format!("{dataset}/{id}")
}

/// Returns the name of the volume of one of its data disks.
pub(super) fn data_volume(dataset: &str, id: Uuid, index: usize) -> String {
    format!("{dataset}/{id}-data-{index}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::LinkName;

    #[test]
    fn the_name_of_any_vnic_is_a_valid_link_name() {
        for id in [Uuid::nil(), Uuid::max(), Uuid::from_u128(7)] {
            let name = vnic_of(id);
            assert!(LinkName::new(&name).is_ok() && name.ends_with("n0"), "{name}");
        }
    }
}
