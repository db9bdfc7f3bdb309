//! The host's side of a guest's network: MAC addresses, taps, neighbours, leases.

mod arrivals;
#[cfg(any(feature = "propolis", all(target_os = "linux", feature = "qemu")))]
mod leases;
mod mac;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod neighbours;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod netlink;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod tap;
#[cfg(all(target_os = "linux", feature = "qemu"))]
#[cfg(test)]
mod testing;

pub use mac::MacAddr;

pub(crate) use arrivals::FirstPackets;

#[cfg(any(feature = "propolis", all(target_os = "linux", feature = "qemu")))]
pub(crate) use leases::default_lease_files;
#[cfg(feature = "propolis")]
pub(crate) use leases::leased_to;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use neighbours::addresses_of;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use tap::{check_bridge, open_tap};
