//! `vmkit fork`.

use std::num::NonZeroU16;

use clap::Args;
use vmkit::abilities::IdentityPolicy;
use vmkit::spec::{VmName, VmSource};

use crate::commands::tell;
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::{json, output};

/// Create VMs that continue as copies of a VM that runs, or of a snapshot with its memory.
///
/// Each has an identity of its own before its programs run: random numbers, host name, machine ID,
/// SSH host keys and login. That needs the guest agent. The snapshot has to be taken with
/// --for-forks. All are created, or none.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The VM, or a snapshot of it.
    #[arg(value_name = "VM[:SNAPSHOT]")]
    pub(super) source: VmSource,
    /// The new VMs' names.
    #[arg(value_name = "NEW", required_unless_present = "count")]
    names: Vec<VmName>,
    /// Create this many, named NEW-1, NEW-2 and so on; without NEW, after the VM. Names in use are
    /// skipped.
    #[arg(long, value_name = "N")]
    count: Option<NonZeroU16>,
    /// Fork a guest without an agent, too: the copies have the same random numbers, keys and
    /// machine ID as their source.
    #[arg(long)]
    allow_shared_identity: bool,
    /// Print the new VMs as a JSON array.
    #[arg(long)]
    json: bool,
}

impl ForkArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let names = self.names(&manager)?;
        let identity = match self.allow_shared_identity {
            true => IdentityPolicy::MayShare,
            false => IdentityPolicy::Unique,
        };
        output::progress(format_args!("{}: forking …", self.source));
        let forks = context
            .block_on(async { Ok::<_, Failure>(manager.fork(&self.source, &names, identity).await?) })?;
        if self.json {
            return output::json(&forks.iter().map(json::VmView::of).collect::<Vec<_>>());
        }
        forks.iter().try_for_each(|fork| tell(fork, false))
    }

    fn names(&self, manager: &CliManager) -> Result<Vec<VmName>, Failure> {
        let Some(count) = self.count else { return Ok(self.names.clone()) };
        if self.names.len() > 1 {
            let why = "with --count, give one name at most, which is numbered";
            return Err(vmkit::Error::invalid("NEW", self.names.len(), why).into());
        }
        let stem = self.names.first().unwrap_or(&self.source.vm);
        let mut names = Vec::new();
        for number in 1_u32.. {
            let name = VmName::new(format!("{stem}-{number}"))?;
            if !manager.home().vm(&name).exists() {
                names.push(name);
            }
            if names.len() == usize::from(count.get()) {
                break;
            }
        }
        Ok(names)
    }
}
