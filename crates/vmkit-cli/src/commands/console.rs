//! `vmkit console`.

use std::time::Duration;

use clap::Args;
use vmkit::spec::VmName;
use vmkit::{ConsoleEndpoint, Error};

use crate::arguments::seconds;
use crate::console;
use crate::context::Context;
use crate::failure::Failure;
use crate::{json, output};

/// Attaches the terminal to a VM's serial console; Ctrl-] leaves.
///
/// The recent past of the console is shown first. All keys but Ctrl-] go to the guest. Where standard input is no
/// terminal, it is sent to the guest as it is, and what the guest says is printed until the VM ends, or until --timeout
/// after the end of the input.
#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Names the VM.
    name: VmName,
    /// Leaves this long after the end of an input that is no terminal.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// Prints where the console is, and does not attach.
    #[arg(long)]
    print_endpoint: bool,
    /// Prints where the console is as a JSON object, and does not attach.
    #[arg(long)]
    json: bool,
}

impl Console {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let vm = context.block_on(async { Ok(manager.info(&self.name).await?) })?;
        let endpoint = manager.console_endpoint(&self.name)?;
        if self.json {
            return output::json(&json::Console::of(&endpoint));
        }
        let unsupported =
            |what: &str| Error::Unsupported { backend: vm.backend.clone(), what: what.to_owned() };
        match endpoint {
            ConsoleEndpoint::None => Err(unsupported("a console").into()),
            ConsoleEndpoint::UnixSocket(path) if self.print_endpoint => output::text(path.display()),
            ConsoleEndpoint::WebSocket(url) if self.print_endpoint => output::text(url),
            ConsoleEndpoint::WebSocket(url) => {
                let what = format!("a terminal on its console; a client for WebSockets reaches it at {url}");
                Err(unsupported(&what).into())
            }
            ConsoleEndpoint::UnixSocket(path) if path.exists() || vm.state.is_live() => {
                console::attach(&self.name, &path, vm.console_log.as_deref(), self.timeout)
            }
            ConsoleEndpoint::UnixSocket(_) => {
                Err(Error::NotLive { what: "the console", state: vm.state }.into())
            }
        }
    }
}
