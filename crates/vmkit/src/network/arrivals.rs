//! The event that a guest on a bridge shows itself to the host.
//!
//! Linux tells of each neighbour that it comes to know, which a guest is as soon as it has sent the
//! host its first packet. Elsewhere there is no event, and a waiting caller has to look again.

use super::MacAddr;

/// The first packets of one guest.
pub(crate) struct FirstPackets {
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    neighbours: Option<super::netlink::NeighbourWatch>,
}

impl FirstPackets {
    /// Starts to watch for the guest with this Ethernet address; without a netlink socket no event
    /// ever arrives.
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    pub(crate) fn of(mac: MacAddr) -> Self {
        let neighbours = super::netlink::NeighbourWatch::watch(mac);
        Self {
            neighbours: neighbours
                .inspect_err(|error| tracing::debug!(%error, "new neighbours are not reported"))
                .ok(),
        }
    }

    #[cfg(not(all(target_os = "linux", feature = "qemu")))]
    pub(crate) fn of(_mac: MacAddr) -> Self {
        Self {}
    }

    /// Returns what never tells anything: of a guest that is on no bridge.
    pub(crate) fn none() -> Self {
        Self {
            #[cfg(all(target_os = "linux", feature = "qemu"))]
            neighbours: None,
        }
    }

    /// Waits until the host comes to know the guest, or another address of it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&mut self) {
        #[cfg(all(target_os = "linux", feature = "qemu"))]
        if let Some(neighbours) = &mut self.neighbours
            && neighbours.next().await
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(all(test, target_os = "linux", feature = "qemu"))]
mod tests {
    use super::*;
    use crate::network::testing::{in_own_network, ip};
    use std::time::Duration;
    use tokio::time::timeout;

    #[test]
    fn only_the_guest_itself_is_reported_and_only_once_it_can_be_reached() {
        in_own_network(async || {
            ip("link add br0 type bridge");
            ip("link set br0 up");
            let mine = "52:54:00:12:34:56";
            let mut arrivals = FirstPackets::of(mine.parse().unwrap());
            ip("neigh add 10.0.0.3 lladdr 52:54:00:00:00:01 dev br0 nud reachable");
            ip(&format!("neigh add 10.0.0.2 lladdr {mine} dev br0 nud failed"));
            assert!(timeout(Duration::from_millis(200), arrivals.next()).await.is_err());
            ip(&format!("neigh replace 10.0.0.2 lladdr {mine} dev br0 nud stale"));
            timeout(Duration::from_secs(60), arrivals.next()).await.unwrap();
        });
    }
}
