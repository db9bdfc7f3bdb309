//! Where everything of one user's lies: [`Home`].

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::spec::VmName;
use crate::steps::step;

/// What the directory of a VM's small files is called.
pub(super) const KEPT: &str = "kept";

/// The directories below which vmkit keeps what it makes. Nothing is created before something is put there.
///
/// The library never reads the environment: whoever calls it chooses the places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    vms: PathBuf,
    images: PathBuf,
    projects: PathBuf,
    run: PathBuf,
    cache: PathBuf,
}

impl Home {
    /// The longest path of a Unix socket, in bytes, without the final NUL.
    ///
    /// Source: unix(7).
    pub const MAX_SOCKET_PATH_BYTES: usize = 107;

    /// The longest path below a VM's runtime directory, to see beforehand that it will fit.
    const LONGEST_SOCKET: &'static str = "/0123456789/console.sock";

    /// Puts everything below one directory.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is relative, is not UTF-8, or is too long for the sockets below it.
    pub fn at(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        Self::checked(root, root.join("run"), root.join("cache"))
    }

    /// Puts what is kept below `data`, the sockets below `runtime`, and what can be made again below `cache`.
    ///
    /// # Errors
    /// As for [`at`](Self::at).
    pub fn split(data: impl AsRef<Path>, runtime: impl AsRef<Path>, cache: impl AsRef<Path>) -> Result<Self> {
        Self::checked(data.as_ref(), runtime.as_ref().into(), cache.as_ref().into())
    }

    fn checked(data: &Path, run: PathBuf, cache: PathBuf) -> Result<Self> {
        let [vms, images, projects] = ["vms", "images", "projects"].map(|below| data.join(below));
        for path in [&vms, &run, &cache] {
            // Paths are kept in records and handed to QEMU's monitor, and both are JSON.
            if path.to_str().is_none() {
                return Err(Error::invalid("home", path.display(), "the path must be UTF-8"));
            }
            if !path.is_absolute() {
                return Err(Error::invalid("home", path.display(), "the path must be absolute"));
            }
        }
        let bytes = run.as_os_str().as_bytes().len() + Self::LONGEST_SOCKET.len();
        if bytes > Self::MAX_SOCKET_PATH_BYTES {
            let bound = format!(
                "the path is too long: a socket below it would have {bytes} bytes, and the system allows {}",
                Self::MAX_SOCKET_PATH_BYTES
            );
            return Err(Error::invalid("home", run.display(), bound));
        }
        Ok(Self { vms, images, projects, run, cache })
    }

    /// Answers the directory that has one directory for each VM.
    pub fn vms(&self) -> &Path {
        &self.vms
    }

    /// Answers the directory of one VM: its record, its lock, and what its backend keeps.
    pub fn vm(&self, name: &VmName) -> PathBuf {
        self.vms.join(name.as_str())
    }

    /// Answers the directory of the small files that belong to a VM beside its backend's: the key that logs in, what was
    /// provisioned. They are removed with the VM.
    pub fn kept(&self, name: &VmName) -> PathBuf {
        self.vm(name).join(KEPT)
    }

    /// Answers the directory of the images that were pulled or imported.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Answers the directory of the locks that keep two operations on one project apart.
    pub fn projects(&self) -> &Path {
        &self.projects
    }

    /// Answers the directory of the sockets; it may be gone after a reboot.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Answers the directory of what can be made again.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Creates the directories for VMs and for sockets where they are missing, for this user alone.
    ///
    /// # Errors
    /// `Host` for a directory that can't be created, or a runtime directory that is somebody else's.
    pub fn create(&self) -> Result<()> {
        create_private(&self.vms)?;
        create_private(&self.run)?;
        let owner = fs::metadata(&self.run).map_err(Error::io("look at", &self.run))?.uid();
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            // Whoever owns the directory could put a socket of their own in the place of a VM's.
            return Err(Error::Host {
                needed: self.run.display().to_string(),
                problem: format!("the runtime directory belongs to user {owner}, and this is user {user}"),
            });
        }
        Ok(())
    }
}

/// Creates a directory for this user alone, with its parents; one that is there is left as it is.
pub(crate) fn create_private(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let made =
        step("create a directory").and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(path));
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Host { needed: path.display().to_string(), problem: "this is not a directory".into() })
        }
        made => made.map_err(Error::io("create", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_relative_home_is_refused() {
        let error = Home::at("vms").unwrap_err().to_string();
        assert!(error.starts_with("home: ") && error.contains("absolute"), "{error}");
    }

    #[test]
    fn a_home_too_long_for_a_socket_is_refused_with_both_numbers() {
        let fits = format!("/{}", "x".repeat(107 - 1 - "/run/0123456789/console.sock".len()));
        Home::at(&fits).unwrap();
        let error = Home::at(format!("{fits}x")).unwrap_err().to_string();
        assert!(error.contains("have 108 bytes") && error.contains("allows 107"), "{error}");
    }

    #[test]
    fn the_directories_are_for_this_user_alone() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::at(temp.path().join("home")).unwrap();
        home.create().unwrap();
        home.create().unwrap();
        for path in [home.vms(), home.run(), &temp.path().join("home")] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }
}
