//! Sends each call to the backend that the VM belongs to. It routes, and has no policy of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::abilities::{Abilities, Capabilities};
#[cfg(all(target_os = "illumos", feature = "propolis"))]
use crate::backend::propolis::PropolisHypervisor;
#[cfg(all(target_os = "linux", feature = "qemu"))]
use crate::backend::qemu::QemuHypervisor;
use crate::error::{Error, Result};
use crate::handle::{BackendTag, ConsoleEndpoint, VmHandle};
use crate::hypervisor::{Backend, DynHypervisor, Hypervisor};
use crate::lifecycle::VmState;
use crate::spec::VmSpec;

/// A hypervisor over several: a handle's tag says whose VM it is, a spec's `backend` who shall make
/// it.
#[derive(Debug, Clone)]
pub struct RouterHypervisor {
    default: BackendTag,
    routes: BTreeMap<BackendTag, DynHypervisor>,
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
        Self::new(BackendTag::Qemu).with(qemu)
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

    /// Adds a backend at run time, or replaces the one with the same tag.
    pub fn register(&mut self, backend: impl Backend + 'static) {
        self.routes.insert(backend.tag(), DynHypervisor::new(backend));
    }

    /// Returns the tags of the registered backends, in order.
    pub fn tags(&self) -> impl Iterator<Item = &BackendTag> {
        self.routes.keys()
    }

    /// Returns what a registered backend can do.
    ///
    /// # Errors
    /// `Host` for a tag that is not registered; the error names those that are.
    pub fn capabilities(&self, tag: &BackendTag) -> Result<Capabilities> {
        self.route(tag).map(|backend| backend.abilities(tag).capabilities())
    }

    fn route(&self, tag: &BackendTag) -> Result<&DynHypervisor> {
        self.routes.get(tag).ok_or_else(|| Error::UnknownBackend {
            tag: tag.clone(),
            known: self.routes.keys().cloned().collect(),
        })
    }

    fn of(&self, vm: &VmHandle) -> Result<&DynHypervisor> {
        self.route(&vm.backend)
    }
}

impl Hypervisor for RouterHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.route(spec.backend().unwrap_or(&self.default))?.prepare(spec).await
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

impl Backend for RouterHypervisor {
    fn tag(&self) -> BackendTag {
        self.default.clone()
    }

    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        self.routes.get(tag).map_or_else(Abilities::none, |backend| backend.abilities(tag))
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
