//! What an error is about: kinds of things, what a VM has while it runs, and peers.
//!
//! Pure: this module knows nothing of the host. Enums, so that a caller matches what it acts on,
//! and the texts are free to change.

use std::fmt;

/// The kind of thing that exists already, or does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subject {
    /// A VM.
    Vm,
    /// A snapshot of a VM.
    Snapshot,
    /// The address of a VM's guest.
    VmAddress,
    /// The log of a VM's console.
    ConsoleLog,
    /// The log of a VM's hypervisor.
    HypervisorLog,
    /// A forwarded port of a VM.
    Forward,
    /// An image, by one of its names.
    Image,
    /// A file that is a disk.
    Disk,
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A file of machines, such as `vmkit.toml`.
    MachinesFile,
    /// A machine of such a file.
    Machine,
    /// A step of a machine's provisioning.
    Step,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Subject::Vm => "VM",
            Subject::Snapshot => "snapshot",
            Subject::VmAddress => "address of VM",
            Subject::ConsoleLog => "console log of VM",
            Subject::HypervisorLog => "hypervisor log of VM",
            Subject::Forward => "forward",
            Subject::Image => "image",
            Subject::Disk => "disk",
            Subject::File => "file",
            Subject::Directory => "directory",
            Subject::MachinesFile => "file of machines",
            Subject::Machine => "machine",
            Subject::Step => "step",
        })
    }
}

/// What is wrong with a file of a VM's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PartProblem {
    /// There is none, or a link that leads to nothing.
    Missing,
    /// A directory or a device is in its place.
    NotAFile,
    /// It has no byte.
    Empty,
    /// It is a disk, and has no header of a qcow2 image.
    NotQcow2,
}

impl fmt::Display for PartProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PartProblem::Missing => "is missing",
            PartProblem::NotAFile => "is no file",
            PartProblem::Empty => "is empty",
            PartProblem::NotQcow2 => "is no qcow2 image any more",
        })
    }
}

/// What is known of a VM only while it runs or is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LiveResource {
    /// The address of the guest.
    GuestAddress,
    /// The port of the guest that a port of this host is forwarded to.
    ForwardedPort,
    /// Whether something in the guest listens on a port.
    GuestListener,
    /// The login to the guest.
    GuestLogin,
    /// The address of the guest's SSH server.
    SshServer,
    /// The guest agent.
    GuestAgent,
    /// The guest's memory.
    Memory,
    /// The console.
    Console,
}

impl fmt::Display for LiveResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LiveResource::GuestAddress => "the guest's address",
            LiveResource::ForwardedPort => "the guest's port of a forward",
            LiveResource::GuestListener => "whether the guest listens",
            LiveResource::GuestLogin => "the login to the guest",
            LiveResource::SshServer => "the guest's SSH server",
            LiveResource::GuestAgent => "the guest agent",
            LiveResource::Memory => "the guest's memory",
            LiveResource::Console => "the console",
        })
    }
}

/// A process that is spoken to, and that may refuse or break the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Peer {
    /// QEMU, over QMP.
    Qemu,
    /// The guest agent, over its channel.
    GuestAgent,
    /// The SSH server of a guest.
    SshServer,
    /// The keeper: the process between this one and a VM's hypervisor.
    Keeper,
    /// A Propolis server, over its API.
    Propolis,
    /// The process of a Propolis server that vmkit started.
    PropolisProcess,
    /// The hypervisor of a backend outside this crate.
    Hypervisor,
}

impl Peer {
    /// Returns whether the peer runs in the guest.
    #[must_use]
    pub fn is_in_guest(self) -> bool {
        matches!(self, Peer::GuestAgent | Peer::SshServer)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Peer::Qemu => "QEMU",
            Peer::GuestAgent => "the guest agent",
            Peer::SshServer => "the SSH server",
            Peer::Keeper => "the keeper",
            Peer::Propolis => "the Propolis server",
            Peer::PropolisProcess => "propolis-server",
            Peer::Hypervisor => "the hypervisor",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_in_the_guest_or_is_the_hypervisors() {
        for (peer, is_in_guest) in [
            (Peer::Qemu, false),
            (Peer::GuestAgent, true),
            (Peer::SshServer, true),
            (Peer::Keeper, false),
            (Peer::Propolis, false),
            (Peer::PropolisProcess, false),
            (Peer::Hypervisor, false),
        ] {
            assert_eq!(peer.is_in_guest(), is_in_guest, "{peer}");
        }
    }
}
