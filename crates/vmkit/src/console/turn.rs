//! Turns at a console: QEMU serves one client at a time, and leaves all others in its queue without
//! a reply.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::flock::{FileLock, LockMode};
use crate::spec::VmName;
use crate::store::{denied, keep_owner};

/// This process's turn at a console that serves one client at a time.
///
/// It ends when this is dropped, or the process has died. Its lock file is in the socket's
/// directory, contains the PID for other processes, and is removed with the VM.
#[derive(Debug)]
pub struct ConsoleTurn {
    _held: FileLock,
    client: ConsoleClient,
}

/// A client of a VM's console socket.
#[derive(Debug, Clone)]
pub(crate) struct ConsoleClient {
    vm: VmName,
    socket: PathBuf,
}

impl ConsoleTurn {
    /// Takes a turn at the console of this VM, which is at this socket.
    ///
    /// # Errors
    /// `Busy` with the PID of the process that has it; `Io` and `Host` if that can't be determined.
    pub fn take(vm: &VmName, socket: &Path) -> Result<Self> {
        let path = lock_of(socket);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(denied("open", &path))?;
        keep_owner(&file, &path);
        let held = match FileLock::try_take(file, LockMode::Alone).map_err(Error::io("lock", &path))? {
            Ok(lock) => lock,
            Err(file) => return Err(busy(vm, signed(&file))),
        };
        sign(held.file()).map_err(Error::io("write", &path))?;
        Ok(Self { _held: held, client: ConsoleClient::new(vm, socket) })
    }

    /// Returns whether the hypervisor serves a client that has not taken its turn, so that a new
    /// connection waits to be accepted. Always `false` except on Linux, the only system that
    /// reports it.
    pub fn is_disregarded(&self) -> bool {
        self.client.is_waiting()
    }

    /// Creates the error for a console that serves such a client.
    pub fn busy(&self) -> Error {
        self.client.busy()
    }

    pub(super) fn client(&self) -> &ConsoleClient {
        &self.client
    }
}

impl ConsoleClient {
    /// Creates a client of a console that needs no turn; has no effects.
    pub(crate) fn new(vm: &VmName, socket: &Path) -> Self {
        Self { vm: vm.clone(), socket: socket.to_owned() }
    }

    /// Returns whether a connection waits to be accepted, as far as the system reports it.
    pub(super) fn is_waiting(&self) -> bool {
        fs::read_to_string("/proc/net/unix").is_ok_and(|table| has_waiting(&table, &self.socket))
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn busy(&self) -> Error {
        busy(&self.vm, None)
    }
}

fn busy(vm: &VmName, holder: Option<u32>) -> Error {
    Error::Busy { what: format!("the console of the VM `{vm}`"), holder }
}

/// Returns whether a socket at the path has a connection that was not accepted yet.
///
/// Source: the kernel's `unix_seq_show`, which shows such a one in the state SS_CONNECTING (2).
fn has_waiting(table: &str, socket: &Path) -> bool {
    table.lines().skip(1).any(|line| {
        // Num RefCount Protocol Flags Type St Inode Path; the inode is padded, and the path may
        // contain spaces.
        let mut columns = line.split_ascii_whitespace();
        let waits = columns.nth(5) == Some("02");
        waits && line.split_once(" /").is_some_and(|(_, path)| socket == Path::new(&format!("/{path}")))
    })
}

fn lock_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

fn sign(mut file: &File) -> io::Result<()> {
    file.set_len(0)?;
    write!(file, "{}", std::process::id())
}

fn signed(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_pending_connection_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("with blank.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let turn = ConsoleTurn::take(&VmName::new("web").unwrap(), &path).unwrap();
        assert!(!turn.is_disregarded());
        let first = UnixStream::connect(&path).unwrap();
        assert!(turn.is_disregarded());
        let accepted = listener.accept().unwrap();
        assert!(!turn.is_disregarded());
        drop((first, accepted));
    }

    #[test]
    fn a_second_turn_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, socket) = (VmName::new("web").unwrap(), dir.path().join("console.sock"));
        let held = ConsoleTurn::take(&vm, &socket).unwrap();
        let error = ConsoleTurn::take(&vm, &socket).unwrap_err().to_string();
        let own = std::process::id();
        assert_eq!(error, format!("the console of the VM `web` is in use by process {own}"));
        drop(held);
        ConsoleTurn::take(&vm, &socket).unwrap();
    }
}
