//! `vmkit create`.

use clap::Args;
use vmkit::image::{Catalogue, ImageRef, ImageStore, PullPolicy};
use vmkit::launch::{LaunchEvent, LaunchOptions, LaunchStage, LaunchUntil, launch};
use vmkit::spec::{Blueprint, VmName};

use crate::commands::machine::SpecArgs;
use crate::commands::{plan, tell};
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;
use crate::progress::ImageProgressBar;

/// The hint if the VM was created but its start failed.
const NOT_STARTED: &str =
    "the VM was created, but did not start: `vmkit start` tries again, `vmkit rm` removes it";

/// Create a VM; it does not run unless `--start` is given.
///
/// The VM boots from its disk, an overlay over the image, or from a kernel. Sizes are 512MiB, 2GiB
/// or a bare number of MiB, from 64 on.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The VM's name: a-z, 0-9 and -, at most 63 characters.
    name: VmName,
    /// Create the root disk as an overlay over this image, which is never written to: debian:12, a
    /// file, raw or qcow2, an https:// address, or oci://REGISTRY/NAME:TAG. It is fetched unless it
    /// is local already.
    #[arg(long, value_name = "IMAGE")]
    image: Option<ImageRef>,
    /// Boot the VM after its creation.
    #[arg(long)]
    start: bool,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the VM as a JSON object.
    #[arg(long)]
    json: bool,
    // Last, since options after a heading are listed below it.
    #[command(flatten)]
    options: SpecArgs,
}

impl CreateArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let blueprint = Blueprint::new(self.options.spec(self.name, self.image.as_ref())?)?;
        let store = match &self.image {
            Some(_) => context.images()?,
            // A VM without an image does not read the user's settings of images.
            None => ImageStore::new(manager.home(), Catalogue::built_in()),
        };
        context.block_on(async {
            if self.dry_run {
                blueprint.check(&manager).await?;
                let resolved = blueprint.resolve(&manager, &store, PullPolicy::Never, &mut |_| {}).await?;
                return plan::print_new(context, &manager, &resolved.spec, self.json).await;
            }
            let mut options = LaunchOptions::new(blueprint);
            options.until = if self.start { LaunchUntil::Booted } else { LaunchUntil::Created };
            let mut progress = None;
            let mut on_event = |event| match (event, &self.image) {
                (LaunchEvent::Pulling(now), Some(image)) => {
                    progress.get_or_insert_with(|| ImageProgressBar::new(&image.to_string())).show(now)
                }
                (LaunchEvent::Ended(..), _) => progress = None,
                _ => {}
            };
            match launch(&manager, &store, options, &mut on_event).await {
                Ok(launched) => tell(&launched.vm, self.json),
                Err(failed) => {
                    if failed.stage == LaunchStage::Boot {
                        output::warning(NOT_STARTED);
                    }
                    Err(failed.error.into())
                }
            }
        })
    }
}
