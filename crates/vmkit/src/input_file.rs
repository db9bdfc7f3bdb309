//! Opens the files that a user named, which may turn out to be anything.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
#[cfg(all(target_os = "linux", feature = "qemu"))]
use rustix::fs::{Access, access};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;

use crate::error::{Error, Result, ValueProblem};

/// How long a named pipe may have no writer.
const WRITER_LIMIT: Duration = Duration::from_secs(10);

/// Why the URL of a web server is refused where a file is needed.
const NO_URL: &str = "URLs are not fetched here";

/// A regular file, open for reading.
#[derive(Debug)]
pub(crate) struct InputFile {
    /// The open file.
    pub(crate) file: File,
    /// Where it is: absolute, without symbolic links.
    pub(crate) path: PathBuf,
    /// How long it is.
    pub(crate) bytes: u64,
}

impl InputFile {
    /// Opens the regular file at `path` and never waits for one: a FIFO or a device is refused
    /// unopened.
    ///
    /// # Errors
    /// `InvalidInput` on `field` where there is no file, one that may not be read, or anything but
    /// a regular file.
    pub(crate) fn open(field: &'static str, path: &Path) -> Result<Self> {
        let failed = |source: io::Error| failure(field, path, source);
        let check = |metadata: &Metadata| match special(metadata) {
            Some(what) => {
                Err(Error::invalid(field, path.display(), format!("this is {what}: name a regular file")))
            }
            None => Ok(()),
        };
        // Asked before it is opened, since opening alone has effects on some devices, and after,
        // since only that is certain. And before the path is resolved, which has no meaning for
        // what a pipe of this process is called below `/dev/fd`.
        check(&path.metadata().map_err(failed)?)?;
        let found = path.canonicalize().map_err(failed)?;
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&found).map_err(failed)?;
        let metadata = file.metadata().map_err(Error::io("examine", path))?;
        check(&metadata)?;
        Ok(Self { file, path: found, bytes: metadata.len() })
    }

    /// Refuses a path that names an open file of one process, such as `/dev/stdin`: a VM needs its
    /// files for longer.
    ///
    /// # Errors
    /// `InvalidInput` on `field`, with the path that the file has.
    #[cfg(any(test, all(feature = "images", feature = "ssh"), all(target_os = "linux", feature = "qemu")))]
    pub(crate) fn check_lasts(field: &'static str, path: &Path) -> Result<()> {
        let of_process = path.starts_with("/proc") && path.iter().any(|part| part == "fd");
        let is_stream = ["/dev/fd", "/dev/stdin"].iter().any(|stream| path.starts_with(stream));
        // A pipe is refused where it is opened.
        if !(of_process || is_stream) || !path.is_file() {
            return Ok(());
        }
        let own = path.canonicalize().map_or_else(|_| String::new(), |own| format!(", {}", own.display()));
        let why = format!(
            "this is an open file of one process, and the VM needs it later: name the file itself{own}"
        );
        Err(Error::invalid(field, path.display(), why))
    }

    /// Opens a data disk, and refuses one to write to that this user may not write to, or that lies
    /// on a read-only file system.
    ///
    /// # Errors
    /// `InvalidInput` on `data_disks`.
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    pub(crate) fn data_disk(path: &Path, readonly: bool) -> Result<Self> {
        let opened = Self::open("data_disks", path)?;
        if !readonly && let Err(error) = access(&opened.path, Access::WRITE_OK) {
            let why = match io::Error::from(error).kind() {
                io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only",
                _ => "this user may not write to it",
            };
            let why = format!("{why}: add `:ro` to make the disk read-only, or use another");
            return Err(Error::invalid("data_disks", path.display(), why));
        }
        Ok(opened)
    }
}

/// Opens a file of vmkit's own for reading, and never waits for one: what is no regular file, such
/// as a FIFO that took its place, is refused.
///
/// # Errors
/// `InvalidData` for what is no regular file.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    match special(&file.metadata()?) {
        Some(what) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("this is {what}"))),
        None => Ok(file),
    }
}

/// A regular file or a pipe, open to be read once, from its beginning to its end.
#[derive(Debug)]
pub(crate) struct InputStream {
    /// The open file.
    pub(crate) file: File,
    /// Where it is: absolute and without symbolic links where it is a regular file.
    #[cfg_attr(not(feature = "images"), expect(dead_code, reason = "only an import names its source"))]
    pub(crate) path: PathBuf,
    /// How long a regular file is.
    pub(crate) bytes: Option<u64>,
}

impl InputStream {
    /// Opens a regular file, or a pipe: `<(…)` of a shell, `/dev/stdin`, or a named one, which
    /// something has to write to within [`WRITER_LIMIT`].
    ///
    /// # Errors
    /// `InvalidInput` on `field` for what is neither, is not there, or may not be read.
    pub(crate) fn open(field: &'static str, path: &Path) -> Result<Self> {
        let failed = |source: io::Error| failure(field, path, source);
        let is_pipe = |metadata: &Metadata| metadata.file_type().is_fifo();
        let metadata = path.metadata().map_err(failed)?;
        let resolved = path.canonicalize();
        if !is_pipe(&metadata) && (resolved.is_ok() || !metadata.is_file()) {
            let InputFile { file, path, bytes } = InputFile::open(field, path)?;
            return Ok(Self { file, path, bytes: Some(bytes) });
        }
        // What has no name, such as the text that a shell hands over as `<<EOF`, is opened by its
        // descriptor.
        let is_named = resolved.is_ok();
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
        let file = file.map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if is_pipe(&metadata) {
            if !has_writer(&file, is_named.then_some(WRITER_LIMIT)).map_err(failed)? {
                let why = format!(
                    "this is a named pipe, and nothing wrote to it within {} s",
                    WRITER_LIMIT.as_secs()
                );
                return Err(Error::invalid(field, path.display(), why));
            }
            fcntl_setfl(&file, OFlags::empty()).map_err(|errno| failed(errno.into()))?;
        }
        let bytes = metadata.is_file().then_some(metadata.len());
        Ok(Self { file, path: path.to_owned(), bytes })
    }
}

/// Waits until there is something to read, or the end; without a limit for a pipe that was opened
/// with its writer there.
fn has_writer(file: &File, limit: Option<Duration>) -> io::Result<bool> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    loop {
        match poll(&mut [PollFd::new(file, PollFlags::IN)], limit.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn failure(field: &'static str, path: &Path, source: io::Error) -> Error {
    let refused = |why: &str| Error::invalid(field, path.display(), why);
    match source.kind() {
        io::ErrorKind::NotFound => match as_url(path) {
            Some(url) => Error::invalid(field, url, NO_URL).with_problem(ValueProblem::UrlNotFetched),
            None => refused("there is no such file"),
        },
        io::ErrorKind::NotADirectory => refused("a part of this path is not a directory"),
        io::ErrorKind::PermissionDenied => refused("this user may not read it"),
        _ => Error::io("open", path)(source),
    }
}

/// Returns the URL of a web server that was taken for a path, and made absolute perhaps.
fn as_url(path: &Path) -> Option<String> {
    let mut parts = path.components().map(|part| part.as_os_str().to_string_lossy());
    let scheme = parts.find(|part| ["http:", "https:"].contains(&&**part))?;
    Some(format!("{scheme}//{}", parts.collect::<Vec<_>>().join("/")))
}

/// Returns what this is, unless it is a regular file.
fn special(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_fifo() => Some("a pipe"),
        () if kind.is_socket() => Some("a socket"),
        () => Some("a device"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::thread;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    fn content(path: &Path) -> String {
        let mut text = String::new();
        InputStream::open("file", path).unwrap().file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_pipe_of_this_process_is_read_to_its_end_and_is_no_regular_file() {
        let (read, mut write) = io::pipe().unwrap();
        let path = PathBuf::from(format!("/dev/fd/{}", read.as_raw_fd()));
        let error = InputFile::open("file", &path).unwrap_err().to_string();
        assert!(error.ends_with("this is a pipe: name a regular file"), "{error}");
        let writer = thread::spawn(move || write.write_all(&[b'x'; 100_000]).unwrap());
        assert_eq!(content(&path).len(), 100_000);
        writer.join().unwrap();
    }

    #[test]
    fn a_named_pipe_is_read_once_something_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let to = path.clone();
        let writer = thread::spawn(move || std::fs::write(to, "later").unwrap());
        assert_eq!(content(&path), "later");
        writer.join().unwrap();
    }

    #[test]
    fn a_file_without_a_name_is_read_by_its_descriptor() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"here").unwrap();
        assert_eq!(content(&PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()))), "here");
    }

    #[test]
    fn a_file_that_only_one_process_has_open_is_no_file_of_a_vm() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let descriptor = file.as_file().as_raw_fd();
        for path in [format!("/dev/fd/{descriptor}"), format!("/proc/self/fd/{descriptor}")] {
            let error = InputFile::check_lasts("image", Path::new(&path)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("image: {path:?}: this is an open file of one process")));
            assert!(error.ends_with(&format!("name the file itself, {}", file.path().display())), "{error}");
        }
        InputFile::check_lasts("image", file.path()).unwrap();
    }

    #[test]
    fn a_directory_and_a_device_are_no_input() {
        for (path, what) in [
            ("/", "a directory"),
            ("/dev/null", "a device"),
            ("/no/file", "no such file"),
            ("https://example.org/a.iso", "file: \"https://example.org/a.iso\": URLs are not fetched here"),
            ("/home/me/http:/example.org/a.iso", "\"http://example.org/a.iso\": URLs are not"),
        ] {
            let error = InputStream::open("file", Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
