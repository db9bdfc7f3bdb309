//! `vmkit clone`.

use clap::Args;
use vmkit::abilities::CloneMode;
use vmkit::spec::{VmName, VmSource};

use crate::commands::tell;
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;

/// Create a VM as a copy of another one that does not run, or of a snapshot.
///
/// The copy has the disks and the configuration of its source, and an identity of its own. It boots
/// at its first start, and cloud-init runs as on a new machine. Fixed ports of the host become free
/// ones.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// The VM, or a snapshot of it.
    #[arg(value_name = "VM[:SNAPSHOT]")]
    pub(super) source: VmSource,
    /// The new VM's name.
    #[arg(value_name = "NEW")]
    name: VmName,
    /// Copy the disks, instead of sharing what they have in common. The image stays shared.
    #[arg(long)]
    full: bool,
    /// Boot the new VM.
    #[arg(long)]
    start: bool,
    /// Print the new VM as a JSON object.
    #[arg(long)]
    json: bool,
}

impl CloneArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let mode = if self.full { CloneMode::Full } else { CloneMode::Linked };
        let created = context.block_on(async {
            let created = manager.clone_vm(&self.source, &self.name, mode).await?;
            match self.start {
                true => Ok::<_, Failure>(manager.start(&self.name).await?),
                false => Ok(created),
            }
        })?;
        if created.spec.cloud_init().is_none() && created.spec.disk().is_some() {
            let why = "without cloud-init, its guest keeps the host name, the machine ID and the keys of";
            output::warning(format_args!("{}: {why} {}", self.name, self.source.vm));
        }
        tell(&created, self.json)
    }
}
