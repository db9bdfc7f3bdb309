//! What is done in a guest, one after the other: a machine's copies and then its steps, as
//! [`GuestTask`]s.
//!
//! It knows how a task is told to a guest's shell, and what a task consists of, to see whether it
//! changed. Reading the host's files is its only effect.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::archive::{self, entries, is_special, open_regular, unless_gone};
use super::provisioned::{ProvisionRecord, StepReason};
use super::script::{self, TaskToken};
use super::script_text::ScriptText;
use crate::error::Error;
use crate::vmfile::{CopySpec, MachineConfig, ProvisionStep, RunPolicy, StepAction};

/// How long a copy of `files` may take; a step has its own limit.
const COPY_LIMIT: Duration = Duration::from_secs(600);
/// How long a script of the host may be: it is held in memory, and sent in one piece.
const MOST_SCRIPT_BYTES: u64 = 64 << 20;

/// One thing to do in a guest.
#[derive(Debug, Clone)]
pub(super) struct GuestTask {
    /// What it is kept under: it stays the same while the file calls it the same.
    pub(super) key: String,
    /// What a person knows it by.
    pub(super) name: String,
    /// Where the file describes it, such as `provision[0]`.
    pub(super) place: String,
    pub(super) run: RunPolicy,
    pub(super) limit: Duration,
    pub(super) what: TaskKind,
}

/// What a task does.
#[derive(Debug, Clone)]
pub(super) enum TaskKind {
    Copy(CopySpec),
    Run { step: ProvisionStep, from: Option<PathBuf> },
}

/// A task that is to be done now.
#[derive(Debug, Clone)]
pub(super) struct ToDo {
    pub(super) task: GuestTask,
    pub(super) why: StepReason,
    /// What the task consists of now, where that had to be looked at to know whether it is due.
    pub(super) digest: Option<String>,
    /// What a copy leaves out: neither file nor folder nor link.
    pub(super) left_out: Vec<PathBuf>,
}

/// A file or a folder of the host that a task needs can't be read.
#[derive(Debug)]
pub(super) struct UnreadableSource {
    /// Where the file names it, such as `provision[0].script`.
    pub(super) place: String,
    pub(super) path: PathBuf,
    pub(super) error: io::Error,
}

impl UnreadableSource {
    /// Returns it as an error on the key that names the path.
    pub(super) fn into_error(self) -> Error {
        let UnreadableSource { place, path, error } = self;
        let refused = |why: &str| Error::invalid(place, path.display(), why);
        match error.kind() {
            io::ErrorKind::NotFound => refused("it can't be read: there is no such file or directory"),
            io::ErrorKind::InvalidData => refused(&error.to_string()),
            _ => refused("it can't be read").with_source(error),
        }
    }
}

/// Returns what is to be done in a machine's guest, in order.
pub(super) fn tasks(machine: &MachineConfig) -> Vec<GuestTask> {
    let copies = machine.files.iter().enumerate().map(|(index, copy)| GuestTask {
        key: format!("copy {} {}", copy.from.display(), copy.to),
        name: format!("copy to {}", copy.to),
        place: format!("files[{index}]"),
        run: RunPolicy::Changed,
        limit: COPY_LIMIT,
        what: TaskKind::Copy(copy.clone()),
    });
    let steps = machine.steps.iter().enumerate().map(|(index, step)| GuestTask {
        key: format!("step {}", step.name),
        name: step.name.clone(),
        place: format!("provision[{index}]"),
        run: step.run,
        limit: step.timeout,
        what: match &step.action {
            StepAction::Copy(copy) => TaskKind::Copy(copy.clone()),
            StepAction::Script(path) => TaskKind::Run { step: step.clone(), from: Some(path.clone()) },
            StepAction::Shell(_) => TaskKind::Run { step: step.clone(), from: None },
        },
    });
    copies.chain(steps).collect()
}

/// Returns which of the tasks are to be done, and why; `forced` does all of them.
///
/// What a task consists of is looked at only where that decides.
///
/// # Errors
/// For a file of the host that has to be looked at, or is to be copied or run, and can't be read.
pub(super) fn to_do(
    tasks: Vec<GuestTask>,
    provisioned: &ProvisionRecord,
    forced: bool,
    digests: &DigestCache,
) -> std::result::Result<Vec<ToDo>, UnreadableSource> {
    let mut found = Vec::new();
    for task in tasks {
        let mut looked = None;
        let mut look = || {
            let digest = task.digest(digests)?;
            looked = Some(digest.clone());
            Ok(digest)
        };
        let why = match forced {
            true => Some(StepReason::Forced),
            false => provisioned.why(&task.key, task.run, &mut look)?,
        };
        let Some(why) = why else { continue };
        let left_out = task.check()?;
        found.push(ToDo { task, why, digest: looked, left_out });
    }
    Ok(found)
}

/// What lies below paths of the host, each hashed once in one operation, however many machines get
/// it.
#[derive(Debug, Clone, Default)]
pub(super) struct DigestCache(Arc<Mutex<BTreeMap<PathBuf, KnownDigest>>>);

/// The digest of one path, once computed.
type KnownDigest = Arc<Mutex<Option<[u8; 32]>>>;

impl DigestCache {
    /// Returns the digest of a file, or of a folder with all that is in it.
    fn of(&self, path: &Path) -> std::result::Result<[u8; 32], (PathBuf, io::Error)> {
        let place = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(path.to_owned()).or_default())
        };
        // Others that want the same path wait here; those that want another one do not.
        let mut known = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = *known {
            return Ok(digest);
        }
        let mut parts = PartHasher(Sha256::new());
        parts.add_path(path)?;
        Ok(*known.insert(parts.0.finalize().into()))
    }
}

impl GuestTask {
    /// Returns what has to be said to the guest to have it done, and as whom.
    ///
    /// # Errors
    /// For a script of the host that can't be read.
    pub(super) fn script(
        &self,
        token: &TaskToken,
    ) -> std::result::Result<script::GuestScript, UnreadableSource> {
        match &self.what {
            TaskKind::Copy(copy) => Ok(script::of_copy(copy, token)),
            TaskKind::Run { step, from: Some(path) } => {
                Ok(script::of_step(step, &self.text(path)?, &path.display().to_string(), token))
            }
            TaskKind::Run { step, from: None } => {
                let StepAction::Shell(text) = &step.action else {
                    unreachable!("a step without a file is a text")
                };
                Ok(script::of_step(
                    step,
                    &ScriptText::of_step(text),
                    &format!("the step `{}`", step.name),
                    token,
                ))
            }
        }
    }

    /// Checks beforehand that the files of the host are there and can be read, and returns what a
    /// copy leaves out.
    fn check(&self) -> std::result::Result<Vec<PathBuf>, UnreadableSource> {
        match &self.what {
            TaskKind::Copy(copy) => {
                archive::check(&copy.from).map_err(|(path, error)| self.unreadable("from", &path, error))
            }
            TaskKind::Run { from: Some(path), .. } => self.text(path).map(|_| Vec::new()),
            TaskKind::Run { from: None, .. } => Ok(Vec::new()),
        }
    }

    /// Reads a script of the host.
    fn text(&self, path: &Path) -> std::result::Result<ScriptText, UnreadableSource> {
        let read = || {
            let mut bytes = Vec::new();
            open_script(path)?.take(MOST_SCRIPT_BYTES).read_to_end(&mut bytes)?;
            let text = ScriptText::parse(&bytes);
            text.map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
        };
        read().map_err(|error| self.unreadable("script", path, error))
    }

    /// Returns what a failure of this task is of: its script, with what runs that.
    pub(super) fn script_named(&self) -> Option<String> {
        let TaskKind::Run { from: Some(path), .. } = &self.what else { return None };
        let text = self.text(path).ok()?;
        Some(format!("the script {}, run by {}", path.display(), text.runner()))
    }

    /// Returns a SHA-256 over everything that makes this task what it is.
    ///
    /// # Errors
    /// For a file of the host that can't be read.
    pub(super) fn digest(&self, digests: &DigestCache) -> std::result::Result<String, UnreadableSource> {
        let mut parts = PartHasher(Sha256::new());
        match &self.what {
            TaskKind::Copy(copy) => {
                parts.add(b"copy");
                parts.add(copy.to.as_bytes());
                parts.add(format!("{:?} {:?}", copy.mode, copy.owner).as_bytes());
                let below = digests.of(&copy.from);
                parts.add(&below.map_err(|(path, error)| self.unreadable("from", &path, error))?);
            }
            TaskKind::Run { step, from } => {
                parts.add(b"run");
                parts.add(step.user.as_bytes());
                parts.add(step.dir.as_deref().unwrap_or_default().as_bytes());
                for (name, value) in &step.env {
                    parts.add(name.as_bytes());
                    parts.add(value.as_bytes());
                }
                match (&step.action, from) {
                    (StepAction::Shell(text), _) => parts.add(text.as_bytes()),
                    (_, Some(path)) => {
                        let added = open_script(path).and_then(|file| parts.add_content(file));
                        added.map_err(|error| self.unreadable("script", path, error))?
                    }
                    (_, None) => {}
                }
            }
        }
        Ok(parts.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    pub(super) fn unreadable(&self, key: &str, path: &Path, error: io::Error) -> UnreadableSource {
        let inside = match &self.what {
            TaskKind::Copy(_) if self.place.starts_with("provision") => "copy.",
            _ => "",
        };
        let place = format!("{}.{inside}{key}", self.place);
        UnreadableSource { place, path: path.to_owned(), error }
    }
}

/// Opens a script of the host.
fn open_script(path: &Path) -> io::Result<File> {
    let file = open_regular(path)?;
    match file.metadata()?.len() {
        bytes if bytes > MOST_SCRIPT_BYTES => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the script has {bytes} bytes (expected at most {MOST_SCRIPT_BYTES}): copy it by `files`, \
                 and run it in a step"
            ),
        )),
        _ => Ok(file),
    }
}

/// A hash over parts, each with its length before it, so that nothing of one can be taken for the
/// next.
struct PartHasher(Sha256);

impl PartHasher {
    fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn add_content(&mut self, mut file: File) -> io::Result<()> {
        let mut content = Sha256::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => content.update(&buffer[..read]),
            }
        }
        self.add(&content.finalize());
        Ok(())
    }

    /// Adds a file, or a folder with all that is in it, in the order of the names.
    fn add_path(&mut self, path: &Path) -> std::result::Result<(), (PathBuf, io::Error)> {
        let failed = |error| (path.to_owned(), error);
        // What a link at the top leads to is what gets copied.
        let kind = fs::metadata(path).map_err(failed)?;
        self.add_entry(path, kind)
    }

    fn add_entry(
        &mut self,
        path: &Path,
        kind: fs::Metadata,
    ) -> std::result::Result<(), (PathBuf, io::Error)> {
        let failed = |error| (path.to_owned(), error);
        self.add(&kind.permissions().mode().to_le_bytes());
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(failed)?;
            self.add(target.as_os_str().as_bytes());
        } else if kind.is_file() {
            open_regular(path).and_then(|file| self.add_content(file)).map_err(failed)?;
        } else if kind.is_dir() {
            let mut entries = entries(path)?;
            // What is left out of the copy changes nothing about it.
            entries.retain(|(_, kind)| !is_special(kind));
            self.add(&(entries.len() as u64).to_le_bytes());
            for (path, kind) in entries {
                self.add(path.file_name().unwrap_or_default().as_bytes());
                unless_gone(&path, self.add_entry(&path, kind))?;
            }
        }
        Ok(())
    }
}
