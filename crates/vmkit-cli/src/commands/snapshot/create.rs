//! `vmkit snapshot create`.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;
use vmkit::SnapshotSchedule;
use vmkit::abilities::{MemoryMode, Snapshot, SnapshotKind};
use vmkit::spec::{SnapshotName, VmName};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::values::age;
use crate::{human_snapshot, json_snapshot, output};

/// Take a snapshot of a VM: its disks, and its memory if it runs.
///
/// With --if-older-than and --keep, one line of a crontab takes snapshots on a schedule.
#[derive(Debug, Args)]
pub(crate) struct SnapshotCreateArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// The snapshot's name; without one, auto-1, auto-2 and so on.
    #[arg(value_name = "NAME")]
    name: Option<SnapshotName>,
    /// The disks alone, without the memory: the guest boots from them.
    #[arg(long)]
    disk_only: bool,
    /// Also for `vmkit fork` and `vmkit launch --from`: the guest's programs stand still meanwhile,
    /// so that none draws the same random numbers in two VMs. Needs the guest agent.
    #[arg(long, conflicts_with = "disk_only")]
    for_forks: bool,
    /// Only if the newest auto-N is older, such as 90m, 12h or 7d.
    #[arg(long, value_name = "AGE", value_parser = age, conflicts_with = "name")]
    if_older_than: Option<Duration>,
    /// Remove the oldest auto-N beyond this number.
    #[arg(long, value_name = "N", conflicts_with = "name")]
    keep: Option<NonZeroUsize>,
    /// Print the snapshot as a JSON object; `null` if none was due.
    #[arg(long)]
    json: bool,
}

impl SnapshotCreateArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let memory = match (self.disk_only, self.for_forks) {
            (true, _) => MemoryMode::DisksOnly,
            (false, true) => MemoryMode::ForClones,
            (false, false) => MemoryMode::Include,
        };
        output::progress(format_args!("{}: taking a snapshot …", self.vm));
        let schedule = SnapshotSchedule { if_older_than: self.if_older_than, keep: self.keep };
        let (created, removed) = context.block_on(async {
            match &self.name {
                Some(name) => {
                    let created = manager.create_snapshot(&self.vm, name, memory).await?;
                    Ok::<_, Failure>((Some(created), Vec::new()))
                }
                None => {
                    let done = manager.create_automatic_snapshot(&self.vm, memory, schedule).await?;
                    Ok((done.created, done.removed))
                }
            }
        })?;
        for name in removed {
            output::progress(format_args!("{}: snapshot {name} removed", self.vm));
        }
        if let Some(created) = created.as_ref().filter(|it| it.kind == SnapshotKind::CrashConsistent) {
            let why = "the guest's agent did not freeze its file systems";
            output::warning(format_args!("snapshot {} is as after a power cut: {why}", created.name));
        }
        if self.json {
            return output::json(&created.as_ref().map(json_snapshot::SnapshotView::of));
        }
        self.tell(created.as_ref());
        Ok(())
    }

    fn tell(&self, created: Option<&Snapshot>) {
        match created {
            Some(created) => {
                output::status(format_args!("{}: snapshot {}", self.vm, human_snapshot::line(created)));
            }
            None => output::progress(format_args!("{}: no snapshot is due", self.vm)),
        }
    }
}
