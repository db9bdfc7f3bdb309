//! `vmkit console`.

use std::env;
use std::time::Duration;

use clap::Args;
use vmkit::error::LiveResource;
use vmkit::spec::VmName;
use vmkit::{ConsoleEndpoint, Error, VmState};

use crate::console::escape::{self, EscapeKey};
use crate::console::{self, ConsoleAddress};
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::values::seconds;
use crate::{json, output};

/// Attach the terminal to a VM's serial console; Ctrl-] or the key of --escape detaches.
///
/// The recent output of the console is printed first. All keys except the escape key go to the
/// guest. If standard input is no terminal, it is sent to the guest unchanged, and the guest's
/// output is printed until the VM ends: the end of the input does not detach, so give a --timeout
/// if the VM keeps running.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The VM.
    pub(super) name: VmName,
    /// Detach this long after the end of an input that is no terminal.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// Set the key that detaches: ^A, ctrl-a, …, or none [else: VMKIT_ESCAPE, else Ctrl-]].
    #[arg(long, value_name = "KEY")]
    escape: Option<EscapeKey>,
    /// Print the console's address, and do not attach.
    #[arg(long)]
    print_endpoint: bool,
    /// Print the console's address as a JSON object, and do not attach.
    #[arg(long)]
    json: bool,
}

impl ConsoleArgs {
    /// Returns the escape key: the option's, else the environment's.
    ///
    /// # Errors
    /// `InvalidInput` on the variable.
    fn escape(&self) -> Result<EscapeKey, Error> {
        let variable = env::var_os(escape::VARIABLE).filter(|value| !value.is_empty());
        match (self.escape, variable) {
            (Some(key), _) => Ok(key),
            (None, None) => Ok(EscapeKey::default()),
            (None, Some(value)) => {
                value.to_string_lossy().parse().map_err(|error: Error| error.in_field(escape::VARIABLE))
            }
        }
    }

    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let escape = self.escape()?;
        let manager = context.manager()?;
        let vm = context.block_on(async { Ok(manager.info(&self.name).await?) })?;
        let endpoint = manager.console_endpoint(&self.name)?;
        if self.json {
            return output::json(&json::ConsoleView::of(&endpoint));
        }
        match endpoint {
            // A console at a server has an address only while the VM runs.
            ConsoleEndpoint::None
                if manager.hypervisor().capabilities(&vm.backend).is_ok_and(|able| able.console) =>
            {
                Err(Error::NotLive { what: LiveResource::Console, state: vm.state }.into())
            }
            ConsoleEndpoint::None => {
                Err(Error::Unsupported { backend: vm.backend, what: "a console".to_owned() }.into())
            }
            ConsoleEndpoint::UnixSocket(path) if self.print_endpoint => output::text(path.display()),
            ConsoleEndpoint::WebSocket(url) if self.print_endpoint => output::text(url),
            ConsoleEndpoint::WebSocket(url) if vm.state.is_live() => {
                console::attach(&self.name, ConsoleAddress::WebSocket(&url), escape, self.timeout)
            }
            // A guest that has panicked still has its console. Without a running VM, a socket there
            // is another VM's: of a home that this one is a copy of, with the same runtime
            // directory.
            ConsoleEndpoint::UnixSocket(path)
                if vm.state.is_live() || (path.exists() && matches!(vm.state, VmState::Failed { .. })) =>
            {
                let at = ConsoleAddress::Socket { path: &path, log: vm.console_log.as_deref() };
                console::attach(&self.name, at, escape, self.timeout)
            }
            ConsoleEndpoint::UnixSocket(_) | ConsoleEndpoint::WebSocket(_) => {
                Err(Error::NotLive { what: LiveResource::Console, state: vm.state }.into())
            }
        }
    }
}
