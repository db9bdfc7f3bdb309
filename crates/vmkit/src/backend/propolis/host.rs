//! Running the host's programs: `zfs`, `dladm`, `bhyvectl`, `arp`.
//!
//! What is run is data that [`plan`](super::plan) made. The environment is cleared: the programs
//! speak English, and nothing of the caller's reaches them.

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

/// How long a program may take, unless set otherwise: to destroy a large volume takes a while.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
/// How long one that is killed may take to end: what it has begun in the kernel goes on till it is
/// done.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What a program says of what it should make and is there, or should take away and is not.
///
/// Source: zfs_main.c and dladm.c of illumos.
const THERE: [&str; 2] = ["already exists", "object already"];
const GONE: [&str; 4] = ["does not exist", "could not find any", "invalid link name", "object not found"];

/// Where programs are found, and how they get their privileges.
#[derive(Debug, Clone)]
pub(super) struct HostPrograms {
    pub(super) search_path: Vec<PathBuf>,
    /// Whether `pfexec` stands before each.
    pub(super) pfexec: bool,
    /// How long each may take.
    pub(super) limit: Duration,
}

/// How a program ended.
#[derive(Debug)]
pub(super) enum ProgramEnd {
    /// Well, and this it said.
    Well(String),
    /// It failed, and this was the reason.
    Failed(String),
    /// It did not end in time, and not when it was killed either: what it does, and will have done,
    /// nobody knows.
    Endless,
}

impl ProgramEnd {
    /// Returns whether it failed since what it should make is there.
    pub(super) fn is_there(&self) -> bool {
        matches!(self, ProgramEnd::Failed(why) if THERE.iter().any(|text| why.contains(text)))
    }

    /// Returns whether it failed since what it is about is not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, ProgramEnd::Failed(why) if GONE.iter().any(|text| why.contains(text)))
    }

    /// Returns what it said; `words` is what was run.
    ///
    /// # Errors
    /// `Host` with why it failed, `TimedOut` where it does not end.
    pub(super) fn well(self, words: &[String]) -> Result<String> {
        match self {
            ProgramEnd::Well(said) => Ok(said),
            ProgramEnd::Failed(why) => Err(Error::host(format!("`{}`", words.join(" ")), why)),
            ProgramEnd::Endless => {
                Err(Error::timed_out(format!("`{}` to end, even by a kill", words.join(" ")), KILL_LIMIT))
            }
        }
    }
}

impl HostPrograms {
    /// Finds a program.
    ///
    /// # Errors
    /// `Host` where no directory has it.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        let paths = self.search_path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
        let found = paths.into_iter().find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok());
        found.ok_or_else(|| {
            let dirs: Vec<_> = self.search_path.iter().map(|dir| dir.display().to_string()).collect();
            let problem = format!("not found in {}: it comes with illumos", dirs.join(":"));
            Error::host(name, problem)
        })
    }

    /// Returns what to execute for a program and its arguments, `pfexec` before it where that is
    /// wanted.
    ///
    /// # Errors
    /// `Host` where no directory has it.
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
    /// A program that was begun goes on; until it has ended the lock is held.
    ///
    /// # Errors
    /// `Host` where it can't be run; `TimedOut` where it took too long, and has ended since it was
    /// killed.
    pub(super) async fn change(&self, words: &[String], hold: &OperationLock) -> Result<ProgramEnd> {
        let line = self.line(words)?;
        step("host: run a program").map_err(Error::io("run", &line[0]))?;
        let input = hold.as_input().map_err(Error::io("run", &line[0]))?;
        self.run(words, &line, Stdio::from(input), false).await
    }

    /// Runs a program that only tells something.
    ///
    /// # Errors
    /// As for [`change`](Self::change).
    pub(super) async fn ask(&self, words: &[&str]) -> Result<ProgramEnd> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let line = self.line(&words)?;
        self.run(&words, &line, Stdio::null(), true).await
    }

    async fn run(&self, words: &[String], line: &[String], input: Stdio, kill: bool) -> Result<ProgramEnd> {
        let failed =
            |error| Error::host(line[0].clone(), format!("it can't be run: {}", child_problem(&error)));
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
                let awaited = format!("`{}` to end, which was killed then", words.join(" "));
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

    /// Kills a program, and returns whether it has ended.
    async fn killed(&self, child: &mut Child) -> bool {
        let killed = child.start_kill().map_err(Error::io("kill", "/proc"));
        let killed = match (killed, child.id(), self.killer()) {
            // One that pfexec gave more privileges than this user has; its number is its own until
            // it is waited for.
            (Err(_), Some(pid), Some(killer)) => kill_by(&killer, pid).await,
            (killed, ..) => killed,
        };
        if let Err(error) = killed {
            tracing::warn!(%error, "a program that took too long can't be killed");
        }
        matches!(timeout(KILL_LIMIT, child.wait()).await, Ok(Ok(_)))
    }

    /// Returns what kills a process that runs with more privileges than this user's, where there is
    /// such a thing.
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
