//! A file or a folder of the host as an archive (tar), made while it is sent.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use rustix::pipe::{PipeFlags, pipe_with};
use tar::{Builder, EntryType, Header};
use tokio::net::unix::pipe::Receiver;

use crate::vmfile::Copy;

/// What the entry at the top of an archive is called.
const TOP: &str = "it";
/// The name of the last entry: an archive without it was interrupted, even if it looks whole.
const LAST: &str = "end";

/// An archive that is being made.
#[derive(Debug)]
pub(super) struct Archive {
    writer: JoinHandle<Result<(), (PathBuf, io::Error)>>,
}

impl Archive {
    /// Begins to make one of what is to be copied, in a thread of its own that goes as fast as
    /// somebody reads; answers its bytes, too.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn of(copy: &Copy) -> io::Result<(Receiver, Self)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&reader, true)?;
        let bytes = Receiver::from_owned_fd_unchecked(reader)?;
        let copy = copy.clone();
        let write = move || write(File::from(writer), &copy);
        let writer = thread::Builder::new().name("vmkit-archive".into()).spawn(write)?;
        Ok((bytes, Self { writer }))
    }

    /// Returns what could not be read of the host's files, once the archive is no longer read.
    ///
    /// A reader that stops early is no failure of the archive.
    pub(super) async fn failure(self) -> Option<(PathBuf, io::Error)> {
        // It may be in the middle of a block of a slow disk.
        match tokio::task::spawn_blocking(|| self.writer.join()).await.expect("joining does not panic") {
            Ok(Err((_, error))) if error.kind() == io::ErrorKind::BrokenPipe => None,
            Ok(written) => written.err(),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Writes the archive; one whose writing fails lacks its last entry.
pub(super) fn write(to: File, copy: &Copy) -> Result<(), (PathBuf, io::Error)> {
    let mut archive = Builder::new(io::BufWriter::with_capacity(64 << 10, to));
    archive.follow_symlinks(false);
    let failed = |error| (copy.from.clone(), error);
    // What a link at the top leads to is what gets copied.
    let kind = fs::metadata(&copy.from).map_err(failed)?;
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
    // Whose it is on the host means nothing in the guest.
    header.set_uid(0);
    header.set_gid(0);
    if kind.is_symlink() {
        let target = fs::read_link(from).map_err(failed)?;
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        return archive.append_link(&mut header, name, target).map_err(failed);
    }
    if kind.is_dir() {
        // A folder without execute permission is of no use, whatever the mode of its files.
        let own = kind.permissions().mode() & 0o7777;
        header.set_mode(mode.map_or(own, |mode| mode | (mode & 0o444) >> 2 | 0o700));
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty()).map_err(failed)?;
        let entries = fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = entries.map_err(failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let kind = entry.metadata().map_err(|error| (entry.path(), error))?;
            add(archive, &entry.path(), &name.join(entry.file_name()), &kind, mode)?;
        }
        return Ok(());
    }
    if !kind.is_file() {
        return Err(failed(io::Error::other("this is neither a file nor a folder nor a link")));
    }
    if let Some(mode) = mode {
        header.set_mode(mode);
    }
    let file = File::open(from).map_err(failed)?;
    // The length was written already: what grows meanwhile is cut, and what shrinks is a failure.
    let length = header.size().map_err(failed)?;
    let mut content = Exact { file, left: length };
    archive.append_data(&mut header, name, &mut content).map_err(failed)
}

/// As many bytes of a file as it had when its length was looked at.
struct Exact {
    file: File,
    left: u64,
}

impl io::Read for Exact {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        match self.file.read(&mut buffer[..most])? {
            0 if most > 0 => Err(io::Error::other("the file became shorter while it was copied")),
            read => {
                self.left -= read as u64;
                Ok(read)
            }
        }
    }
}
