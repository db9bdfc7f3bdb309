//! The directories of one user's files: [`Home`].

use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::ownership::{denied, refuse_other_user};
use super::portable::HomePaths;
use crate::error::{Error, Result};
use crate::host::ForeignFiles;
use crate::spec::VmName;
use crate::steps::step;

/// The name of the directory of a VM's small files.
pub(super) const KEPT: &str = "kept";

/// The directories below which vmkit stores its files. They are created when first written to.
///
/// The library never reads the environment: the caller chooses the directories.
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

    /// The longest path below a VM's runtime directory, to check beforehand that it will fit.
    const LONGEST_SOCKET: &'static str = "/0123456789/console.sock";

    /// Returns a home with all directories below one.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is relative, is not UTF-8, or is too long for the sockets
    /// below it.
    pub fn at(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        Self::checked(root, root.join("run"), root.join("cache"))
    }

    /// Returns a home with the permanent files below `data`, the sockets below `runtime`, and what
    /// can be created again below `cache`.
    ///
    /// # Errors
    /// As for [`at`](Self::at).
    pub fn split(data: impl AsRef<Path>, runtime: impl AsRef<Path>, cache: impl AsRef<Path>) -> Result<Self> {
        Self::checked(data.as_ref(), runtime.as_ref().into(), cache.as_ref().into())
    }

    fn checked(data: &Path, run: PathBuf, cache: PathBuf) -> Result<Self> {
        let [vms, images, projects] = ["vms", "images", "projects"].map(|below| data.join(below));
        for path in [&vms, &run, &cache] {
            // Paths are stored in records and sent to QEMU's monitor, and both are JSON.
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

    /// Returns the parent directory of the VMs, the images and the projects.
    pub(crate) fn root(&self) -> &Path {
        self.vms.parent().unwrap_or(&self.vms)
    }

    /// Returns the names that records have for paths below this home when they are read.
    pub(super) fn paths(&self) -> HomePaths {
        HomePaths::new(self.root(), Vec::new())
    }

    /// Returns the names that records have for paths below this home when they are written.
    pub(super) fn paths_to_write(&self) -> HomePaths {
        // Images are identified by their paths without symbolic links.
        let named = [(self.root(), ""), (&self.images, "images"), (&self.vms, "vms")];
        let aliases = named.into_iter().filter_map(|(path, below)| Some((path.canonicalize().ok()?, below)));
        HomePaths::new(self.root(), aliases.collect())
    }

    /// Returns the directory of the VMs, with one directory for each.
    pub fn vms(&self) -> &Path {
        &self.vms
    }

    /// Returns the directory of one VM: its record, its lock, and its backend's files.
    pub fn vm(&self, name: &VmName) -> PathBuf {
        self.vms.join(name.as_str())
    }

    /// Returns the directory of a VM's small files beside its backend's: the login key, the record
    /// of provisioning. They are removed with the VM.
    pub fn kept(&self, name: &VmName) -> PathBuf {
        self.vm(name).join(KEPT)
    }

    /// Returns the directory of the images that were pulled or imported.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Returns the directory of the locks that serialize operations on a project.
    pub fn projects(&self) -> &Path {
        &self.projects
    }

    /// Returns the directory of the sockets; a reboot may remove it.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Returns the directory of files that can be created again.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Creates the directories for VMs and for sockets if they are missing, accessible to this user
    /// only.
    ///
    /// # Errors
    /// `Host` for a directory that can't be created, or that belongs to another user.
    pub fn create(&self) -> Result<()> {
        self.refuse_other_user(&self.vms)?;
        create_private(&self.vms)?;
        create_private(&self.run)?;
        // The owner of the directory could replace a VM's socket.
        refuse_other_user(&self.run)
    }

    /// Refuses to write to a directory of this home if it, or the home, belongs to another user,
    /// who could not read the new files.
    ///
    /// # Errors
    /// [`Error::OtherUser`], with a remedy.
    pub(crate) fn refuse_other_user(&self, dir: &Path) -> Result<()> {
        // Any user may create a home in a directory that is writable for all, but root would take
        // it from its owner.
        if rustix::process::geteuid().is_root() {
            refuse_other_user(self.root())?;
        }
        refuse_other_user(&self.vms)?;
        refuse_other_user(dir)
    }

    /// Searches the home for files that belong to other users than its owner, such as those of a
    /// command that was run by `sudo`; `None` if there is no home yet. It reads the metadata of
    /// every file.
    pub fn strangers(&self) -> Option<ForeignFiles> {
        let parts = [&self.vms, &self.images, &self.projects, &self.run, &self.cache];
        ForeignFiles::of(self.root(), &parts.map(PathBuf::as_path))
    }
}

/// Creates a directory with its parents, accessible to this user only; an existing one is left
/// unchanged.
pub(crate) fn create_private(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let made =
        step("create a directory").and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(path));
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            check_is_mounted(path)?;
            Err(Error::host(path.display().to_string(), "this is not a directory"))
        }
        made => made.map_err(denied("create", path)),
    }
}

/// Refuses a path below a link that leads to nothing, such as one to a disk that is not mounted:
/// what is not there now is not gone.
///
/// # Errors
/// `Host`.
pub(super) fn check_is_mounted(path: &Path) -> Result<()> {
    let leads_nowhere = |path: &&Path| path.is_symlink() && !path.exists();
    match path.ancestors().find(leads_nowhere) {
        Some(link) => {
            let problem = "this link leads to nothing: mount what it leads to, or remove the link";
            Err(Error::host(link.display().to_string(), problem))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
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
