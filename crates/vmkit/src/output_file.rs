//! Writes a file beside its destination until it is complete: [`OutputFile`].
//!
//! Edge: files. A writer that is killed leaves the unfinished file, and the next writer to the same
//! destination takes it over.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fchmod};

use crate::error::{Error, Result};
use crate::flock::{FileLock, LockMode};
use crate::steps::step;

/// The suffix of a file's name while it is being written.
const UNFINISHED: &str = ".unfinished";

/// What to do with a file that exists already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverwritePolicy {
    /// Keep it, and write nothing.
    Stays,
    /// Replace it, once everything is written.
    Replaced,
}

/// Who may read a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileReaders {
    /// Those whom the process's umask leaves.
    AsUsual,
    /// This user alone.
    Owner,
}

/// A file that is being written; removed when dropped, unless it got its final name.
#[derive(Debug)]
pub(crate) struct OutputFile {
    path: PathBuf,
    lock: FileLock,
    is_named: bool,
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        // The lock is held until after this, so the file is ours unless it got its final name.
        if !self.is_named {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl OutputFile {
    /// Opens the file, empty, beside `place`, and locks it against other writers. `shown` is the
    /// destination in errors.
    ///
    /// # Errors
    /// `InvalidInput` on `file` for what is no file; `Busy` while another process writes there;
    /// `Io`, `Host`.
    pub(crate) fn begin(place: &Path, shown: &Path, readers: FileReaders) -> Result<Self> {
        let mut path = place.as_os_str().to_owned();
        path.push(UNFINISHED);
        let path = PathBuf::from(path);
        let failed = || Error::io("write", shown);
        let open = || {
            step("output: create the file")?;
            // A link there is not followed, and a FIFO not waited for.
            let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).custom_flags(flags);
            match readers {
                FileReaders::AsUsual => options.open(&path),
                FileReaders::Owner => options.mode(0o600).open(&path),
            }
        };
        loop {
            let file = open().map_err(failed())?;
            let opened = file.metadata().map_err(failed())?;
            if !opened.is_file() {
                let why =
                    "this is not a file, and the destination is written under this name first: remove it";
                return Err(Error::invalid("file", path.display(), why));
            }
            let Ok(lock) = FileLock::try_take(file, LockMode::Alone).map_err(failed())? else {
                return Err(Error::Busy { what: shown.display().to_string(), holder: None });
            };
            // The previous holder may have given it its final name.
            let is_it = |at: fs::Metadata| (at.dev(), at.ino()) == (opened.dev(), opened.ino());
            if fs::symlink_metadata(&path).is_ok_and(is_it) {
                let file = lock.file();
                file.set_len(0).map_err(failed())?;
                if readers == FileReaders::Owner {
                    // It may be one that was left there.
                    fchmod(file, Mode::RUSR | Mode::WUSR).map_err(|errno| failed()(errno.into()))?;
                }
                return Ok(Self { path, lock, is_named: false });
            }
        }
    }

    /// Returns the open file.
    pub(crate) fn file(&self) -> &File {
        self.lock.file()
    }

    /// Renames it to its final name; what it contains is synced already.
    ///
    /// # Errors
    /// Those of the system; `AlreadyExists` for a file that is to stay.
    pub(crate) fn name(mut self, place: &Path, existing: OverwritePolicy) -> io::Result<()> {
        step("output: name the file")?;
        match existing {
            OverwritePolicy::Replaced => fs::rename(&self.path, place)?,
            OverwritePolicy::Stays => rename_to_nothing(&self.path, place)?,
        }
        self.is_named = true;
        File::open(place.parent().unwrap_or(place))?.sync_all()
    }
}

/// Renames a file, unless one of that name exists by now.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system can do this.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            renamed => return Ok(renamed?),
        }
    }
    match fs::symlink_metadata(to) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(from, to),
    }
}
