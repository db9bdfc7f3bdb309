//! Running the host's programs: `zfs`, `dladm`, `bhyvectl`, `arp`.
//!
//! What is run is data that [`plan`](super::plan) made. The environment is cleared: the programs speak English, and nothing of
//! the caller's reaches them.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Access, access};
use tokio::process::Command;
use tokio::time::timeout;

use super::hold::Hold;
use crate::error::{Error, Result};
use crate::steps::step;

/// How long a program may take: to destroy a large volume takes a while.
const LIMIT: Duration = Duration::from_secs(120);

/// What a program says of what it should make and is there, or should take away and is not.
///
/// Source: zfs_main.c and dladm.c of illumos.
const THERE: [&str; 2] = ["already exists", "object already"];
const GONE: [&str; 4] = ["does not exist", "could not find any", "invalid link name", "object not found"];

/// Where programs are found, and how they get their privileges.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) search_path: Vec<PathBuf>,
    /// Whether `pfexec` stands before each.
    pub(super) pfexec: bool,
}

/// How a program ended.
#[derive(Debug)]
pub(super) enum Done {
    /// Well, and this it said.
    Well(String),
    /// It failed, and this was the reason.
    Failed(String),
}

impl Done {
    /// Tells whether it failed since what it should make is there.
    pub(super) fn is_there(&self) -> bool {
        matches!(self, Done::Failed(why) if THERE.iter().any(|text| why.contains(text)))
    }

    /// Tells whether it failed since what it is about is not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Done::Failed(why) if GONE.iter().any(|text| why.contains(text)))
    }
}

impl Host {
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
            Error::Host { needed: name.to_owned(), problem }
        })
    }

    /// Answers what to execute for a program and its arguments, `pfexec` before it where that is wanted.
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
    /// `Host` where it can't be run, `TimedOut` where it does not end.
    pub(super) async fn change(&self, words: &[String], hold: &Hold) -> Result<Done> {
        let line = self.line(words)?;
        step("host: run a program").map_err(Error::io("run", &line[0]))?;
        let input = hold.as_input().map_err(Error::io("run", &line[0]))?;
        self.run(words, &line, Stdio::from(input), false).await
    }

    /// Runs a program that only tells something.
    ///
    /// # Errors
    /// As for [`change`](Self::change).
    pub(super) async fn ask(&self, words: &[&str]) -> Result<Done> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let line = self.line(&words)?;
        self.run(&words, &line, Stdio::null(), true).await
    }

    async fn run(&self, words: &[String], line: &[String], input: Stdio, kill: bool) -> Result<Done> {
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).env_clear().env("LC_ALL", "C").stdin(input).kill_on_drop(kill);
        let output = match timeout(LIMIT, command.output()).await {
            Ok(output) => output.map_err(|error| Error::Host {
                needed: line[0].clone(),
                problem: format!("it can't be run: {error}"),
            })?,
            Err(_) => {
                let awaited = format!("`{}` to end", words.join(" "));
                return Err(Error::TimedOut { awaited, after: LIMIT, console: String::new() });
            }
        };
        if output.status.success() {
            return Ok(Done::Well(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(2000).collect();
        Ok(Done::Failed(if said.is_empty() { output.status.to_string() } else { said }))
    }
}

/// Makes the error of a program that failed.
pub(super) fn failed(words: &[String], why: String) -> Error {
    Error::Host { needed: format!("`{}`", words.join(" ")), problem: why }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
