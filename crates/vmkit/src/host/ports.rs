//! Whether a port of the host is free.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::num::NonZeroU16;

use crate::error::{Error, Result};
use crate::spec::Protocol;

/// Answers whether somebody could listen on this port now.
///
/// It is a courtesy, so that a port in use is named before anything is made. The port may be taken in the next moment, and
/// that is for whoever binds it to report.
///
/// # Errors
/// `Host` when this user may not listen there, or the host does not have the address.
pub(crate) fn port_is_free(protocol: Protocol, addr: IpAddr, port: NonZeroU16) -> Result<bool> {
    let socket = SocketAddr::new(addr, port.get());
    let bound = match protocol {
        Protocol::Tcp => TcpListener::bind(socket).map(drop),
        Protocol::Udp => UdpSocket::bind(socket).map(drop),
    };
    match bound {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(false),
        Err(error) => Err(Error::Host {
            needed: format!("the port {socket}/{}", protocol.as_str()),
            problem: match error.kind() {
                io::ErrorKind::AddrNotAvailable => "this host does not have that address".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "this user may not listen there; take a port from 1024 on".to_owned()
                }
                _ => error.to_string(),
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn a_tcp_port_is_taken_while_somebody_listens() {
        let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        assert!(!port_is_free(Protocol::Tcp, LOOPBACK, port).unwrap());
        drop(listener);
        assert!(port_is_free(Protocol::Tcp, LOOPBACK, port).unwrap());
    }

    #[test]
    fn a_udp_port_is_taken_while_somebody_is_bound_to_it() {
        let socket = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        let port = NonZeroU16::new(socket.local_addr().unwrap().port()).unwrap();
        assert!(!port_is_free(Protocol::Udp, LOOPBACK, port).unwrap());
        drop(socket);
        assert!(port_is_free(Protocol::Udp, LOOPBACK, port).unwrap());
    }

    #[test]
    fn an_address_of_another_host_is_named() {
        let port = NonZeroU16::new(2222).unwrap();
        // TEST-NET-1 of RFC 5737: nobody's.
        let error = port_is_free(Protocol::Tcp, Ipv4Addr::new(192, 0, 2, 1).into(), port).unwrap_err();
        assert_eq!(error.to_string(), "the port 192.0.2.1:2222/tcp: this host does not have that address");
    }
}
