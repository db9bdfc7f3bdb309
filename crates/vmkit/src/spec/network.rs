//! How the guest is connected.
//!
//! Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::Serialize;

use crate::error::Error;
use crate::spec::{BridgeName, LinkName};

/// The network of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetworkConfig {
    /// QEMU's own user-mode network: no privilege, reached through port forwards.
    User(UserNetwork),
    /// A tap device on a bridge that exists on the host.
    Tap {
        /// The bridge.
        bridge: BridgeName,
    },
    /// A VNIC of the VM's own over a data link of an illumos host.
    Vnic {
        /// The link below it: a NIC, an aggregation, an etherstub.
        link: LinkName,
    },
    /// No network device at all.
    None,
}

/// QEMU's user-mode network (slirp).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UserNetwork {
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<PortForward>,
    /// Whether the guest is kept from everything but its forwards.
    pub restrict: bool,
}

impl Default for NetworkConfig {
    /// Returns user mode with one forward to the guest's SSH port, the host's port chosen by the
    /// kernel.
    fn default() -> Self {
        NetworkConfig::User(UserNetwork::with_ssh(Vec::new()))
    }
}

impl FromStr for NetworkConfig {
    type Err = Error;

    /// Parses `user`, which is the default, `tap:BRIDGE`, `vnic:LINK` or `none`.
    fn from_str(text: &str) -> Result<Self, Error> {
        match (text, text.split_once(':')) {
            ("user", _) => Ok(Self::default()),
            ("none", _) => Ok(Self::None),
            (_, Some(("tap", bridge))) => BridgeName::new(bridge).map(|bridge| Self::Tap { bridge }),
            (_, Some(("vnic", link))) => LinkName::new(link).map(|link| Self::Vnic { link }),
            _ => {
                let value: String = text.chars().take(40).collect();
                Err(Error::invalid("network", value, "write user, tap:BRIDGE, vnic:LINK or none"))
            }
        }
    }
}

impl UserNetwork {
    /// Returns a network with these forwards, and one to the guest's TCP port 22 where they have
    /// none.
    pub fn with_ssh(mut forwards: Vec<PortForward>) -> Self {
        const SSH: NonZeroU16 = NonZeroU16::new(22).expect("22 is not zero");
        let is_ssh = |f: &PortForward| f.protocol == Protocol::Tcp && f.guest_port == SSH;
        if !forwards.iter().any(is_ssh) {
            forwards.push(PortForward {
                protocol: Protocol::Tcp,
                host_addr: PortForward::LOOPBACK,
                host_port: None,
                guest_port: SSH,
            });
        }
        Self { forwards, restrict: false }
    }
}

/// A transport protocol that can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Returns `tcp` or `udp`.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A port of the host that leads to a port of the guest.
///
/// Its text is `[ADDR:]HOST:GUEST[/udp]`, or `GUEST[/udp]` alone to have the kernel choose the
/// host's port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PortForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address of the host that is listened on; loopback unless said otherwise. IPv4 only:
    /// slirp has no other.
    pub host_addr: Ipv4Addr,
    /// The host's port; chosen by the kernel at each start where none is named.
    pub host_port: Option<NonZeroU16>,
    /// The guest's port.
    pub guest_port: NonZeroU16,
}

impl PortForward {
    /// The address that is listened on where none is named.
    pub const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
}

impl FromStr for PortForward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |why: String| {
            let value: String = text.chars().take(80).collect();
            Error::invalid(
                "forward",
                value,
                format!(
                    "{why}; write [ADDR:]HOST:GUEST[/udp], or GUEST[/udp] to have the host's port chosen"
                ),
            )
        };
        let port = |which: &str, text: &str| {
            let number = text.parse::<u32>().ok().filter(|n| (1..=65535).contains(n));
            let number = number.and_then(|n| NonZeroU16::new(n as u16));
            number.ok_or_else(|| refused(format!("the {which}'s port {text:?} is not 1 to 65535")))
        };
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => return Err(refused(format!("the protocol {other:?} is not tcp or udp"))),
        };
        let mut parts = ports.rsplitn(3, ':');
        let guest_port = port("guest", parts.next().unwrap_or_default())?;
        let host_port = parts.next().map(|text| port("host", text)).transpose()?;
        let host_addr = match parts.next() {
            None => Self::LOOPBACK,
            Some(addr) => match addr.trim_matches(['[', ']']).parse::<IpAddr>() {
                Ok(IpAddr::V4(addr)) => addr,
                Ok(IpAddr::V6(_)) => {
                    return Err(refused(format!(
                        "{addr:?} is IPv6, and user networking listens on IPv4 only"
                    )));
                }
                Err(_) => return Err(refused(format!("{addr:?} is not an IPv4 address"))),
            },
        };
        Ok(Self { protocol, host_addr, host_port, guest_port })
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host_addr != Self::LOOPBACK {
            write!(f, "{}:", self.host_addr)?;
        }
        if let Some(port) = self.host_port {
            write!(f, "{port}:")?;
        }
        write!(f, "{}", self.guest_port)?;
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => f.write_str("/udp"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_in_every_form() {
        for text in ["22", "2222:22", "53:53/udp", "0.0.0.0:8080:80", "9/udp"] {
            assert_eq!(text.parse::<PortForward>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_ports_are_refused_by_name_and_bound() {
        for (text, reason) in [
            ("0:22", "the host's port \"0\" is not 1 to 65535"),
            ("70000:22", "the host's port \"70000\""),
            ("22:0", "the guest's port \"0\""),
            ("", "the guest's port \"\""),
            ("22/sctp", "not tcp or udp"),
            ("localhost:1:2", "not an IPv4 address"),
            ("[::1]:1:2", "IPv6"),
        ] {
            let error = text.parse::<PortForward>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
