//! Starting a keeper with its hypervisor: the library's side of what `keeper` says.

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

/// Finds the program that becomes a keeper: the one that was named, this program itself, or
/// `vmkit-keeper` beside it.
///
/// # Errors
/// `Host` where there is none, with what to do; `InvalidInput` on `keeper` for a path that is
/// relative.
pub(crate) fn keeper_program(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = named {
        // It is started in `/`.
        return match path.is_absolute() {
            true => Ok(path.to_owned()),
            false => Err(Error::invalid("keeper", path.display(), "the path must be absolute")),
        };
    }
    // The link, not the path: it names this very program even after an upgrade has replaced the
    // file.
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

/// What a keeper says on: a copy of its hypervisor's output, where that was asked for.
pub(crate) type KeeperStream = BufReader<tokio::net::UnixStream>;

/// A keeper that was told what to do and has not answered yet.
#[derive(Debug)]
pub(crate) struct StartedKeeper {
    answers: UnixStream,
    program: PathBuf,
    hypervisor: PathBuf,
}

/// Starts a keeper and tells it what to start.
///
/// From here on the hypervisor runs, whoever waits for it or not; there is no point at which a
/// dropped future leaves a keeper that was half told. One that was told nothing, since this process
/// was killed just then, ends by itself.
///
/// # Errors
/// `Protocol` where the keeper can't be started; `InvalidInput` on a directory for sockets whose
/// path is too long to be recorded.
pub(crate) fn launch(
    program: &Path,
    launch: &KeeperRequest,
    descriptors: &[OwnedFd],
) -> Result<StartedKeeper> {
    if launch.run_dir.as_os_str().len() > MOST_RUN_DIR_BYTES {
        let why = format!("the path must have {MOST_RUN_DIR_BYTES} bytes at the most");
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
    // The runtime reaps the keeper; after this process has ended, init does.
    drop(child);
    crate::steps::step("keeper: launch").map_err(&failed)?;
    send(&ours, launch, descriptors).map_err(&failed)?;
    Ok(StartedKeeper { answers: ours, program: program.to_owned(), hypervisor: launch.program.clone() })
}

impl StartedKeeper {
    /// Waits until the hypervisor's process is there, and returns its id, with what the keeper says
    /// from then on.
    ///
    /// # Errors
    /// `Host` where the hypervisor can't be started, `TimedOut` at the deadline, `Protocol` from a
    /// program that is no keeper.
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
                    "{} ended without a word: it is no vmkit-keeper, or it was killed",
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

/// The keeper's name in the process list: whose keeper it is.
fn name_of(launch: &KeeperRequest) -> std::ffi::OsString {
    let vm = launch.run_file.parent().and_then(Path::file_name).unwrap_or(OsStr::new("?"));
    let mut name = std::ffi::OsString::from(format!("{ARG0}: "));
    name.push(vm);
    name
}

/// Sends one line, the descriptors along with its first bytes.
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
