//! Tests in which a real Debian boots, a minute each under emulation.
//!
//! Tests start in the order of their names. These take longest, and stand together here so that
//! they start early: a long one that starts last leaves all but one core idle.

mod debian;
mod guest_ssh;
mod launch;
mod up;

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How long until a connection is tried again: seldom enough that the server is not crowded by
/// those that QEMU has taken before it listened.
const PAUSE: Duration = Duration::from_millis(200);

/// Connects again and again, with a pause after each failure, until an SSH server greets; sends
/// when that was.
fn first_greeting(address: SocketAddr) -> Receiver<Instant> {
    let (sender, receiver) = channel();
    let greets = move || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut greeting = [0; 4];
        stream.read_exact(&mut greeting)?;
        std::io::Result::Ok(&greeting == b"SSH-")
    };
    let limit = Instant::now() + Duration::from_secs(600);
    thread::spawn(move || {
        while !greets().unwrap_or(false) {
            if Instant::now() > limit {
                return;
            }
            // There is no event for a server that begins to listen.
            thread::sleep(PAUSE);
        }
        let _ = sender.send(Instant::now());
    });
    receiver
}
