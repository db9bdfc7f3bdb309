//! `vmkit logs`.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use vmkit::propolis::{HistoryRange, SerialOutput};
use vmkit::spec::VmName;
use vmkit::{BackendTag, ConsoleEndpoint, Error, LogPosition, VmState};

use crate::console::websocket;
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::follow::{self, LogRange};
use crate::output;

/// Print the log of a VM's serial console, as far back as it is kept.
///
/// The output is printed as the guest wrote it, with colours and cursor movements. For a running
/// Propolis VM it is what the server keeps of this run, the first and the last MiB; after the VM
/// has stopped, the log is stored as for any other VM.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The VM.
    pub(super) name: VmName,
    /// Follow the log, until the VM is removed; with Propolis, until it stops.
    #[arg(short, long)]
    follow: bool,
    /// Start with this many last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Start with the VM's last run, which may be the present one
    #[arg(long)]
    last_run: bool,
    /// Print the hypervisor's output instead.
    #[arg(long, conflicts_with = "last_run")]
    hypervisor: bool,
}

impl LogsArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        if !self.hypervisor
            && let Some(url) = served(context, &manager, &self.name)?
        {
            return self.print_served(&url);
        }
        let log: PathBuf = match self.hypervisor {
            true => manager.hypervisor_log(&self.name)?,
            false => manager.console_log(&self.name)?,
        };
        let part = LogRange { since: self.since(context, &manager)?, tail: self.tail };
        match self.follow {
            true => follow::follow(context, &log, part),
            false => follow::print(&log, part),
        }
    }

    /// Returns the offset in the log to start at, if one was requested.
    fn since(&self, context: &CommandContext, manager: &CliManager) -> Result<Option<LogPosition>, Failure> {
        if !self.last_run {
            return Ok(None);
        }
        let vm = context.block_on(async { Ok(manager.info(&self.name).await?) })?;
        match vm.console_since {
            Some(since) => Ok(Some(since)),
            None if vm.state == VmState::Prepared => Ok(None),
            None => {
                let what = "separating the console logs of two runs".to_owned();
                Err(Error::Unsupported { backend: vm.backend, what }.into())
            }
        }
    }

    /// Prints what the server of a running VM keeps.
    fn print_served(&self, url: &str) -> Result<(), Failure> {
        let (past, mut stream, carrier) = websocket::open(url, HistoryRange::Start(0), output::warning)?;
        print(&past, self.tail)?;
        if !self.follow {
            return Ok(());
        }
        let failed = || Error::io("read", url);
        stream.set_nonblocking(false).map_err(failed())?;
        let mut words = vec![0; 16 << 10];
        loop {
            match stream.read(&mut words).map_err(failed())? {
                0 => break,
                bytes => output::bytes(&words[..bytes])?,
            }
        }
        websocket::outcome(carrier)?;
        Ok(())
    }
}

/// Returns the console's address of a running VM whose log is kept by its server.
fn served(context: &CommandContext, manager: &CliManager, name: &VmName) -> Result<Option<String>, Failure> {
    // No other backend has its console at a server, so the state of its VMs is not needed.
    let endpoint = manager.console_endpoint(name)?;
    let ConsoleEndpoint::WebSocket(url) = endpoint else { return Ok(None) };
    let vm = context.block_on(async { Ok(manager.info(name).await?) })?;
    Ok((vm.backend == BackendTag::Propolis && vm.state.is_live()).then_some(url))
}

fn print(past: &SerialOutput, tail: Option<usize>) -> Result<(), Failure> {
    if past.missed > 0 {
        output::warning(format_args!(
            "{} bytes between the first and the last MiB are missing: the server no longer has them",
            past.missed
        ));
    }
    output::bytes(last_lines(&past.bytes, tail))
}

/// Returns the last lines, including an unfinished last one.
fn last_lines(bytes: &[u8], tail: Option<usize>) -> &[u8] {
    let Some(lines) = tail else { return bytes };
    let ended = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let ends = ended.iter().enumerate().rev().filter(|&(_, &byte)| byte == b'\n');
    match (lines, ends.map(|(at, _)| at + 1).nth(lines.saturating_sub(1))) {
        (0, _) => &[],
        (_, begin) => &bytes[begin.unwrap_or(0)..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_counted_with_the_one_that_is_not_ended() {
        let text: &[u8] = b"one\ntwo\nthree";
        for (tail, expected) in [
            (None, "one\ntwo\nthree"),
            (Some(0), ""),
            (Some(1), "three"),
            (Some(2), "two\nthree"),
            (Some(3), "one\ntwo\nthree"),
            (Some(9), "one\ntwo\nthree"),
        ] {
            assert_eq!(last_lines(text, tail), expected.as_bytes(), "{tail:?}");
        }
        assert_eq!(last_lines(b"one\ntwo\n", Some(1)), b"two\n");
        assert_eq!(last_lines(b"", Some(1)), b"");
    }
}
