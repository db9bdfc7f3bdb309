//! Snapshots of guests that live.
//!
//! ```text
//!  memory.unfinished, while the guest goes on ─▶ it stands ─▶ overlays ─▶ the rest ─▶ cont
//!      ─▶ the overlays are the disks ─▶ snapshots/NAME.memory ─▶ snapshots/NAME.json
//! ```
//!
//! QEMU stops the guest when little of its memory is left to be written; its disks become layers at
//! that instant. Without memory, the guest's agent freezes the file systems for the moment in which
//! they do.

use std::fs;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::time::Instant;

use super::agent::GuestAgent;
use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::qmp::blocks::LiveOverlay;
use super::qmp::client::QmpClient;
use super::recovery::{self, FREEZE_LIMIT};
use super::saved::{self, SavedGuest};
use super::snapshot_files::{self, SnapshotRecord};
use super::{PAUSE_LIMIT, clock, parking, save, status};
use crate::abilities::{MemoryMode, SnapshotKind};
use crate::backend::supervise::files::remove_file;
use crate::backend::supervise::unfinished;
use crate::error::{Error, Peer, Result};
use crate::handle::VmHandle;
use crate::lifecycle::{InvalidTransition, Operation, VmState};
use crate::spec::SnapshotName;
use crate::steps::step;

/// The timeout of an agent that stops the guest's programs; below the time after which the guest
/// lets them go on by itself.
const PARK_LIMIT: Duration = Duration::from_secs(30);
/// How long the programs of a guest without memory stand still at most.
const PARKED_LIMIT: Duration = Duration::from_secs(60);
/// How fast memory is written while they do, in bytes per second. On a slower disk there is no
/// snapshot for clones.
const PARKED_SPEED: u64 = 100 << 20;

/// Takes a snapshot of a guest that lives.
///
/// # Errors
/// Those of [`create_snapshot`](crate::abilities::Snapshots::create_snapshot). The guest is as it
/// was.
pub(super) async fn take(
    vm: &VmHandle,
    layout: &QemuLayout,
    disks: &[OwnDisk],
    name: &SnapshotName,
    memory: MemoryMode,
    state: &VmState,
) -> Result<SnapshotRecord> {
    let limit = Instant::now() + PAUSE_LIMIT;
    let runs = *state == VmState::Running;
    let was_begun = saved::was_begun(layout);
    if was_begun {
        // QEMU refuses a second migration of a guest that is paused by the first.
        save::give_up(layout, true).await?;
    }
    let mut qmp = QmpClient::connect(&status::monitor(layout), limit).await?;
    if was_begun && !runs {
        qmp.pause(limit).await?;
    }
    recovery::recover(layout, disks, &mut qmp, limit).await?;
    layers::refuse_depth(disks)?;
    let parks = memory == MemoryMode::ForClones;
    let live = LiveSnapshot { vm, layout, disks, name, id: LayerId::new(), runs, parks };
    match memory {
        MemoryMode::Include => live.with_memory(qmp).await,
        MemoryMode::ForClones => {
            live.check_agent(&mut qmp, limit).await?;
            live.with_memory(qmp).await
        }
        MemoryMode::DisksOnly => live.of_disks(qmp).await,
    }
}

/// A snapshot of a guest that lives, as it is taken.
struct LiveSnapshot<'a> {
    vm: &'a VmHandle,
    layout: &'a QemuLayout,
    disks: &'a [OwnDisk],
    name: &'a SnapshotName,
    id: LayerId,
    runs: bool,
    /// Whether the guest's programs stand still meanwhile.
    parks: bool,
}

impl LiveSnapshot<'_> {
    async fn with_memory(&self, mut qmp: QmpClient) -> Result<SnapshotRecord> {
        let layout = self.layout;
        let memory = save::create_memory(self.vm, layout).await?;
        layers::prepare_live(self.disks, &self.id).inspect_err(|_| self.remove_memory())?;
        let parked = self.park().await;
        let deadline = save::deadline(self.vm.spec.memory().bytes());
        let written = async {
            parked?;
            let by = save::saved_by(&mut qmp, layout, deadline).await?;
            let nodes = self.nodes(&mut qmp, deadline).await?;
            step("snapshot: write the memory").map_err(Error::io("write", layout.memory_file()))?;
            qmp.write_memory_live(memory.as_fd(), deadline).await?;
            let stood = Instant::now();
            snapshot_files::keep_vars(&self.vm.spec, layout, self.name)?;
            step("snapshot: put the overlays").map_err(Error::io("write", &layout.work))?;
            self.put_overlays(&mut qmp, nodes, deadline).await?;
            qmp.write_rest(deadline).await?;
            if self.runs {
                step("snapshot: resume").map_err(Error::io("resume", &layout.work))?;
                qmp.cont_after_migration(deadline).await?;
            }
            Ok::<_, Error>((by, stood.elapsed()))
        };
        let written = written.await;
        let stood_still = self.parks && parking::unpark(layout).await;
        let (by, stood) = match written {
            Ok(written) => written,
            Err(error) => {
                self.give_up(&mut qmp).await;
                return Err(error);
            }
        };
        tracing::debug!(vm = %self.vm.name(), ms = stood.as_millis(), "the guest stood still");
        let kept = async {
            layers::adopt_live(self.disks, &self.id)?;
            if self.runs {
                let _clock = clock::keep_right(&mut qmp, &layout.agent_socket(), Some(stood)).await;
            }
            drop(qmp);
            if self.parks && !stood_still {
                let problem = "its programs went on before its memory was written: the disk is too slow for a copy that \
                               continues";
                return Err(Error::protocol(Peer::GuestAgent, problem));
            }
            let guest = SavedGuest::of(&self.vm.spec, layout, by, memory).await?;
            let path = layout.snapshot_memory(self.name);
            step("snapshot: name the memory")
                .and_then(|()| fs::rename(unfinished(&layout.memory_file()), &path))
                .map_err(Error::io("rename", &path))?;
            let (name, id) = (self.name.clone(), self.id.clone());
            let mut record = SnapshotRecord::new(name, id, SnapshotKind::Memory, Some(guest));
            record.parked = stood_still;
            snapshot_files::keep(layout, self.disks, &record).await?;
            Ok(record)
        };
        kept.await.inspect_err(|_| self.remove_memory())
    }

    /// Refuses a guest whose programs can't be stopped.
    async fn check_agent(&self, qmp: &mut QmpClient, limit: Instant) -> Result<()> {
        if !self.runs {
            let (state, operation) = (VmState::Suspended, Operation::Clone);
            return Err(InvalidTransition { state, operation }.into());
        }
        match clock::agent_listens(qmp, limit).await? {
            true => Ok(()),
            false => {
                let problem = "none runs, and without one its copies can't be given an identity of their own: \
                               install `qemu-guest-agent` in the guest, or allow them to share its identity";
                Err(Error::host(format!("a guest agent in `{}`", self.vm.name()), problem))
            }
        }
    }

    /// Stops the guest's programs, if that is asked for.
    async fn park(&self) -> Result<()> {
        if !self.parks {
            return Ok(());
        }
        let mark = self.layout.parked_mark();
        let mut agent = GuestAgent::connect(&self.layout.agent_socket(), FREEZE_LIMIT).await?;
        step("snapshot: mark the guest as parked")
            .and_then(|()| fs::write(&mark, ""))
            .map_err(Error::io("write", &mark))?;
        let writing = Duration::from_secs(self.vm.spec.memory().bytes() / PARKED_SPEED);
        agent.park(PARKED_LIMIT + writing, PARK_LIMIT).await
    }

    async fn of_disks(&self, mut qmp: QmpClient) -> Result<SnapshotRecord> {
        let limit = Instant::now() + PAUSE_LIMIT;
        layers::prepare_live(self.disks, &self.id)?;
        let taken = async {
            let nodes = self.nodes(&mut qmp, limit).await?;
            let quiesced = self.runs
                && clock::agent_listens(&mut qmp, limit).await.unwrap_or(false)
                && self.freeze().await;
            let put = step("snapshot: put the overlays").map_err(Error::io("write", &self.layout.work));
            let put = match put {
                Ok(()) => self.put_overlays(&mut qmp, nodes, limit).await,
                Err(error) => Err(error),
            };
            let thawed = if quiesced { recovery::thaw(self.layout).await } else { Ok(()) };
            put.map(|()| (quiesced, thawed))
        };
        let (quiesced, thawed) = match taken.await {
            Ok(taken) => taken,
            Err(error) => {
                self.recover(&mut qmp).await;
                return Err(error);
            }
        };
        layers::adopt_live(self.disks, &self.id)?;
        thawed?;
        drop(qmp);
        let kind = if quiesced { SnapshotKind::Quiesced } else { SnapshotKind::CrashConsistent };
        snapshot_files::keep_vars(&self.vm.spec, self.layout, self.name)?;
        let record = SnapshotRecord::new(self.name.clone(), self.id.clone(), kind, None);
        snapshot_files::keep(self.layout, self.disks, &record).await?;
        Ok(record)
    }

    async fn nodes(&self, qmp: &mut QmpClient, limit: Instant) -> Result<Vec<String>> {
        let mut nodes = Vec::new();
        for disk in self.disks {
            nodes.push(qmp.node_of(&disk.device, limit).await?);
        }
        Ok(nodes)
    }

    async fn put_overlays(&self, qmp: &mut QmpClient, nodes: Vec<String>, limit: Instant) -> Result<()> {
        let files: Vec<_> = self.disks.iter().map(|disk| disk.live(&self.id)).collect();
        let nodes = self.disks.iter().zip(nodes).zip(&files);
        let overlays = nodes.map(|((disk, node), path)| LiveOverlay {
            node,
            overlay: recovery::overlay_node(disk, &self.id),
            path,
        });
        let overlays: Vec<_> = overlays.collect();
        qmp.put_overlays(&overlays, limit).await
    }

    /// Ends a snapshot that failed while QEMU wrote the memory.
    async fn give_up(&self, qmp: &mut QmpClient) {
        let limit = Instant::now() + PAUSE_LIMIT;
        if let Err(error) = qmp.cancel_migration(self.runs, limit).await {
            tracing::warn!(vm = %self.vm.name(), %error, "cannot undo a failed snapshot: `resume` tries again");
        }
        self.recover(qmp).await;
        self.remove_memory();
    }

    /// Puts the overlays in the places of the disks if QEMU writes to them, and removes them
    /// otherwise: a command whose reply did not come may have been carried out.
    async fn recover(&self, qmp: &mut QmpClient) {
        let limit = Instant::now() + PAUSE_LIMIT;
        if let Err(error) = recovery::recover(self.layout, self.disks, qmp, limit).await {
            tracing::warn!(vm = %self.vm.name(), %error, "cannot undo a failed snapshot; the next operation will");
        }
    }

    fn remove_memory(&self) {
        let memory = self.layout.snapshot_memory(self.name);
        let removed = saved::remove_leftovers(self.layout).and_then(|()| remove_file(&memory));
        if let Err(error) = removed {
            tracing::warn!(vm = %self.vm.name(), %error, "cannot remove the memory of a failed snapshot; the next one will");
        }
    }

    /// Freezes the guest's file systems; returns whether they are.
    async fn freeze(&self) -> bool {
        let mark = self.layout.frozen_mark();
        let frozen = async {
            let mut agent = GuestAgent::connect(&self.layout.agent_socket(), FREEZE_LIMIT).await?;
            step("snapshot: mark the guest as frozen")
                .and_then(|()| fs::write(&mark, ""))
                .map_err(Error::io("write", &mark))?;
            agent.freeze(FREEZE_LIMIT).await
        };
        match frozen.await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(vm = %self.vm.name(), %error, "the guest's file systems could not be frozen: the snapshot is as after a power cut");
                if let Err(error) = recovery::thaw(self.layout).await {
                    tracing::debug!(%error, "the guest may not have been frozen");
                }
                false
            }
        }
    }
}
