//! `vmkit snapshot ls`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_snapshot, json_snapshot, output};

/// List the snapshots of a VM as a tree, with the disk space of each.
#[derive(Debug, Args)]
pub(crate) struct SnapshotLsArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// Print a JSON array, the oldest first.
    #[arg(long)]
    json: bool,
}

impl SnapshotLsArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let all = context.block_on(async { Ok::<_, Failure>(manager.snapshots(&self.vm).await?) })?;
        if self.json {
            return output::json(&all.iter().map(json_snapshot::SnapshotView::of).collect::<Vec<_>>());
        }
        if all.is_empty() {
            output::progress(format_args!(
                "no snapshots yet: `vmkit snapshot create {} NAME` takes one",
                self.vm
            ));
        }
        output::text(human_snapshot::tree(&all))
    }
}
