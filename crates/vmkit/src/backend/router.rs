//! Sends each call to the backend that the VM belongs to. It routes, and has no policy of its own.

use std::collections::BTreeMap;
use std::time::Duration;

#[cfg(all(target_os = "illumos", feature = "propolis"))]
use crate::backend::propolis::PropolisHypervisor;
#[cfg(all(target_os = "linux", feature = "qemu"))]
use crate::backend::qemu::QemuHypervisor;
use crate::error::{Error, Result};
use crate::forwarding::{DynPortForwarding, PortForwarding};
use crate::handle::{BackendTag, ConsoleEndpoint, VmHandle};
use crate::hypervisor::{Backend, Capabilities, DynHypervisor, Hypervisor};
use crate::lifecycle::VmState;
use crate::spec::{PortForward, VmSpec};

/// A hypervisor over several: a handle's tag says whose VM it is, a spec's `backend` who shall make
/// it.
#[derive(Debug, Clone)]
pub struct RouterHypervisor {
    default: BackendTag,
    routes: BTreeMap<BackendTag, RoutedBackend>,
}

/// A backend, and what else it has beside the contract.
#[derive(Debug, Clone)]
struct RoutedBackend {
    hypervisor: DynHypervisor,
    capabilities: Capabilities,
    forwarding: Option<DynPortForwarding>,
}

impl RouterHypervisor {
    /// Creates a router without backends; a spec that names none goes to `default`.
    pub fn new(default: BackendTag) -> Self {
        Self { default, routes: BTreeMap::new() }
    }

    /// Creates a router over what vmkit itself has for this kind of host: QEMU on Linux, which is
    /// also the default.
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    pub fn of_this_host(qemu: QemuHypervisor) -> Self {
        Self::new(BackendTag::Qemu).with_forwarding(qemu)
    }

    /// Creates a router over what vmkit itself has for this kind of host: Propolis on illumos,
    /// which is also the default.
    #[cfg(all(target_os = "illumos", feature = "propolis"))]
    pub fn of_this_host(propolis: PropolisHypervisor) -> Self {
        Self::new(BackendTag::Propolis).with(propolis)
    }

    /// Adds a backend, or replaces the one with the same tag.
    #[must_use]
    pub fn with(mut self, backend: impl Backend + 'static) -> Self {
        self.register(backend);
        self
    }

    /// Adds a backend that can also forward ports of a VM that runs, or replaces the one with the
    /// same tag.
    #[must_use]
    pub fn with_forwarding(mut self, backend: impl Backend + PortForwarding + Clone + 'static) -> Self {
        let tag = backend.tag();
        self.register(backend.clone());
        if let Some(route) = self.routes.get_mut(&tag) {
            route.forwarding = Some(DynPortForwarding::new(backend));
        }
        self
    }

    /// Adds a backend at run time, or replaces the one with the same tag.
    pub fn register(&mut self, backend: impl Backend + 'static) {
        let (tag, capabilities) = (backend.tag(), backend.capabilities());
        let hypervisor = DynHypervisor::new(backend);
        self.routes.insert(tag, RoutedBackend { hypervisor, capabilities, forwarding: None });
    }

    /// Returns the tags of the registered backends, in order.
    pub fn tags(&self) -> impl Iterator<Item = &BackendTag> {
        self.routes.keys()
    }

    /// Returns what a registered backend can do.
    ///
    /// # Errors
    /// `Host` for a tag that is not registered; the error names those that are.
    pub fn capabilities(&self, tag: &BackendTag) -> Result<&Capabilities> {
        self.route(tag).map(|route| &route.capabilities)
    }

    fn route(&self, tag: &BackendTag) -> Result<&RoutedBackend> {
        self.routes.get(tag).ok_or_else(|| Error::UnknownBackend {
            tag: tag.clone(),
            known: self.routes.keys().cloned().collect(),
        })
    }

    fn forwarding_of(&self, vm: &VmHandle) -> Result<&DynPortForwarding> {
        self.route(&vm.backend)?.forwarding.as_ref().ok_or_else(|| Error::Unsupported {
            backend: vm.backend.clone(),
            what: "forwards in a VM that is there already".to_owned(),
        })
    }

    fn of(&self, vm: &VmHandle) -> Result<&DynHypervisor> {
        self.route(&vm.backend).map(|route| &route.hypervisor)
    }
}

impl Hypervisor for RouterHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.route(spec.backend().unwrap_or(&self.default))?.hypervisor.prepare(spec).await
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.of(vm)?.start(vm).await
    }

    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        self.of(vm)?.stop(vm, timeout).await
    }

    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.of(vm)?.suspend(vm).await
    }

    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.of(vm)?.resume(vm).await
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        self.of(&vm)?.destroy(vm).await
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.of(vm)?.state(vm).await
    }

    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.of(vm)?.guest_ip(vm).await
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.of(vm)?.console_endpoint(vm)
    }
}

impl PortForwarding for RouterHypervisor {
    async fn add_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.forwarding_of(vm)?.add(vm, forward).await
    }

    async fn remove_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.forwarding_of(vm)?.remove(vm, forward).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::noop::NoopHypervisor;
    use crate::spec::{Boot, Kernel, VmName};

    #[tokio::test]
    async fn an_unknown_tag_names_the_known_ones() {
        let router = RouterHypervisor::new(BackendTag::Propolis).with(NoopHypervisor::new());
        let kernel = Kernel { path: "/vmlinuz".into(), initrd: None, cmdline: String::new() };
        let spec = VmSpec::builder(VmName::new("web").unwrap()).boot(Boot::Kernel(kernel)).build().unwrap();
        let error = router.prepare(&spec).await.unwrap_err();
        assert_eq!(error.to_string(), "no backend `propolis` is registered here; known: `noop`");
    }
}
