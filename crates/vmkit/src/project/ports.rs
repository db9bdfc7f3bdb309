//! Whether a guest listens on a TCP port, as seen from the host: for guests that vmkit can't log in
//! to.
//!
//! On a network that the host is on, a connection shows it. QEMU's user network accepts at once
//! even if the guest is not there, and closes the connection when the guest refuses. So an open
//! connection only means something if the guest is known to reply: its SSH port, which always has a
//! forward, is probed first, and either a greeting or a refusal is a reply.
//!
//! Source: libslirp 4.7, `tcp_subr.c`, `tcp_connect`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::error::{Error, ErrorKind, LiveResource, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::manager::VmManager;
use crate::spec::{NetworkConfig, Protocol, VmName};

/// The shortest and the longest pause between two attempts. A service that begins to listen raises
/// no event outside of the guest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long a guest may take to answer at all.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a connection through the user network has to stay open: at least, and at the most. In
/// between it is a few times as long as the guest took for the answer before.
const SILENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// What is known of a port at which nothing listens.
pub(super) const SILENT: &str = "nothing is known to listen there";
/// The guest's port that always has a forward on a user network.
const SSH: u16 = 22;

/// How the host reaches a port of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortRoute {
    /// On a network that it is on.
    Direct(SocketAddr),
    /// Through QEMU's user network; `ssh` leads to the guest's SSH port.
    Forward { port: SocketAddr, ssh: SocketAddr },
}

/// Waits until the guest listens on these ports.
///
/// # Errors
/// `TimedOut` at the deadline; `InvalidState` where the VM does not run; those of the manager.
pub(super) async fn listen<H: Backend + 'static>(
    manager: &VmManager<H>,
    vm: &VmName,
    ports: &[u16],
    deadline: Instant,
) -> Result<()> {
    let began = Instant::now();
    for port in ports {
        let tries = async {
            let mut pause = BACK_OFF.0;
            loop {
                let vm = manager.info(vm).await?;
                if vm.state != VmState::Running {
                    return Err(Error::NotLive { what: LiveResource::GuestListener, state: vm.state });
                }
                if let Some(way) = way(manager, &vm, *port).await?
                    && way.is_listened_at().await
                {
                    return Ok(());
                }
                sleep_until(Instant::now() + pause).await;
                pause = (pause * 2).min(BACK_OFF.1);
            }
        };
        timeout_at(deadline, tries).await.unwrap_or_else(|_| {
            let awaited = format!("{} ({SILENT})", awaited(*port));
            Err(Error::timed_out(awaited, began.elapsed()))
        })?;
    }
    Ok(())
}

/// Says that a port is awaited.
pub(super) fn awaited(port: u16) -> String {
    format!("the guest's TCP port {port}, as `ready.tcp` asks for")
}

/// Returns how the host reaches a port, where that is known by now.
async fn way<H: Backend + 'static>(
    manager: &VmManager<H>,
    vm: &VmHandle,
    port: u16,
) -> Result<Option<PortRoute>> {
    if let NetworkConfig::User(_) = vm.spec.network() {
        let forward = |port: u16| {
            let active = vm.run.iter().flat_map(|run| &run.forwards);
            let mut found = active.filter(|it| it.guest_port.get() == port && it.protocol == Protocol::Tcp);
            found.next().map(|it| reachable(it.host.into()))
        };
        return Ok(forward(port).zip(forward(SSH)).map(|(port, ssh)| PortRoute::Forward { port, ssh }));
    }
    match manager.guest_ip(vm.name()).await {
        Ok(address) => {
            Ok(address.parse().ok().map(|ip: IpAddr| PortRoute::Direct(SocketAddr::new(ip, port))))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns where a port is connected to that is listened on everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip().is_unspecified() {
        true => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port()),
        false => address,
    }
}

impl PortRoute {
    async fn is_listened_at(self) -> bool {
        match self {
            PortRoute::Direct(address) => {
                timeout(ANSWER, TcpStream::connect(address)).await.is_ok_and(|connected| connected.is_ok())
            }
            PortRoute::Forward { port, ssh } => {
                let began = Instant::now();
                if timeout(ANSWER, words(ssh)).await.is_err() {
                    return false;
                }
                let silence = (began.elapsed() * 4).clamp(SILENCE.0, SILENCE.1);
                // It was not closed: the guest has accepted, and waits for us to speak.
                timeout(silence, words(port)).await.unwrap_or(true)
            }
        }
    }
}

/// Waits until a connection brings words, or is closed; tells which.
async fn words(address: SocketAddr) -> bool {
    let heard = async { TcpStream::connect(address).await?.peek(&mut [0]).await };
    heard.await.is_ok_and(|bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread;

    /// What a user network does with a connection once it has accepted it.
    #[derive(Clone, Copy)]
    enum FakeUserNetwork {
        Greets,
        Refuses,
        IsSilent,
    }

    fn forward_to(guest: FakeUserNetwork) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut held = Vec::new();
            for mut stream in listener.incoming().flatten() {
                match guest {
                    FakeUserNetwork::Greets => stream.write_all(b"220 hello\r\n").unwrap(),
                    FakeUserNetwork::Refuses => continue,
                    FakeUserNetwork::IsSilent => {}
                }
                held.push(stream);
            }
        });
        address
    }

    async fn is_listened_at(port: FakeUserNetwork, ssh: FakeUserNetwork) -> bool {
        PortRoute::Forward { port: forward_to(port), ssh: forward_to(ssh) }.is_listened_at().await
    }

    #[tokio::test]
    async fn a_connection_that_stays_open_means_that_a_guest_listens() {
        for ssh in [FakeUserNetwork::Greets, FakeUserNetwork::Refuses] {
            assert!(
                is_listened_at(FakeUserNetwork::IsSilent, ssh).await,
                "a server that waits for a request"
            );
            assert!(is_listened_at(FakeUserNetwork::Greets, ssh).await);
            assert!(!is_listened_at(FakeUserNetwork::Refuses, ssh).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_to_a_guest_that_is_not_there_proves_nothing() {
        assert!(!is_listened_at(FakeUserNetwork::IsSilent, FakeUserNetwork::IsSilent).await);
    }

    #[tokio::test]
    async fn on_a_network_of_the_host_a_connection_proves_a_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let way = PortRoute::Direct(listener.local_addr().unwrap());
        assert!(way.is_listened_at().await);
        drop(listener);
        assert!(!way.is_listened_at().await);
    }

    #[test]
    fn a_port_on_all_addresses_is_connected_to_on_loopback() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(reachable(address("0.0.0.0:80")), address("127.0.0.1:80"));
        assert_eq!(reachable(address("10.0.0.1:80")), address("10.0.0.1:80"));
    }
}
