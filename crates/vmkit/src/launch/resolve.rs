//! From a [`Blueprint`] to a spec: the image, the firmware that it needs, and vmkit's login.

use std::path::Path;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::hypervisor::Backend;
use crate::image::{
    ImageInUse, ImageRef, ImageStore, PullPolicy, PullProgress, firmware_of_disc, watch_progress,
};
use crate::input_file::InputFile;
use crate::manager::VmManager;
use crate::spec::{Blueprint, GuestAccess, HostInputs, RootDisk, UserName, VmSpec};

/// What a VM can be created from now. While this exists, its image can't be removed.
#[derive(Debug)]
#[non_exhaustive]
pub struct ResolvedVm {
    /// The spec.
    pub spec: VmSpec,
    /// The full name of its image, or the path.
    pub image_name: Option<String>,
    /// The image, if it is on this host.
    pub image: Option<ImageInUse>,
}

impl Blueprint {
    /// Checks what is known before the image is fetched.
    ///
    /// # Errors
    /// `InvalidInput` for what this host can never run ([`VmManager::check_host`]), and on
    /// `user_data` for one that vmkit's login can't be added to.
    pub async fn check<H: Backend + 'static>(&self, manager: &VmManager<H>) -> Result<()> {
        // The image's own user is not known yet.
        self.new_access(None)?;
        manager.check_host(self.draft()).await
    }

    /// Finds the image, fetched if need be, and returns the spec that it leads to.
    ///
    /// # Cancel safety
    /// As for [`ImageStore::resolve`].
    ///
    /// # Errors
    /// Those of [`ImageStore::resolve`] and [`fill`](Blueprint::fill); `InvalidInput` on `cdrom`
    /// and `user_data`, and on `image` for a path such as `/dev/fd/9`; `Host` if the system has no
    /// random numbers.
    pub async fn resolve<H: Backend + 'static>(
        &self,
        manager: &VmManager<H>,
        store: &ImageStore,
        pull: PullPolicy,
        on_progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> Result<ResolvedVm> {
        let draft = self.draft();
        let base = draft.disk().and_then(RootDisk::base);
        let is_here = manager.abilities_for(draft).capabilities().local_files;
        let image = match base.map(image_ref).transpose()? {
            // Its server may be on another host, and the backend examines it there.
            Some(ImageRef::Path(path)) if !is_here && !path.exists() => None,
            Some(image) => {
                if let ImageRef::Path(path) = &image {
                    InputFile::check_lasts("image", path)?;
                }
                let (sender, receiver) = watch::channel(PullProgress::default());
                let resolved = store.resolve(&image, draft.machine().arch(), pull, &sender);
                Some(watch_progress(resolved, receiver, on_progress).await?)
            }
            None => None,
        };
        let found = HostInputs {
            image: image.as_ref().map_or(base, |image| Some(&image.facts.path)).map(Path::to_owned),
            firmware: match (&image, draft.cdrom()) {
                (Some(image), _) => image.firmware,
                (None, Some(disc)) if base.is_none() => firmware_of_disc(disc)?,
                _ => None,
            },
            access: self.new_access(image.as_ref().and_then(|image| image.user.as_ref()))?,
        };
        let spec = self.fill(found)?;
        let name = image.as_ref().map(|image| image.name.clone());
        let image_name = name.or_else(|| base?.to_str().map(str::to_owned));
        let spec = match &image_name {
            // A machine's image is what its file calls it.
            Some(name) if spec.image_name().is_none() => spec.with_image_name(name),
            _ => spec,
        };
        Ok(ResolvedVm { spec, image_name, image })
    }

    /// Creates the keys of vmkit's login, as the image's `own` user if the user-data allows that.
    fn new_access(&self, own: Option<&UserName>) -> Result<Option<GuestAccess>> {
        let config = self.draft().cloud_init().filter(|_| self.lacks_access());
        config.map(|config| GuestAccess::beside(config, own)).transpose()
    }
}

/// Returns what the root disk of a draft calls its image.
fn image_ref(base: &Path) -> Result<ImageRef> {
    match base.to_str() {
        Some(_) if base.is_absolute() => Ok(ImageRef::Path(base.to_owned())),
        Some(text) => text.parse(),
        None => Err(Error::invalid("image", base.display(), "the path must be UTF-8")),
    }
}
