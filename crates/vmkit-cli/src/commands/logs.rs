//! `vmkit logs`.

use std::path::PathBuf;

use clap::Args;
use vmkit::spec::VmName;

use crate::context::Context;
use crate::failure::Failure;
use crate::follow;

/// Prints what a VM's serial console said, as far back as it is kept.
///
/// It is printed as the guest wrote it, colours and cursor movements included.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Names the VM.
    name: VmName,
    /// Goes on with what is said from now on, until the VM is removed.
    #[arg(short, long)]
    follow: bool,
    /// Begins with the last lines, so many of them.
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Prints what the hypervisor said instead.
    #[arg(long)]
    hypervisor: bool,
}

impl Logs {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let log: PathBuf = match self.hypervisor {
            true => manager.hypervisor_log(&self.name)?,
            false => manager.console_log(&self.name)?,
        };
        match self.follow {
            true => follow::follow(&log, self.tail),
            false => follow::print(&log, self.tail),
        }
    }
}
