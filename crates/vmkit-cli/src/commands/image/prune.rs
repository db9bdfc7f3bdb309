//! `vmkit image prune`.

use clap::Args;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human_image, json_image, output};

/// Remove the images without a name that no VM needs, and the remains of interrupted downloads.
#[derive(Debug, Args)]
pub(crate) struct ImagePruneArgs {
    /// Remove the images with a name, too, unless a VM needs them.
    #[arg(long)]
    all: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

impl ImagePruneArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        let (images, freed_bytes) = context.block_on(async { Ok(store.prune(self.all).await?) })?;
        match self.json {
            true => output::json(&json_image::PrunedView { images, freed_bytes }),
            false => {
                output::status(human_image::pruned(images, freed_bytes));
                Ok(())
            }
        }
    }
}
