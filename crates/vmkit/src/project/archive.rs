//! A file or a folder of the host as an archive (tar), created while it is sent.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use tar::{Builder, EntryType, Header};
use tokio::net::unix::pipe::Receiver;

use crate::blocking::BlockingWork;
use crate::error::Error;
use crate::vmfile::CopySpec;

/// The name of the entry at the top of an archive.
const TOP: &str = "it";
/// The name of the last entry: an archive without it was interrupted, even if it looks complete.
const LAST: &str = "end";
/// How much of a file is read before its length is written: a smaller file has the length that was
/// read, even if it changes meanwhile or the file system reports another length.
const WHOLE_BYTES: u64 = 8 << 20;
/// The longest file of unknown length, such as some in `/proc`.
const MOST_UNTOLD_BYTES: u64 = 256 << 20;

/// An archive that is being created.
#[derive(Debug)]
pub(super) struct TarArchive {
    writer: BlockingWork<Result<(), (PathBuf, io::Error)>>,
}

impl TarArchive {
    /// Starts to create an archive of the source, in a thread of its own that is as fast as the
    /// reader; returns the reader, too.
    ///
    /// # Errors
    /// `Host` without a thread; otherwise `Io`.
    pub(super) fn of(copy: &CopySpec) -> Result<(Receiver, Self), Error> {
        let pipe = || {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&reader, true)?;
            Ok((Receiver::from_owned_fd_unchecked(reader)?, File::from(writer)))
        };
        let (bytes, writer) = pipe().map_err(Error::io("archive", &copy.from))?;
        let copy = copy.clone();
        Ok((bytes, Self { writer: BlockingWork::begin(move || write(writer, &copy))? }))
    }

    /// Returns the failure to read the host's files, once the archive is no longer read.
    ///
    /// A reader that stops early is no failure of the archive.
    pub(super) async fn failure(self) -> Option<(PathBuf, io::Error)> {
        let failed = self.writer.outcome().await.err();
        failed.filter(|(_, error)| error.kind() != io::ErrorKind::BrokenPipe)
    }
}

/// Writes the archive; after a failure the last entry is missing.
pub(super) fn write(to: File, copy: &CopySpec) -> Result<(), (PathBuf, io::Error)> {
    let mut archive = Builder::new(io::BufWriter::with_capacity(64 << 10, to));
    archive.follow_symlinks(false);
    let failed = |error| (copy.from.clone(), error);
    // A link at the top is followed.
    let kind = fs::metadata(&copy.from).map_err(failed)?;
    if is_special(&kind) {
        return Err(failed(io::Error::other("this is neither a file, a directory nor a link")));
    }
    add(&mut archive, &copy.from, Path::new(TOP), &kind, copy.mode)?;
    let mut header = Header::new_gnu();
    header.set_mode(0o600);
    header.set_size(0);
    archive.append_data(&mut header, LAST, io::empty()).map_err(failed)?;
    archive.into_inner().and_then(|mut to| io::Write::flush(&mut to)).map_err(failed)
}

fn add(
    archive: &mut Builder<impl io::Write>,
    from: &Path,
    name: &Path,
    kind: &fs::Metadata,
    mode: Option<u32>,
) -> Result<(), (PathBuf, io::Error)> {
    let failed = |error| (from.to_owned(), error);
    let mut header = Header::new_gnu();
    header.set_metadata(kind);
    // The host's owner has no meaning in the guest.
    header.set_uid(0);
    header.set_gid(0);
    if kind.is_symlink() {
        let target = fs::read_link(from).map_err(failed)?;
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        return archive.append_link(&mut header, name, target).map_err(failed);
    }
    if kind.is_dir() {
        // A folder without execute permission is useless, whatever the mode of its files.
        let own = kind.permissions().mode() & 0o7777;
        header.set_mode(mode.map_or(own, |mode| mode | (mode & 0o444) >> 2 | 0o700));
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty()).map_err(failed)?;
        for (path, kind) in entries(from)? {
            let below = name.join(path.file_name().expect("an entry has a name"));
            unless_gone(&path, add(archive, &path, &below, &kind, mode))?;
        }
        return Ok(());
    }
    if is_special(kind) {
        // Reported beforehand, by `check`.
        return Ok(());
    }
    if let Some(mode) = mode {
        header.set_mode(mode);
    }
    let (bytes, mut content) = content(open_regular(from).map_err(failed)?).map_err(failed)?;
    header.set_size(bytes);
    archive.append_data(&mut header, name, &mut content).map_err(failed)
}

/// Returns the entries of a folder, sorted by name. An entry that disappears meanwhile is left out.
pub(super) fn entries(folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, (PathBuf, io::Error)> {
    let read = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = read.map_err(|error| (folder.to_owned(), error))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut found = Vec::with_capacity(entries.len());
    for entry in entries {
        match entry.metadata() {
            Ok(kind) => found.push((entry.path(), kind)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err((entry.path(), error)),
        }
    }
    Ok(found)
}

/// Ignores an entry that was removed after its folder was read.
///
/// # Errors
/// Every other failure.
pub(super) fn unless_gone(
    path: &Path,
    done: Result<(), (PathBuf, io::Error)>,
) -> Result<(), (PathBuf, io::Error)> {
    match done {
        Err((gone, error)) if error.kind() == io::ErrorKind::NotFound && gone == path => Ok(()),
        done => done,
    }
}

/// Returns whether this can't be copied: a socket, a named pipe, a device.
pub(super) fn is_special(kind: &fs::Metadata) -> bool {
    !kind.is_file() && !kind.is_dir() && !kind.is_symlink()
}

/// Checks that a file or a folder can be read completely, and returns what the copy leaves out.
///
/// # Errors
/// The failure to read a part, with its path.
pub(super) fn check(from: &Path) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let kind = fs::metadata(from).map_err(|error| (from.to_owned(), error))?;
    if is_special(&kind) {
        return Err((from.to_owned(), io::Error::other("this is neither a file, a directory nor a link")));
    }
    let (mut ahead, mut left_out) = (vec![(from.to_owned(), kind)], Vec::new());
    while let Some((path, kind)) = ahead.pop() {
        let looked = match () {
            () if kind.is_dir() => entries(&path).map(|entries| ahead.extend(entries.into_iter().rev())),
            () if kind.is_file() => open_regular(&path).map(drop).map_err(|error| (path.clone(), error)),
            () => Ok(()),
        };
        match path == from {
            true => looked?,
            false => unless_gone(&path, looked)?,
        }
        if is_special(&kind) {
            left_out.push(path);
        }
    }
    Ok(left_out)
}

/// Opens a regular file, without blocking on a named pipe.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("this is not a regular file")),
    }
}

/// Returns the length for a file's entry, and a reader of that many bytes.
fn content(mut file: File) -> io::Result<(u64, impl Read)> {
    let mut begin = Vec::new();
    (&mut file).take(WHOLE_BYTES).read_to_end(&mut begin)?;
    let mut bytes = begin.len() as u64;
    if bytes == WHOLE_BYTES {
        bytes = file.metadata()?.len();
        if bytes < WHOLE_BYTES {
            (&mut file).take(MOST_UNTOLD_BYTES).read_to_end(&mut begin)?;
            bytes = begin.len() as u64;
        }
    }
    // Later growth is ignored, and a truncated file is a failure: the length was written already.
    let left = bytes - begin.len() as u64;
    Ok((bytes, io::Cursor::new(begin).chain(ExactReader { file, left })))
}

/// As many bytes of a file as it had when its length was read.
struct ExactReader {
    file: File,
    left: u64,
}

impl io::Read for ExactReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        match self.file.read(&mut buffer[..most])? {
            0 if most > 0 => Err(io::Error::other(
                "the file became shorter while it was copied (expected one that is not written to)",
            )),
            read => {
                self.left -= read as u64;
                Ok(read)
            }
        }
    }
}
