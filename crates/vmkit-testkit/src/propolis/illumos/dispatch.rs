//! Calls of the stand-ins, by the name of the tool.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::time::Duration;

use super::call::{CallFault, PlannedFault, ToolOutput};
use super::{Illumos, IllumosState, bhyvectl, dladm, zfs};

impl Illumos {
    /// Calls a tool; `None` means that it hangs.
    ///
    /// # Errors
    /// Whatever the system says to the directory in which the host lives.
    pub fn call(&self, tool: &str, args: &[String]) -> io::Result<Option<ToolOutput>> {
        let planned = self.planned()?;
        let fault = IllumosState::change(self, |state| -> io::Result<_> {
            state.calls += 1;
            self.record(tool, args)?;
            let fault = planned.into_iter().find(|planned| planned.call == state.calls);
            Ok(fault.map(|planned| planned.fault))
        })??;
        if let Some(CallFault::Late { millis }) = fault {
            std::thread::sleep(Duration::from_millis(millis));
        }
        IllumosState::change(self, |state| {
            match fault {
                Some(CallFault::Hang) => return Ok(None),
                Some(CallFault::Fail { stderr, code }) => return Ok(Some(ToolOutput::failed(code, stderr))),
                _ => {}
            }
            let said = match tool {
                "zfs" => zfs::run(self, state, args)?,
                "dladm" => dladm::run(self, state, args),
                "bhyvectl" => bhyvectl::run(self, args)?,
                other => ToolOutput::failed(127, format!("{other}: no stand-in has this name")),
            };
            Ok(Some(match fault {
                Some(CallFault::FailAfterwards { stderr, code }) => ToolOutput::failed(code, stderr),
                _ => said,
            }))
        })?
    }

    /// Returns the faults that are in store.
    pub(super) fn planned(&self) -> io::Result<Vec<PlannedFault>> {
        match std::fs::read(self.dir.join("faults.json")) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn record(&self, tool: &str, args: &[String]) -> io::Result<()> {
        let words: Vec<&str> = std::iter::once(tool).chain(args.iter().map(String::as_str)).collect();
        let mut log = OpenOptions::new().create(true).append(true).open(self.dir.join("calls.log"))?;
        // In one write: another process may be reading.
        log.write_all(format!("{}\n", serde_json::to_string(&words)?).as_bytes())
    }
}
