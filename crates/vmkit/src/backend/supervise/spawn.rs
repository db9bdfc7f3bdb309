//! Starting a keeper with its hypervisor: the library's side of the exchange in `keeper`.

use std::ffi::OsStr;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::Instant;

use super::keeper::{self, ARG0, KeeperReply, KeeperRequest, MAX_DESCRIPTORS};
use super::runfile::MOST_RUN_DIR_BYTES;
use crate::error::{Error, Peer, Result};

/// Returns the program that becomes a keeper: the configured one, this program, or `vmkit-keeper`
/// in the same directory.
///
/// # Errors
/// `Host` if there is none, with what to do; `InvalidInput` on `keeper` for a relative path.
pub(crate) fn keeper_program(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = named {
        // The keeper's current directory is `/`.
        return match path.is_absolute() {
            true => Ok(path.to_owned()),
            false => Err(Error::invalid("keeper", path.display(), "the path must be absolute")),
        };
    }
    // The link, not its target: it leads to this very program even after an upgrade has replaced
    // the file.
    if keeper::this_program_can_be_one() && cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let own = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    if keeper::this_program_can_be_one() {
        return Ok(own);
    }
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(ARG0));
    beside.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Error::host(
            ARG0,
            "call vmkit::run_if_keeper() first in main, or install vmkit-keeper beside this program",
        )
    })
}

/// What comes from a keeper after its reply: a copy of the hypervisor's output, if that was
/// requested.
pub(crate) type KeeperStream = BufReader<tokio::net::UnixStream>;

/// A keeper that has its request and has not replied yet.
#[derive(Debug)]
pub(crate) struct StartedKeeper {
    answers: UnixStream,
    program: PathBuf,
    hypervisor: PathBuf,
}

/// Starts a keeper and sends its request.
///
/// From here on the hypervisor starts, even if the caller is gone: a dropped future never leaves a
/// keeper with half of a request. A keeper without a request, since this process was killed, exits
/// by itself.
///
/// # Errors
/// `Protocol` if the keeper can't be started; `InvalidInput` if the path of the directory for
/// sockets is too long to be recorded.
pub(crate) fn launch(
    program: &Path,
    launch: &KeeperRequest,
    descriptors: &[OwnedFd],
) -> Result<StartedKeeper> {
    if launch.run_dir.as_os_str().len() > MOST_RUN_DIR_BYTES {
        let why = format!("the path may have at most {MOST_RUN_DIR_BYTES} bytes");
        return Err(Error::invalid("run_dir", launch.run_dir.display(), why));
    }
    let failed = failure(program);
    let (ours, theirs) = UnixStream::pair().map_err(&failed)?;
    crate::steps::step("keeper: spawn").map_err(&failed)?;
    let child = tokio::process::Command::new(program)
        .arg0(name_of(launch))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(&failed)?;
    // The runtime reaps the keeper; when this process has ended, init does.
    drop(child);
    crate::steps::step("keeper: launch").map_err(&failed)?;
    send(&ours, launch, descriptors).map_err(&failed)?;
    Ok(StartedKeeper { answers: ours, program: program.to_owned(), hypervisor: launch.program.clone() })
}

impl StartedKeeper {
    /// Waits until the hypervisor's process exists; returns its PID, and what the keeper sends
    /// after that.
    ///
    /// # Errors
    /// `Host` if the hypervisor can't be started, `TimedOut` at the deadline, `Protocol` if the
    /// program is not a keeper.
    pub(crate) async fn started(self, deadline: Instant) -> Result<(u32, KeeperStream)> {
        let failed = failure(&self.program);
        self.answers.set_nonblocking(true).map_err(&failed)?;
        let answers = tokio::net::UnixStream::from_std(self.answers).map_err(&failed)?;
        let mut words = BufReader::new(answers);
        let mut line = String::new();
        let began = Instant::now();
        match tokio::time::timeout_at(deadline, words.read_line(&mut line)).await {
            Ok(read) => read.map_err(&failed)?,
            Err(_) => {
                return Err(Error::timed_out(
                    format!("the keeper to start {}", self.hypervisor.display()),
                    began.elapsed(),
                ));
            }
        };
        match serde_json::from_str(&line) {
            Ok(KeeperReply::Started { pid }) => Ok((pid, words)),
            Ok(KeeperReply::Failed { what }) => Err(Error::host(self.hypervisor.display().to_string(), what)),
            Err(_) => Err(Error::protocol(
                Peer::Keeper,
                format!(
                    "{} ended without a reply: it was killed, or is not a vmkit-keeper",
                    self.program.display()
                ),
            )),
        }
    }
}

fn failure(program: &Path) -> impl Fn(io::Error) -> Error {
    let problem = format!("cannot start {}", program.display());
    move |source| Error::protocol(Peer::Keeper, problem.clone()).with_source(source)
}

/// Returns the keeper's name in the process list, with the name of its VM.
fn name_of(launch: &KeeperRequest) -> std::ffi::OsString {
    let vm = launch.run_file.parent().and_then(Path::file_name).unwrap_or(OsStr::new("?"));
    let mut name = std::ffi::OsString::from(format!("{ARG0}: "));
    name.push(vm);
    name
}

/// Sends one line, with the descriptors along with its first bytes.
fn send(stream: &UnixStream, launch: &KeeperRequest, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut line = serde_json::to_vec(launch)?;
    line.push(b'\n');
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other(format!("more than {MAX_DESCRIPTORS} descriptors for one process")));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    (&*stream).write_all(&line[sent..])
}
