//! What a killed process left of the disks of a guest that lives: half a snapshot, or file systems
//! that are frozen.

use std::time::Duration;

use tokio::time::Instant;

use super::agent::GuestAgent;
use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::qmp::client::QmpClient;
use super::{PAUSE_LIMIT, parking, renewal, status};
use crate::backend::supervise::files::remove_file;
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::steps::step;

/// The timeout of an agent that freezes or thaws the guest's file systems.
pub(super) const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// Completes or undoes what a killed process left of the disks of a guest that lives.
///
/// # Errors
/// Those of the monitor and the agent; `Io`.
pub(super) async fn recover(
    layout: &QemuLayout,
    disks: &[OwnDisk],
    qmp: &mut QmpClient,
    limit: Instant,
) -> Result<()> {
    if layout.frozen_mark().exists() {
        thaw(layout).await?;
    }
    if layout.parked_mark().exists() {
        parking::unpark(layout).await;
    }
    let Some(id) = layers::interrupted(disks)? else { return Ok(()) };
    // QEMU puts all overlays or none.
    let Some(first) = disks.first() else { return Ok(()) };
    if qmp.node_of(&first.device, limit).await? == overlay_node(first, &id) {
        return layers::adopt_live(disks, &id);
    }
    for disk in disks {
        qmp.forget_node(&overlay_node(disk, &id), limit).await;
    }
    layers::undo_live(disks, &id);
    Ok(())
}

/// Does the same, if there is something left at all, without a monitor at hand.
///
/// # Errors
/// As [`recover`].
pub(super) async fn recover_running(vm: &VmHandle, layout: &QemuLayout) -> Result<()> {
    let disks = layers::own_disks(&vm.spec, layout);
    let marks = [layout.frozen_mark(), layout.parked_mark(), layout.identity_mark()];
    if !marks.iter().any(|mark| mark.exists()) && layers::interrupted(&disks)?.is_none() {
        return Ok(());
    }
    let limit = Instant::now() + PAUSE_LIMIT;
    let mut qmp = QmpClient::connect(&status::monitor(layout), limit).await?;
    recover(layout, &disks, &mut qmp, limit).await?;
    renewal::settle(&vm.spec, layout, &mut qmp).await
}

/// Thaws the guest's file systems, and removes the mark that they may be frozen.
pub(super) async fn thaw(layout: &QemuLayout) -> Result<()> {
    let mut agent = GuestAgent::connect(&layout.agent_socket(), FREEZE_LIMIT).await?;
    step("snapshot: thaw").map_err(Error::io("write", layout.frozen_mark()))?;
    agent.thaw(FREEZE_LIMIT).await?;
    remove_file(&layout.frozen_mark())
}

/// Returns the name of the node of the overlay over a layer.
pub(super) fn overlay_node(disk: &OwnDisk, id: &LayerId) -> String {
    format!("{}-{}", disk.device, id.as_str())
}
