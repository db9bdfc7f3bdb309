//! `vmkit ip`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{json, output};

/// Print the address at which this host reaches the guest.
///
/// With user networking that is loopback, where only the forwarded ports can be reached, which
/// `info` shows.
#[derive(Debug, Args)]
pub(crate) struct IpArgs {
    /// The VM.
    pub(super) name: VmName,
    /// Print a JSON object, with the forwarded ports.
    #[arg(long)]
    json: bool,
}

impl IpArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        context.block_on(async {
            let address = manager.guest_ip(&self.name).await?;
            if !self.json {
                return output::text(output::printable(address));
            }
            let vm = manager.info(&self.name).await?;
            let forwards = json::forwards(&vm);
            output::json(&json::AddressView { name: self.name.as_str(), address, forwards })
        })
    }
}
