//! Checks of whether this host can run VMs, with advice for what is missing.

mod limits;
#[cfg(feature = "propolis")]
mod propolis;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod qemu;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};
use serde::Serialize;

pub use self::limits::{ProcessLimits, limits};
#[cfg(feature = "propolis")]
pub use self::propolis::{PropolisHost, diagnose_propolis};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use self::qemu::diagnose;
use crate::host::ForeignFiles;

/// A warning is given below this free space for VMs.
const LITTLE_ROOM_BYTES: u64 = 2 << 30;

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HostCheck {
    /// The subject of the check, such as `kvm`.
    pub name: String,
    /// The result.
    pub status: CheckStatus,
    /// What was found.
    pub found: String,
    /// What to do about it, if there is something to do.
    pub advice: Option<String>,
}

/// The status of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// No problem.
    Ok,
    /// VMs run, but something is slower or unavailable.
    Warn,
    /// VMs don't run.
    Fail,
}

/// The facts about a directory that vmkit uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DirFacts {
    /// The directory.
    pub path: PathBuf,
    /// Its owner and permission bits, if it exists.
    pub present: Option<DirOwnership>,
    /// Why nothing can be created in it, or in its nearest existing parent.
    pub unwritable: Option<String>,
    /// The free space of its file system for this user, in bytes.
    pub free_bytes: Option<u64>,
}

/// The owner of a directory, and its permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DirOwnership {
    /// The owner's user id.
    pub uid: u32,
    /// The permission bits.
    pub mode: u32,
}

impl DirFacts {
    /// Examines a directory; if it does not exist yet, the nearest parent that does.
    pub fn probe(path: &Path) -> Self {
        let mut unwritable = None;
        let mut free_bytes = None;
        match path.ancestors().find(|above| above.symlink_metadata().is_ok()) {
            None => unwritable = Some("no part of this path exists".to_owned()),
            Some(above) if !above.is_dir() => {
                unwritable = Some(format!("{} is not a directory", above.display()))
            }
            Some(above) => {
                if let Err(errno) = access(above, Access::WRITE_OK | Access::EXEC_OK) {
                    unwritable = Some(format!("{}: {}", above.display(), std::io::Error::from(errno)));
                }
                if let Ok(found) = statvfs(above) {
                    free_bytes = Some(found.f_bavail.saturating_mul(found.f_frsize));
                    // Root can write everywhere except on a read-only file system.
                    if found.f_flag.contains(StatVfsMountFlags::RDONLY) {
                        unwritable = Some(format!("{} is on a read-only file system", above.display()));
                    }
                }
            }
        }
        let present = fs::metadata(path).ok();
        let present = present.map(|found| DirOwnership { uid: found.uid(), mode: found.mode() & 0o7777 });
        Self { path: path.to_owned(), present, unwritable, free_bytes }
    }
}

/// Checks the directories of VMs and of their sockets; `euid` is the user of this process.
pub fn places(home: &DirFacts, runtime: &DirFacts, euid: u32) -> Vec<HostCheck> {
    vec![writable("home", home), private(runtime, euid), room(home)]
}

/// Checks the owners of the files of a home: every command of its owner has to read them.
pub fn owners(strangers: &ForeignFiles) -> HostCheck {
    let path = strangers.home.display();
    let Some((first, other)) = strangers.found.first() else {
        return ok("owner", format!("all of {path} belongs to {}", strangers.owner));
    };
    let more = match strangers.found.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let found = format!(
        "{path} is the home of {}, and {}{more} belong to {other}: a command was run there as that user, \
         perhaps with `sudo`",
        strangers.owner,
        first.display()
    );
    bad("owner", CheckStatus::Fail, found, format!("run `{}`", strangers.repair))
}

fn ok(name: impl Into<String>, found: impl Into<String>) -> HostCheck {
    HostCheck { name: name.into(), status: CheckStatus::Ok, found: found.into(), advice: None }
}

fn bad(
    name: impl Into<String>,
    status: CheckStatus,
    found: impl Into<String>,
    advice: impl Into<String>,
) -> HostCheck {
    HostCheck { name: name.into(), status, found: found.into(), advice: Some(advice.into()) }
}

fn writable(name: &str, dir: &DirFacts) -> HostCheck {
    let path = dir.path.display();
    match &dir.unwritable {
        None if dir.present.is_some() => ok(name, format!("{path} is writable")),
        None => ok(name, format!("{path} does not exist yet and can be created")),
        Some(problem) => bad(
            name,
            CheckStatus::Fail,
            format!("{path} can't be written to: {problem}"),
            "give this user the directory, or choose another",
        ),
    }
}

/// Checks that no other user can enter the directory of the sockets, which give a root shell in the
/// guest.
fn private(dir: &DirFacts, euid: u32) -> HostCheck {
    let check = writable("runtime", dir);
    let Some(DirOwnership { uid, mode }) = dir.present else { return check };
    let path = dir.path.display();
    if uid != euid {
        return bad(
            "runtime",
            CheckStatus::Fail,
            format!("{path} belongs to user {uid}, not to user {euid}"),
            "remove it or choose another",
        );
    }
    if mode & 0o077 != 0 {
        return bad(
            "runtime",
            CheckStatus::Fail,
            format!("{path} is open to others (mode {mode:04o})"),
            format!("run `chmod 0700 {path}`"),
        );
    }
    check
}

fn room(home: &DirFacts) -> HostCheck {
    let path = home.path.display();
    let Some(free) = home.free_bytes else {
        return bad(
            "room",
            CheckStatus::Warn,
            format!("the free space of {path} is unknown"),
            "check with `df`",
        );
    };
    let found = format!("{:.1} GiB free for {path}", free as f64 / (1u64 << 30) as f64);
    if free < LITTLE_ROOM_BYTES {
        return bad(
            "room",
            CheckStatus::Warn,
            found,
            "free some space: disks of guests grow as they are written to",
        );
    }
    ok("room", found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    pub(super) fn dir(path: &str) -> DirFacts {
        DirFacts {
            path: path.into(),
            present: Some(DirOwnership { uid: 1000, mode: 0o700 }),
            unwritable: None,
            free_bytes: Some(LITTLE_ROOM_BYTES),
        }
    }

    #[test]
    fn directories_that_are_foreign_open_full_or_unwritable_are_named() {
        let good = dir("/d");
        let foreign = DirFacts { present: Some(DirOwnership { uid: 0, mode: 0o700 }), ..good.clone() };
        let open = DirFacts { present: Some(DirOwnership { uid: 1000, mode: 0o755 }), ..good.clone() };
        let sealed = DirFacts { unwritable: Some("read-only".to_owned()), ..good.clone() };
        let full = DirFacts { free_bytes: Some(LITTLE_ROOM_BYTES - 1), ..good.clone() };
        for (home, runtime, name, status, found) in [
            (&good, &foreign, "runtime", CheckStatus::Fail, "belongs to user 0"),
            (&good, &open, "runtime", CheckStatus::Fail, "mode 0755"),
            (&good, &sealed, "runtime", CheckStatus::Fail, "read-only"),
            (&sealed, &good, "home", CheckStatus::Fail, "read-only"),
            (&full, &good, "room", CheckStatus::Warn, "2.0 GiB free"),
        ] {
            let check = places(home, runtime, 1000).into_iter().find(|check| check.name == name).unwrap();
            assert!(check.status == status && check.found.contains(found), "{check:?}");
            assert!(check.advice.is_some(), "{check:?}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_judged_by_the_one_above() {
        let above = tempfile::tempdir().unwrap();
        let facts = DirFacts::probe(&above.path().join("a/b/c"));
        assert_eq!((facts.present, facts.unwritable), (None, None));
        assert!(facts.free_bytes.is_some());
        fs::write(above.path().join("file"), "").unwrap();
        let facts = DirFacts::probe(&above.path().join("file/vms"));
        assert!(facts.unwritable.unwrap().contains("file is not a directory"));
    }

    #[test]
    fn the_owner_and_the_mode_of_a_directory_are_seen() {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), Permissions::from_mode(0o750)).unwrap();
        let present = DirFacts::probe(home.path()).present.unwrap();
        assert_eq!(present, DirOwnership { uid: rustix::process::geteuid().as_raw(), mode: 0o750 });
    }
}
