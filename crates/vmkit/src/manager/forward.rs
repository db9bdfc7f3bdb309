//! Forwards of an existing VM.
//!
//! The spec has those that are wanted, the run those that are active. The spec is written first, so
//! it is the intent as well: after an interrupted change, the next start applies it, and so does a
//! repeated call. If another spec waits for the next start, it is changed as well.

use tokio::time::Instant;
use tracing::warn;

use super::{PATIENCE, VmManager, write_outcome};
use crate::abilities::{DynPortForwarding, in_force};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::Operation;
use crate::span::{operation, within};
use crate::spec::{NetworkConfig, PortForward, VmName, VmSpec};
use crate::store::{LockedVm, VmRecord};

impl<H: Backend + 'static> VmManager<H> {
    /// Forwards a port of the host to a VM: at once if it lives, and at each start.
    ///
    /// # State
    /// Any; unchanged. A forward that exists is success.
    ///
    /// # Errors
    /// `InvalidInput` if the VM's network has no forwards, or the host's port is in use, with its
    /// holder if that is known; `Unsupported` by a backend without the ability. The VM's forwards
    /// are then unchanged. If the hypervisor does not reply (`TimedOut`, `Hypervisor`, `Io`), the
    /// forward is recorded, and may be active.
    pub async fn add_forward(&self, name: &VmName, forward: &PortForward) -> Result<VmHandle> {
        within(operation!("add_forward", vm = name), self.lead(name, forward)).await
    }

    async fn lead(&self, name: &VmName, forward: &PortForward) -> Result<VmHandle> {
        let (locked, before) = self.take_to_forward(name).await?;
        // A backend without the ability must not record a forward.
        let forwarding = before.state.is_live().then(|| self.forwarding(&before)).transpose()?;
        let mut vm = before.clone();
        vm.spec = vm.spec.with_forward(forward.clone())?;
        // A network without forwards waits for the next start; the current one is in force until
        // then.
        if let Some(next) = vm.next_spec.take_if(|next| has_forwards(next)) {
            vm.next_spec = Some(Box::new(next.with_forward(forward.clone())?));
        }
        locked.write_wanted(&VmRecord::settled(vm.clone()))?;
        let Some(forwarding) = forwarding else { return Ok(vm) };
        let added = forwarding.add_forward(&vm, forward).await;
        match &added {
            Ok(added) => write_outcome(&locked, added),
            // The forward may be active now or later: it stays recorded, so that the caller can
            // retry or remove it.
            Err(error) if !is_refusal(error) => {}
            // A forward that the host refuses now would keep the VM from starting later.
            Err(_) => {
                if let Err(error) = locked.write_wanted(&VmRecord::settled(before)) {
                    warn!(vm = %name, %forward, %error, "the forward was refused, but that can't be recorded");
                }
            }
        }
        added
    }

    /// Removes a forward of a port of the host to a VM; open connections are kept.
    ///
    /// `forward` is either the one that was requested, or has the host's port that was chosen for
    /// it.
    ///
    /// # State
    /// Any; unchanged.
    ///
    /// # Errors
    /// `NotFound` for a forward that is neither recorded nor active.
    pub async fn remove_forward(&self, name: &VmName, forward: &PortForward) -> Result<VmHandle> {
        within(operation!("remove_forward", vm = name), self.lead_no_more(name, forward)).await
    }

    async fn lead_no_more(&self, name: &VmName, forward: &PortForward) -> Result<VmHandle> {
        let (locked, mut vm) = self.take_to_forward(name).await?;
        let now = wanted(&vm, &vm.spec, forward);
        let later = vm.next_spec.as_deref().and_then(|next| wanted(&vm, next, forward));
        if now.is_none() && later.is_none() && !is_active(&vm, forward) {
            return Err(Error::not_found(Subject::Forward, forward));
        }
        if now.is_some() || later.is_some() {
            if let Some(now) = now {
                vm.spec = vm.spec.without_forward(&now);
            }
            if let Some(later) = later {
                vm.next_spec = vm.next_spec.map(|next| Box::new(next.without_forward(&later)));
            }
            locked.write_wanted(&VmRecord::settled(vm.clone()))?;
        }
        if !vm.state.is_live() {
            return Ok(vm);
        }
        let removed = self.forwarding(&vm)?.remove_forward(&vm, forward).await?;
        write_outcome(&locked, &removed);
        Ok(removed)
    }

    fn forwarding(&self, vm: &VmHandle) -> Result<DynPortForwarding<'_>> {
        self.abilities_of(vm).port_forwarding().ok_or_else(|| Error::Unsupported {
            backend: vm.backend.clone(),
            what: "forwards of an existing VM".to_owned(),
        })
    }

    /// Locks a VM and returns it with its current state, and with the information on its run if it
    /// lives.
    async fn take_to_forward(&self, name: &VmName) -> Result<(LockedVm, VmHandle)> {
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        // A VM that can only be removed is refused, as for `start`; otherwise an unrecorded run is
        // recorded, as for `resume`.
        let order = if record.is_unfinished() { Operation::Start } else { Operation::Resume };
        let record = self.finish_restore(&locked, record).await?;
        let vm = self.settle(record, order).await?;
        let state = self.state(&vm).await?;
        Ok((locked, vm.in_state(state)))
    }
}

/// Returns whether the hypervisor has refused, and not merely failed to reply.
fn is_refusal(error: &Error) -> bool {
    let unclear = [ErrorKind::TimedOut, ErrorKind::Io, ErrorKind::Hypervisor];
    matches!(error, Error::Refused { .. }) || !unclear.contains(&error.kind())
}

fn has_forwards(spec: &VmSpec) -> bool {
    matches!(spec.network(), NetworkConfig::User(_))
}

/// Returns the forward of one of the VM's specs that is meant.
fn wanted(vm: &VmHandle, spec: &VmSpec, forward: &PortForward) -> Option<PortForward> {
    let NetworkConfig::User(user) = spec.network() else { return None };
    if user.forwards.contains(forward) {
        return Some(forward.clone());
    }
    let unnamed = PortForward { host_port: None, ..forward.clone() };
    (is_active(vm, forward) && user.forwards.contains(&unnamed)).then_some(unnamed)
}

/// Returns whether the host listens for this forward, as far as is known.
fn is_active(vm: &VmHandle, forward: &PortForward) -> bool {
    vm.run.as_ref().is_some_and(|run| in_force(&vm.spec, forward, &run.forwards).is_some())
}
