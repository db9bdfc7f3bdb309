//! The owner of a home, and files in it that belong to other users.
//!
//! A command that writes as root to a user's home would leave files there that the user can't read,
//! and so the user would lose the VM. So writers refuse the home of another user, and an error
//! about a file that an earlier vmkit has left names its owner.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::ForeignFiles;

/// More files than any home has, and as many as are checked in acceptable time.
const MOST_ENTRIES: usize = 200_000;

/// Returns the effective user of this process.
fn this_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Refuses to write to a file or a directory of another user; a missing one is accepted.
///
/// # Errors
/// [`Error::OtherUser`].
pub(crate) fn refuse_other_user(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.uid() != this_user() => Err(other_user(path, found.uid())),
        _ => Ok(()),
    }
}

/// Gives a new file to the owner of its directory, so that it belongs to the same user as the
/// others.
pub(crate) fn keep_owner(file: &File, path: &Path) {
    let Some(dir) = path.parent().and_then(|dir| fs::metadata(dir).ok()) else { return };
    if dir.uid() != this_user() {
        // Only root can do that, and only root needs to.
        let _ = std::os::unix::fs::fchown(file, Some(dir.uid()), Some(dir.gid()));
    }
}

/// Returns a function for `map_err` that wraps an I/O error as [`Error::io`] does; if the cause is
/// another user's file, the error names the owner and the command that gives it back.
pub(crate) fn denied(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |error| {
        if error.kind() == io::ErrorKind::PermissionDenied
            && let Some((path, owner)) = stranger_of(&path)
        {
            return other_user(&path, owner);
        }
        Error::io(verb, path)(error)
    }
}

/// Returns the part of an unusable path that belongs to another user: the file, or its nearest
/// accessible parent.
fn stranger_of(path: &Path) -> Option<(PathBuf, u32)> {
    let (found, metadata) =
        path.ancestors().find_map(|above| fs::metadata(above).ok().map(|metadata| (above, metadata)))?;
    (metadata.uid() != this_user()).then(|| (found.to_owned(), metadata.uid()))
}

fn other_user(path: &Path, owner: u32) -> Error {
    let (home, home_owner) = home_of(path);
    let me = name(this_user());
    let way_out = match home_owner {
        Some(home_owner) if home_owner == this_user() => format!(
            "a command was run here as that user, perhaps with `sudo`; `sudo chown -R {me} {}` gives all \
             of the home back",
            home.display()
        ),
        _ => format!(
            "run the command as that user, or make the home this user's with `sudo chown -R {me} {}`",
            home.display()
        ),
    };
    Error::OtherUser {
        path: path.to_owned(),
        owner: user(owner).into(),
        user: user(this_user()).into(),
        way_out: way_out.into(),
    }
}

/// Returns the home that a path lies in, and its owner: the parent of the nearest of the
/// directories that every home has.
fn home_of(path: &Path) -> (PathBuf, Option<u32>) {
    let is_part = |dir: &&Path| ["vms", "images", "projects"].iter().any(|part| dir.ends_with(part));
    let home = path.ancestors().find(is_part).and_then(Path::parent).unwrap_or(path);
    let part = ["vms", "images"].iter().find_map(|part| fs::metadata(home.join(part)).ok());
    let found = part.or_else(|| fs::metadata(home).ok());
    (home.to_owned(), found.map(|found| found.uid()))
}

/// Returns a user's name for a command line.
fn name(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| uid.to_string())
}

fn user(uid: u32) -> String {
    match name(uid) {
        name if name == uid.to_string() => format!("user {uid}"),
        name => format!("user {name} ({uid})"),
    }
}

impl ForeignFiles {
    /// Searches the home that has these directories; returns `None` if there is no home yet.
    pub(super) fn of(root: &Path, parts: &[&Path]) -> Option<Self> {
        let owner = [root.join("vms"), root.to_owned()].iter().find_map(|dir| fs::metadata(dir).ok())?.uid();
        let (mut found, mut left) = (Vec::new(), MOST_ENTRIES);
        for part in parts {
            collect(part, owner, &mut found, &mut left);
        }
        let repair = format!("sudo chown -R {} {}", name(owner), root.display());
        Some(Self { home: root.to_owned(), owner: user(owner), found, repair })
    }
}

fn collect(path: &Path, owner: u32, found: &mut Vec<(PathBuf, String)>, left: &mut usize) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    if metadata.uid() != owner {
        found.push((path.to_owned(), user(metadata.uid())));
        return;
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries {
        if *left == 0 {
            return;
        }
        *left -= 1;
        collect(&entry.path(), owner, found, left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_called_by_name_where_there_is_one() {
        assert_eq!((name(0).as_str(), user(0).as_str()), ("root", "user root (0)"));
        assert_eq!(
            (name(4_294_967_000).as_str(), user(4_294_967_000).as_str()),
            ("4294967000", "user 4294967000")
        );
    }

    #[test]
    fn what_belongs_to_another_user_is_refused_named_and_listed() {
        let home = tempfile::tempdir().unwrap();
        let (vms, file) = (home.path().join("vms"), home.path().join("vms/web/run.json"));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "{}").unwrap();
        refuse_other_user(&vms).unwrap();
        refuse_other_user(&home.path().join("none")).unwrap();
        if this_user() != 0 {
            println!("SKIP: only root gives files away");
            return;
        }
        std::os::unix::fs::chown(&file, Some(65534), None).unwrap();
        let found = ForeignFiles::of(home.path(), &[&vms]).unwrap();
        assert_eq!(found.found.iter().map(|(path, _)| path).collect::<Vec<_>>(), [&file]);
        assert_eq!(found.repair, format!("sudo chown -R root {}", home.path().display()));
        let error = refuse_other_user(&file).unwrap_err().to_string();
        assert!(error.contains("65534") && error.contains("perhaps with `sudo`"), "{error}");
        std::os::unix::fs::chown(&vms, Some(65534), None).unwrap();
        let error = refuse_other_user(&vms).unwrap_err().to_string();
        assert!(error.contains("run the command as that user"), "{error}");
        assert!(error.contains(&format!("sudo chown -R root {}", home.path().display())), "{error}");
    }
}
