//! `vmkit image prune`.

use clap::Args;

use crate::context::Context;
use crate::failure::Failure;
use crate::{human_image, json_image, output};

/// Remove the images that no name and no VM needs, and what is left of interrupted downloads.
#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Remove the images with a name, too, unless a VM needs them.
    #[arg(long)]
    all: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

impl Prune {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let store = context.images()?;
        let (images, freed_bytes) = context.block_on(async { Ok(store.prune(self.all).await?) })?;
        match self.json {
            true => output::json(&json_image::Pruned { images, freed_bytes }),
            false => {
                output::status(human_image::pruned(images, freed_bytes));
                Ok(())
            }
        }
    }
}
