//! `vmkit ssh-config`.

use clap::Args;
use vmkit::ErrorKind;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{json, output};

/// Print the settings that `ssh`, `scp`, `rsync` and editors need to reach guests, as a block for
/// `~/.ssh/config`.
///
/// Without a name: for all running VMs that vmkit has a key for. The key and the host key are files
/// in the VM's directory and are removed with it. A VM with user networking may have another port
/// after its next start: print the block again.
#[derive(Debug, Args)]
pub(crate) struct SshConfigArgs {
    /// The VMs.
    #[arg(value_name = "NAME")]
    names: Vec<VmName>,
    /// Print a JSON array instead.
    #[arg(long)]
    json: bool,
}

impl SshConfigArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        context.block_on(async {
            let mut blocks = Vec::new();
            if self.names.is_empty() {
                for listed in manager.list().await? {
                    match manager.ssh_config(&listed.name).await {
                        Ok(block) => blocks.push(block),
                        // Not among the named ones.
                        Err(error) if is_elsewhere(error.kind()) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            for name in &self.names {
                let block = manager.ssh_config(name).await;
                blocks.push(block.map_err(|error| Failure::from(error).of_vm(name))?);
            }
            if self.json {
                return output::json(&blocks.iter().map(json::SshConfigView::of).collect::<Vec<_>>());
            }
            blocks.into_iter().try_for_each(output::text)
        })
    }
}

fn is_elsewhere(kind: ErrorKind) -> bool {
    use ErrorKind::{InvalidState, NotFound, Record, Unsupported};
    matches!(kind, NotFound | InvalidState | Unsupported | Record)
}
