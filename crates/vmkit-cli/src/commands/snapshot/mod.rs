//! `vmkit snapshot`: states of a VM to go back to.

mod create;
mod info;
mod ls;
mod restore;
mod rm;

use clap::{Args, Subcommand};
use vmkit::abilities::Snapshot;
use vmkit::spec::{SnapshotName, VmName};

use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;

/// Take snapshots of a VM, list them, go back to them and remove them.
///
/// A snapshot of a VM that runs has its memory, too. Snapshots form a tree: each is below the one
/// that the VM's disks continued from.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    Create(create::SnapshotCreateArgs),
    #[command(visible_alias = "list")]
    Ls(ls::SnapshotLsArgs),
    Info(info::SnapshotInfoArgs),
    Restore(restore::SnapshotRestoreArgs),
    #[command(visible_aliases = ["delete", "remove"])]
    Rm(rm::SnapshotRmArgs),
}

impl SnapshotArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        match self.command {
            SnapshotCommand::Create(command) => command.run(context),
            SnapshotCommand::Ls(command) => command.run(context),
            SnapshotCommand::Info(command) => command.run(context),
            SnapshotCommand::Restore(command) => command.run(context),
            SnapshotCommand::Rm(command) => command.run(context),
        }
    }

    /// Returns the VM that the command is about.
    pub(super) fn vm(&self) -> &VmName {
        match &self.command {
            SnapshotCommand::Create(command) => &command.vm,
            SnapshotCommand::Ls(command) => &command.vm,
            SnapshotCommand::Info(command) => &command.vm,
            SnapshotCommand::Restore(command) => &command.vm,
            SnapshotCommand::Rm(command) => &command.vm,
        }
    }
}

/// Returns a snapshot of a VM.
async fn find(manager: &CliManager, vm: &VmName, name: &SnapshotName) -> vmkit::Result<Snapshot> {
    let all = manager.snapshots(vm).await?;
    let found = all.into_iter().find(|it| it.name == *name);
    found.ok_or_else(|| vmkit::Error::not_found(vmkit::error::Subject::Snapshot, name))
}
