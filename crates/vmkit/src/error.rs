//! The one error type of the library, and the few kinds that callers act on.
//!
//! Pure: this module knows nothing of the host. A message names the field or the path, the value
//! and what would be right; it never repeats its source, so print the chain
//! (`std::error::Error::source`) once, at the edge.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::handle::BackendTag;
use crate::image::ImageFormat;
use crate::lifecycle::{InvalidTransition, VmState};
use crate::misplacement::Misplacement;
use crate::spec::VmName;

/// The result of every fallible call of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the facts a caller or a reader needs.
///
/// Match on [`Error::kind`] to act; match on a variant only for its fields.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that a caller gave is not acceptable.
    #[error("{field}: {value:?}: {expected}")]
    Invalid {
        /// The field as the user knows it, such as `cpus` or `network.forwards`.
        field: Cow<'static, str>,
        /// The value as it was given.
        value: String,
        /// What is wrong with it and what would be right.
        expected: String,
    },
    /// What should be created exists already.
    #[error("{what} `{name}` already exists")]
    AlreadyExists {
        /// What kind of thing, such as `VM`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// What was asked for does not exist.
    #[error("{what} `{name}` does not exist")]
    NotFound {
        /// What kind of thing, such as `VM`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A part of the login to a guest was not given, and is not in the VM's record.
    #[error("no {missing} is known for the VM `{vm}`")]
    NoLogin {
        /// The VM.
        vm: VmName,
        /// What is missing.
        missing: LoginPart,
    },
    /// An image has a format that the backend does not take.
    #[error("{field}: {:?}: this is a {} image, and the backend `{backend}` takes raw ones", path.display().to_string(), found.as_str())]
    WrongFormat {
        /// The field as the user knows it, such as `image`.
        field: &'static str,
        /// The image.
        path: PathBuf,
        /// The format that it has.
        found: ImageFormat,
        /// The backend.
        backend: BackendTag,
    },
    /// The name is none of those that exist.
    #[error("{what} `{name}` does not exist; {}{}", LocationOf(known), SuggestionOf(meant.as_deref()))]
    Unknown {
        /// What kind of thing, such as `machine`.
        what: &'static str,
        /// The name that was given.
        name: String,
        /// The names that exist.
        known: Vec<String>,
        /// The one that was probably meant.
        meant: Option<String>,
    },
    /// The operation is not legal in the state the VM is in.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// What was asked for exists only while the VM runs or is suspended.
    #[error("{what} is known only while the VM runs, and it is {state}{}", CauseOf(state))]
    NotLive {
        /// What was asked for.
        what: &'static str,
        /// The state the VM is in.
        state: VmState,
    },
    /// The backend can never do this; its `Capabilities` say so beforehand.
    #[error("the backend `{backend}` does not support {what}")]
    Unsupported {
        /// The backend that was asked.
        backend: BackendTag,
        /// What it can't do.
        what: String,
    },
    /// No backend with this tag is registered.
    #[error("no backend `{tag}` is registered here; known: {}", NameList(known))]
    UnknownBackend {
        /// The tag that was asked for.
        tag: BackendTag,
        /// The tags that are registered.
        known: Vec<BackendTag>,
    },
    /// Another process holds what is needed.
    #[error("{what} is in use{}", HolderOf(*holder))]
    Busy {
        /// What is held.
        what: String,
        /// The process that holds it, where it is known.
        holder: Option<u32>,
    },
    /// The same VM runs in another directory already: one of the two is a copy of the other.
    #[error(
        "cannot start the VM `{vm}` in {}: the same VM, with the same identity and MAC address, runs already{}{}; stop that one first, \
         or make a VM of its own here (expected one of the copies to run at a time)",
        here.display(),
        other.as_ref().map_or_else(String::new, |other| format!(" from {}", other.display())),
        pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
    )]
    SameVm {
        /// The VM.
        vm: VmName,
        /// The directory in which it was to be started.
        here: PathBuf,
        /// The directory in which it runs, where that is known.
        other: Option<PathBuf>,
        /// Its process, where that is known.
        pid: Option<u32>,
    },
    /// A directory has the record of a VM of another name.
    #[error("{}: {}", path.display(), how.problem(path, vm))]
    Misplaced {
        /// The directory.
        path: PathBuf,
        /// The VM that its record is of.
        vm: VmName,
        /// What the directory is.
        how: Misplacement,
    },
    /// What an operation needs belongs to another user.
    #[error("{} belongs to {owner}, and this is {user}: {way_out}", path.display())]
    OtherUser {
        /// What belongs to the other user.
        path: PathBuf,
        /// The owner.
        owner: Box<str>,
        /// The user that this process acts as.
        user: Box<str>,
        /// What to do about it.
        way_out: Box<str>,
    },
    /// The image that is to be removed is the backing file of VMs' disks.
    #[error("{image}: the {} on it, and so it is in use", BackingUsers(vms))]
    ImageInUse {
        /// The image, by all its names.
        image: String,
        /// The VMs, in the order of their names.
        vms: Vec<VmName>,
    },
    /// A deadline passed.
    #[error("waited {:.1} s for {awaited}{}", after.as_secs_f64(), ConsoleTail("the console's last lines", console))]
    TimedOut {
        /// What was awaited.
        awaited: String,
        /// How long it was awaited.
        after: Duration,
        /// The console's last lines, where there is a console.
        console: String,
    },
    /// A VM ended while something else was awaited of it.
    #[error(
        "waited for {awaited}, and it is {state}{}{}",
        CauseOf(state),
        ConsoleTail("the console's last lines", console)
    )]
    Ended {
        /// What was awaited.
        awaited: String,
        /// The state the VM is in now.
        state: VmState,
        /// The console's last lines, where there is a console.
        console: String,
    },
    /// A record or another file of vmkit's own can't be used.
    #[error("{}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The host lacks something that the operation needs.
    #[error("{needed}: {problem}")]
    Host {
        /// What is needed, such as `qemu-system-x86_64` or `/dev/kvm`.
        needed: String,
        /// What was found instead, and what would be right.
        problem: String,
    },
    /// QEMU ended when it should not have.
    #[error("QEMU ended: {status} (its log: {}){}", log.display(), ConsoleTail("it said", stderr))]
    QemuExited {
        /// How it ended: its exit code or the signal.
        status: String,
        /// The last lines of its standard error.
        stderr: String,
        /// Where the whole log is.
        log: PathBuf,
    },
    /// QEMU or the guest agent replied to a command with an error.
    #[error("{peer} refused `{command}`: {description} ({class})")]
    Refused {
        /// Which peer: `QEMU` or `the guest agent`.
        peer: &'static str,
        /// The command.
        command: String,
        /// The error class of the reply.
        class: String,
        /// The description in the reply.
        description: String,
    },
    /// A peer broke the protocol or went away.
    #[error("{peer}: {problem}")]
    Protocol {
        /// Which peer: `QEMU`, `the guest agent`, `the keeper`.
        peer: &'static str,
        /// What it did.
        problem: String,
        /// The I/O error below, if any.
        #[source]
        source: Option<io::Error>,
    },
    /// A guest's SSH server refused, failed or went away.
    #[error("SSH to {target}: {problem}")]
    Ssh {
        /// Where to and as whom, such as `vmkit@web (127.0.0.1:2222)`.
        target: String,
        /// What went wrong.
        problem: String,
        /// The error below, if any.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A guest's SSH server has another host key than the one that is known.
    #[error("SSH to {target}: the server has the host key {found}, and {expected} is the one that is known")]
    HostKey {
        /// Where to and as whom.
        target: String,
        /// The fingerprint of the key that is known.
        expected: String,
        /// The fingerprint of the key that the server has.
        found: String,
    },
    /// A file can't be copied into a guest or out of it.
    #[error("cannot copy {from} to {to}: {problem}")]
    Copy {
        /// What is copied, such as `web:/etc/hosts`.
        from: String,
        /// Where to.
        to: String,
        /// What went wrong, and at which end.
        problem: String,
        /// Which kind this is to a caller.
        kind: ErrorKind,
        /// The error below, if any.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A part of a directory could not be copied; all else was.
    #[error("cannot copy {from} to {to}: {problem}")]
    CopyPart {
        /// What is copied, such as `web:/etc`.
        from: Box<str>,
        /// Where to.
        to: Box<str>,
        /// What was left out.
        problem: Box<str>,
        /// Which kind this is to a caller.
        kind: ErrorKind,
        /// The failures, an [`Error::Copy`] each; of very many only the first.
        failures: Vec<Error>,
        /// How many more failures there were.
        more: u32,
        /// What was left out because it is neither file nor directory nor symbolic link.
        skipped: Box<[String]>,
    },
    /// The system refused a file operation.
    #[error("cannot {verb} {}", path.display())]
    Io {
        /// What was tried, such as `create` or `read`.
        verb: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of machines has something wrong in it.
    #[cfg(feature = "vmfile")]
    #[error(transparent)]
    Vmfile(#[from] Box<crate::vmfile::VmfileError>),
    /// Something could not be fetched from a server.
    #[error("cannot fetch {url}: {problem}")]
    Fetch {
        /// From where.
        url: String,
        /// What went wrong, or what the server replied.
        problem: String,
        /// The status of the reply, if the reply was the problem.
        status: Option<u16>,
        /// The error of the connection, if that failed.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// What was fetched differs from what its publisher says, or could not be verified; it was not
    /// kept.
    #[error("{what} is not to be trusted: {problem}")]
    Untrusted {
        /// What was fetched.
        what: String,
        /// What is wrong: both checksums, or what the signature lacks.
        problem: String,
    },
    /// A VM has the name that a machine's VM would have, and is not the machine's.
    #[error("the VM `{vm}` is there already, and {owner}")]
    Foreign {
        /// The VM.
        vm: VmName,
        /// The owner.
        owner: String,
    },
    /// A step of a machine's provisioning failed in its guest.
    #[error("the step `{step}` of the machine `{machine}` failed: {how} (its log: {})", log.display())]
    Step {
        /// The machine, by its name in the file.
        machine: String,
        /// The step.
        step: String,
        /// How it ended, such as `exit code 3`.
        how: Box<str>,
        /// The log of what the step printed.
        log: PathBuf,
    },
    /// A backend outside this crate failed in its own way.
    #[error("{message}")]
    Backend {
        /// The message.
        message: String,
        /// Which kind this is to a caller.
        kind: ErrorKind,
        /// Its own error.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

/// What it takes to log in to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoginPart {
    /// The user.
    User,
    /// The key that the user logs in with.
    Key,
    /// The key by which the guest's server is recognised.
    HostKey,
    /// The port of this host that is forwarded to the guest's server.
    Port,
}

impl fmt::Display for LoginPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LoginPart::User => "user",
            LoginPart::Key => "SSH key",
            LoginPart::HostKey => "SSH host key",
            LoginPart::Port => "port of this host that leads to its SSH server",
        })
    }
}

/// What a caller can do about an error. The CLI's exit codes come from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was given is wrong: change it and call again.
    InvalidInput,
    /// The name is taken.
    AlreadyExists,
    /// What was named does not exist.
    NotFound,
    /// Not legal in this state: another operation has to come first.
    InvalidState,
    /// This backend can never do it.
    Unsupported,
    /// Another process holds it now: trying again later may help.
    Busy,
    /// A deadline passed; nothing is known to be dead.
    TimedOut,
    /// A file of vmkit's own is unreadable, foreign or from a newer version.
    Record,
    /// The host lacks something: a program, a device, permission or space.
    Host,
    /// A server failed, or sent what could not be verified.
    Remote,
    /// The hypervisor failed.
    Hypervisor,
    /// What runs in the guest failed.
    Guest,
    /// The system failed in another way.
    Io,
}

impl Error {
    /// Returns the kind: what a caller can do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Invalid { .. } | Error::WrongFormat { .. } => ErrorKind::InvalidInput,
            #[cfg(feature = "vmfile")]
            Error::Vmfile(error) => error.kind(),
            Error::AlreadyExists { .. } | Error::Foreign { .. } => ErrorKind::AlreadyExists,
            Error::Step { .. } => ErrorKind::Guest,
            Error::NotFound { .. } | Error::NoLogin { .. } | Error::Unknown { .. } => ErrorKind::NotFound,
            Error::Transition(_) | Error::Ended { .. } | Error::NotLive { .. } => ErrorKind::InvalidState,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::UnknownBackend { .. } | Error::Host { .. } | Error::OtherUser { .. } => ErrorKind::Host,
            Error::Busy { .. } | Error::ImageInUse { .. } | Error::SameVm { .. } => ErrorKind::Busy,
            Error::TimedOut { .. } => ErrorKind::TimedOut,
            Error::Record { .. } | Error::Misplaced { .. } => ErrorKind::Record,
            Error::QemuExited { .. } => ErrorKind::Hypervisor,
            Error::Refused { peer, .. } | Error::Protocol { peer, .. } => {
                if [GUEST_AGENT, SSH_SERVER].contains(peer) {
                    ErrorKind::Guest
                } else {
                    ErrorKind::Hypervisor
                }
            }
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::PermissionDenied => ErrorKind::Host,
                _ => ErrorKind::Io,
            },
            Error::Ssh { .. } | Error::HostKey { .. } => ErrorKind::Guest,
            Error::Copy { kind, .. } | Error::CopyPart { kind, .. } | Error::Backend { kind, .. } => *kind,
            Error::Fetch { status: Some(404 | 410), .. } => ErrorKind::NotFound,
            Error::Fetch { .. } | Error::Untrusted { .. } => ErrorKind::Remote,
        }
    }

    /// Creates the error for a value that can't be accepted.
    pub fn invalid(
        field: impl Into<Cow<'static, str>>,
        value: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Error::Invalid { field: field.into(), value: value.to_string(), expected: expected.into() }
    }

    /// Returns a function for `map_err` that wraps an I/O error with what was tried on which path.
    pub fn io(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { verb, path, source }
    }
}

#[cfg(feature = "vmfile")]
impl From<crate::vmfile::VmfileError> for Error {
    fn from(error: crate::vmfile::VmfileError) -> Self {
        Error::Vmfile(Box::new(error))
    }
}

/// The peer's name in the errors that the guest agent causes.
pub(crate) const GUEST_AGENT: &str = "the guest agent";

/// The name of a guest's SSH server as a peer in errors.
pub(crate) const SSH_SERVER: &str = "the SSH server";

struct NameList<'a>(&'a [BackendTag]);

impl fmt::Display for NameList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, tag) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}`{tag}`")?;
        }
        Ok(())
    }
}

/// How many names an error lists at most.
const MOST_NAMES: usize = 20;

struct LocationOf<'a>(&'a [String]);

impl fmt::Display for LocationOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("there is none");
        }
        let names: Vec<String> = self.0.iter().take(MOST_NAMES).map(|name| format!("`{name}`")).collect();
        write!(f, "there {} {}", if self.0.len() == 1 { "is" } else { "are" }, names.join(", "))?;
        match self.0.len().saturating_sub(MOST_NAMES) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

struct SuggestionOf<'a>(Option<&'a str>);

impl fmt::Display for SuggestionOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(meant) => write!(f, ": did you mean `{meant}`?"),
            None => Ok(()),
        }
    }
}

struct HolderOf(Option<u32>);

impl fmt::Display for HolderOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pid) => write!(f, " by process {pid}"),
            None => Ok(()),
        }
    }
}

struct BackingUsers<'a>(&'a [VmName]);

impl fmt::Display for BackingUsers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(|name| format!("`{name}`")).collect();
        match &names[..] {
            [name] => write!(f, "disk of VM {name} hangs"),
            names => write!(f, "disks of VMs {} hang", names.join(", ")),
        }
    }
}

struct CauseOf<'a>(&'a VmState);

impl fmt::Display for CauseOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            VmState::Failed { cause } => write!(f, ": {cause}"),
            _ => Ok(()),
        }
    }
}

struct ConsoleTail<'a>(&'static str, &'a str);

impl fmt::Display for ConsoleTail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.1.trim_end();
        if text.is_empty() {
            return Ok(());
        }
        write!(f, "; {}:", self.0)?;
        for line in text.lines() {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}
