//! `vmkit forward`.

use std::net::SocketAddrV4;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use vmkit::spec::{PortForward, Protocol, VmName};
use vmkit::ssh::LoginOptions;
use vmkit::{Error, WaitCondition};

use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::{human, json, output};

/// How long to wait for a login to the guest.
const LOGIN: Duration = Duration::from_secs(120);

/// Forward ports of the host into a VM, at once and at each of its starts; without ports, list the
/// forwards in force.
///
/// A running VM is not interrupted. This is for user networking; a guest on a bridge has an address
/// of its own, which `ip` prints, and `--foreground` forwards to any guest that SSH reaches.
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    /// The VM.
    pub(super) name: VmName,
    /// The ports; without HOST the host's port is chosen, ADDR defaults to 127.0.0.1.
    #[arg(value_name = "[[ADDR:]HOST:]GUEST[/udp]")]
    forwards: Vec<PortForward>,
    /// Remove these forwards; open connections stay open.
    #[arg(long, requires = "forwards")]
    remove: bool,
    /// Forward over SSH, and only while this command runs: on any network, TCP only.
    #[arg(long, requires = "forwards", conflicts_with_all = ["remove", "json"])]
    foreground: bool,
    /// Print the VM as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ForwardArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        if self.foreground {
            return context.block_on(self.over_ssh(&manager));
        }
        let vm = context.block_on(async {
            let mut vm = manager.info(&self.name).await?;
            for forward in &self.forwards {
                vm = match self.remove {
                    false => manager.add_forward(&self.name, forward).await?,
                    true => manager.remove_forward(&self.name, forward).await?,
                };
            }
            Ok(vm)
        })?;
        if self.json {
            return output::json(&json::VmView::of(&vm));
        }
        if !vm.state.is_live() {
            output::progress(format_args!(
                "{}: {}, so no forward is in effect until it starts",
                vm.name(),
                vm.state
            ));
        }
        output::text(human::forwards(&vm))
    }

    /// Forwards the ports over one SSH session, until the VM or the session ends.
    async fn over_ssh(self, manager: &CliManager) -> Result<(), Failure> {
        if let Some(udp) = self.forwards.iter().find(|forward| forward.protocol == Protocol::Udp) {
            return Err(Error::invalid(
                "forward",
                udp,
                "SSH forwards TCP only; without --foreground UDP works too",
            )
            .into());
        }
        // The cheap check first: a port in use is reported before the login.
        let mut listeners = Vec::new();
        for forward in &self.forwards {
            let address = SocketAddrV4::new(forward.host_addr, forward.host_port.map_or(0, NonZeroU16::get));
            let taken = |error| {
                Error::invalid("forward", forward, format!("cannot listen at {address}")).with_source(error)
            };
            let listener = TcpListener::bind(address).await.map_err(taken)?;
            listeners.push((listener, forward.guest_port));
        }
        let session = Arc::new(manager.ssh_session(&self.name, &LoginOptions::default(), LOGIN).await?);
        let mut led = JoinSet::new();
        for (listener, guest_port) in listeners {
            let address = listener.local_addr().map_err(Error::io("listen at", "a forwarded port"))?;
            output::text(format_args!("{address}->{guest_port}"))?;
            let session = Arc::clone(&session);
            led.spawn(async move { session.forward(&listener, guest_port).await });
        }
        tokio::select! {
            Some(ended) = led.join_next() => match ended.expect("forwarding a port does not panic")? {},
            ended = manager.wait(&self.name, WaitCondition::Stopped, Duration::MAX) => ended.map(drop).map_err(Failure::from),
        }
    }
}
