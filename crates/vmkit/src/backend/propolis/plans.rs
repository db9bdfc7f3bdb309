//! Plans of a VM, from what the host is like now and what was made for the VM.
//!
//! Edge: examines files and the host, and changes neither.

use uuid::Uuid;

use super::context::VmContext;
use super::layout::PropolisLayout;
use super::options::PropolisOptions;
use super::plan::PropolisPlan;
use super::reshape::reshaping;
use super::{PropolisHypervisor, plan};
use crate::error::Result;
use crate::handle::VmHandle;
use crate::lifecycle::{InvalidTransition, Operation, VmState};
use crate::spec::VmSpec;

impl PropolisHypervisor {
    /// Returns what `prepare`, and `start` after it, would do for a new VM, and changes nothing.
    ///
    /// # Errors
    /// Those of `prepare` that show without making anything: `InvalidInput`, `Unsupported`, `Host`.
    pub async fn plan(&self, spec: &VmSpec) -> Result<PropolisPlan> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        self.planned(spec, id).await.map(|(_, plan, _)| plan)
    }

    /// Returns what a `start` of a VM would do that does not run, and changes nothing. A spec that
    /// waits for the next start ([`VmHandle::next_spec`]) is the one that is planned.
    ///
    /// # Errors
    /// Those of `start` that show without making anything: `InvalidInput`, `Unsupported`, `Host`.
    pub async fn plan_start(&self, vm: &VmHandle) -> Result<PropolisPlan> {
        let vm = vm.clone().with_next_spec();
        let gone = InvalidTransition { state: VmState::Destroyed, operation: Operation::Start };
        let site = self.site(&vm)?.ok_or(gone)?;
        site.plan().await
    }

    pub(super) async fn planned(
        &self,
        spec: &VmSpec,
        id: Uuid,
    ) -> Result<(PropolisOptions, PropolisPlan, u64)> {
        let options = PropolisOptions::of(spec, &self.0.defaults)?;
        plan::check(spec, &options)?;
        plan::dataset(spec, &options)?;
        let facts = self.0.facts(spec, id, &options, None).await?;
        let layout = PropolisLayout::of(&self.0.work_root, spec.name());
        let plan = plan::plan(spec, id, &options, &layout, &facts)?;
        Ok((options, plan, facts.image_bytes))
    }
}

impl VmContext<'_> {
    /// Plans a start of the VM.
    pub(super) async fn plan(&self) -> Result<PropolisPlan> {
        let VmContext { vm, claim, layout, .. } = self;
        let facts = self.settings.facts(&vm.spec, vm.id, &claim.options, Some(claim)).await?;
        let plan = plan::plan(&vm.spec, vm.id, &claim.options, layout, &facts)?;
        self.check_size()?;
        let update = reshaping(&claim.steps, &claim.pending, &plan.prepare);
        Ok(PropolisPlan { prepare: Vec::new(), update, ..plan })
    }
}
