//! Asking a guest to power itself off, for a hypervisor that has no power button.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::pin::Pin;
use std::time::Duration;

use super::{GuestCommand, HostKey, Session, SshIdentity, SshTarget};
use crate::backend::propolis::PowerOff;
use crate::deadline::{later, left};
use crate::error::{Error, Result};
use crate::handle::VmHandle;

/// How long one attempt may take: a guest that is just ending may go silent half way.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Powers guests off over SSH, by the way in that their spec has (`cloud_init.access`).
///
/// # Examples
/// ```
/// use vmkit::{PropolisHypervisor, ssh::SshPowerOff};
/// let propolis = PropolisHypervisor::builder("/var/vmkit/vms").with_power_off(SshPowerOff::default()).build();
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SshPowerOff {
    port: NonZeroU16,
}

impl Default for SshPowerOff {
    /// Asks at port 22.
    fn default() -> Self {
        Self::at(NonZeroU16::new(22).expect("22 is not zero"))
    }
}

impl SshPowerOff {
    /// Asks at this port of the guests.
    pub fn at(port: NonZeroU16) -> Self {
        Self { port }
    }

    async fn ask(self, vm: &VmHandle, address: IpAddr, timeout: Duration) -> Result<()> {
        let access = vm.spec.cloud_init().and_then(|config| config.access.as_ref());
        let access = access.ok_or_else(|| Error::Unsupported {
            backend: vm.backend.clone(),
            what: format!("a power-off of the VM `{}` by SSH without a login of vmkit's", vm.name()),
        })?;
        let target = SshTarget {
            name: vm.name().to_string(),
            address: SocketAddr::new(address, self.port.get()),
            user: access.user.clone(),
            identity: SshIdentity::of(&access.login_key)?,
            host_key: HostKey::known(&access.host_key.public)?,
        };
        let deadline = later(timeout.min(ATTEMPT));
        let session = Session::connect(&target, left(deadline)).await?;
        let done =
            session.output(&GuestCommand::new(["sudo", "-n", "poweroff"]), b"", left(deadline)).await?;
        session.close().await;
        if done.exit.is_success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&done.stderr);
        let problem = format!("`sudo -n poweroff` ended with {}: {}", done.exit, words.trim());
        Err(Error::Ssh { target: target.to_string(), problem, source: None })
    }
}

impl PowerOff for SshPowerOff {
    fn power_off<'a>(
        &'a self,
        vm: &'a VmHandle,
        address: IpAddr,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
        Box::pin(self.ask(vm, address, timeout))
    }
}
