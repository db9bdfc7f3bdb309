//! What the limits of this process allow its VMs, which inherit them.

use rustix::process::{Resource, geteuid, getrlimit};
use serde::Serialize;

use super::{CheckStatus, HostCheck, bad, ok};

/// As many descriptors QEMU needs at least: it is given its sockets under numbers from 200 up.
const FEWEST_DESCRIPTORS: u64 = 210;
/// Fewer than these are too few for a VM with many disks or a busy network.
const FEW_DESCRIPTORS: u64 = 1024;
/// Fewer than these are too few beside a user's other processes: QEMU has up to 64 threads for its
/// disks alone.
const FEW_PROCESSES: u64 = 256;

/// The hard limits of this process; `None` is without bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ProcessLimits {
    /// How many descriptors can be open: RLIMIT_NOFILE.
    pub descriptors: Option<u64>,
    /// How long a file that it writes can be, in bytes: RLIMIT_FSIZE.
    pub file_bytes: Option<u64>,
    /// How much memory it can map, in bytes: RLIMIT_AS.
    pub memory_bytes: Option<u64>,
    /// How much memory of its own it can have, in bytes: RLIMIT_DATA.
    pub data_bytes: Option<u64>,
    /// For how many seconds it can use a processor: RLIMIT_CPU.
    pub processor_seconds: Option<u64>,
    /// How many processes and threads its user can have: RLIMIT_NPROC. It does not hold for root.
    pub processes: Option<u64>,
}

impl ProcessLimits {
    /// Reads the limits of this process.
    pub fn probe() -> Self {
        let of = |resource| getrlimit(resource);
        Self {
            // Raised to its hard limit where it counts.
            descriptors: of(Resource::Nofile).maximum,
            file_bytes: of(Resource::Fsize).current,
            memory_bytes: of(Resource::As).current,
            data_bytes: of(Resource::Data).current,
            processor_seconds: of(Resource::Cpu).current,
            processes: of(Resource::Nproc).current.filter(|_| !geteuid().is_root()),
        }
    }
}

/// Judges the limits of a process that starts VMs.
pub fn limits(limits: &ProcessLimits) -> Vec<HostCheck> {
    vec![descriptors(limits), sizes(limits)]
}

fn descriptors(limits: &ProcessLimits) -> HostCheck {
    const RAISE: &str = "raise the hard limit: `ulimit -Hn`, or LimitNOFILE of a systemd unit";
    match limits.descriptors {
        Some(most) if most < FEW_DESCRIPTORS => {
            let status = if most < FEWEST_DESCRIPTORS { CheckStatus::Fail } else { CheckStatus::Warn };
            let found =
                format!("at most {most} open files (RLIMIT_NOFILE), and a VM needs {FEWEST_DESCRIPTORS}");
            bad("descriptors", status, found, RAISE)
        }
        Some(most) => ok("descriptors", format!("at most {most} open files")),
        None => ok("descriptors", "open files are not limited"),
    }
}

fn sizes(limits: &ProcessLimits) -> HostCheck {
    let mut found = Vec::new();
    if let Some(bytes) = limits.file_bytes {
        found.push(format!("a file has at most {bytes} bytes (RLIMIT_FSIZE, `ulimit -f`)"));
    }
    if let Some(bytes) = limits.memory_bytes {
        found.push(format!("a process has at most {bytes} bytes of memory (RLIMIT_AS, `ulimit -v`)"));
    }
    if let Some(bytes) = limits.data_bytes {
        found.push(format!("a process has at most {bytes} bytes of its own (RLIMIT_DATA, `ulimit -d`)"));
    }
    if let Some(seconds) = limits.processor_seconds {
        found.push(format!("a VM ends after {seconds} s of CPU time (RLIMIT_CPU, `ulimit -t`)"));
    }
    if let Some(most) = limits.processes.filter(|most| *most < FEW_PROCESSES) {
        found.push(format!("this user has at most {most} processes and threads (RLIMIT_NPROC, `ulimit -u`)"));
    }
    match found.is_empty() {
        true => ok("limits", "the limits of file size, memory, CPU time and processes suffice for a VM"),
        false => {
            let advice = "raise them, or VMs that need more fail: disks, the guest's memory, its CPU time and QEMU's threads count";
            bad("limits", CheckStatus::Warn, found.join("; "), advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_keeps_vms_from_running_is_named() {
        let none = ProcessLimits {
            descriptors: None,
            file_bytes: None,
            memory_bytes: None,
            data_bytes: None,
            processor_seconds: None,
            processes: None,
        };
        assert!(limits(&none).iter().all(|check| check.status == CheckStatus::Ok));
        for (found, name, status, said) in [
            (
                ProcessLimits { descriptors: Some(209), ..none },
                "descriptors",
                CheckStatus::Fail,
                "RLIMIT_NOFILE",
            ),
            (
                ProcessLimits { descriptors: Some(256), ..none },
                "descriptors",
                CheckStatus::Warn,
                "256 open files",
            ),
            (ProcessLimits { file_bytes: Some(4096), ..none }, "limits", CheckStatus::Warn, "RLIMIT_FSIZE"),
            (ProcessLimits { data_bytes: Some(4096), ..none }, "limits", CheckStatus::Warn, "RLIMIT_DATA"),
            (ProcessLimits { processor_seconds: Some(9), ..none }, "limits", CheckStatus::Warn, "RLIMIT_CPU"),
            (ProcessLimits { processes: Some(9), ..none }, "limits", CheckStatus::Warn, "RLIMIT_NPROC"),
            (ProcessLimits { memory_bytes: Some(1 << 30), ..none }, "limits", CheckStatus::Warn, "RLIMIT_AS"),
        ] {
            let checks = limits(&found);
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert!(check.status == status && check.found.contains(said), "{check:?}");
        }
    }
}
