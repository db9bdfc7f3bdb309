//! The host's side of the guest's network: `-netdev`.
//!
//! Pure.

use std::num::NonZero;

use super::{PropertyList, QemuArgs};
use crate::spec::{PortForward, UserNetwork};

/// `-netdev`, always `net0`.
pub(crate) enum Netdev<'a> {
    User(&'a UserNetwork),
    /// A tap device, handed down by number.
    Tap {
        descriptor: i32,
    },
}

impl Netdev<'_> {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let props = match self {
            Netdev::User(user) => {
                let mut props = PropertyList::new("user").with("id", "net0");
                if user.restrict {
                    props = props.with("restrict", "on");
                }
                for forward in &user.forwards {
                    props = props.with("hostfwd", hostfwd(forward));
                }
                props
            }
            Netdev::Tap { descriptor } => {
                PropertyList::new("tap").with("id", "net0").with("fd", descriptor.to_string())
            }
        };
        args.props("-netdev", props);
    }
}

/// Returns a forward as `hostfwd` takes it, here and in the monitor.
pub(crate) fn hostfwd(forward: &PortForward) -> String {
    // Port 0 has the kernel choose; `info usernet` tells which.
    let host = forward.host_port.map_or(0, NonZero::get);
    let (protocol, addr, guest) = (forward.protocol.as_str(), forward.host_addr, forward.guest_port);
    format!("{protocol}:{addr}:{host}-:{guest}")
}
