//! `vmkit snapshot rm`.

use clap::Args;
use vmkit::spec::{SnapshotName, VmName};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;

/// Remove snapshots of a VM; the VM and its other snapshots stay what they are.
#[derive(Debug, Args)]
pub(crate) struct SnapshotRmArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// The snapshots.
    #[arg(value_name = "NAME", required = true)]
    names: Vec<SnapshotName>,
}

impl SnapshotRmArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        context.block_on(async {
            let mut failures = Vec::new();
            for name in &self.names {
                match manager.remove_snapshot(&self.vm, name).await {
                    Ok(()) => output::progress(format_args!("{}: snapshot {name} removed", self.vm)),
                    Err(error) => failures.push(Failure::from(error)),
                }
            }
            match failures.len() {
                0 => Ok(()),
                1 => Err(failures.remove(0)),
                _ => Err(Failure::Several(failures)),
            }
        })
    }
}
