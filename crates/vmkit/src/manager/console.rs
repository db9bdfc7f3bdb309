//! Attaching to the serial console of a VM, whatever its backend has there.

use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use super::{VmManager, WaitCondition};
use crate::blocking::blocking;
use crate::console::{AttachedConsole, ConsoleClient, ConsoleLog, ConsoleTurn, JoinedConsole, StateQuery};
use crate::error::{Error, LiveResource, Result};
use crate::handle::{ConsoleEndpoint, VmHandle};
use crate::hypervisor::Backend;
use crate::spec::VmName;

/// How much of what the run has said before is had, in bytes.
const PAST_BYTES: u64 = 1 << 20;
/// How long a VM whose console has closed may take to have ended.
const END_LIMIT: Duration = Duration::from_secs(10);

impl<H: Backend + 'static> VmManager<H> {
    /// Attaches to the serial console of a VM that runs, from what this run has printed before on.
    ///
    /// Of a VM whose handle does not say where the run begins in the log
    /// ([`VmHandle::console_since`]), the last MiB of the log comes first.
    ///
    /// # Errors
    /// `Busy` with the process that is at the console, where it serves one client at a time;
    /// `InvalidState` unless the VM lives; `NotFound`; `Unsupported` for a VM without a console;
    /// `Io` and `Hypervisor` where it can't be reached.
    pub async fn attach_console(&self, name: &VmName) -> Result<AttachedConsole> {
        let vm = self.info(name).await?;
        if !vm.state.is_live() {
            return Err(Error::NotLive { what: LiveResource::Console, state: vm.state });
        }
        let history = self.abilities_of(&vm).console_history();
        let (stream, unread, turn) = match (self.console_endpoint(name)?, history) {
            (ConsoleEndpoint::UnixSocket(socket), _) => {
                let is_shared = self.abilities_of(&vm).capabilities().shared_console;
                let turn = (!is_shared).then(|| ConsoleTurn::take(name, &socket)).transpose()?;
                let (stream, past) = at_socket(&vm, &socket).await?;
                (stream, past, turn)
            }
            (_, Some(history)) => {
                let attached = history.attach_console(&vm, PAST_BYTES).await?;
                (attached.stream, attached.past, None)
            }
            _ => {
                return Err(Error::Unsupported { backend: vm.backend, what: "a console".to_owned() });
            }
        };
        let (manager, of) = (self.clone(), name.clone());
        let end = Box::new(move || -> StateQuery {
            let (manager, of) = (manager.clone(), of.clone());
            Box::pin(async move { Ok(manager.wait(&of, WaitCondition::Stopped, END_LIMIT).await?.state) })
        });
        Ok(AttachedConsole::new(name.clone(), stream, unread, turn, end))
    }
}

/// Connects to a console, and returns the stream and what was printed before.
///
/// Without a place where the run begins, all of the log is the past: of what was printed before,
/// too much is better than nothing.
async fn at_socket(vm: &VmHandle, socket: &Path) -> Result<(UnixStream, Vec<u8>)> {
    let (log, since) = (vm.console_log.clone(), vm.console_since);
    let client = ConsoleClient::new(vm.name(), socket);
    let join = move || {
        let log = log.as_deref().map(|path| ConsoleLog { path, since, most_bytes: PAST_BYTES });
        client.join(log)
    };
    let JoinedConsole { past, said, stream } = blocking(join).await??;
    let stream = UnixStream::from_std(stream).map_err(Error::io("watch", socket))?;
    Ok((stream, [past, said].concat()))
}
