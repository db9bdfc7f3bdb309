//! The serial console of a guest that is not there: a socket, a log, and a thread that echoes.
//!
//! A thread and not a task, so that the guest lives as long as its VM runs, whatever runtime has
//! started it. It waits for the first of: a new client, input, a change of who is waited for, the
//! guest's end. Dropping a [`NoopConsole`] is that end.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use uuid::Uuid;

use crate::blocking::spawn;
use crate::boundedlog::BoundedLog;
use crate::error::{Error, Result};
use crate::handle::{ConsoleEndpoint, VmHandle};
use crate::log_position::{LogPosition, older_log};
use crate::store::create_private;

/// How long a client may leave output unread before it is disconnected.
const READ_LIMIT: Duration = Duration::from_secs(1);

/// Where the consoles of all guests are.
#[derive(Debug, Clone)]
pub(super) struct ConsoleDir(pub(super) PathBuf);

impl ConsoleDir {
    pub(super) fn socket(&self, id: Uuid) -> PathBuf {
        self.0.join(format!("{id}.sock"))
    }

    pub(super) fn log(&self, id: Uuid) -> PathBuf {
        self.0.join(format!("{id}.log"))
    }

    pub(super) fn endpoint(&self, id: Uuid) -> ConsoleEndpoint {
        ConsoleEndpoint::UnixSocket(self.socket(id))
    }

    /// Starts the console of a guest.
    pub(super) fn open(&self, vm: &VmHandle) -> Result<NoopConsole> {
        create_private(&self.0)?;
        let (log, socket) = (self.log(vm.id), self.socket(vm.id));
        let written = BoundedLog::open(&log, vm.spec.console_log().bytes());
        let written = written.map_err(Error::io("open", &log))?;
        let since = written.position().map_err(Error::io("read", &log))?;
        // Left by a process that was killed.
        remove_if_there(&socket)?;
        let listener = UnixListener::bind(&socket).map_err(Error::io("listen at", &socket))?;
        NoopConsole::begin(socket, listener, written, since)
    }

    /// Removes the log of a VM.
    pub(super) fn remove_log(&self, id: Uuid) -> Result<()> {
        let log = self.log(id);
        remove_if_there(&older_log(&log))?;
        remove_if_there(&log)
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The console of a guest that runs or is suspended.
#[derive(Debug)]
pub(super) struct NoopConsole {
    socket: PathBuf,
    since: LogPosition,
    guest: Arc<Mutex<EchoGuest>>,
    /// A byte has the thread look again; its end ends the thread.
    wake: UnixStream,
}

/// What a guest has of its console.
#[derive(Debug)]
struct EchoGuest {
    log: BoundedLog,
    clients: Vec<Arc<UnixStream>>,
    is_paused: bool,
    has_ended: bool,
}

impl NoopConsole {
    fn begin(socket: PathBuf, listener: UnixListener, log: BoundedLog, since: LogPosition) -> Result<Self> {
        let guest = EchoGuest { log, clients: Vec::new(), is_paused: false, has_ended: false };
        let guest = Arc::new(Mutex::new(guest));
        let (wake, woken) = UnixStream::pair().map_err(Error::io("create", "a socket pair"))?;
        // From here on, its drop removes the socket.
        let console = Self { socket, since, guest, wake };
        let private = fs::set_permissions(&console.socket, fs::Permissions::from_mode(0o600));
        private
            .and_then(|()| listener.set_nonblocking(true))
            .and_then(|()| console.wake.set_nonblocking(true))
            .and_then(|()| woken.set_nonblocking(true))
            .map_err(Error::io("set up", &console.socket))?;
        let guest = Arc::clone(&console.guest);
        spawn("vmkit-noop-guest", move || serve(&listener, &woken, &guest))?;
        Ok(console)
    }

    /// Returns where this run begins in the log.
    pub(super) fn since(&self) -> LogPosition {
        self.since
    }

    pub(super) fn print(&self, text: &[u8]) {
        locked(&self.guest).print(text);
    }

    /// A paused guest reads nothing: what is typed waits.
    pub(super) fn set_paused(&self, is_paused: bool) {
        locked(&self.guest).is_paused = is_paused;
        // A full socket wakes the thread as well.
        let _ = (&self.wake).write(&[0]);
    }
}

impl Drop for NoopConsole {
    fn drop(&mut self) {
        // The next start reports what can't be removed.
        let _ = fs::remove_file(&self.socket);
        locked(&self.guest).end();
    }
}

impl EchoGuest {
    fn end(&mut self) {
        self.has_ended = true;
        for client in self.clients.drain(..) {
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// Prints to the clients first, and to the log after them, as the contract of a socket says.
    fn print(&mut self, text: &[u8]) {
        self.clients.retain(|client| {
            let is_read = client.as_ref().write_all(text).is_ok();
            if !is_read {
                let _ = client.shutdown(Shutdown::Both);
            }
            is_read
        });
        self.log.append(text);
    }

    /// Reads what a client has typed, and echoes it as a terminal does.
    fn echo(&mut self, client: &Arc<UnixStream>) {
        let mut typed = [0; 4096];
        match client.as_ref().read(&mut typed) {
            Ok(bytes @ 1..) => {
                let text = typed[..bytes].iter().flat_map(|byte| match byte {
                    b'\r' => b"\r\n".as_slice(),
                    byte => std::slice::from_ref(byte),
                });
                self.print(&text.copied().collect::<Vec<u8>>());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => self.clients.retain(|it| !Arc::ptr_eq(it, client)),
        }
    }
}

fn locked(guest: &Mutex<EchoGuest>) -> MutexGuard<'_, EchoGuest> {
    guest.lock().expect("nothing panics while it holds a guest")
}

/// Serves the clients of a guest until its [`NoopConsole`] is dropped.
fn serve(listener: &UnixListener, woken: &UnixStream, guest: &Mutex<EchoGuest>) {
    loop {
        let (clients, is_paused) = {
            let guest = locked(guest);
            (guest.clients.clone(), guest.is_paused)
        };
        let read = if is_paused { [].as_slice() } else { clients.as_slice() };
        let mut awaited = vec![PollFd::new(woken, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        awaited.extend(read.iter().map(|client| PollFd::new(client, PollFlags::IN)));
        match poll(&mut awaited, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return locked(guest).end(),
        }
        let is_ready: Vec<bool> = awaited.iter().map(|it| !it.revents().is_empty()).collect();
        let mut guest = locked(guest);
        if guest.has_ended || (is_ready[0] && matches!((&*woken).read(&mut [0; 64]), Ok(0))) {
            return;
        }
        // What was typed before a pause was read, or waits until its end.
        if !guest.is_paused {
            let typed = read.iter().zip(&is_ready[2..]).filter(|(_, is_ready)| **is_ready);
            typed.for_each(|(client, _)| guest.echo(client));
        }
        if is_ready[1] {
            match accept(listener) {
                Ok(client) => guest.clients.push(Arc::new(client)),
                Err(error) if is_of_one_client(&error) => {}
                // Without descriptors for clients there is no console: they are refused.
                Err(_) => return guest.end(),
            }
        }
    }
}

fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    let (client, _) = listener.accept()?;
    client.set_nonblocking(false)?;
    client.set_write_timeout(Some(READ_LIMIT))?;
    Ok(client)
}

fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, InvalidInput, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | InvalidInput | WouldBlock)
}
