//! `vmkit create`.

use std::path::PathBuf;

use clap::Args;
use vmkit::Error;
use vmkit::image::{ImageInUse, ImageRef, PullPolicy, firmware_of_disc};
use vmkit::spec::{Boot, RootDisk, VmName, VmSpec};

use crate::commands::machine::{SpecArgs, ZFS, image_path};
use crate::commands::{plan, tell};
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::{images, output};

/// What is left where making a VM succeeds and starting it does not.
const NOT_STARTED: &str =
    "the VM was made, and did not start: `vmkit start` tries again, `vmkit rm` removes it";

/// Create a VM; it does not run unless `--start` is given.
///
/// It boots from its disk, an overlay over the image, or from a kernel. Sizes are written 512MiB,
/// 2GiB or as a bare number of MiB, from 64 on.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The VM: a-z, 0-9 and -, at most 63 characters.
    name: VmName,
    /// Create the root disk as an overlay over this image, which is never written to: debian:12, a
    /// file, raw or qcow2, an https:// address, or oci://REGISTRY/NAME:TAG. It is fetched unless it
    /// is local already.
    #[arg(long, value_name = "IMAGE")]
    image: Option<PathBuf>,
    /// Boot the VM at once.
    #[arg(long)]
    start: bool,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the VM as a JSON object.
    #[arg(long)]
    json: bool,
    // Last, since what follows a heading stands below it.
    #[command(flatten)]
    options: SpecArgs,
}

impl CreateArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        context.block_on(async {
            self.check_ahead(&manager).await?;
            // It holds the image until there is a VM that hangs on it.
            let image = self.found(context).await?;
            let spec = self.spec(image.as_ref())?;
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

    /// Refuses what could not be made whatever its image is, before that is fetched.
    async fn check_ahead(&self, manager: &CliManager) -> Result<(), Error> {
        if self.image.is_none() && !self.dry_run {
            return Ok(());
        }
        if !self.dry_run {
            manager.check_free(&self.name).await?;
        }
        manager.check_host(&self.spec(None)?).await
    }

    /// Finds the image here, or fetches it. A path that is not here may be one at a server
    /// elsewhere: the backend tells.
    async fn found(&self, context: &CommandContext) -> Result<Option<ImageInUse>, Error> {
        let Some(text) = self.image.as_ref().and_then(|image| image.to_str()) else { return Ok(None) };
        if text.starts_with(ZFS) {
            return Ok(None);
        }
        let image = images::image(text)?;
        if matches!(&image, ImageRef::Path(path) if !path.exists()) {
            return Ok(None);
        }
        let policy = if self.dry_run { PullPolicy::Never } else { PullPolicy::Missing };
        let (store, arch) = (context.images()?, self.options.machine().arch());
        let work = async |progress: &_| store.resolve(&image, arch, policy, progress).await;
        images::watched(text, work).await.map(Some)
    }

    fn spec(&self, found: Option<&ImageInUse>) -> Result<VmSpec, Error> {
        let firmware = match (found, self.options.cdrom()?) {
            (Some(image), _) => image.firmware,
            // One that can't be read is refused with all else of the host.
            (None, Some(disc)) if self.image.is_none() => firmware_of_disc(&disc)?,
            _ => None,
        };
        let usual = Boot::Firmware(firmware.unwrap_or(self.options.machine().usual_firmware()));
        let mut spec = self.options.spec(self.name.clone())?.boot(self.options.boot()?.unwrap_or(usual));
        if let Some(image) = &self.image {
            let image = found.map_or_else(|| image_path(image), |found| Ok(found.facts.path.clone()))?;
            spec = spec.disk(RootDisk { image, size: self.options.disk() });
        } else if let Some(size) = self.options.disk() {
            if self.options.cdrom()?.is_none() {
                let why = "a root disk is made of an image, by --image, or empty for what --cdrom installs; --data-disk adds another";
                return Err(Error::invalid("disk", size, why));
            }
            spec = spec.disk(RootDisk::empty(size));
        }
        if let Some(config) = self.options.cloud_init()? {
            spec = spec.cloud_init(config);
        }
        let spec = spec.build()?;
        Ok(match self.image_name(found) {
            Some(name) => spec.with_image_name(&name),
            None => spec,
        })
    }

    /// Returns what the root disk is made from, as `launch` records it: an image by its whole name,
    /// a file by its path.
    fn image_name(&self, found: Option<&ImageInUse>) -> Option<String> {
        let image = self.image.as_deref()?;
        match found {
            Some(found) => Some(found.name.clone()),
            None => image_path(image).ok()?.to_str().map(str::to_owned),
        }
    }
}
