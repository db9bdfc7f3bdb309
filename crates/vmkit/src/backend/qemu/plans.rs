//! Plans of a VM, from what the host and the VM's disk are like now.
//!
//! Edge: examines files and the host, and changes neither.

use uuid::Uuid;

use super::facts::{ImageMedia, QemuFacts};
use super::layout::QemuLayout;
use super::plan::{QemuPlan, RestoreStep, SeedStep, UpdateStep};
use super::saved::{SavedGuest, is_saved};
use super::{QemuDetails, QemuHypervisor, disks, elsewhere, layers, plan, prepare, wanted_disk, wanted_run};
use crate::cloud_init::SeedOf;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::image::is_backing_settled;
use crate::lifecycle::Operation;
use crate::network::MacAddr;
use crate::spec::{NetworkConfig, VmSpec};

impl QemuHypervisor {
    /// Returns what `prepare`, and `start` after it, would do for a new VM, and changes nothing.
    ///
    /// # Errors
    /// Those of `prepare` that show without creating anything: `InvalidInput`, `Host`.
    pub async fn plan(&self, spec: &VmSpec) -> Result<QemuPlan> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        self.plan_new(spec, id).await.map(|(plan, _)| plan)
    }

    /// Returns what a `start` of a VM would do that does not run, and changes nothing. A spec that
    /// waits for the next start ([`VmHandle::next_spec`]) is the one that is planned.
    ///
    /// # Errors
    /// Those of `start` that show without changing anything: `InvalidInput`, `Host`, `Record`.
    pub async fn plan_start(&self, vm: &VmHandle) -> Result<QemuPlan> {
        let vm = match is_saved(&self.layout(&vm.spec, vm.id)?) {
            true => vm.clone(),
            false => vm.clone().with_next_spec(),
        };
        let details = self.details(&vm)?;
        elsewhere::check_owner(&vm, &details.layout, Operation::Start)?;
        disks::check_own_files(&vm.spec, &details.layout)?;
        disks::check_files(&vm.spec, &details.media, details.base.as_ref()).await?;
        let facts = self.facts(&vm.spec).await?;
        let saved = SavedGuest::read(&details.layout)?;
        saved.as_ref().map_or(Ok(()), |saved| saved.check(&vm.spec, &details.layout, &facts))?;
        self.plan_run(&vm, &details, &facts, saved.as_ref())
    }

    pub(super) async fn plan_new(&self, spec: &VmSpec, id: Uuid) -> Result<(QemuPlan, ImageMedia)> {
        spec.backend_options().check_known(&[])?;
        let layout = self.layout(spec, id)?;
        let looked = prepare::look_at_files(spec)?;
        prepare::check_network(spec).await?;
        let facts = self.facts(spec).await?;
        let seed = seed(spec, id, &layout)?;
        let prepare = plan::prepare_steps(spec, id, &layout, &facts, looked.root, seed);
        let plan = plan::plan(spec, id, &layout, &facts, &looked.media, self.0.devices, None);
        Ok((QemuPlan { prepare, ..plan }, looked.media))
    }

    /// Plans a run of a VM that exists, in the directory for sockets that this session has.
    pub(super) fn plan_run(
        &self,
        vm: &VmHandle,
        details: &QemuDetails,
        facts: &QemuFacts,
        saved: Option<&SavedGuest>,
    ) -> Result<QemuPlan> {
        let layout = self.layout(&vm.spec, vm.id)?;
        let mut update = outdated(vm, details, &layout)?;
        let restore = saved.map(|saved| RestoreStep {
            memory: layout.memory_file(),
            machine: saved.machine.clone(),
            bytes: saved.bytes,
        });
        let devices = saved.map_or(Ok(self.0.devices), |saved| saved.devices(vm.name()))?;
        if restore.is_some() {
            // The guest has its disks in memory as they are: what changes them waits for a boot.
            update.retain(|step| matches!(step, UpdateStep::BackingFile { .. }));
        }
        let plan = plan::plan(&vm.spec, vm.id, &layout, facts, &details.media, devices, restore);
        Ok(QemuPlan { update, ..plan })
    }
}

/// Finds what on the disk of a VM that does not run is not as its spec, or this host, asks for
/// by now.
fn outdated(vm: &VmHandle, details: &QemuDetails, layout: &QemuLayout) -> Result<Vec<UpdateStep>> {
    let mut steps = Vec::new();
    // The first thing that a removal takes from a VM without a root disk.
    if !layout.seed().exists() || details.seed_run != wanted_run(&vm.spec) {
        steps.extend(seed(&vm.spec, vm.id, layout)?.map(UpdateStep::Seed));
    }
    let path = layout.root_disk();
    if let Some(disk) = vm.spec.disk() {
        for path in layers::root_files(layout)? {
            if !is_backing_settled(&path, &disk.image)? {
                steps.push(UpdateStep::BackingFile { path, image: disk.image.clone() });
            }
        }
    }
    if let Some(size) = wanted_disk(&vm.spec).filter(|size| details.disk != Some(*size)) {
        steps.push(UpdateStep::Grow { path, size });
    }
    Ok(steps)
}

/// Renders the seed of a VM; `None` without cloud-init.
pub(super) fn seed(spec: &VmSpec, id: Uuid, layout: &QemuLayout) -> Result<Option<SeedStep>> {
    let Some(config) = spec.cloud_init() else { return Ok(None) };
    let mac = match spec.network() {
        NetworkConfig::None => None,
        NetworkConfig::User(_) | NetworkConfig::Tap { .. } | NetworkConfig::Vnic { .. } => {
            Some(MacAddr::of_vm(id))
        }
    };
    let seed = SeedOf { config, name: spec.name(), id, mac }.rendered()?;
    Ok(Some(SeedStep { path: layout.seed(), seed }))
}
