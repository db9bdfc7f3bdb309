//! `vmkit import`.

use std::path::PathBuf;

use clap::Args;
use vmkit::spec::VmName;
use vmkit::{HostFilePolicy, VmImportOptions};

use crate::commands::tell;
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::places::input;
use crate::{images, output};

/// Make a VM of a file that `vmkit export` has written.
///
/// It is the same VM, with its identity, MAC address, snapshots and saved memory: let only one of
/// the two run. Everything is verified before the VM is there. For the image of a disk, see `vmkit
/// image import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The file; - for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Name the VM so [default: the name that it had].
    #[arg(long)]
    name: Option<VmName>,
    /// Let the VM use the files of this host that it names: its kernel, its disc, its read-only
    /// disks.
    #[arg(long)]
    host_files: bool,
    /// Print the VM as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ImportArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let file = input("file", &self.file)?;
        let mut options = VmImportOptions::default();
        options.name = self.name;
        if self.host_files {
            options = options.with_host_files(HostFilePolicy::Accept);
        }
        let shown = self.file.display().to_string();
        context.block_on(async {
            let imported =
                images::watched(&shown, async |progress| manager.import(&file, &options, progress).await);
            let imported = imported.await?;
            for problem in &imported.problems {
                let vm = imported.vm.name();
                output::warning(format_args!("{vm} can't be started here as it is: {}", problem.chain()));
            }
            tell(&imported.vm, self.json)
        })
    }
}
