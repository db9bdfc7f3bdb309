//! `vmkit rm`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::Context;
use crate::failure::Failure;
use crate::{output, several};

/// Removes VMs with their disks and logs; the images that they were made from stay.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Names the VMs.
    #[arg(value_name = "NAME", required = true)]
    names: Vec<VmName>,
    /// Removes a VM that runs, too, and ends it by force.
    #[arg(short, long)]
    force: bool,
}

impl Rm {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let (manager, force) = (context.manager()?, self.force);
        let remove = |manager: crate::context::Manager, name: VmName| async move {
            manager.remove(&name, force).await
        };
        context.block_on(several::each(&manager, self.names, remove, |name, ()| {
            output::progress(format_args!("{name}: removed"));
            Ok(())
        }))
    }
}
