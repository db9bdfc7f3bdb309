//! The last lines that a VM's console has said: what a person wants to see of a guest that did not
//! become what was awaited.

use std::path::Path;
use std::time::Duration;

use super::VmManager;
use crate::boundedlog::{tail_of_file, tail_of_log_since};
use crate::console::last_lines;
#[cfg(all(feature = "ssh", feature = "images"))]
use crate::console::without_sequences;
use crate::error::ConsoleTail;
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::log_position::LogPosition;

/// How much of the end is looked at, in bytes.
const MOST_BYTES: u64 = 4096;
/// How long a backend may take to tell what a console has said: the caller has waited long enough.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// How much of what a guest has printed in a run is read for what went wrong in it, in bytes.
#[cfg(all(feature = "ssh", feature = "images"))]
const MOST_OF_RUN: u64 = 256 << 10;

/// Returns what a guest has printed in this run, without what commands a terminal; none where the
/// log can't be read.
#[cfg(all(feature = "ssh", feature = "images"))]
pub(super) fn this_run(log: &Path, since: Option<&LogPosition>) -> Option<String> {
    let said = match since {
        Some(since) => tail_of_log_since(log, since, MOST_OF_RUN),
        None => tail_of_file(log, MOST_OF_RUN),
    };
    Some(without_sequences(&String::from_utf8_lossy(&said.ok()?)).replace('\r', ""))
}

impl<H: Backend + 'static> VmManager<H> {
    /// Returns the last lines of a VM's console, as far as they can be had.
    ///
    /// A backend that has the console's past itself writes it to the log when its VM is stopped:
    /// what the log has while the VM lives is an earlier run's.
    pub(crate) async fn console_tail(&self, vm: &VmHandle) -> Option<ConsoleTail> {
        let said = match (self.abilities_of(vm).console_history(), &vm.console_log) {
            (Some(history), _) if vm.state.is_live() => {
                let said = tokio::time::timeout(ASK_LIMIT, history.console_tail(vm, MOST_BYTES)).await;
                said.ok().and_then(Result::ok)
            }
            (_, Some(log)) => logged(log, vm.console_since.as_ref()),
            (_, None) => None,
        };
        last_lines(&said.unwrap_or_default())
    }
}

fn logged(log: &Path, since: Option<&LogPosition>) -> Option<Vec<u8>> {
    match since {
        Some(since) => tail_of_log_since(log, since, MOST_BYTES).ok(),
        None => tail_of_file(log, MOST_BYTES).ok(),
    }
}
