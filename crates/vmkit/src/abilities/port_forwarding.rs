//! The ability to forward ports of the host into a VM that runs already: [`PortForwarding`].
//!
//! A trait of its own, since not every backend can do it: a guest on a tap, or on a remote host, is
//! reached without a forward.

use std::future::Future;
use std::net::SocketAddrV4;

use super::erased;
use crate::error::Result;
use crate::handle::{ActiveForward, VmHandle};
use crate::spec::{NetworkConfig, PortForward, VmSpec};

/// Adds forwards to a VM that runs, and removes them.
///
/// The forwards of the spec are in force from each start on, so a forward that is to stay has to be
/// in the spec as well; `VmManager::add_forward` does both.
///
/// # Cancel safety
/// A dropped future may or may not have had its effect; calling again is safe.
pub trait PortForwarding: Send + Sync {
    /// Adds a forward, and returns a handle whose `run` has it, with the host's real port.
    ///
    /// # State
    /// Running and Suspended, which stay. A forward that is in force already is success.
    ///
    /// # Errors
    /// `InvalidState` unless the VM runs or is suspended; `InvalidInput` if the VM's network has no
    /// forwards, or the host's port is in use: by which process, where that is known.
    fn add_forward(
        &self,
        vm: &VmHandle,
        forward: &PortForward,
    ) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Removes a forward, and returns a handle without it. Open connections through it stay open.
    ///
    /// # State
    /// Running and Suspended, which stay. A forward that is not in force is success.
    ///
    /// # Errors
    /// `InvalidState` unless the VM runs or is suspended; `InvalidInput` if the VM's network has no
    /// forwards.
    fn remove_forward(
        &self,
        vm: &VmHandle,
        forward: &PortForward,
    ) -> impl Future<Output = Result<VmHandle>> + Send;
}

erased! {
    /// Any backend that forwards ports while a VM runs, its type erased.
    DynPortForwarding of PortForwarding by ErasedPortForwarding for 'a;
    /// Calls [`PortForwarding::add_forward`].
    ///
    /// # Errors
    /// Those of the backend.
    add_forward as add_forward_dyn(vm: &'a VmHandle, forward: &'a PortForward) -> VmHandle;
    /// Calls [`PortForwarding::remove_forward`].
    ///
    /// # Errors
    /// Those of the backend.
    remove_forward as remove_forward_dyn(vm: &'a VmHandle, forward: &'a PortForward) -> VmHandle;
}

/// Returns the address that the host listens on for this forward, if it is in force.
///
/// A forward without a host port matches any to the guest's port that is not another forward of the
/// spec.
pub(crate) fn in_force(
    spec: &VmSpec,
    forward: &PortForward,
    active: &[ActiveForward],
) -> Option<SocketAddrV4> {
    let NetworkConfig::User(user) = spec.network() else { return None };
    let is_named = |host: SocketAddrV4| {
        user.forwards.iter().any(|it| {
            it.protocol == forward.protocol
                && it.host_addr == *host.ip()
                && it.host_port.is_some_and(|port| port.get() == host.port())
        })
    };
    let leads_there = |it: &&ActiveForward| {
        it.protocol == forward.protocol
            && *it.host.ip() == forward.host_addr
            && it.guest_port == forward.guest_port
    };
    let is_it = |it: &&ActiveForward| match forward.host_port {
        Some(port) => it.host.port() == port.get(),
        None => !is_named(it.host),
    };
    active.iter().filter(leads_there).find(is_it).map(|it| it.host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Boot, Kernel, Protocol, UserNetwork, VmName};

    fn active(text: &str) -> ActiveForward {
        let (host, guest) = text.split_once('-').unwrap();
        let protocol = Protocol::Tcp;
        ActiveForward { protocol, host: host.parse().unwrap(), guest_port: guest.parse().unwrap() }
    }

    #[test]
    fn a_forward_is_found_by_its_port_or_by_being_the_only_unnamed_one() {
        let forwards = ["8080:80", "80", "22"].map(|text| text.parse().unwrap());
        let network = NetworkConfig::User(UserNetwork { forwards: forwards.to_vec(), restrict: false });
        let kernel = Kernel { path: "/k".into(), initrd: None, cmdline: String::new() };
        let spec = VmSpec::builder(VmName::new("web").unwrap()).boot(Boot::Kernel(kernel)).network(network);
        let spec = spec.build().unwrap();
        let found = |forward: &PortForward, table: &[&str]| {
            let table: Vec<ActiveForward> = table.iter().map(|text| active(text)).collect();
            in_force(&spec, forward, &table).map(|host| host.port())
        };
        let [named, chosen, _] = &forwards;
        let table = ["127.0.0.1:8080-80", "127.0.0.1:40001-80", "127.0.0.1:40002-22"];
        assert_eq!(found(named, &table), Some(8080));
        assert_eq!(found(chosen, &table), Some(40001));
        assert_eq!(found(chosen, &table[..1]), None, "that one is the named forward's");
        assert_eq!(found(named, &table[1..]), None);
        assert_eq!(found(named, &["0.0.0.0:8080-80"]), None, "another address is another forward");
    }
}
