//! Whether a port of the host is free, and which process uses it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::num::NonZeroU16;
use std::path::Path;

use tokio::net::TcpSocket;

use super::holder::{ProcessHolder, holder_of};
use crate::error::{Error, Result};
use crate::spec::Protocol;

/// Returns whether a process could listen on this port now.
///
/// This is only for an early error, before anything is created. The port may be taken in the next
/// moment, which the process that binds it reports.
///
/// # Errors
/// `Host` if this user may not listen there, or the host does not have the address.
pub(crate) fn port_is_free(protocol: Protocol, addr: IpAddr, port: NonZeroU16) -> Result<bool> {
    let socket = SocketAddr::new(addr, port.get());
    let bound = match protocol {
        Protocol::Tcp => bind_alone(socket),
        Protocol::Udp => UdpSocket::bind(socket).map(drop),
    };
    match bound {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(false),
        Err(error) => Err(Error::host(
            format!("the port {socket}/{}", protocol.as_str()),
            match error.kind() {
                io::ErrorKind::AddrNotAvailable => "this host does not have that address".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "this user may not listen there; use port 1024 or above".to_owned()
                }
                _ => error.to_string(),
            },
        )),
    }
}

/// Binds a TCP port for a moment without listening, so that concurrent checks do not conflict with
/// each other, nor with a process that starts to listen.
///
/// Source: socket(7), `SO_REUSEADDR`: only a socket that listens conflicts.
fn bind_alone(addr: SocketAddr) -> io::Result<()> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)
}

/// Returns the process that has this port, as far as this user can see: the sockets of other users'
/// processes are hidden.
///
/// Source: proc_pid_net(5) and proc_pid_fd(5).
pub(crate) fn port_holder(protocol: Protocol, addr: Ipv4Addr, port: NonZeroU16) -> Option<ProcessHolder> {
    let name = protocol.as_str();
    let tables = [format!("/proc/self/net/{name}"), format!("/proc/self/net/{name}6")];
    let inode =
        tables.iter().find_map(|table| inode_in(&fs::read_to_string(table).ok()?, protocol, addr, port));
    let socket = format!("socket:[{}]", inode?);
    holder_of(|fd| fs::read_link(fd).is_ok_and(|target| target == Path::new(&socket)))
}

/// Finds in a table of the kernel the socket that has this port, and returns its inode.
fn inode_in(table: &str, protocol: Protocol, addr: Ipv4Addr, port: NonZeroU16) -> Option<u64> {
    /// The state of a TCP socket that listens; for UDP every socket matters.
    const LISTENS: &str = "0A";
    let ours = format!("{:08X}", u32::from_ne_bytes(addr.octets()));
    let is_it = |row: &&str| {
        let mut columns = row.split_ascii_whitespace().skip(1);
        let (Some(local), state) = (columns.next(), columns.nth(1)) else { return false };
        let Some((address, number)) = local.split_once(':') else { return false };
        // The last word of an IPv6 address is an IPv4-mapped address.
        let address = &address[address.len().saturating_sub(8)..];
        u16::from_str_radix(number, 16) == Ok(port.get())
            && (protocol == Protocol::Udp || state == Some(LISTENS))
            && (addr.is_unspecified() || address == ours || address == "00000000")
    };
    table.lines().skip(1).find(is_it)?.split_ascii_whitespace().nth(9)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn a_tcp_port_is_taken_while_a_socket_listens() {
        let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        assert!(!port_is_free(Protocol::Tcp, LOOPBACK, port).unwrap());
        drop(listener);
        assert!(port_is_free(Protocol::Tcp, LOOPBACK, port).unwrap());
    }

    #[test]
    fn those_who_look_at_once_do_not_find_each_other() {
        let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        drop(listener);
        let look = || (0..500).all(|_| port_is_free(Protocol::Tcp, LOOPBACK, port).unwrap());
        let all_free = std::thread::scope(|scope| {
            let lookers: Vec<_> = (0..4).map(|_| scope.spawn(look)).collect();
            lookers.into_iter().all(|looker| looker.join().unwrap())
        });
        assert!(all_free);
    }

    #[test]
    fn the_process_that_has_a_port_is_named() {
        let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        for addr in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
            let holder = port_holder(Protocol::Tcp, addr, port).expect("this process has it");
            assert_eq!((holder.pid, holder.vm.as_deref()), (std::process::id(), None));
            assert!(!holder.program.is_empty());
        }
        assert_eq!(port_holder(Protocol::Tcp, Ipv4Addr::new(127, 0, 0, 9), port), None);
        assert_eq!(port_holder(Protocol::Udp, Ipv4Addr::LOCALHOST, port), None);
    }

    #[test]
    fn a_udp_port_is_taken_while_a_socket_is_bound_to_it() {
        let socket = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(socket.local_addr().unwrap().port()).unwrap();
        assert!(!port_is_free(Protocol::Udp, LOOPBACK, port).unwrap());
        drop(socket);
        assert!(port_is_free(Protocol::Udp, LOOPBACK, port).unwrap());
    }

    #[test]
    fn an_address_of_another_host_is_named() {
        let port = NonZeroU16::new(2222).unwrap();
        // TEST-NET-1 of RFC 5737, which no host has.
        let error = port_is_free(Protocol::Tcp, Ipv4Addr::new(192, 0, 2, 1).into(), port).unwrap_err();
        assert_eq!(error.to_string(), "the port 192.0.2.1:2222/tcp: this host does not have that address");
    }
}
