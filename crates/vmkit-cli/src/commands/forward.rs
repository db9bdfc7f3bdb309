//! `vmkit forward`.

use clap::Args;
use vmkit::spec::{PortForward, VmName};

use crate::context::Context;
use crate::failure::Failure;
use crate::{human, json, output};

/// Leads ports of the host into a VM, at once and at each of its starts; without ports, lists those in force.
///
/// A VM that runs goes on meanwhile. This is for user networking: a guest on a bridge has an address of its own, which
/// `ip` prints.
#[derive(Debug, Args)]
pub(crate) struct Forward {
    /// Names the VM.
    name: VmName,
    /// Names the ports; without HOST the host's port is chosen, ADDR is 127.0.0.1 unless given.
    #[arg(value_name = "[[ADDR:]HOST:]GUEST[/udp]")]
    forwards: Vec<PortForward>,
    /// Takes these forwards away; connections that are open stay so.
    #[arg(long, requires = "forwards")]
    remove: bool,
    /// Prints the VM as a JSON object.
    #[arg(long)]
    json: bool,
}

impl Forward {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let vm = context.block_on(async {
            let mut vm = manager.info(&self.name).await?;
            for forward in &self.forwards {
                vm = match self.remove {
                    false => manager.add_forward(&self.name, forward).await?,
                    true => manager.remove_forward(&self.name, forward).await?,
                };
            }
            Ok(vm)
        })?;
        if self.json {
            return output::json(&json::Vm::of(&vm));
        }
        if !vm.state.is_live() {
            output::progress(format_args!(
                "{}: {}, so nothing is in force until it starts",
                vm.name(),
                vm.state
            ));
        }
        output::text(human::forwards(&vm))
    }
}
