//! VMs as copies of others.
//!
//! ```text
//!  the source's disks become layers ─▶ the new directory, with the same layers ─▶ overlays over them
//!                                         ─▶ memory, identity, saved.json, if the guest continues
//! ```
//!
//! A layer never changes, so the two have it by a hard link each. A guest that continues with the
//! memory of another has that one's identity until it has run for a moment: the file `identity`
//! says so, and [`renewal`](super::renewal) gives it another one.

use uuid::Uuid;

use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::merge::{self, Merger};
use super::plan::{PrepareStep, QemuPlan};
use super::saved::SavedGuest;
use super::snapshot_files::{SnapshotLock, SnapshotRecord};
use super::{
    QemuDetails, QemuHypervisor, elsewhere, parts, plan, plans, prepare, renewal, snapshot, wanted_run,
};
use crate::abilities::{CloneMode, CloneRequest, Clones, IdentityPolicy, MemoryMode};
use crate::backend::supervise::{alive, spawn};
use crate::error::{Error, Result, Subject};
use crate::handle::{BackendTag, VmHandle};
use crate::hypervisor::Hypervisor;
use crate::lifecycle::{Operation, VmState};
use crate::room::check_room;
use crate::spec::{Boot, Firmware, NetworkConfig, VmSpec};
use crate::store::refuse_other_user;

impl Clones for QemuHypervisor {
    async fn create_clone(&self, source: &VmHandle, request: &CloneRequest) -> Result<VmHandle> {
        let from = self.details(source)?;
        refuse_other_user(&from.layout.work)?;
        let id = request.spec.id().unwrap_or_else(Uuid::new_v4);
        let spec = request.spec.clone().with_id(id);
        let layout = self.layout(&spec, id)?;
        if parts::owner(&layout)?.is_some() {
            return Err(Error::already_exists(Subject::Vm, spec.name()));
        }
        spawn::keeper_program(self.0.keeper.as_deref())?;
        let what = "a clone can't have a disk that is not the VM's own";
        layers::refuse_foreign_disks(&source.spec, what)?;
        let disks = layers::own_disks(&source.spec, &from.layout);
        refuse_other_disks(&disks, &layers::own_disks(&spec, &layout))?;
        let clone = NewClone { hypervisor: self, source, from: &from, disks: &disks, request, spec, layout };
        let _lock = SnapshotLock::take(&from.layout, source.name())?;
        match &request.snapshot {
            Some(name) => {
                let record = SnapshotRecord::read(&from.layout, name)?;
                clone.check_identity(&record)?;
                snapshot::check_parts(&from.layout, &disks, &record)?;
                clone.create(&record.layer, Some(&record)).await
            }
            None => clone.create_at_rest().await,
        }
    }
}

/// A VM that is created as a copy.
struct NewClone<'a> {
    hypervisor: &'a QemuHypervisor,
    source: &'a VmHandle,
    from: &'a QemuDetails,
    /// The source's.
    disks: &'a [OwnDisk],
    request: &'a CloneRequest,
    spec: VmSpec,
    layout: QemuLayout,
}

impl NewClone<'_> {
    /// Creates a copy of a VM that does not run.
    async fn create_at_rest(&self) -> Result<VmHandle> {
        let (layout, name) = (&self.from.layout, self.source.name());
        self.hypervisor.allowed(self.source, Operation::Clone).await?;
        let busy = || Error::Busy { what: format!("VM `{name}`"), holder: None };
        let _alive = alive::try_take(&layout.place())?.ok_or_else(busy)?;
        elsewhere::check_owner(self.source, layout, Operation::Clone)?;
        elsewhere::refuse_linked(self.source, layout)?;
        layers::settle(self.disks)?;
        if let Some(id) = layers::unchanged_since(self.disks)? {
            return self.create(&id, None).await;
        }
        if layers::deepest(self.disks)? >= merge::SHARED_LAYERS {
            let program = self.hypervisor.qemu_img();
            Merger { program, live: None }.collect(layout, self.disks).await?;
        }
        layers::refuse_depth(self.disks)?;
        let id = LayerId::new();
        layers::freeze(self.disks, &id)?;
        let created = self.create(&id, None).await;
        // What was copied does not need the layer, and what was not created neither.
        if created.is_err() || self.request.mode == CloneMode::Full {
            layers::undo_freeze(self.disks, &id);
        }
        created
    }

    /// Creates a copy with the disks over this layer.
    async fn create(&self, id: &LayerId, snapshot: Option<&SnapshotRecord>) -> Result<VmHandle> {
        let (hypervisor, spec, layout) = (self.hypervisor, &self.spec, &self.layout);
        let vm_id = spec.id().expect("it was set");
        let steps = self.steps(vm_id, id, snapshot)?;
        let facts = hypervisor.facts(spec).await?;
        let planned = plan::plan(spec, vm_id, layout, &facts, &self.from.media, hypervisor.0.devices, None);
        prepare::apply(&QemuPlan { prepare: steps, ..planned })?;
        let mut vm = VmHandle::preparing(vm_id, BackendTag::Qemu, spec.clone());
        let state = match self.complete(snapshot).await {
            Ok(state) => state,
            Err(error) => {
                if let Err(error) = hypervisor.destroy(vm).await {
                    tracing::warn!(vm = %spec.name(), %error, "cannot remove a clone that could not be created");
                }
                return Err(error);
            }
        };
        let details = QemuDetails {
            layout: layout.clone(),
            media: self.from.media.clone(),
            seed_run: wanted_run(spec),
            disk: self.from.disk,
            base: self.from.base.clone(),
        };
        details.keep_in(&mut vm);
        Ok(QemuHypervisor::handle(&vm, state, layout, None))
    }

    fn steps(
        &self,
        vm_id: Uuid,
        id: &LayerId,
        snapshot: Option<&SnapshotRecord>,
    ) -> Result<Vec<PrepareStep>> {
        let (from, layout) = (&self.from.layout, &self.layout);
        let mut steps = vec![PrepareStep::Directory { path: layout.work.clone(), id: vm_id }];
        for (source, disk) in self.disks.iter().zip(layers::own_disks(&self.spec, layout)) {
            let mut at = Some(id.clone());
            while let Some(id) = at {
                steps.push(PrepareStep::Layer { source: source.layer(&id), path: disk.layer(&id) });
                at = source.below(Some(&id))?;
            }
            steps.push(PrepareStep::LayerOverlay { layer: disk.layer(id), path: disk.path });
        }
        if let Boot::Firmware(Firmware::Uefi) = self.spec.boot() {
            let template = snapshot.map_or_else(|| from.efi_vars(), |it| from.snapshot_vars(&it.name));
            steps.push(PrepareStep::FirmwareVariables { template, path: layout.efi_vars() });
        }
        steps.extend(plans::seed(&self.spec, vm_id, layout)?.map(PrepareStep::Seed));
        Ok(steps)
    }

    /// Returns the guest that continues, if one does.
    fn guest<'a>(&self, snapshot: Option<&'a SnapshotRecord>) -> Option<(&'a SnapshotRecord, SavedGuest)> {
        let continues = self.request.memory != MemoryMode::DisksOnly;
        snapshot.filter(|_| continues).and_then(|it| Some((it, it.memory.clone()?)))
    }

    /// Refuses a guest that would continue with the identity of another.
    fn check_identity(&self, record: &SnapshotRecord) -> Result<()> {
        if self.guest(Some(record)).is_none() || self.request.identity == IdentityPolicy::MayShare {
            return Ok(());
        }
        if let NetworkConfig::Tap { bridge } = self.spec.network() {
            let why = "its copies would have its MAC address on the bridge: clone it without its memory";
            return Err(Error::invalid("network", bridge, why));
        }
        match record.parked {
            true => Ok(()),
            false => {
                let why = "it was not taken for copies that continue: in them, programs would draw the same random \
                           numbers as in their source, until these are renewed";
                Err(Error::invalid("snapshot", &record.name, why))
            }
        }
    }

    /// Adds what is more than links, and returns the state of the VM.
    async fn complete(&self, snapshot: Option<&SnapshotRecord>) -> Result<VmState> {
        let (spec, layout) = (&self.spec, &self.layout);
        if self.request.mode == CloneMode::Full {
            let disks = layers::own_disks(spec, layout);
            let bytes = space_of(&disks)?;
            check_room(&layout.work, bytes, |mib| format!("the disks of `{}` need {mib} MiB", spec.name()))?;
            let merger = Merger { program: self.hypervisor.qemu_img(), live: None };
            for disk in &disks {
                merger.detach(disk).await?;
            }
        }
        match self.guest(snapshot) {
            None => Ok(VmState::Prepared),
            Some((record, guest)) => {
                let former = self.source.spec.cloud_init().and_then(|config| config.access.as_ref());
                renewal::demand(layout, former, self.request.identity, record.parked)?;
                guest.put(spec, layout, &self.from.layout.snapshot_memory(&record.name))?;
                Ok(VmState::Saved)
            }
        }
    }
}

/// Returns the space that the layers of disks take, in bytes.
fn space_of(disks: &[OwnDisk]) -> Result<u64> {
    let mut bytes = 0;
    for disk in disks {
        bytes += disk.chain()?.iter().map(|id| layers::space(&disk.layer(id))).sum::<u64>();
    }
    Ok(bytes)
}

/// Refuses a new VM whose disks are not those of the source.
fn refuse_other_disks(source: &[OwnDisk], disks: &[OwnDisk]) -> Result<()> {
    let names = |disks: &[OwnDisk]| disks.iter().map(|disk| disk.device.clone()).collect::<Vec<_>>();
    match names(source) == names(disks) {
        true => Ok(()),
        false => {
            Err(Error::invalid("data_disks", names(disks).join(" "), "a clone has the disks of its source"))
        }
    }
}
