//! Running the host's programs: `zfs`, `dladm`, `bhyvectl`, `arp`.
//!
//! The command lines come from [`plan`](super::plan). The environment is cleared, so that the
//! programs speak English and nothing of the caller's environment reaches them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Access, access};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::hold::OperationLock;
use crate::backend::supervise::process::kill_by;
use crate::error::{Error, Result};
use crate::host::inherited::child_problem;
use crate::steps::step;

/// The default timeout of a program: destroying a large volume takes a while.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
/// How long a killed program may take to end: work that it has started in the kernel is completed
/// first.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Parts of a program's error messages: what it should create exists, or what it should remove
/// doesn't.
///
/// Source: zfs_main.c and dladm.c of illumos.
const THERE: [&str; 2] = ["already exists", "object already"];
const GONE: [&str; 4] = ["does not exist", "could not find any", "invalid link name", "object not found"];

/// Where programs are found, and how they get their privileges.
#[derive(Debug, Clone)]
pub(super) struct HostPrograms {
    pub(super) search_path: Vec<PathBuf>,
    /// Whether each is run by `pfexec`.
    pub(super) pfexec: bool,
    /// The timeout of each.
    pub(super) limit: Duration,
}

/// How a program ended.
#[derive(Debug)]
pub(super) enum ProgramEnd {
    /// Successfully, with this output.
    Well(String),
    /// With this failure.
    Failed(String),
    /// Not in time, and not when it was killed either: what it has done is unknown.
    Endless,
}

impl ProgramEnd {
    /// Returns whether the program failed because what it should create exists.
    pub(super) fn is_there(&self) -> bool {
        matches!(self, ProgramEnd::Failed(why) if THERE.iter().any(|text| why.contains(text)))
    }

    /// Returns whether the program failed because its object doesn't exist.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, ProgramEnd::Failed(why) if GONE.iter().any(|text| why.contains(text)))
    }

    /// Returns the output of a program that succeeded; `words` is its command line.
    ///
    /// # Errors
    /// `Host` with why it failed, `TimedOut` if it does not end.
    pub(super) fn well(self, words: &[String]) -> Result<String> {
        match self {
            ProgramEnd::Well(said) => Ok(said),
            ProgramEnd::Failed(why) => Err(Error::host(format!("`{}`", words.join(" ")), why)),
            ProgramEnd::Endless => {
                Err(Error::timed_out(format!("`{}` to end after it was killed", words.join(" ")), KILL_LIMIT))
            }
        }
    }
}

impl HostPrograms {
    /// Finds a program.
    ///
    /// # Errors
    /// `Host` if it is in no directory of the search path.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        let paths = self.search_path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
        let found = paths.into_iter().find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok());
        found.ok_or_else(|| {
            let dirs: Vec<_> = self.search_path.iter().map(|dir| dir.display().to_string()).collect();
            let problem = format!("not found in {}: it comes with illumos", dirs.join(":"));
            Error::host(name, problem)
        })
    }

    /// Returns the whole command line of a program, with `pfexec` if that is configured.
    ///
    /// # Errors
    /// `Host` if the program is in no directory of the search path.
    pub(super) fn line(&self, words: &[String]) -> Result<Vec<String>> {
        let (program, arguments) = words.split_first().expect("a command has a program");
        let mut line = Vec::new();
        if self.pfexec {
            line.push(text(&self.find("pfexec")?));
        }
        line.push(if program.starts_with('/') { program.clone() } else { text(&self.find(program)?) });
        line.extend_from_slice(arguments);
        Ok(line)
    }

    /// Runs a program that changes something, with the operation's lock as its standard input.
    ///
    /// # Cancel safety
    /// A program that was started goes on, and holds the lock until it has ended.
    ///
    /// # Errors
    /// `Host` if it can't be run; `TimedOut` if it took too long, and has ended since it was
    /// killed.
    pub(super) async fn change(&self, words: &[String], hold: &OperationLock) -> Result<ProgramEnd> {
        let line = self.line(words)?;
        step("host: run a program").map_err(Error::io("run", &line[0]))?;
        let input = hold.as_input().map_err(Error::io("run", &line[0]))?;
        self.run(words, &line, Stdio::from(input), false).await
    }

    /// Runs a program that only reports something.
    ///
    /// # Errors
    /// As for [`change`](Self::change).
    pub(super) async fn ask(&self, words: &[&str]) -> Result<ProgramEnd> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let line = self.line(&words)?;
        self.run(&words, &line, Stdio::null(), true).await
    }

    async fn run(&self, words: &[String], line: &[String], input: Stdio, kill: bool) -> Result<ProgramEnd> {
        let failed = |error| {
            Error::host(line[0].clone(), format!("cannot run the program: {}", child_problem(&error)))
        };
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).env_clear().env("LC_ALL", "C").stdin(input).kill_on_drop(kill);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
        let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
        let ending = async {
            let (said, complained, ended) =
                tokio::join!(all_of(stdout.as_mut()), all_of(stderr.as_mut()), child.wait());
            Ok((said?, complained?, ended?))
        };
        let (said, complained, status) = match timeout(self.limit, ending).await {
            Ok(ended) => ended.map_err(failed)?,
            Err(_) if self.killed(&mut child).await => {
                let awaited = format!("`{}` to end; it was killed", words.join(" "));
                return Err(Error::timed_out(awaited, self.limit));
            }
            Err(_) => return Ok(ProgramEnd::Endless),
        };
        if status.success() {
            return Ok(ProgramEnd::Well(String::from_utf8_lossy(&said).into_owned()));
        }
        let complained = String::from_utf8_lossy(&complained);
        let complained: String = complained.trim().chars().take(2000).collect();
        Ok(ProgramEnd::Failed(if complained.is_empty() { status.to_string() } else { complained }))
    }

    /// Kills a program; returns whether it has ended.
    async fn killed(&self, child: &mut Child) -> bool {
        let killed = child.start_kill().map_err(Error::io("kill", "/proc"));
        let killed = match (killed, child.id(), self.killer()) {
            // `pfexec` gave it more privileges than this user has. Its PID can't be reused before
            // it is waited for.
            (Err(_), Some(pid), Some(killer)) => kill_by(&killer, pid).await,
            (killed, ..) => killed,
        };
        if let Err(error) = killed {
            tracing::warn!(%error, "a program that took too long can't be killed");
        }
        matches!(timeout(KILL_LIMIT, child.wait()).await, Ok(Ok(_)))
    }

    /// Returns the command that kills a process with more privileges than this user's, if there is
    /// one.
    pub(super) fn killer(&self) -> Option<Vec<String>> {
        let words = ["kill", "-9"].map(str::to_owned);
        self.pfexec.then(|| self.line(&words).ok()).flatten()
    }
}

async fn all_of(pipe: Option<&mut (impl AsyncRead + Unpin)>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
