//! Starts in QEMU's place, has a test take over the monitors, and becomes QEMU: see
//! [`vmkit_testkit::faulty_qemu`].
//!
//! Started as a VM's keeper, it is a real keeper, so that tests need only one program.

use std::ffi::OsString;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use vmkit_testkit::faulty_qemu::{Handover, MOST_MONITORS, control_socket};

const QEMU: &str = "qemu-system-x86_64";

fn main() -> ExitCode {
    vmkit::run_if_keeper();
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let program = PathBuf::from(args.remove(0));
    let error = match hand_over(&program, &mut args) {
        Ok(false) => Command::new(QEMU).args(args).exec(),
        // QEMU handles these signals, but inherits which are blocked.
        Ok(true) => Command::new("env").arg("--block-signal=TERM,INT,HUP").arg(QEMU).args(args).exec(),
        Err(error) => error,
    };
    let _ = writeln!(io::stderr(), "{QEMU}: {error}");
    ExitCode::FAILURE
}

/// Hands the monitors' sockets over, puts others in their place, and returns whether signals are to
/// be ignored.
fn hand_over(program: &Path, args: &mut [OsString]) -> io::Result<bool> {
    let (mut sockets, mut names) = (Vec::new(), Vec::new());
    let ids: Vec<String> = args.iter().filter_map(monitor).collect();
    for arg in args.iter_mut() {
        let Some((id, number)) = chardev(arg).filter(|(id, _)| ids.contains(id)) else { continue };
        let name = format!("vmkit-faulty-qemu-{}-{id}", std::process::id());
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        // As vmkit hands it down: QEMU may accept a client that another of its threads has taken.
        listener.set_nonblocking(true)?;
        fcntl_setfd(&listener, FdFlags::empty())?;
        sockets.push(inherited(number)?);
        names.push(name);
        *arg = format!("socket,id={id},fd={},server=on,wait=off", listener.into_raw_fd()).into();
    }
    if sockets.is_empty() {
        return Ok(false);
    }
    let mut control = UnixStream::connect(control_socket(program))?;
    let text = serde_json::to_vec(&Handover { pid: getpid().as_raw_nonzero().get(), names })?;
    let sockets: Vec<BorrowedFd> = sockets.iter().map(OwnedFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_MONITORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::other("too many monitors"));
    }
    sendmsg(&control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::empty())?;
    let mut ignore_signals = [0];
    control.read_exact(&mut ignore_signals)?;
    Ok(ignore_signals == [1])
}

/// Returns the channel of a `-mon` argument for QMP.
fn monitor(arg: &OsString) -> Option<String> {
    let id = arg.to_str()?.strip_prefix("chardev=")?.strip_suffix(",mode=control")?;
    Some(id.to_owned())
}

/// Returns the ID and the file descriptor of a `-chardev` argument for a listening socket.
fn chardev(arg: &OsString) -> Option<(String, i32)> {
    let rest = arg.to_str()?.strip_prefix("socket,id=")?.strip_suffix(",server=on,wait=off")?;
    let (id, number) = rest.split_once(",fd=")?;
    Some((id.to_owned(), number.parse().ok()?))
}

/// Copies a file descriptor of this process that is known by its number only: to own a bare number
/// would be unsafe.
fn inherited(number: i32) -> io::Result<OwnedFd> {
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, number, PidfdGetfdFlags::empty())?)
}
