//! `vmkit ls`.

use clap::Args;
use vmkit::VmEntry;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_list, json, output};

/// List all VMs with their present states.
///
/// No VM is waited for: a VM that does not reply within a second is listed as unknown, and so is
/// one whose record can't be read, with the path of that record. VMs of a killed `launch --rm` are
/// removed first.
///
/// IMAGE is the image that the VM was created from; of a file or an address only its last part.
/// PROJECT is shown if a VM is a machine of a vmkit.toml, BACKEND if the VMs have different ones.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Always show the backend, the project and the full name of the image.
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
            // VMs of a killed command have no owner any more; they are removed here.
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
