//! The one error type of the library, and the few kinds that callers act on.
//!
//! Pure: this module knows nothing of the host. A message names the field or the path, the value
//! and what would be right; it never repeats its source, so print the chain
//! (`std::error::Error::source`) once, at the edge.

mod classify;
mod kind;
mod subject;
mod text;
mod value;
#[cfg(feature = "vmfile")]
mod vmfile;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::backend_tag::BackendTag;
use crate::image_format::ImageFormat;
use crate::lifecycle::{InvalidTransition, VmState};
use crate::misplacement::Misplacement;
use crate::spec::VmName;

use text::{BackingUsers, CauseOf, HolderOf, LastLines, LocationOf, NameList, SuggestionOf};

pub use kind::ErrorKind;
pub use subject::{LiveResource, PartProblem, Peer, Subject};
pub use value::ValueProblem;
#[cfg(feature = "vmfile")]
pub use vmfile::{VmfileError, VmfileProblem, VmfileSpan};

/// The result of every fallible call of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error below one of this library's, of whatever type.
pub type ErrorSource = Box<dyn std::error::Error + Send + Sync>;

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
        /// The same, where a caller can do something about it.
        problem: ValueProblem,
        /// The error below, if any.
        #[source]
        source: Option<ErrorSource>,
    },
    /// What should be created exists already.
    #[error("{what} `{name}` already exists")]
    AlreadyExists {
        /// What kind of thing.
        what: Subject,
        /// Its name.
        name: String,
    },
    /// What was requested does not exist.
    #[error("{what} `{name}` does not exist")]
    NotFound {
        /// What kind of thing.
        what: Subject,
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
        /// What kind of thing.
        what: Subject,
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
    /// What was requested exists only while the VM runs or is suspended.
    #[error("{what} is known only while the VM runs, and it is {state}{}", CauseOf(state))]
    NotLive {
        /// What was requested.
        what: LiveResource,
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
        /// The tag that was requested.
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
        "cannot start the VM `{vm}` in {}: the same VM, with the same identity and MAC address, runs \
         already{}{}; stop that one first, or create a new VM here (expected one of the copies to run at a \
         time)",
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
    #[error("{}: {}", path.display(), how.problem(path, vm.as_str()))]
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
    #[error("{image}: it is the backing file of the {}", BackingUsers(vms))]
    ImageInUse {
        /// The image, by all its names.
        image: String,
        /// The VMs, in the order of their names.
        vms: Vec<VmName>,
    },
    /// A saved guest can't be continued: its memory, its disks or its host are not what they were.
    /// Discarded, its VM boots.
    #[error("cannot continue the saved guest (expected its memory, disks and host as they were)")]
    NotContinued {
        /// What is different.
        source: Box<Error>,
    },
    /// A file of a VM's directory is not what `prepare` created there.
    #[error("{}: this part of the VM {problem}: restore it from a backup, or remove the VM", path.display())]
    VmPart {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: PartProblem,
    },
    /// A deadline passed.
    #[error("waited {:.1} s for {awaited}{}", after.as_secs_f64(), LastLines("the console's last lines", console.as_ref().map_or("", ConsoleTail::as_str)))]
    TimedOut {
        /// What was awaited.
        awaited: String,
        /// How long it was awaited.
        after: Duration,
        /// The console's last lines, where there is a console.
        console: Option<ConsoleTail>,
    },
    /// A VM ended while something else was awaited of it.
    #[error(
        "waited for {awaited}, and it is {state}{}{}",
        CauseOf(state),
        LastLines("the console's last lines", console.as_ref().map_or("", ConsoleTail::as_str))
    )]
    Ended {
        /// What was awaited.
        awaited: String,
        /// The state the VM is in now.
        state: VmState,
        /// The console's last lines, where there is a console.
        console: Option<ConsoleTail>,
    },
    /// A record or another file of vmkit's own can't be used.
    #[error("{}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// The error below, if any.
        #[source]
        source: Option<ErrorSource>,
    },
    /// The host lacks something that the operation needs.
    #[error("{needed}: {problem}")]
    Host {
        /// What is needed, such as `qemu-system-x86_64` or `/dev/kvm`.
        needed: String,
        /// What was found instead, and what would be right.
        problem: String,
        /// The error below, if any.
        #[source]
        source: Option<ErrorSource>,
    },
    /// QEMU ended when it should not have.
    #[error("QEMU ended: {status} (its log: {}){}", log.display(), LastLines("it said", stderr))]
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
        /// The peer.
        peer: Peer,
        /// The command.
        command: String,
        /// The error class of the reply.
        class: String,
        /// The description in the reply.
        description: String,
    },
    /// A guest's SSH server does not let the user in.
    #[error("the SSH server refused `log in as {target}`: {description} (publickey)")]
    LoginRefused {
        /// Where to and as whom, such as `vmkit@web (127.0.0.1:2222)`.
        target: String,
        /// The user.
        user: String,
        /// What the server did not take, and what it would take.
        description: String,
    },
    /// A peer broke the protocol or went away.
    #[error("{peer}: {problem}")]
    Protocol {
        /// The peer.
        peer: Peer,
        /// What it did.
        problem: String,
        /// The error below, if any.
        #[source]
        source: Option<ErrorSource>,
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
        source: Option<ErrorSource>,
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
        source: Option<ErrorSource>,
    },
    /// A directory was to be copied as a file is.
    #[error("cannot copy {from} to {to}: this is a directory, which is copied only recursively")]
    NotRecursive {
        /// The directory, such as `web:/etc`.
        from: String,
        /// Where to.
        to: String,
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
    Vmfile(#[from] Box<VmfileError>),
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
        source: Option<ErrorSource>,
    },
    /// What was fetched differs from what its publisher says, or could not be verified; it was not
    /// kept.
    #[error("{what} can't be trusted:  {problem}")]
    Untrusted {
        /// What was fetched.
        what: String,
        /// What is wrong: both checksums, or what the signature lacks.
        problem: String,
        /// The error below, if any.
        #[source]
        source: Option<ErrorSource>,
    },
    /// A VM has the name that a machine's VM would have, and is not the machine's.
    #[error("the VM `{vm}` exists already, and {owner}")]
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
    /// cloud-init failed in a guest.
    #[error("cloud-init in the VM `{vm}` failed{}: {problem}", if *is_locked { LOCKED_OUT } else { "" })]
    CloudInit {
        /// The VM.
        vm: VmName,
        /// Whether no SSH server lets vmkit into the guest for that.
        is_locked: bool,
        /// What cloud-init or the guest's console says.
        problem: String,
    },
    /// A program can't be run in a guest.
    #[error("cannot run `{program}` in the guest: {problem}")]
    GuestProgram {
        /// The program.
        program: String,
        /// Why.
        problem: String,
    },
    /// The user that vmkit logs in as can't become the one that a step runs as.
    #[error("in the guest of the machine `{machine}` {problem}")]
    GuestUser {
        /// The machine, by its name in the file.
        machine: String,
        /// Why.
        problem: String,
    },
    /// A backend failed in a way of its own.
    #[error("{message}")]
    Backend {
        /// The message.
        message: String,
        /// Which kind this is to a caller.
        kind: ErrorKind,
        /// Its own error.
        #[source]
        source: Option<ErrorSource>,
    },
}

/// The last lines that a guest printed on its console; never none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleTail(Box<str>);

impl ConsoleTail {
    /// Wraps the last lines of a console; `None` where nothing was printed.
    #[must_use]
    pub fn new(lines: &str) -> Option<Self> {
        let lines = lines.trim_end();
        (!lines.is_empty()).then(|| Self(lines.into()))
    }

    /// Returns the lines.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An error and all below it, displayed as `message: cause: cause`.
#[derive(Debug, Clone, Copy)]
pub struct ErrorChain<'a>(&'a (dyn std::error::Error + 'static));

impl<'a> ErrorChain<'a> {
    /// Wraps an error of any type.
    #[must_use]
    pub fn of(error: &'a (dyn std::error::Error + 'static)) -> Self {
        Self(error)
    }
}

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let below = std::iter::successors(self.0.source(), |error| error.source());
        below.into_iter().try_for_each(|error| write!(f, ": {error}"))
    }
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
            LoginPart::Port => "forward to its SSH server",
        })
    }
}

impl Error {
    /// Creates the error for a value that can't be accepted.
    pub fn invalid(
        field: impl Into<Cow<'static, str>>,
        value: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Error::Invalid {
            field: field.into(),
            value: value.to_string(),
            expected: expected.into(),
            problem: ValueProblem::Other,
            source: None,
        }
    }

    /// Sets what is wrong with a value that can't be accepted; any other error stays as it is.
    #[must_use]
    pub fn with_problem(self, problem: ValueProblem) -> Self {
        match self {
            Error::Invalid { field, value, expected, source, .. } => {
                Error::Invalid { field, value, expected, problem, source }
            }
            other => other,
        }
    }

    /// Sets the field whose value can't be accepted; any other error stays as it is.
    #[must_use]
    pub fn in_field(self, field: impl Into<Cow<'static, str>>) -> Self {
        match self {
            Error::Invalid { value, expected, problem, source, .. } => {
                Error::Invalid { field: field.into(), value, expected, problem, source }
            }
            other => other,
        }
    }

    /// Creates the error for what does not exist.
    pub fn not_found(what: Subject, name: impl fmt::Display) -> Self {
        Error::NotFound { what, name: name.to_string() }
    }

    /// Creates the error for what should be created and exists.
    pub fn already_exists(what: Subject, name: impl fmt::Display) -> Self {
        Error::AlreadyExists { what, name: name.to_string() }
    }

    /// Creates the error for a file of vmkit's own that can't be used.
    pub fn record(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Record { path: path.into(), problem: problem.into(), source: None }
    }

    /// Creates the error for what the host lacks.
    pub fn host(needed: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Host { needed: needed.into(), problem: problem.into(), source: None }
    }

    /// Creates the error for what was fetched and can't be trusted.
    pub fn untrusted(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Untrusted { what: what.into(), problem: problem.into(), source: None }
    }

    /// Creates the error for a deadline that passed, with no console to show.
    pub fn timed_out(awaited: impl Into<String>, after: Duration) -> Self {
        Error::TimedOut { awaited: awaited.into(), after, console: None }
    }

    /// Creates the error for a peer that broke the protocol.
    pub fn protocol(peer: Peer, problem: impl Into<String>) -> Self {
        Error::Protocol { peer, problem: problem.into(), source: None }
    }

    /// Sets the error below this one, which a reader sees after it; one that has no room for any
    /// stays as it is.
    #[must_use]
    pub fn with_source(mut self, below: impl Into<ErrorSource>) -> Self {
        match &mut self {
            Error::Invalid { source, .. }
            | Error::Record { source, .. }
            | Error::Host { source, .. }
            | Error::Untrusted { source, .. }
            | Error::Protocol { source, .. }
            | Error::Ssh { source, .. }
            | Error::Copy { source, .. }
            | Error::Fetch { source, .. }
            | Error::Backend { source, .. } => *source = Some(below.into()),
            _ => {}
        }
        self
    }

    /// Returns the text with those of all errors below it, in one line: for lists and JSON.
    pub fn chain(&self) -> ErrorChain<'_> {
        ErrorChain(self)
    }

    /// Returns a function for `map_err` that wraps an I/O error with what was tried on which path.
    pub fn io(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { verb, path, source }
    }
}

#[cfg(feature = "vmfile")]
impl From<VmfileError> for Error {
    fn from(error: VmfileError) -> Self {
        Error::Vmfile(Box::new(error))
    }
}

/// What a failure of cloud-init may lead to.
const LOCKED_OUT: &str = ", and its SSH server does not accept vmkit's login";

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `Result` of the library is at least as large.
    #[test]
    fn an_error_is_small() {
        assert!(size_of::<Error>() <= 96, "{}", size_of::<Error>());
    }

    #[test]
    fn a_chain_has_each_text_once() {
        let below = io::Error::new(io::ErrorKind::InvalidData, "not JSON");
        let error = Error::record("/home/vm.json", "this is not a record of a VM").with_source(below);
        assert_eq!(error.to_string(), "/home/vm.json: this is not a record of a VM");
        assert_eq!(error.chain().to_string(), "/home/vm.json: this is not a record of a VM: not JSON");
    }

    #[test]
    fn a_console_that_is_empty_has_no_last_lines() {
        assert_eq!(ConsoleTail::new(" \n"), None);
        assert_eq!(ConsoleTail::new("login: \n").as_ref().map(ConsoleTail::as_str), Some("login:"));
        let error = Error::TimedOut {
            awaited: "x".to_owned(),
            after: Duration::from_secs(1),
            console: ConsoleTail::new("a\nb\n"),
        };
        assert_eq!(error.to_string(), "waited 1.0 s for x; the console's last lines:\n    a\n    b");
    }
}
