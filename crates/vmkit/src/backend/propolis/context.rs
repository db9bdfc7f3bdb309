//! One VM that exists: its files, its claim and the settings of the backend.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::builder::PropolisSettings;
use super::client::PropolisClient;
use super::files::{self, OwnerClaim};
use super::host::HostPrograms;
use super::layout::PropolisLayout;
use super::{plan, reshape};
use crate::backend::supervise::SupervisionPaths;
use crate::error::{Error, Result};
use crate::handle::VmHandle;

/// One VM that exists, with its files and the settings of the backend.
pub(super) struct VmContext<'a> {
    pub(super) settings: &'a PropolisSettings,
    pub(super) vm: &'a VmHandle,
    pub(super) layout: PropolisLayout,
    pub(super) claim: OwnerClaim,
    /// The directory of the original if this one is a copy: what is outside of this directory
    /// belongs to the original.
    pub(super) original: Option<PathBuf>,
}

impl VmContext<'_> {
    pub(super) fn host(&self) -> &HostPrograms {
        &self.settings.host
    }

    /// Returns the files by which the server's process is supervised.
    pub(super) fn place(&self) -> SupervisionPaths {
        SupervisionPaths { killer: self.settings.host.killer(), ..self.layout.place() }
    }

    /// Returns the path of the VM's device in the kernel.
    pub(super) fn kernel_vm(&self) -> PathBuf {
        self.settings.dev_vmm.join(self.vm.id.to_string())
    }

    /// Records that the VM is in this directory, so that a copy of the directory is recognized. The
    /// directory may have been moved here, or its claim may come from a version that did not record
    /// this.
    pub(super) fn settle_down(&mut self) -> Result<()> {
        let work = absolute(&self.layout)?;
        if self.original.is_none() && self.claim.work.as_ref() != Some(&work) {
            self.claim.work = Some(work);
            files::write_synced(&self.layout.claim(), &self.claim)?;
        }
        Ok(())
    }

    pub(super) fn client(&self, address: SocketAddr) -> PropolisClient {
        PropolisClient { address, version: plan::api_version(&self.claim.options) }
    }

    /// Returns the server of the last run, or the one elsewhere.
    pub(super) fn server(&self) -> Result<Option<PropolisClient>> {
        let address = match self.claim.options.address {
            Some(address) => Some(address),
            None => files::server(&self.layout)?.map(|server| server.address),
        };
        Ok(address.map(|address| self.client(address)))
    }

    /// Refuses a root disk that is to become smaller.
    ///
    /// # Errors
    /// `InvalidInput` on `disk`.
    pub(super) fn check_size(&self) -> Result<()> {
        let made = [&self.claim.steps[..], &self.claim.pending].concat();
        let has = reshape::grown_to(&made).unwrap_or_default();
        match self.vm.spec.disk().and_then(|disk| disk.size) {
            Some(size) if size.bytes() < has => {
                let bound =
                    format!("the VM's disk has {has} bytes; the data after the new end would be lost");
                Err(Error::invalid("disk", size, bound))
            }
            _ => Ok(()),
        }
    }
}

/// Returns the absolute path of a VM's directory, as it is in the claim.
pub(super) fn absolute(layout: &PropolisLayout) -> Result<PathBuf> {
    let work = std::path::absolute(&layout.work).map_err(Error::io("find", &layout.work))?;
    match work.to_str() {
        Some(_) => Ok(work),
        None => Err(Error::invalid("path", work.display(), "the path of a VM must be UTF-8")),
    }
}
