//! Adding and removing forwards of a running VM, through the monitor.
//!
//! QMP has no command for them, only the monitor for people (HMP), whose printed text is the reply.
//! The active forwards are those of the table that `info usernet` prints.
//!
//! Source: QEMU, `net/slirp.c`, `hmp_hostfwd_add` and `hmp_hostfwd_remove`.

use std::time::Duration;

use tokio::time::Instant;

use super::QemuHypervisor;
use super::layout::QemuLayout;
use super::prepare::check_port;
use super::qmp::client::QmpClient;
use super::status;
use super::switch::hostfwd;
use crate::abilities::{PortForwarding, in_force};
use crate::error::{Error, LiveResource, Peer, Result};
use crate::handle::{ActiveForward, VmHandle};
use crate::hypervisor::Hypervisor;
use crate::spec::{NetworkConfig, PortForward};
use crate::steps::step;

/// The timeout of a change. QEMU may still apply one after the timeout, so it is longer than that
/// of a query.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);

impl PortForwarding for QemuHypervisor {
    async fn add_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        let layout = self.forwarding(vm, forward).await?;
        let deadline = Instant::now() + CHANGE_LIMIT;
        let (mut qmp, active) = QmpClient::with_user_forwards(&status::monitor(&layout), deadline).await?;
        if in_force(&vm.spec, forward, &active).is_some() {
            return Ok(with_forwards(vm, active));
        }
        check_port(forward)?;
        step("forward: add").map_err(Error::io("forward", layout.qmp_socket()))?;
        let said = qmp.hmp(&format!("hostfwd_add net0 {}", hostfwd(forward)), deadline).await?;
        let active = qmp.user_forwards(deadline).await?;
        if in_force(&vm.spec, forward, &active).is_some() {
            return Ok(with_forwards(vm, active));
        }
        // Another process may have taken the port in the meantime.
        check_port(forward)?;
        Err(refused("hostfwd_add", &said))
    }

    async fn remove_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        let layout = self.forwarding(vm, forward).await?;
        let deadline = Instant::now() + CHANGE_LIMIT;
        let (mut qmp, active) = QmpClient::with_user_forwards(&status::monitor(&layout), deadline).await?;
        let Some(host) = in_force(&vm.spec, forward, &active) else {
            return Ok(with_forwards(vm, active));
        };
        step("forward: remove").map_err(Error::io("forward", layout.qmp_socket()))?;
        let rule = format!("hostfwd_remove net0 {}:{}:{}", forward.protocol.as_str(), host.ip(), host.port());
        let said = qmp.hmp(&rule, deadline).await?;
        let active = qmp.user_forwards(deadline).await?;
        match active.iter().any(|it| it.protocol == forward.protocol && it.host == host) {
            true => Err(refused("hostfwd_remove", &said)),
            false => Ok(with_forwards(vm, active)),
        }
    }
}

impl QemuHypervisor {
    /// Returns the VM's paths if its forwards can be changed now.
    async fn forwarding(&self, vm: &VmHandle, forward: &PortForward) -> Result<QemuLayout> {
        if !matches!(vm.spec.network(), NetworkConfig::User(_)) {
            return Err(Error::invalid("forward", forward, "only user networking forwards ports"));
        }
        let state = self.state(vm).await?;
        match state.is_live() {
            true => Ok(self.details(vm)?.layout),
            false => Err(Error::NotLive { what: LiveResource::ForwardedPort, state }),
        }
    }
}

fn with_forwards(vm: &VmHandle, forwards: Vec<ActiveForward>) -> VmHandle {
    let mut handle = vm.clone();
    if let Some(run) = &mut handle.run {
        run.forwards = forwards;
    }
    handle
}

fn refused(command: &str, said: &str) -> Error {
    Error::Refused {
        peer: Peer::Qemu,
        command: command.to_owned(),
        class: "printed".to_owned(),
        description: said.trim().to_owned(),
    }
}
