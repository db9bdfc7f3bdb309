//! The host's side of a guest's network: MAC addresses, taps, neighbours, leases.

mod mac;

pub use mac::MacAddr;
