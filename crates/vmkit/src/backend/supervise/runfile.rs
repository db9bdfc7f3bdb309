//! The record of the last run: its process, and how it ended. Only the keeper writes it.
//!
//! The file has its full size from the start and is overwritten in place, so that an end can be
//! recorded on a full disk. It is valid for one boot: the identity of a process includes the boot's
//! id.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
#[cfg(any(test, all(target_os = "linux", feature = "qemu")))]
use std::path::Component;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::process::ProcessId;
use crate::input_file::open_regular;
use crate::log_position::LogPosition;
use crate::store::denied;

/// The file's size: a page, more than its JSON needs, so that one write replaces all of it.
const SIZE_BYTES: usize = 4096;
/// The maximum length of the path of a directory for sockets, in bytes: as JSON each may take six.
pub(crate) const MOST_RUN_DIR_BYTES: usize = 512;

/// The version of the record that this program writes and reads. A record without a version has
/// version 1.
const VERSION: u64 = 1;

/// What a record of any version has.
#[derive(Deserialize)]
struct RunHead {
    #[serde(default = "first_version")]
    version: u64,
}

fn first_version() -> u64 {
    1
}

/// The record as it is written.
#[derive(Serialize)]
struct VersionedRun<'a> {
    version: u64,
    #[serde(flatten)]
    run: &'a ProcessRun,
}

/// The record of a run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ProcessRun {
    /// The hypervisor's process.
    #[serde(alias = "qemu")]
    pub(crate) hypervisor: Option<ProcessId>,
    /// The keeper's process.
    pub(crate) keeper: Option<ProcessId>,
    /// How the hypervisor ended, if it has.
    pub(crate) ended: Option<ProcessEnd>,
    /// The directory of this run's sockets, which may differ from the previous run's. A relative
    /// path starts at the directory of the record, and so stays valid if that is moved.
    #[serde(default)]
    pub(crate) run_dir: Option<String>,
    /// The start of this run in the log of its console, if it has one.
    #[serde(default)]
    pub(crate) console: Option<LogPosition>,
    /// What runs the guest's code, if the hypervisor has a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) accel: Option<String>,
    /// The version of the guest's devices, if the hypervisor has several. A QEMU that an earlier
    /// vmkit started has the first, and no version here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) devices: Option<u32>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessEnd {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
}

impl std::fmt::Display for ProcessEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "killed by signal {signal}{}", signal_name(signal)),
            (None, None) => f.write_str("unknown exit status"),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        24 => " (SIGXCPU: RLIMIT_CPU, the limit of its CPU time, was reached)",
        25 => " (SIGXFSZ: RLIMIT_FSIZE, the limit of a file's size, was reached)",
        31 => " (SIGSYS: the sandbox forbade a system call)",
        _ => "",
    }
}

/// The keeper's open file, for the whole run.
#[derive(Debug)]
pub(crate) struct RunFile {
    file: File,
    run: ProcessRun,
}

impl RunFile {
    /// Creates a new file with its full size, at once under its name, with only the keeper in it.
    pub(crate) fn create(
        path: &Path,
        run_dir: &Path,
        console: Option<LogPosition>,
        accel: Option<String>,
        devices: Option<u32>,
    ) -> io::Result<Self> {
        let temporary = super::unfinished(path);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let run_dir = recorded_dir(path, run_dir).to_str().map(str::to_owned);
        let keeper = identify(std::process::id());
        let run = ProcessRun { keeper, run_dir, console, accel, devices, ..ProcessRun::default() };
        file.write_all(&padded(&run))?;
        fs::rename(&temporary, path)?;
        Ok(Self { file, run })
    }

    /// Records which process runs.
    pub(crate) fn started(&mut self, pid: u32) -> io::Result<()> {
        self.run.hypervisor = identify(pid);
        self.write()
    }

    /// Records how it ended.
    pub(crate) fn ended(&mut self, ended: &ProcessEnd) -> io::Result<()> {
        self.run.ended = Some(*ended);
        self.write()
    }

    fn write(&self) -> io::Result<()> {
        self.file.write_all_at(&padded(&self.run), 0)
    }
}

/// Returns how the record names a directory for sockets: relative to the VM's work directory,
/// `HOME/vms/NAME`, if both are in one home.
fn recorded_dir(run_file: &Path, run_dir: &Path) -> PathBuf {
    let work = run_file.parent().unwrap_or(run_file);
    let mut up = PathBuf::new();
    for above in work.ancestors().take(3) {
        // If the home were the root of the file system, every path would be in it.
        if let Ok(below) = run_dir.strip_prefix(above)
            && above.parent().is_some()
        {
            return up.join(below);
        }
        up.push("..");
    }
    run_dir.to_owned()
}

/// Returns the absolute path of a recorded directory for sockets.
#[cfg(any(test, all(target_os = "linux", feature = "qemu")))]
pub(crate) fn run_dir_in_full(run_file: &Path, recorded: &str) -> PathBuf {
    let recorded = Path::new(recorded);
    if recorded.is_absolute() {
        return recorded.to_owned();
    }
    // Only by the names: a VM's directory may be a link to another place.
    let mut full = run_file.parent().unwrap_or(run_file).to_owned();
    for part in recorded.components() {
        match part {
            Component::ParentDir => drop(full.pop()),
            part => full.push(part),
        }
    }
    full
}

fn identify(pid: u32) -> Option<ProcessId> {
    ProcessId::of(pid).ok().flatten()
}

fn padded(run: &ProcessRun) -> Vec<u8> {
    let record = VersionedRun { version: VERSION, run };
    let mut bytes = serde_json::to_vec(&record).expect("a run is plain data");
    assert!(bytes.len() < SIZE_BYTES, "a run's record fits its file");
    bytes.resize(SIZE_BYTES - 1, b' ');
    bytes.push(b'\n');
    bytes
}

/// Reads the record of the last run; `None` if there was none.
///
/// # Errors
/// `Record` if the file is not a valid one, or has a version that this program does not know.
pub(crate) fn read(path: &Path) -> Result<Option<ProcessRun>> {
    read_or_loss(path)?
}

/// Reads the record of the last run as [`read`] does; the inner error is about a file that is not a
/// record, which the next start may replace.
///
/// # Errors
/// `Record` if the record has a version that this program does not know, and is to be kept.
pub(crate) fn read_or_loss(path: &Path) -> Result<Result<Option<ProcessRun>>> {
    // The keeper may be overwriting it: a torn read is repeated, while an invalid file stays
    // invalid.
    let mut failure = None;
    for _ in 0..3 {
        let bytes = match read_once(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(None)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Ok(Err(Error::record(path, error.to_string())));
            }
            Err(error) => return Err(denied("read", path)(error)),
        };
        match parse(path, &bytes)? {
            Ok(run) => return Ok(Ok(Some(run))),
            Err(error) => failure = Some(error),
        }
    }
    let error = Error::record(path, "not the record of a run");
    Ok(Err(match failure {
        Some(failure) => error.with_source(failure),
        None => error,
    }))
}

/// Parses a record; the outer error is about its version.
fn parse(path: &Path, bytes: &[u8]) -> Result<Result<ProcessRun, serde_json::Error>> {
    match serde_json::from_slice::<RunHead>(bytes) {
        Ok(RunHead { version: VERSION }) => Ok(serde_json::from_slice(bytes)),
        Ok(RunHead { version }) => {
            let problem = format!("the record has version {version}, and this vmkit reads version {VERSION}");
            Err(Error::record(path, problem))
        }
        Err(error) => Ok(Err(error)),
    }
}

/// Reads the whole file in one call, with one byte more to detect a foreign one: two calls might
/// see two records.
fn read_once(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE_BYTES + 1];
    let read = open_regular(path)?.read(&mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_is_read_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        assert_eq!(read(&path).unwrap(), None);
        let mut file =
            RunFile::create(&path, Path::new("/run/vm"), None, Some("tcg".to_owned()), Some(2)).unwrap();
        let fresh = read(&path).unwrap().unwrap();
        assert!(fresh.keeper.is_some() && fresh.hypervisor.is_none() && fresh.ended.is_none());
        file.started(std::process::id()).unwrap();
        let ended = ProcessEnd { code: None, signal: Some(9) };
        file.ended(&ended).unwrap();
        let run = read(&path).unwrap().unwrap();
        assert_eq!(run.hypervisor, run.keeper);
        assert_eq!((run.run_dir.as_deref(), run.accel.as_deref()), (Some("/run/vm"), Some("tcg")));
        assert_eq!(run.devices, Some(2));
        assert_eq!(run.ended.unwrap().to_string(), "killed by signal 9 (SIGKILL)");
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE_BYTES as u64);
    }

    #[test]
    fn the_run_file_of_the_first_release_is_read() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records/c2c6b0a/qemu.json");
        let run = read(&file).unwrap().unwrap();
        assert_eq!((run.accel, run.run_dir.as_deref()), (None, Some("/old/vmkit/run/a7c0ea83b7")));
        assert_eq!((run.hypervisor.unwrap().pid, run.devices), (31214, None));
    }

    #[test]
    fn a_record_has_its_version_and_one_of_a_newer_version_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        RunFile::create(&path, Path::new("/run/vm"), None, None, None).unwrap();
        let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(record["version"], 1);
        record.as_object_mut().unwrap().remove("version");
        fs::write(&path, record.to_string()).unwrap();
        assert!(read(&path).unwrap().unwrap().keeper.is_some(), "without a version it is the first");
        for version in ["2", "0", "18446744073709551615"] {
            let newer = format!("{{\"version\": {version}, \"later\": []}}");
            fs::write(&path, &newer).unwrap();
            let error = read_or_loss(&path).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Record);
            let expected = format!("{}: the record has version {version}, and", path.display());
            assert!(error.to_string().starts_with(&expected), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), newer);
        }
        for lost in ["", "{", "[]", "{\"version\": \"2\"}", "{\"version\": -1}"] {
            fs::write(&path, lost).unwrap();
            read_or_loss(&path).unwrap().unwrap_err();
        }
    }

    #[test]
    fn a_directory_for_sockets_in_the_home_moves_with_the_home() {
        for (run_dir, recorded, found) in [
            ("/old/run/x", "../../run/x", "/new/run/x"),
            ("/old/vms/web/server", "server", "/new/vms/web/server"),
            ("/run/user/7/vmkit/x", "/run/user/7/vmkit/x", "/run/user/7/vmkit/x"),
        ] {
            assert_eq!(
                recorded_dir(Path::new("/old/vms/web/run.json"), Path::new(run_dir)),
                Path::new(recorded)
            );
            assert_eq!(run_dir_in_full(Path::new("/new/vms/web/run.json"), recorded), Path::new(found));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("run.json");
            fs::write(&path, &bytes).unwrap();
            let _ = read(&path);
        }
    }
}
