//! Where the host reaches a guest on a bridge.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::network::MacAddr;
use crate::network::leases::leased_to;
use crate::network::netlink::NetlinkSocket;
use crate::spec::BridgeName;

/// Returns the addresses of the guest with this Ethernet address, the best first; none while none
/// is known.
///
/// First those at which the host's kernel has met it on this bridge, then those that dnsmasq has
/// leased to it.
///
/// # Errors
/// `Host` when the bridge is gone, `Io` when a lease file can't be read and nothing else is known.
pub(crate) async fn addresses_of(
    mac: MacAddr,
    bridge: &BridgeName,
    lease_files: &[PathBuf],
) -> Result<Vec<IpAddr>> {
    let netlink = NetlinkSocket::open()?;
    let gone = |problem| Error::host(format!("the bridge `{bridge}`"), problem);
    let bridge = netlink.bridge(bridge).await?.map_err(gone)?;
    let mut addresses = netlink.neighbours(mac, &bridge).await?;
    match leased_to(mac, lease_files) {
        Ok(leased) => {
            for address in leased {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        Err(error) if addresses.is_empty() => return Err(error),
        Err(error) => tracing::debug!(%error, "leases are not known"),
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{in_own_network, ip};
    use std::fs;

    #[test]
    fn a_guest_is_found_in_the_neighbour_table_and_then_in_the_leases() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("link add br1 type bridge");
            ip("link set br0 up");
            ip("link set br1 up");
            let (mine, other) = ("52:54:00:12:34:56", "52:54:00:00:00:01");
            for (address, mac, device, state) in [
                ("10.0.0.9", mine, "br0", "stale"),
                ("10.0.0.2", mine, "br0", "reachable"),
                ("fd00::2", mine, "br0", "reachable"),
                ("fe80::2", mine, "br0", "reachable"),
                ("10.0.0.3", other, "br0", "reachable"),
                ("10.0.0.4", mine, "br1", "reachable"),
                ("10.0.0.5", mine, "br0", "failed"),
            ] {
                ip(&format!("neigh add {address} lladdr {mac} dev {device} nud {state}"));
            }
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("dnsmasq.leases");
            fs::write(&file, format!("0 {mine} 10.0.0.2 * *\n0 {mine} 10.0.0.7 * *\n")).unwrap();
            let bridge = BridgeName::new("br0").unwrap();
            let found = addresses_of(mine.parse().unwrap(), &bridge, &[file]).await.unwrap();
            let found: Vec<_> = found.iter().map(ToString::to_string).collect();
            assert_eq!(found, ["10.0.0.2", "fd00::2", "10.0.0.9", "10.0.0.7"]);
            let none = addresses_of(MacAddr::from([2; 6]), &bridge, &[]).await.unwrap();
            assert_eq!(none, Vec::<IpAddr>::new());
        });
    }

    #[test]
    fn a_bridge_that_is_gone_is_named() {
        in_own_network(async || {
            let bridge = BridgeName::new("br7").unwrap();
            let error = addresses_of(MacAddr::from([2; 6]), &bridge, &[]).await.unwrap_err();
            assert!(error.to_string().contains("`br7`"), "{error}");
        });
    }
}
