//! Reads the table that HMP's `info usernet` prints: the only place where QEMU tells which host
//! ports it listens on.
//!
//! Pure. The table is made for people, so lines that are not understood are passed over: a caller
//! compares what it finds with what it asked for.
//!
//! Source: libslirp, `slirp_connection_info`; the columns are protocol and state, fd, source
//! address and port, destination address and port, two queue lengths.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::handle::ActiveForward;
use crate::spec::Protocol;

/// Returns the forwards into the guest that are in force, in the order of the table.
pub(crate) fn forwards(table: &str) -> Vec<ActiveForward> {
    table.lines().filter_map(forward).collect()
}

fn forward(line: &str) -> Option<ActiveForward> {
    let mut words = line.split_ascii_whitespace();
    let protocol = match words.next()? {
        "TCP[HOST_FORWARD]" => Protocol::Tcp,
        "UDP[HOST_FORWARD]" => Protocol::Udp,
        _ => return None,
    };
    let (_fd, address, port) = (words.next()?, words.next()?, words.next()?);
    let (_guest, guest_port) = (words.next()?, words.next()?);
    let address = if address == "*" { Ipv4Addr::UNSPECIFIED } else { address.parse().ok()? };
    Some(ActiveForward {
        protocol,
        host: SocketAddrV4::new(address, port.parse().ok()?),
        guest_port: guest_port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What QEMU 7.2.22 answered, a connection through the second forward being open.
    const TABLE: &str = "Hub -1 (net0):\r\n  \
        Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
        TCP[HOST_FORWARD]  10       127.0.0.1 43525       10.0.2.15    22     0     0\r\n  \
        TCP[ESTABLISHED]   12       127.0.0.1 18080       10.0.2.15    80     0     0\r\n  \
        TCP[HOST_FORWARD]   8               * 18080       10.0.2.15    80     0     0\r\n  \
        UDP[236 sec]       18       10.0.2.15 38311        10.0.2.3    53     0     0\r\n  \
        UDP[HOST_FORWARD]   9       127.0.0.1 55870       10.0.2.15    53     0     0\r\n";

    #[test]
    fn the_ports_that_the_kernel_chose_are_printed() {
        let found: Vec<String> = forwards(TABLE)
            .iter()
            .map(|it| format!("{:?} {} {}", it.protocol, it.host, it.guest_port))
            .collect();
        assert_eq!(found, ["Tcp 127.0.0.1:43525 22", "Tcp 0.0.0.0:18080 80", "Udp 127.0.0.1:55870 53"]);
    }

    #[test]
    fn a_line_cut_short_is_passed_over() {
        assert_eq!(forwards("  TCP[HOST_FORWARD]  10       127.0.0.1 43525       10.0.2.15"), []);
        assert_eq!(forwards("  TCP[HOST_FORWARD]  10       127.0.0.1 70000       10.0.2.15 22 0 0"), []);
        assert_eq!(forwards("  TCP[HOST_FORWARD]  10       127.0.0.1 43525       10.0.2.15 0 0 0"), []);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "((TCP|UDP)\\[HOST_FORWARD\\]|\\PC)*") {
            let _ = forwards(&text);
        }
    }
}
