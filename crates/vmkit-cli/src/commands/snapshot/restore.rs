//! `vmkit snapshot restore`.

use std::io::{self, BufRead, IsTerminal};

use clap::Args;
use vmkit::abilities::MemoryMode;
use vmkit::spec::{SnapshotName, VmName};
use vmkit::{Error, VmState};

use super::find;
use crate::commands::tell;
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;

/// Return a VM to a snapshot; what its disks and memory have become since is discarded.
///
/// A VM that ran runs afterwards. One that did not continues at its next start, if the snapshot has
/// memory, and boots otherwise.
#[derive(Debug, Args)]
pub(crate) struct SnapshotRestoreArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// The snapshot.
    #[arg(value_name = "NAME")]
    name: SnapshotName,
    /// Discard without asking.
    #[arg(short, long)]
    yes: bool,
    /// Take a snapshot of this name first, so that nothing is discarded for good.
    #[arg(long, value_name = "NAME")]
    snapshot_first: Option<SnapshotName>,
    /// Leave the VM as it is after the restore, even if it ran.
    #[arg(long)]
    no_start: bool,
    /// Print the VM afterwards as a JSON object.
    #[arg(long)]
    json: bool,
}

impl SnapshotRestoreArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        context.block_on(async {
            find(&manager, &self.vm, &self.name).await?;
            let before = manager.info(&self.vm).await?.state;
            if let Some(first) = &self.snapshot_first {
                output::progress(format_args!("{}: taking the snapshot {first} …", self.vm));
                manager.create_snapshot(&self.vm, first, MemoryMode::Include).await?;
            } else if !self.yes {
                self.ask()?;
            }
            output::progress(format_args!("{}: returning to {} …", self.vm, self.name));
            let mut vm = manager.restore_snapshot(&self.vm, &self.name).await?;
            if before == VmState::Running && !self.no_start {
                vm = manager.start(&self.vm).await?;
            }
            tell(&vm, self.json)
        })
    }

    /// Asks whether the VM's present state may be discarded.
    fn ask(&self) -> Result<(), Failure> {
        let (vm, name) = (&self.vm, &self.name);
        let refused = || {
            let why = format!(
                "this discards what the disks and the memory of `{vm}` have become since: pass --yes, or keep it by \
                 --snapshot-first NAME"
            );
            Error::invalid("snapshot", name, why)
        };
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(refused().into());
        }
        output::ask(format_args!(
            "Return {vm} to {name}, and discard what its disks and memory have become since? [y/N] "
        ));
        let mut reply = String::new();
        let read = io::stdin().lock().read_line(&mut reply);
        read.map_err(Error::io("read", "the terminal"))?;
        match reply.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(refused().into()),
        }
    }
}
