//! `vmkit ls`.

use clap::Args;
use vmkit::VmEntry;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_list, json, output};

/// List all VMs with their present states.
///
/// No VM is waited for: one that does not answer within a second is listed as unknown, and so is
/// one whose record can't be read, with the path of that record. What a killed `launch --rm` left
/// is removed first.
///
/// IMAGE is what the VM was made from; of a file or an address only its last part. PROJECT is there
/// where a VM is a machine of a vmkit.toml, BACKEND where not all VMs have the same.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Show the backend, the project and the image whole, whatever they are.
    #[arg(long, short = 'w', conflicts_with = "json")]
    wide: bool,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

impl LsArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let listed = context.block_on_threads(async {
            let listed = manager.list().await?;
            // VMs of a command that was killed have no owner any more; they are removed here.
            if listed.iter().any(VmEntry::is_ephemeral) && !manager.remove_orphans().await?.is_empty() {
                return Ok(manager.list().await?);
            }
            Ok(listed)
        })?;
        match self.json {
            true => output::json(&listed.iter().map(json::RowView::of).collect::<Vec<_>>()),
            false => output::text(human_list::list(&listed, self.wide)),
        }
    }
}
