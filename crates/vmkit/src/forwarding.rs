//! The ability to lead ports of the host into a VM that runs already: [`PortForwarding`].
//!
//! It stands beside the contract, since not every backend has it: a tap guest, and one on a remote host, is reached
//! without a forward.

use std::future::Future;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::sync::Arc;

use crate::error::Result;
use crate::handle::{ActiveForward, VmHandle};
use crate::hypervisor::Hypervisor;
use crate::spec::{NetworkConfig, PortForward, VmSpec};

/// Adds forwards to a VM that lives, and takes them away.
///
/// What a spec names is in force from each start on, so a forward that is to stay belongs into the spec as well;
/// `VmManager::add_forward` does both.
///
/// # Cancel safety
/// A dropped future may or may not have had its effect; calling again is safe.
pub trait PortForwarding: Hypervisor {
    /// Puts a forward in force, and answers a handle whose `run` tells of it, the host's port as it really is.
    ///
    /// # State
    /// Running and Suspended, which stay. One that is in force already is success.
    ///
    /// # Errors
    /// `InvalidState` unless the VM lives; `InvalidInput` where the VM's network has no forwards or the host's port is in
    /// use, naming by whom where that is known.
    fn add_forward(
        &self,
        vm: &VmHandle,
        forward: &PortForward,
    ) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Takes a forward away, and answers a handle without it. Connections through it that are open stay so.
    ///
    /// # State
    /// Running and Suspended, which stay. One that is not in force is success.
    ///
    /// # Errors
    /// `NotLive` unless the VM lives; `InvalidInput` where the VM's network has no forwards.
    fn remove_forward(
        &self,
        vm: &VmHandle,
        forward: &PortForward,
    ) -> impl Future<Output = Result<VmHandle>> + Send;
}

/// Any backend with the ability, its type erased: what a router keeps.
#[derive(Clone)]
pub(crate) struct DynPortForwarding(Arc<dyn Erased>);

impl DynPortForwarding {
    pub(crate) fn new(backend: impl PortForwarding + 'static) -> Self {
        Self(Arc::new(backend))
    }

    pub(crate) async fn add(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.0.add_dyn(vm, forward).await
    }

    pub(crate) async fn remove(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.0.remove_dyn(vm, forward).await
    }
}

impl std::fmt::Debug for DynPortForwarding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DynPortForwarding")
    }
}

type Boxed<'a> = Pin<Box<dyn Future<Output = Result<VmHandle>> + Send + 'a>>;

/// The object-safe twin of [`PortForwarding`].
trait Erased: Send + Sync {
    fn add_dyn<'a>(&'a self, vm: &'a VmHandle, forward: &'a PortForward) -> Boxed<'a>;
    fn remove_dyn<'a>(&'a self, vm: &'a VmHandle, forward: &'a PortForward) -> Boxed<'a>;
}

impl<B: PortForwarding> Erased for B {
    fn add_dyn<'a>(&'a self, vm: &'a VmHandle, forward: &'a PortForward) -> Boxed<'a> {
        Box::pin(self.add_forward(vm, forward))
    }
    fn remove_dyn<'a>(&'a self, vm: &'a VmHandle, forward: &'a PortForward) -> Boxed<'a> {
        Box::pin(self.remove_forward(vm, forward))
    }
}

/// Answers where the host listens for this forward, if it is in force.
///
/// One without a host's port is any that leads to the guest's port and is not another forward of the spec.
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
    fn a_forward_is_found_by_its_port_or_by_being_nobody_else_s() {
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
