//! The serial console of a Propolis VM: [`SerialConsole`], its client; what of it is kept in a log
//! when the VM is stopped (`keep`); and the ability to show its past.

mod address;
mod bell;
mod event;
mod history;
mod keep;
mod pump;
mod serial;
mod tape;

use tokio::net::UnixStream;

pub use address::HistoryRange;
pub use event::{ConsoleEnd, ConsoleEvent};
pub(super) use keep::LogWriter;
pub use serial::{SerialConsole, SerialOutput};

use super::PropolisHypervisor;
use crate::abilities::{AttachedStream, ConsoleHistory};
use crate::error::{Error, LiveResource, Result};
use crate::handle::{ConsoleEndpoint, VmHandle};
use crate::hypervisor::Hypervisor;

impl ConsoleHistory for PropolisHypervisor {
    async fn console_tail(&self, vm: &VmHandle, most_bytes: u64) -> Result<Vec<u8>> {
        Ok(self.console_of(vm)?.history(HistoryRange::MostRecent(most_bytes)).await?.bytes)
    }

    async fn attach_console(&self, vm: &VmHandle, past_bytes: u64) -> Result<AttachedStream> {
        let console = self.console_of(vm)?;
        let past = console.history(HistoryRange::MostRecent(past_bytes)).await?;
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make", "a pair of sockets"))?;
        let name = vm.name().clone();
        // It ends when either end is closed, ours when the console is dropped.
        tokio::spawn(async move {
            let told = |event| tracing::debug!(vm = %name, ?event, "at the console");
            if let Err(error) = console.pump(past.end, theirs, told).await {
                tracing::warn!(vm = %name, %error, "the console is lost");
            }
        });
        Ok(AttachedStream::new(past.bytes, ours))
    }
}

impl PropolisHypervisor {
    fn console_of(&self, vm: &VmHandle) -> Result<SerialConsole> {
        match self.console_endpoint(vm)? {
            ConsoleEndpoint::WebSocket(url) => SerialConsole::at(&url),
            _ => Err(Error::NotLive { what: LiveResource::Console, state: vm.state.clone() }),
        }
    }
}
