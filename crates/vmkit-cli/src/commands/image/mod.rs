//! `vmkit image`: the images that VMs are created from.

mod convert;
mod import;
mod inspect;
mod ls;
mod prune;
mod pull;
mod rm;
mod verify;

use clap::{Args, Subcommand};

use crate::context::CommandContext;
use crate::failure::Failure;

/// Fetch, list, verify, convert and remove images.
///
/// An image is given by a name such as debian:12, a file, an https:// address, or
/// oci://REGISTRY/NAME:TAG. `image ls --available` lists the names of the catalogue.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    Ls(ls::ImageLsArgs),
    Inspect(inspect::ImageInspectArgs),
    Pull(pull::ImagePullArgs),
    Import(import::ImageImportArgs),
    Convert(convert::ImageConvertArgs),
    Verify(verify::ImageVerifyArgs),
    Rm(rm::ImageRmArgs),
    Prune(prune::ImagePruneArgs),
}

impl ImageArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        match self.command {
            ImageCommand::Ls(command) => command.run(context),
            ImageCommand::Inspect(command) => command.run(context),
            ImageCommand::Pull(command) => command.run(context),
            ImageCommand::Import(command) => command.run(context),
            ImageCommand::Convert(command) => command.run(context),
            ImageCommand::Verify(command) => command.run(context),
            ImageCommand::Rm(command) => command.run(context),
            ImageCommand::Prune(command) => command.run(context),
        }
    }
}
