//! `vmkit export`.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vmkit::abilities::MemoryMode;
use vmkit::image::OverwritePolicy;
use vmkit::spec::VmName;
use vmkit::{Error, VmExportOptions, VmExportSummary};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::places::absolute;
use crate::{images, output, progress};

/// Write a VM to a file, for `vmkit import` in another home or on another host.
///
/// The file has the VM's disks, base image, snapshots, record and saved memory, and its secrets
/// with them. A VM that runs has to be stopped first, or saved with `vmkit suspend --to-disk`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    pub(super) name: VmName,
    /// The file to write; - for standard output, which has to be a pipe.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Leave all memory out: the VM boots, and its snapshots are of the disks alone.
    #[arg(long)]
    disk_only: bool,
    /// Replace the file if there is one.
    #[arg(long)]
    force: bool,
    /// Print the file as a JSON object.
    #[arg(long)]
    json: bool,
}

/// The shape that `vmkit export --json` prints.
#[derive(Serialize)]
struct ExportView<'a> {
    name: &'a str,
    state: &'a str,
    path: String,
    bytes: u64,
    needs: &'a [String],
}

impl ExportArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let is_stdout = self.file == Path::new("-");
        let file = match is_stdout {
            true => self.stdout()?,
            false => absolute("file", &self.file)?,
        };
        let memory = if self.disk_only { MemoryMode::DisksOnly } else { MemoryMode::Include };
        let existing = if self.force { OverwritePolicy::Replaced } else { OverwritePolicy::Stays };
        let options = VmExportOptions::default().with_memory(memory).with_existing(existing);
        let name = &self.name;
        context.block_on(async {
            let written = images::watched(name.as_str(), async |progress| {
                manager.export(name, &file, &options, progress).await
            });
            let written = written.await?;
            match (is_stdout, self.json) {
                (true, _) => Ok(()),
                (false, true) => output::json(&view(&written)),
                (false, false) => {
                    let size = progress::bytes(written.bytes);
                    output::status(format_args!("{name}: {}, {size}", written.path.display()));
                    for needed in &written.needs {
                        output::progress(format_args!("{name}: its memory needs {needed}"));
                    }
                    Ok(())
                }
            }
        })
    }

    /// Returns the path of standard output.
    fn stdout(&self) -> Result<PathBuf, Error> {
        let path = Path::new("/dev/stdout");
        let refused = |why: &str| Err(Error::invalid("file", "-", why));
        match path.metadata() {
            _ if self.json => refused("--json and the export can't both be on standard output"),
            Ok(found) if found.file_type().is_fifo() => Ok(path.to_owned()),
            _ => refused("standard output is no pipe: name the file"),
        }
    }
}

fn view(written: &VmExportSummary) -> ExportView<'_> {
    ExportView {
        name: written.vm.name().as_str(),
        state: written.vm.state.name(),
        path: written.path.display().to_string(),
        bytes: written.bytes,
        needs: &written.needs,
    }
}
