//! `vmkit create`.

use std::path::PathBuf;

use clap::Args;
use vmkit::Error;
use vmkit::spec::{Boot, RootDisk, VmName, VmSpec};

use crate::commands::machine::{Options, image_path};
use crate::commands::{plan, tell};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// What is left where making a VM succeeds and starting it does not.
const NOT_STARTED: &str =
    "the VM was made, and did not start: `vmkit start` tries again, `vmkit rm` removes it";

/// Makes a VM; nothing runs yet unless `--start` is given.
///
/// It boots from its disk, an overlay over the image, or from a kernel. Sizes are written 512MiB, 2GiB or as a bare
/// number of MiB.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Names the VM: a-z, 0-9 and -, at most 63 characters.
    name: VmName,
    /// Makes the root disk an overlay over this image, raw or qcow2, which is never written to.
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Boots the VM at once.
    #[arg(long)]
    start: bool,
    /// Prints what would be done, and changes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Prints the VM as a JSON object.
    #[arg(long)]
    json: bool,
    // Last, since what follows a heading stands below it.
    #[command(flatten)]
    options: Options,
}

impl Create {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let spec = self.spec()?;
        context.block_on(async {
            if self.dry_run {
                return plan::print_new(context, &manager, &spec, self.json).await;
            }
            let mut vm = manager.create(spec).await?;
            if self.start {
                let started = manager.start(vm.name()).await;
                vm = started.inspect_err(|_| output::warning(NOT_STARTED))?;
            }
            tell(&vm, self.json)
        })
    }

    fn spec(&self) -> Result<VmSpec, Error> {
        let usual = Boot::Firmware(self.options.machine().usual_firmware());
        let mut spec = self.options.spec(self.name.clone())?.boot(self.options.boot()?.unwrap_or(usual));
        if let Some(image) = &self.image {
            spec = spec.disk(RootDisk { image: image_path(image)?, size: self.options.disk() });
        }
        if let Some(config) = self.options.cloud_init()? {
            spec = spec.cloud_init(config);
        }
        spec.build()
    }
}
