//! `vmkit rm`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{output, several};

/// Remove VMs with their disks and logs; the images that they were created from stay.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The VMs.
    #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
    names: Vec<VmName>,
    /// Remove all VMs; needs --force.
    #[arg(long, requires = "force")]
    all: bool,
    /// Kill running VMs and remove them, too.
    #[arg(short, long)]
    force: bool,
}

impl RmArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (manager, force) = (context.manager()?, self.force);
        let names = if self.all { several::all(context, &manager, |_| true)? } else { self.names };
        let remove = |manager: crate::context::CliManager, name: VmName| async move {
            manager.remove(&name, force).await
        };
        context.block_on(several::each(&manager, names, remove, |name, ()| {
            output::progress(format_args!("{name}: removed"));
            Ok(())
        }))
    }
}
