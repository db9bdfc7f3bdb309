//! A conversation with the kernel about network interfaces and neighbours.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::{Handle, LinkUnspec, MulticastGroup};
use rustix::io::Errno;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::network::MacAddr;
use crate::spec::BridgeName;

/// How long a reply may take. The kernel replies at once, unless something holds its lock on all
/// networking.
const DEADLINE: Duration = Duration::from_secs(5);

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct NetlinkSocket(Handle);

/// A bridge, as it was when it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BridgeLink {
    pub(super) index: u32,
    pub(super) up: bool,
    /// The longest packet that passes, in bytes.
    pub(super) mtu: Option<u32>,
}

impl NetlinkSocket {
    /// Opens the socket; a task of the tokio runtime serves it until this is dropped.
    pub(super) fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|error| Error::host("netlink", "cannot open a socket").with_source(error))?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Looks up an existing bridge, or returns why there is none of this name.
    ///
    /// # Errors
    /// `Host` when the kernel does not tell.
    pub(super) async fn bridge(&self, name: &BridgeName) -> Result<Result<BridgeLink, String>> {
        let link = match self.link(name.as_str()).await? {
            Ok(link) => link,
            Err(Errno::NODEV) => return Ok(Err("this host has no such network interface".to_owned())),
            Err(errno) => return Ok(Err(io::Error::from(errno).to_string())),
        };
        Ok(match kind(&link) {
            Some(InfoKind::Bridge) => {
                let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                Ok(BridgeLink {
                    index: link.header.index,
                    up: link.header.flags.contains(LinkFlags::Up),
                    mtu,
                })
            }
            Some(other) => Err(format!("that network interface is a {other}, not a bridge")),
            None => Err("that network interface is not a bridge".to_owned()),
        })
    }

    /// Creates a tap a port of a bridge and sets it up.
    ///
    /// Its own address, which no frame of the guest's carries, is set to begin with 0xfe: a bridge
    /// without an address of its own takes the lowest of its ports', and would lose the host's
    /// connections when a VM starts or stops. Its longest packet is made the bridge's for the same
    /// reason: a bridge takes the shortest of its ports'.
    pub(super) async fn attach(&self, tap: &str, bridge: &BridgeLink) -> Result<()> {
        let refused = |errno: Errno| {
            Error::host(format!("the tap `{tap}`"), "it can't be attached to its bridge")
                .with_source(io::Error::from(errno))
        };
        let link = self.link(tap).await?.map_err(refused)?;
        let address = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => Some(address.clone()),
            _ => None,
        });
        let mut address = address.unwrap_or_else(|| vec![0; 6]);
        if let Some(first) = address.first_mut() {
            *first = 0xfe;
        }
        let mut change =
            LinkUnspec::new_with_index(link.header.index).address(address).controller(bridge.index).up();
        if let Some(mtu) = bridge.mtu {
            change = change.mtu(mtu);
        }
        bounded(self.0.link().set(change.build()).execute()).await?.map_err(refused)
    }

    /// Returns the addresses at which a neighbour on this bridge was seen: those last confirmed
    /// first, IPv4 before IPv6.
    pub(super) async fn neighbours(&self, mac: MacAddr, bridge: &BridgeLink) -> Result<Vec<IpAddr>> {
        let known = bounded(self.0.neighbours().get().execute().try_collect::<Vec<_>>()).await?;
        let known = known.map_err(|errno| {
            Error::host("the neighbour table", "it can't be read").with_source(io::Error::from(errno))
        })?;
        let mut found: Vec<_> =
            known.iter().filter_map(|neighbour| seen(neighbour, mac, bridge.index)).collect();
        found.sort();
        Ok(found.into_iter().map(|(_, address)| address).collect())
    }

    async fn link(&self, name: &str) -> Result<Result<LinkMessage, Errno>> {
        let mut answers = std::pin::pin!(self.0.link().get().match_name(name).execute());
        Ok(bounded(answers.try_next()).await?.and_then(|link| link.ok_or(Errno::NODEV)))
    }
}

/// What the kernel tells of the neighbours with one Ethernet address.
pub(super) struct NeighbourWatch {
    mac: MacAddr,
    told: Pin<Box<dyn Stream<Item = RouteNetlinkMessage> + Send>>,
    /// The socket is served for as long as this is there.
    _handle: Handle,
}

impl NeighbourWatch {
    /// Starts to listen, in the network namespace of this thread.
    pub(super) fn watch(mac: MacAddr) -> io::Result<Self> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Neigh])?;
        tokio::spawn(connection);
        let told = messages.filter_map(async |(message, _)| match message.payload {
            NetlinkPayload::InnerMessage(told) => Some(told),
            _ => None,
        });
        Ok(Self { mac, told: Box::pin(told), _handle: handle })
    }

    /// Waits until one of them can be reached; returns false if no more events will arrive.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(super) async fn next(&mut self) -> bool {
        while let Some(told) = self.told.next().await {
            if let RouteNetlinkMessage::NewNeighbour(neighbour) = told
                && seen(&neighbour, self.mac, neighbour.header.ifindex).is_some()
            {
                return true;
            }
        }
        false
    }
}

/// Waits for an answer until the deadline, and reduces the kernel's refusals to their numbers.
async fn bounded<T>(
    answer: impl Future<Output = std::result::Result<T, rtnetlink::Error>>,
) -> Result<Result<T, Errno>> {
    match timeout(DEADLINE, answer).await {
        Ok(Ok(answer)) => Ok(Ok(answer)),
        Ok(Err(rtnetlink::Error::NetlinkError(message))) => {
            Ok(Err(Errno::from_raw_os_error(message.raw_code().saturating_abs())))
        }
        Ok(Err(other)) => Err(Error::host("netlink", format!("unexpected reply: {other}"))),
        Err(_) => Err(Error::timed_out("the kernel's reply about its network interfaces", DEADLINE)),
    }
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    link.attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })
        .flatten()
        .find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        })
}

/// How good an address is, the lowest the best: whether it is old, and whether it is IPv6.
type AddressRank = (bool, bool);

fn seen(neighbour: &NeighbourMessage, mac: MacAddr, interface: u32) -> Option<(AddressRank, IpAddr)> {
    let old = match neighbour.header.state {
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None => return None,
        NeighbourState::Stale => true,
        _ => false,
    };
    let is_its = neighbour.attributes.contains(&NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    if !is_its || neighbour.header.ifindex != interface {
        return None;
    }
    let address = neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    })?;
    is_reachable(address).then_some(((old, address.is_ipv6()), address))
}

/// Returns whether the address alone says where to connect to: a link-local one needs its
/// interface, too.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address != Ipv4Addr::UNSPECIFIED && !address.is_multicast(),
        IpAddr::V6(address) => {
            address != Ipv6Addr::UNSPECIFIED && !address.is_multicast() && !address.is_unicast_link_local()
        }
    }
}
