//! Taps: network interfaces whose other end is a descriptor, for QEMU to hold.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::host::TUN;
use crate::network::netlink::{BridgeLink, NetlinkSocket};
use crate::spec::BridgeName;
use crate::steps::step;
use crate::sys;

/// A tap that exists as long as a process holds a copy of its descriptor.
///
/// The kernel removes it when the last holder ends, however that ends.
#[derive(Debug)]
pub(crate) struct TapDevice {
    /// The guest's end: Ethernet frames, each behind a virtio-net header.
    pub(crate) fd: OwnedFd,
    /// The name of the host's end.
    pub(crate) name: String,
}

/// Checks that there is a bridge of this name.
///
/// It asks the kernel, not `/sys`: that shows the network in which it was mounted, which need not
/// be this process's.
///
/// # Errors
/// `InvalidInput` naming the bridge when it does not exist or is something else.
pub(crate) async fn check_bridge(bridge: &BridgeName) -> Result<()> {
    find_bridge(&NetlinkSocket::open()?, bridge).await.map(drop)
}

async fn find_bridge(netlink: &NetlinkSocket, name: &BridgeName) -> Result<BridgeLink> {
    let found = netlink.bridge(name).await?;
    found.map_err(|problem| Error::invalid("network.bridge", name, problem))
}

/// Creates a tap and attaches it to a bridge that exists.
///
/// `name` has at most 15 bytes and may hold one `%d`, for which the kernel takes the first free
/// number.
///
/// # Cancel safety
/// Nothing is left behind.
///
/// # Errors
/// `InvalidInput` naming the bridge when it does not exist or is something else; `Host` naming
/// `/dev/net/tun` when that is missing, or when this user lacks CAP_NET_ADMIN. `Busy` when there is
/// an interface of this name.
pub(crate) async fn open_tap(bridge: &BridgeName, name: &str) -> Result<TapDevice> {
    let netlink = NetlinkSocket::open()?;
    let found = find_bridge(&netlink, bridge).await?;
    if !found.up {
        tracing::warn!(%bridge, "the bridge is down: nothing passes through it until it is set up");
    }
    let tun = OpenOptions::new().read(true).write(true).open(TUN).map_err(lacking)?;
    step("make the tap").map_err(Error::io("create a tap with", TUN))?;
    let name = match sys::make_tap(&tun, name) {
        Ok(name) => name,
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
            return Err(Error::Busy { what: format!("the network interface `{name}`"), holder: None });
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let problem = "the name of a network interface has 1 to 15 bytes";
            return Err(Error::invalid("tap", name, problem));
        }
        Err(error) => return Err(lacking(error)),
    };
    let tap = TapDevice { fd: tun.into(), name };
    step("attach the tap").map_err(Error::io("attach a tap of", TUN))?;
    netlink.attach(&tap.name, &found).await?;
    Ok(tap)
}

fn lacking(error: io::Error) -> Error {
    let problem = match error.kind() {
        io::ErrorKind::NotFound => "it does not exist; load the module tun",
        io::ErrorKind::PermissionDenied => {
            "this user may not create network interfaces (CAP_NET_ADMIN); run vmkit as root"
        }
        _ => return Error::host(TUN, "no tap can be created").with_source(error),
    };
    Error::host(TUN, problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_own_network, ip};

    fn bridge(name: &str) -> BridgeName {
        BridgeName::new(name).unwrap()
    }

    #[test]
    fn a_tap_is_a_port_of_its_bridge_until_its_descriptor_is_closed() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("link set br0 up");
            let tap = open_tap(&bridge("br0"), "vmkit%d").await.unwrap();
            assert_eq!(tap.name, "vmkit0");
            let shown = ip("-d link show vmkit0");
            for part in ["master br0", "UP", "link/ether fe:", "tun type tap", "vnet_hdr on", "persist off"] {
                assert!(shown.contains(part), "{part}: {shown}");
            }
            let copy = tap.fd.try_clone().unwrap();
            drop(tap);
            assert!(ip("link show").contains("vmkit0"));
            drop(copy);
            assert!(!ip("link show").contains("vmkit0"));
        });
    }

    #[test]
    fn a_bridge_keeps_its_address_when_taps_come_and_go() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("tuntap add dev port0 mode tap");
            ip("link set port0 address 52:54:00:00:00:01 master br0");
            assert!(ip("link show br0").contains("link/ether 52:54:00:00:00:01"));
            for _ in 0..16 {
                let _tap = open_tap(&bridge("br0"), "vmkit%d").await.unwrap();
                let shown = ip("link show br0");
                assert!(shown.contains("link/ether 52:54:00:00:00:01"), "{shown}");
            }
        });
    }

    #[test]
    fn a_bridge_of_long_packets_stays_one() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("tuntap add dev port0 mode tap");
            ip("link set port0 mtu 9000 master br0");
            assert!(ip("link show br0").contains("mtu 9000"));
            let tap = open_tap(&bridge("br0"), "vmkit%d").await.unwrap();
            for device in ["br0", &tap.name] {
                let shown = ip(&format!("link show {device}"));
                assert!(shown.contains("mtu 9000"), "{shown}");
            }
        });
    }

    #[test]
    fn a_bridge_that_is_not_there_or_is_none_is_named() {
        in_own_network(async || {
            ip("tuntap add dev theirs mode tap");
            for (name, reason) in [
                ("br7", "network.bridge: \"br7\": this host has no such network interface"),
                ("theirs", "network.bridge: \"theirs\": that network interface is a tun, not a bridge"),
                ("lo", "network.bridge: \"lo\": that network interface is not a bridge"),
            ] {
                let error = open_tap(&bridge(name), "vmkit%d").await.unwrap_err();
                assert_eq!(error.to_string(), reason);
            }
            assert!(!ip("link show").contains("vmkit"));
        });
    }

    #[test]
    fn a_name_in_use_is_refused_even_if_the_interface_is_a_lasting_tap() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("tuntap add dev theirs mode tap vnet_hdr");
            let error = open_tap(&bridge("br0"), "theirs").await.unwrap_err();
            assert_eq!(error.to_string(), "the network interface `theirs` is in use");
            let error = open_tap(&bridge("br0"), "sixteen-bytes-xx").await.unwrap_err();
            assert!(error.to_string().contains("1 to 15 bytes"), "{error}");
        });
    }
}
