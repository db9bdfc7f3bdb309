//! What is held of the host: descriptors that were handed down, locks, ports.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::fs::FlockOperation;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, getpid, kill_process, pidfd_getfd, pidfd_open};

use crate::args::{CommandLine, ForwardArg, ImageArg, VncArg};

/// What is held until the end.
#[derive(Debug)]
pub(crate) struct HeldResources {
    /// The forwards, with the ports that they really have.
    pub(crate) forwards: Vec<ForwardArg>,
    /// The port of the VNC server, where it has one.
    pub(crate) vnc_port: Option<u16>,
    _files: Vec<File>,
    _sockets: Vec<OwnedFd>,
}

impl HeldResources {
    /// Takes what the command line needs, and says what QEMU says where it can't be had.
    pub(crate) fn take(line: &CommandLine) -> Result<Self, String> {
        let mut sockets = Vec::new();
        let files: Result<Vec<File>, String> = line.images.iter().map(lock).collect();
        let files = files?;
        if let Some(kernel) = &line.kernel {
            let problem =
                |error| format!("could not open kernel file '{}': {}", kernel.display(), said(&error));
            File::open(kernel).map_err(problem)?;
        }
        if let Some(initrd) = &line.initrd {
            let problem = |_| format!("could not open initrd '{}'", initrd.display());
            File::open(initrd).map_err(problem)?;
        }
        let mut forwards = Vec::new();
        for forward in &line.forwards {
            let (forward, socket) = bind(forward)?;
            forwards.push(forward);
            sockets.push(socket);
        }
        let mut vnc_port = None;
        if let Some(vnc) = &line.vnc {
            let (port, socket) = bind_vnc(vnc)?;
            vnc_port = port;
            sockets.push(socket);
        }
        Ok(Self { forwards, vnc_port, _files: files, _sockets: sockets })
    }
}

/// Opens an image, and locks it against other fakes unless it is only read.
fn lock(image: &ImageArg) -> Result<File, String> {
    let path = image.path.display();
    let open = OpenOptions::new().read(true).write(!image.readonly).open(&image.path);
    let file = open.map_err(|error| format!("{}: Could not open '{path}': {}", image.said, said(&error)))?;
    let (operation, kind) = match image.readonly {
        true => (FlockOperation::NonBlockingLockShared, "shared \"write\""),
        false => (FlockOperation::NonBlockingLockExclusive, "\"write\""),
    };
    rustix::fs::flock(&file, operation).map_err(|_| {
        format!("{}: Failed to get {kind} lock\nIs another process using the image [{path}]?", image.said)
    })?;
    Ok(file)
}

fn bind(forward: &ForwardArg) -> Result<(ForwardArg, OwnedFd), String> {
    let address = SocketAddrV4::new(forward.host, forward.host_port);
    let bound: io::Result<(u16, OwnedFd)> = (|| {
        Ok(if forward.udp {
            let socket = UdpSocket::bind(address)?;
            (socket.local_addr()?.port(), socket.into())
        } else {
            let socket = TcpListener::bind(address)?;
            (socket.local_addr()?.port(), socket.into())
        })
    })();
    let (host_port, socket) = bound
        .map_err(|_| format!("{}: Could not set up host forwarding rule '{}'", forward.said, forward.rule))?;
    Ok((ForwardArg { host_port, ..forward.clone() }, socket))
}

fn bind_vnc(vnc: &VncArg) -> Result<(Option<u16>, OwnedFd), String> {
    match vnc {
        VncArg::Unix(path) => {
            // As QEMU does it: whatever is there is in the way.
            let _ = std::fs::remove_file(path);
            let problem =
                |error| format!("-vnc: Failed to bind socket to {}: {}", path.display(), said(&error));
            UnixListener::bind(path).map(|socket| (None, socket.into())).map_err(problem)
        }
        VncArg::Tcp(first, last) => (*first..=*last)
            .map(|display| 5900 + display)
            .find_map(|port| Some((Some(port), TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?.into())))
            .ok_or_else(|| "-vnc: Failed to bind socket: Address already in use".to_owned()),
    }
}

/// Returns what the system says, without the number that Rust adds.
fn said(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// Takes a listening socket that was handed down under this number.
pub(crate) fn inherited_listener(number: i32) -> Result<tokio::net::UnixListener, String> {
    let listener = UnixListener::from(inherited(number)?);
    let taken = listener.set_nonblocking(true).and_then(|()| tokio::net::UnixListener::from_std(listener));
    taken.map_err(|error| format!("File descriptor '{number}' is not a socket: {}", said(&error)))
}

/// Takes a file that was handed down under this number.
pub(crate) fn inherited_file(number: i32) -> Result<File, String> {
    inherited(number).map(File::from)
}

/// Copies a descriptor of this process that is only known by its number.
///
/// To make an owner of a bare number is unsafe; to ask the kernel for a copy of another process's
/// descriptor is not, and the other process may be this one.
fn inherited(number: i32) -> Result<OwnedFd, String> {
    let copy = || {
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        pidfd_getfd(this, number, PidfdGetfdFlags::empty())
    };
    copy().map_err(|_| format!("Bad file descriptor '{number}'"))
}

/// Dies by a signal.
pub(crate) fn die_by(number: i32) -> ! {
    if let Some(signal) = Signal::from_named_raw(number) {
        let _ = kill_process(getpid(), signal);
    }
    // The signal was one that does not kill.
    std::process::exit(128 + number)
}
