//! The programs of QEMU on this host, and their versions.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::{Access, access};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::Error;
use crate::host::facts::cache;
use crate::host::inherited::{child_problem, process_limit};
use crate::spec::Arch;

const CACHE: &str = "qemu.json";

/// How long `--version` may take. It takes 20 ms; a host under heavy load may need a hundred times
/// as long.
const DEADLINE: Duration = Duration::from_secs(10);

/// A QEMU that runs guests of one instruction set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct QemuProgram {
    /// The guests' instruction set.
    pub arch: Arch,
    /// The absolute path of the program.
    pub path: PathBuf,
    /// Its version, or why it did not tell.
    pub version: Result<QemuVersion, String>,
}

/// A version of QEMU; its text is `7.2.22`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QemuVersion {
    /// Counts the years since 4.
    pub major: u32,
    /// Counts the releases of the year.
    pub minor: u32,
    /// Counts the corrections of the release.
    pub micro: u32,
}

impl QemuVersion {
    /// The oldest version that vmkit is tested with.
    pub const OLDEST: Self = Self { major: 7, minor: 2, micro: 0 };

    /// Finds the version in what `--version` prints: `QEMU emulator version 7.2.22 (Debian …)`.
    fn printed(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("version ")?;
        rest.split_ascii_whitespace().next()?.parse().ok()
    }
}

impl FromStr for QemuVersion {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut numbers = text.split('.').map(|part| part.parse().ok());
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Some(major)), Some(Some(minor)), Some(Some(micro)), None) => {
                Ok(Self { major, minor, micro })
            }
            _ => {
                let value: String = text.chars().take(40).collect();
                Err(Error::invalid("version", value, "a version of QEMU is three numbers like 7.2.22"))
            }
        }
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl TryFrom<String> for QemuVersion {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<QemuVersion> for String {
    fn from(version: QemuVersion) -> String {
        version.to_string()
    }
}

/// The versions that were asked for before.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CachedVersions {
    programs: Vec<CachedProgram>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CachedProgram {
    stamp: ProgramStamp,
    version: QemuVersion,
}

/// What changes whenever another program is put in a program's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramStamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl ProgramStamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// Returns the program of this name in the first directory that has one.
///
/// A directory that is not absolute is passed over: what it means depends on where the caller
/// stands.
pub(crate) fn find(name: &str, search_path: &[PathBuf]) -> Option<PathBuf> {
    let paths = search_path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
    paths.into_iter().find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok())
}

/// Returns these QEMU programs with their versions, from the cache as far as that knows the very
/// same files.
pub(super) async fn with_versions(found: Vec<(Arch, PathBuf)>, cache_dir: Option<&Path>) -> Vec<QemuProgram> {
    let cached = cache_dir.and_then(|dir| cache::load::<CachedVersions>(dir, CACHE)).unwrap_or_default();
    let mut fresh = cached.programs.clone();
    let mut programs = Vec::new();
    for (arch, path) in found {
        let version = match ProgramStamp::of(&path) {
            Ok(stamp) => match cached.programs.iter().find(|known| known.stamp == stamp) {
                Some(known) => Ok(known.version),
                None => {
                    let version = ask_version(&path).await;
                    fresh.retain(|known| known.stamp.path != path);
                    fresh.extend(version.as_ref().ok().map(|&version| CachedProgram { stamp, version }));
                    version
                }
            },
            Err(error) => Err(error.to_string()),
        };
        programs.push(QemuProgram { arch, path, version });
    }
    if let Some(dir) = cache_dir
        && fresh != cached.programs
    {
        // Programs that are gone would otherwise stay for ever.
        fresh.retain(|known| known.stamp.path.exists());
        cache::store(dir, CACHE, &CachedVersions { programs: fresh });
    }
    programs
}

/// Runs the program with `--version`.
async fn ask_version(path: &Path) -> Result<QemuVersion, String> {
    let output = match timeout(DEADLINE, output(path)).await {
        Ok(output) => output?,
        Err(_) => return Err(format!("`--version` did not end within {} s", DEADLINE.as_secs())),
    };
    let said = String::from_utf8_lossy(&output.said);
    // A program that was asked in vain for its end has told its version nevertheless.
    let is_well = output.ended.as_ref().map_or(true, ExitStatus::success);
    if let (true, Some(version)) = (is_well, QemuVersion::printed(&said)) {
        return Ok(version);
    }
    let ended =
        output.ended.map_err(|error| format!("how it ended is not known: {}", child_problem(&error)))?;
    let complaint = String::from_utf8_lossy(&output.complained);
    let first = said.lines().chain(complaint.lines()).next().unwrap_or("nothing");
    let first: String = first.chars().take(200).collect();
    let limit = match first.contains("Resource temporarily unavailable") {
        true => format!(": {}", process_limit()),
        false => String::new(),
    };
    Err(format!("`--version` ended with {ended} and printed {first:?}{limit}"))
}

/// What a program printed, and how it ended.
struct VersionOutput {
    said: Vec<u8>,
    complained: Vec<u8>,
    ended: io::Result<ExitStatus>,
}

/// Runs the program to its end.
async fn output(path: &Path) -> Result<VersionOutput, String> {
    let failed = |error: io::Error| format!("it can't be executed: {}", child_problem(&error));
    let mut command = Command::new(path);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let not_begun = |error: io::Error| match error.kind() {
        // The program itself was found.
        io::ErrorKind::NotFound => {
            "it can't be executed: its loader, or the interpreter that its first line names, does not exist"
                .to_owned()
        }
        _ => failed(error),
    };
    let mut child = command.kill_on_drop(true).spawn().map_err(not_begun)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (said, complained, ended) = tokio::join!(all_of(stdout), all_of(stderr), child.wait());
    Ok(VersionOutput { said: said.map_err(failed)?, complained: complained.map_err(failed)?, ended })
}

async fn all_of(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    /// Writes a program that notes each of its runs and says it is of this version.
    fn fake(dir: &Path, version: &str) -> PathBuf {
        let path = dir.join("qemu-system-x86_64");
        let runs = dir.join("runs");
        let text = format!(
            "#!/bin/sh\necho run >> '{}'\necho 'QEMU emulator version {version} (Test)'\n",
            runs.display()
        );
        vmkit_testkit::write_program(&path, &text).unwrap();
        path
    }

    fn runs(dir: &Path) -> usize {
        fs::read_to_string(dir.join("runs")).map_or(0, |text| text.lines().count())
    }

    async fn version(path: &Path, cache_dir: &Path) -> Result<QemuVersion, String> {
        let programs = with_versions(vec![(Arch::X86_64, path.to_owned())], Some(cache_dir)).await;
        programs.into_iter().next().unwrap().version
    }

    #[tokio::test]
    async fn a_program_is_run_once_until_another_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let cache_dir = dir.path().join("cache");
        let path = fake(dir.path(), "7.2.22");
        let old = QemuVersion { major: 7, minor: 2, micro: 22 };
        assert_eq!(version(&path, &cache_dir).await, Ok(old));
        assert_eq!(version(&path, &cache_dir).await, Ok(old));
        assert_eq!(runs(dir.path()), 1);
        fake(dir.path(), "10.0.2");
        let new = QemuVersion { major: 10, minor: 0, micro: 2 };
        assert_eq!(version(&path, &cache_dir).await, Ok(new));
        assert_eq!(version(&path, &cache_dir).await, Ok(new));
        assert_eq!(runs(dir.path()), 2);
        assert!(old < new && old > QemuVersion::OLDEST);
    }

    #[tokio::test]
    async fn a_program_of_unknown_version_is_kept_with_the_reason_and_probed_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = fake(dir.path(), "unknown");
        for asked in 1..=2 {
            let problem = version(&path, dir.path()).await.unwrap_err();
            assert!(problem.contains("printed \"QEMU emulator version unknown"), "{problem}");
            assert_eq!(runs(dir.path()), asked);
        }
        let gone = version(&dir.path().join("gone"), dir.path()).await.unwrap_err();
        assert!(gone.contains("No such file"), "{gone}");
    }

    #[test]
    fn a_program_is_found_in_the_first_absolute_directory_that_can_execute_it() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, good) = (dir.path().join("plain"), dir.path().join("good"));
        fs::create_dir_all(plain.join("nested/qemu-img")).unwrap();
        fs::write(plain.join("qemu-img"), "").unwrap();
        fs::create_dir(&good).unwrap();
        fs::write(good.join("qemu-img"), "").unwrap();
        fs::set_permissions(good.join("qemu-img"), Permissions::from_mode(0o755)).unwrap();
        let path = ["bin".into(), dir.path().join("none"), plain.clone(), plain.join("nested"), good.clone()];
        assert_eq!(find("qemu-img", &path), Some(good.join("qemu-img")));
        assert_eq!(find("qemu-img", &path[..4]), None);
    }

    #[test]
    fn versions_are_found_in_what_the_real_programs_print() {
        for (text, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) …", "7.2.22"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)", "10.0.2"),
            ("QEMU emulator version 8.2.2", "8.2.2"),
        ] {
            assert_eq!(QemuVersion::printed(text).unwrap().to_string(), version);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_searched_without_panic(text in any::<String>()) {
            let _ = QemuVersion::printed(&format!("version {text}"));
        }
    }
}
