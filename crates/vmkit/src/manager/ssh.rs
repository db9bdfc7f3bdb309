//! The way into a guest over SSH, as a VM's record tells it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::{PATIENCE, VmManager, later};
use crate::deadline::left;
use crate::error::{Error, LiveResource, LoginPart, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::program::ProgramOutput;
use crate::spec::{GuestAccess, UserData, VmName};
use crate::ssh::{GuestCommand, HostKey, LoginOptions, SshConfig, SshIdentity, SshTarget};

/// How long a hypervisor may be too busy with other clients to say where a VM is in its life.
const TURN: Duration = Duration::from_secs(30);

impl<H: Backend + 'static> VmManager<H> {
    /// Returns how to log in to a guest that runs; what `login` has goes before what the VM's
    /// record has.
    ///
    /// Its SSH server may not listen yet: [`wait`](Self::wait) for
    /// [`Condition::Ssh`](crate::WaitCondition::Ssh).
    ///
    /// # Errors
    /// `NotFound` without the VM; `InvalidState` unless it runs; `NotFound` where neither says
    /// which key logs in, as whom, or which host key the server has; `Unsupported` for a VM without
    /// a network; `Guest` where its address is not known.
    pub async fn ssh_target(&self, name: &VmName, login: &LoginOptions) -> Result<SshTarget> {
        self.target_of(&self.info_in_turn(name, later(TURN)).await?, login).await
    }

    /// Runs a program in a guest that runs, as the user of its record, and returns what the program
    /// left; its standard input is empty.
    ///
    /// `timeout` bounds the login and the program together; a guest that is still booting is waited
    /// for. A program that still runs then keeps running. For several programs, their input or
    /// their output as it comes, take an [`ssh_session`](Self::ssh_session).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(manager: vmkit::VmManager<vmkit::QemuHypervisor>) -> vmkit::Result<()> {
    /// use std::time::Duration;
    /// use vmkit::{spec::VmName, ssh::GuestCommand};
    /// let uname = GuestCommand::new(["uname", "-r"]);
    /// let ran = manager.exec(&VmName::new("web")?, &uname, Duration::from_secs(60)).await?;
    /// assert!(ran.exit.is_success(), "{}", ran.stderr_text());
    /// println!("{}", ran.stdout_text());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of [`ssh_session`](Self::ssh_session) and
    /// [`Session::output`](crate::ssh::Session::output). A program that fails is no error: its exit
    /// status says so.
    pub async fn exec(
        &self,
        name: &VmName,
        command: &GuestCommand,
        timeout: Duration,
    ) -> Result<ProgramOutput> {
        let deadline = later(timeout);
        let session = self.ssh_session(name, &LoginOptions::default(), timeout).await?;
        let ran = session.output(command, b"", left(deadline)).await;
        session.close().await;
        ran
    }

    /// Returns how to log in to this guest.
    pub(super) async fn target_of(&self, vm: &VmHandle, login: &LoginOptions) -> Result<SshTarget> {
        // Who can't be entered at all needs no key for it.
        check_live(vm)?;
        let (name, access) = (vm.name(), access(vm));
        let missing = |missing| Error::NoLogin { vm: name.clone(), missing };
        let identity = match (&login.identity, access) {
            (Some(identity), _) => identity.clone(),
            (None, Some(access)) => SshIdentity::of(&access.login_key)?,
            (None, None) => return Err(missing(LoginPart::Key)),
        };
        let user = login.user.clone().or(access.map(|access| access.user.clone()));
        let user = user.ok_or_else(|| missing(LoginPart::User))?;
        let host_key = match (&login.host_key, known_host_key(vm)) {
            (Some(host_key), _) => host_key.clone(),
            (None, Some(line)) => HostKey::known(line)?,
            (None, None) => return Err(missing(LoginPart::HostKey)),
        };
        let address = self.live_ssh_address(vm).await?;
        Ok(SshTarget { name: name.to_string(), address, user, identity, host_key })
    }

    /// Writes what OpenSSH's programs need for a guest that runs, and returns the block that tells
    /// them.
    ///
    /// The files lie in [`Home::kept`](crate::store::Home::kept), and are removed with the VM. The
    /// address is that of this run of the VM: with user networking the kernel may choose another
    /// port at the next start.
    ///
    /// # Errors
    /// Those of [`ssh_target`](Self::ssh_target); `Busy`; `Host` and `Io` where the files can't be
    /// written.
    pub async fn ssh_config(&self, name: &VmName) -> Result<SshConfig> {
        let vm = self.info(name).await?;
        check_live(&vm)?;
        let Some(access) = access(&vm) else {
            return Err(Error::NoLogin { vm: name.clone(), missing: LoginPart::Key });
        };
        let address = self.live_ssh_address(&vm).await?;
        // Held, so that the VM is not removed while this is written.
        let _locked = self.store.lock(name, Instant::now() + PATIENCE).await?;
        if self.store.read(name)?.handle.id != vm.id {
            return Err(Error::not_found(Subject::Vm, name));
        }
        SshConfig::write(name, vm.id, address, access, &self.home().kept(name))
    }

    /// Returns a VM as [`info`](Self::info) does, and asks again where its hypervisor has too many
    /// others to serve: a monitor has one client at a time, and any number of commands may be
    /// started at once.
    pub(super) async fn info_in_turn(&self, name: &VmName, deadline: Instant) -> Result<VmHandle> {
        let deadline = deadline.min(later(TURN));
        loop {
            match self.info(name).await {
                // Each question has waited for its turn for a second already.
                Err(Error::TimedOut { .. }) if Instant::now() < deadline => {}
                found => return found,
            }
        }
    }

    async fn live_ssh_address(&self, vm: &VmHandle) -> Result<SocketAddr> {
        self.ssh_address(vm).await?.ok_or_else(|| Error::Ssh {
            target: vm.name().to_string(),
            problem: "the guest's address is not known, and no forward leads to its SSH server".to_owned(),
            source: None,
        })
    }
}

fn check_live(vm: &VmHandle) -> Result<()> {
    match &vm.state {
        VmState::Running => Ok(()),
        state => Err(Error::NotLive { what: LiveResource::SshServer, state: state.clone() }),
    }
}

fn access(vm: &VmHandle) -> Option<&GuestAccess> {
    vm.spec.cloud_init()?.access.as_ref()
}

/// Returns the host key that was handed to the guest.
fn known_host_key(vm: &VmHandle) -> Option<&str> {
    let config = vm.spec.cloud_init()?;
    match (&config.access, &config.user_data) {
        (Some(access), _) => Some(&access.host_key.public),
        (None, UserData::Typed(typed)) => typed.ssh_host_key.as_ref().map(|key| key.public.as_str()),
        (None, UserData::Raw(_)) => None,
    }
}
