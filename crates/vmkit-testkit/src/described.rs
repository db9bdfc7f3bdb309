//! Gives a hypervisor the tag and the capabilities that it can't tell itself.

use std::time::Duration;

use vmkit::spec::VmSpec;
use vmkit::{Backend, BackendTag, Capabilities, ConsoleEndpoint, Hypervisor, Result, VmHandle, VmState};

/// A hypervisor with a name: makes a [`Backend`] of a `DynHypervisor` or of a router.
#[derive(Debug, Clone)]
pub struct TaggedHypervisor<H> {
    hypervisor: H,
    tag: BackendTag,
    capabilities: Capabilities,
}

impl<H: Hypervisor> TaggedHypervisor<H> {
    /// Says that `hypervisor` makes handles with this tag and can do this much.
    pub fn new(hypervisor: H, tag: BackendTag, capabilities: Capabilities) -> Self {
        Self { hypervisor, tag, capabilities }
    }
}

impl<H: Hypervisor> Hypervisor for TaggedHypervisor<H> {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.hypervisor.prepare(spec).await
    }
    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.hypervisor.start(vm).await
    }
    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        self.hypervisor.stop(vm, timeout).await
    }
    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.hypervisor.suspend(vm).await
    }
    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.hypervisor.resume(vm).await
    }
    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        self.hypervisor.destroy(vm).await
    }
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.hypervisor.state(vm).await
    }
    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.hypervisor.guest_ip(vm).await
    }
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.hypervisor.console_endpoint(vm)
    }
}

impl<H: Hypervisor> Backend for TaggedHypervisor<H> {
    fn tag(&self) -> BackendTag {
        self.tag.clone()
    }
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }
}
