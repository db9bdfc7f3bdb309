//! The host's side of a guest's network: MAC addresses, taps, neighbours, leases.

mod leases;
mod mac;
mod neighbours;
mod netlink;
mod tap;
#[cfg(test)]
mod testing;

pub use mac::MacAddr;

pub(crate) use leases::default_lease_files;
pub(crate) use neighbours::addresses_of;
pub(crate) use tap::{check_bridge, open_tap};
