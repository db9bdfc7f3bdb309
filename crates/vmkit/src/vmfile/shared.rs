//! What of the host only one machine can have: a port, a disk that is written.
//!
//! Pure.

use std::ops::Range;
use std::path::Path;

use super::project::MachineConfig;
use crate::error::VmfileProblem;
use crate::spec::{DataDisk, NetworkConfig, PortForward};

/// Returns what two machines of one file both want for themselves.
pub(super) fn problems(machines: &[MachineConfig]) -> Vec<VmfileProblem> {
    let mut problems =
        twice(&wanted_ports(machines), "give one of them another port", "give each machine its own");
    let help = "make it read-only, with `:ro` after its path, or give one of them another disk";
    problems.extend(twice(&wanted_disks(machines), help, help));
    problems
}

/// A machine that wants something of the host, and where its file says so.
struct ResourceUse<'a, T> {
    what: T,
    machine: &'a str,
    place: Range<usize>,
}

/// Something of the host that may be in the way of another.
trait HostResource {
    fn excludes(&self, other: &Self) -> bool;
    fn shown(&self) -> String;
}

struct SharedPort<'a>(&'a PortForward);

impl HostResource for SharedPort<'_> {
    fn excludes(&self, other: &Self) -> bool {
        let anywhere = self.0.host_addr.is_unspecified() || other.0.host_addr.is_unspecified();
        self.0.protocol == other.0.protocol
            && self.0.host_port == other.0.host_port
            && (anywhere || self.0.host_addr == other.0.host_addr)
    }

    fn shown(&self) -> String {
        let port = self.0.host_port.map_or(0, std::num::NonZeroU16::get);
        format!("the host's {} port {port}", self.0.protocol.as_str())
    }
}

struct SharedDisk<'a> {
    path: &'a Path,
    is_readonly: bool,
}

impl HostResource for SharedDisk<'_> {
    fn excludes(&self, other: &Self) -> bool {
        self.path == other.path && !(self.is_readonly && other.is_readonly)
    }

    fn shown(&self) -> String {
        format!("the disk {}, which is written to", self.path.display())
    }
}

fn wanted_ports(machines: &[MachineConfig]) -> Vec<ResourceUse<'_, SharedPort<'_>>> {
    let mut all = Vec::new();
    for machine in machines {
        let NetworkConfig::User(user) = machine.network() else { continue };
        for (index, forward) in user.forwards.iter().enumerate() {
            if forward.host_port.is_some() {
                let place = machine.place(&format!("forwards[{index}]"));
                all.push(ResourceUse { what: SharedPort(forward), machine: &machine.name, place });
            }
        }
    }
    all
}

fn wanted_disks(machines: &[MachineConfig]) -> Vec<ResourceUse<'_, SharedDisk<'_>>> {
    let mut all = Vec::new();
    for machine in machines {
        // What lies behind a name or an address is the store's.
        if let Some(image) = machine.image.as_ref().filter(|image| image.starts_with('/')) {
            let what = SharedDisk { path: Path::new(image), is_readonly: true };
            all.push(ResourceUse { what, machine: &machine.name, place: machine.place("image") });
        }
        if let Some(path) = machine.cdrom() {
            let what = SharedDisk { path, is_readonly: true };
            all.push(ResourceUse { what, machine: &machine.name, place: machine.place("cdrom") });
        }
        for (index, disk) in machine.blueprint.draft().data_disks().iter().enumerate() {
            if let DataDisk::Existing { path, readonly } = disk {
                let place = machine.place(&format!("data_disks[{index}]"));
                let what = SharedDisk { path, is_readonly: *readonly };
                all.push(ResourceUse { what, machine: &machine.name, place });
            }
        }
    }
    all
}

/// Says of all that is in the way of something before it, of another machine. What stands in
/// `defaults` is told once.
fn twice<T: HostResource>(
    all: &[ResourceUse<'_, T>],
    help: &str,
    help_in_defaults: &str,
) -> Vec<VmfileProblem> {
    let mut problems = Vec::new();
    let mut told_in_defaults = Vec::new();
    for (index, second) in all.iter().enumerate() {
        let in_the_way = |first: &&ResourceUse<'_, T>| {
            first.machine != second.machine && first.what.excludes(&second.what)
        };
        let Some(first) = all[..index].iter().find(in_the_way) else { continue };
        let what = second.what.shown();
        let message = format!("the machines `{}` and `{}` both want {what}", first.machine, second.machine);
        if first.place != second.place {
            let problem = VmfileProblem::new(message).at(second.place.clone(), "again here");
            problems.push(problem.also(first.place.clone(), "first here").help(help));
        } else if !told_in_defaults.contains(&second.place) {
            told_in_defaults.push(second.place.clone());
            problems.push(
                VmfileProblem::new(message).at(second.place.clone(), "for both").help(help_in_defaults),
            );
        }
    }
    problems
}
