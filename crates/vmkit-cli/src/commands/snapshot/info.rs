//! `vmkit snapshot info`.

use clap::Args;
use vmkit::spec::{SnapshotName, VmName};

use super::find;
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_snapshot, json_snapshot, output};

/// Show a snapshot of a VM.
#[derive(Debug, Args)]
pub(crate) struct SnapshotInfoArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// The snapshot.
    #[arg(value_name = "NAME")]
    name: SnapshotName,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

impl SnapshotInfoArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let found =
            context.block_on(async { Ok::<_, Failure>(find(&manager, &self.vm, &self.name).await?) })?;
        match self.json {
            true => output::json(&json_snapshot::SnapshotView::of(&found)),
            false => output::text(human_snapshot::details(&found)),
        }
    }
}
