//! Copying from this host into the guest.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File, FileType, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use rustix::fs::{Access, OFlags, SeekFrom, access};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;

use super::ends::{CopyEnds, FileAction, LeftOut, ends_all, parent_and_name, shown};
use super::{
    CHUNK_BYTES, CopyObserver, CopyProgress, CopySummary, FileKind, GuestFiles, IN_FLIGHT, described, joined,
    kind, unfinished,
};
use crate::error::{ErrorKind, Result};

/// The source of a file of the guest.
enum UploadContent<'a> {
    /// A file of this host, with its mode and its holes.
    File { file: File, mode: u32, bytes: u64 },
    /// A stream that is read to its end.
    Stream(&'a mut (dyn AsyncRead + Send + Unpin)),
}

/// Checks the source of a copy into a guest before waiting for the guest: that it exists, is
/// readable, and can be copied by [`GuestFiles::upload`]. `guest` is the guest's name in errors.
///
/// # Errors
/// `Copy`, as for [`GuestFiles::upload`].
pub fn check_upload(from: &Path, guest: &str, to: &str, recursive: bool) -> Result<()> {
    look_here(from, recursive, &CopyEnds::of_upload(from, guest, to)).map(drop)
}

/// Returns the metadata of the source, if it can be copied.
fn look_here(from: &Path, recursive: bool, ends: &CopyEnds) -> Result<Metadata> {
    let metadata = fs::metadata(from).map_err(|source| ends.local(FileAction::Find, from, source))?;
    let is_pipe = metadata.file_type().is_fifo() && is_unnamed(from);
    if metadata.is_dir() && !recursive {
        return Err(ends.flat());
    }
    if !metadata.is_dir() && !metadata.is_file() && !is_pipe {
        return Err(ends.special(special(metadata.file_type()), "on this host"));
    }
    access(from, Access::READ_OK).map_err(|errno| ends.local(FileAction::Read, from, errno.into()))?;
    Ok(metadata)
}

impl GuestFiles {
    /// Copies a file, or with `recursive` a directory and everything below it, into the guest.
    ///
    /// If `to` is a directory, the copy is in it, with the name of its source, which for a symbolic
    /// link is the link's; otherwise `to` is its path. For a directory named by `.` or `..`, such
    /// as `site/.`, the content is copied, as by `cp -r`. Mode bits are copied; holes stay holes; a
    /// symbolic link below a directory is copied as one, whatever its target. An existing file is
    /// replaced as a whole. The copy ends where the source ends when it is read. A pipe without a
    /// name, such as `/dev/fd/63`, is read to its end.
    ///
    /// # Cancel safety
    /// A dropped copy leaves complete files, and possibly a temporary one, which
    /// [`tidy_up`](Self::tidy_up) removes; otherwise the first copy into the same directory after
    /// two minutes does.
    ///
    /// # Errors
    /// `Copy` with both ends, the failed action and its end; `CopyPart` if something below a
    /// directory could not be copied, and all else was.
    pub async fn upload(
        &self,
        from: &Path,
        to: &str,
        recursive: bool,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        let ends = CopyEnds::of_upload(from, &self.name, to);
        let metadata = look_here(from, recursive, &ends)?;
        if metadata.file_type().is_fifo() {
            let mut pipe = open_pipe(from).map_err(|source| ends.local(FileAction::Read, from, source))?;
            return self.upload_content(UploadContent::Stream(&mut pipe), to, &ends, report).await;
        }
        let to = Self::path(to);
        let found = self.look_for_place(to, metadata.is_dir(), &ends).await?;
        let place = match (found, typed_name(from)) {
            (Some(found), _) if kind(&found) != FileKind::Dir && metadata.is_dir() => {
                return Err(ends.file_there("in the guest"));
            }
            (Some(found), Some(name)) if kind(&found) == FileKind::Dir => {
                let name = name
                    .to_str()
                    .ok_or_else(|| ends.problem(ErrorKind::InvalidInput, "the copy needs a name in UTF-8"))?;
                joined(to, name)
            }
            _ if shown(to).trim_end_matches('/').is_empty() => "/".to_owned(),
            _ => shown(to).trim_end_matches('/').to_owned(),
        };
        let mut progress = CopyProgress::default();
        if metadata.is_dir() {
            let left_out = self.upload_tree(from, place, &metadata, &mut progress, report).await?;
            left_out.check(&ends, &progress.total.skipped)?;
        } else {
            self.upload_file(from, &place, &mut progress, report).await?;
        }
        Ok(progress.total)
    }

    /// Copies a stream to its end into a file of the guest; `name` is the stream's name in errors.
    ///
    /// An existing file is replaced as a whole and keeps its mode; a new one has the guest's
    /// default mode.
    ///
    /// # Cancel safety
    /// As [`upload`](Self::upload).
    ///
    /// # Errors
    /// `Copy`, also if `to` is a directory: the copy would have no name there.
    pub async fn upload_stream(
        &self,
        from: &mut (dyn AsyncRead + Send + Unpin),
        name: &str,
        to: &str,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        let ends = CopyEnds { from: name.to_owned(), to: format!("{}:{}", self.name, shown(to)) };
        self.upload_content(UploadContent::Stream(from), to, &ends, report).await
    }

    async fn upload_content(
        &self,
        content: UploadContent<'_>,
        to: &str,
        ends: &CopyEnds,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        let to = Self::path(to);
        let found = self.look_for_place(to, false, ends).await?;
        if found.is_some_and(|found| kind(&found) == FileKind::Dir) {
            return Err(ends.nameless("in the guest"));
        }
        let mut progress = CopyProgress::default();
        self.upload_to(content, to, ends, &mut progress, report).await?;
        Ok(progress.total)
    }

    /// Returns what exists at the destination.
    ///
    /// # Errors
    /// `Copy` for a directory that has to exist and does not, and for a link without a target.
    async fn look_for_place(
        &self,
        to: &str,
        is_dir: bool,
        ends: &CopyEnds,
    ) -> Result<Option<FileAttributes>> {
        let found = self.look(to, ends).await?;
        if found.is_some() {
            return Ok(found);
        }
        if to.ends_with("/.") || (to.ends_with('/') && !is_dir) {
            let there = self.look(shown(to).trim_end_matches('/'), ends).await?.is_some();
            return Err(ends.no_dir(there, "in the guest"));
        }
        match self.raw.lstat(to.trim_end_matches('/')).await {
            Ok(found) if kind(&found.attrs) == FileKind::Link => Err(ends.dangling("in the guest")),
            _ => Ok(None),
        }
    }

    /// Returns whether this is a directory of the guest.
    ///
    /// # Errors
    /// `Copy` if the guest does not reply.
    pub async fn is_dir(&self, path: &str) -> Result<bool> {
        let place = format!("{}:{path}", self.name);
        let ends = CopyEnds { from: place.clone(), to: place };
        Ok(self.look(Self::path(path), &ends).await?.is_some_and(|found| kind(&found) == FileKind::Dir))
    }

    async fn upload_tree(
        &self,
        from: &Path,
        to: String,
        metadata: &Metadata,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<LeftOut> {
        let (mut ahead, mut left_out) = (Vec::new(), LeftOut::default());
        // A failure at the top is a failure of the whole copy.
        let entries = self.upload_dir(from, &to, metadata.mode()).await?;
        ahead.push((entries, to));
        while let Some((mut entries, to)) = ahead.pop() {
            let Some((path, name)) = entries.pop() else { continue };
            let place = joined(&to, &name.to_string_lossy());
            ahead.push((entries, to));
            if name.to_str().is_none() {
                left_out.add_unnamed(format!("the name of {}", path.display()));
                continue;
            }
            let ends = CopyEnds { from: path.display().to_string(), to: format!("{}:{place}", self.name) };
            let done = match fs::symlink_metadata(&path) {
                Err(source) => Err(ends.local(FileAction::Read, &path, source)),
                Ok(found) if found.is_dir() => {
                    let entries = self.upload_dir(&path, &place, found.mode()).await;
                    entries.map(|entries| ahead.push((entries, place)))
                }
                Ok(found) if found.is_symlink() => match self.upload_link(&path, &place, &ends).await {
                    Ok(true) => {
                        progress.total.files += 1;
                        Ok(())
                    }
                    Ok(false) => {
                        left_out.add_unnamed(format!("the target of the link {}", path.display()));
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                Ok(found) if found.is_file() => self.upload_file(&path, &place, progress, report).await,
                Ok(_) => {
                    progress.total.skipped.push(path.display().to_string());
                    Ok(())
                }
            };
            done.or_else(|failure| left_out.add(failure))?;
        }
        Ok(left_out)
    }

    /// Creates a directory, and returns the content of its source, the last name first.
    async fn upload_dir(
        &self,
        from: &Path,
        to: &str,
        mode: u32,
    ) -> Result<Vec<(PathBuf, std::ffi::OsString)>> {
        let ends = CopyEnds { from: from.display().to_string(), to: format!("{}:{to}", self.name) };
        let read = fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = read.map_err(|source| ends.local(FileAction::Read, from, source))?;
        self.make_dir(to, mode, &ends).await?;
        let mut entries: Vec<_> =
            entries.into_iter().map(|entry| (entry.path(), entry.file_name())).collect();
        entries.sort_by(|(_, one), (_, other)| other.cmp(one));
        Ok(entries)
    }

    /// Creates a directory that its owner can use, unless it exists.
    async fn make_dir(&self, path: &str, mode: u32, ends: &CopyEnds) -> Result<()> {
        let mode = mode & 0o7777 | 0o700;
        let attrs = FileAttributes { permissions: Some(mode), ..FileAttributes::default() };
        let Err(error) = self.raw.mkdir(path, attrs.clone()).await else {
            // The guest's umask takes these bits away, and mkdir(2) those beyond the permissions.
            if mode & 0o7022 != 0 {
                let set = self.raw.setstat(path, attrs).await;
                set.map_err(|error| ends.remote(FileAction::Make, path, error))?;
            }
            return Ok(());
        };
        match self.look(path, ends).await? {
            Some(found) if kind(&found) == FileKind::Dir => Ok(()),
            Some(_) => Err(ends.file_there("in the guest")),
            None => Err(self.unmade(FileAction::Make, path, error, ends).await),
        }
    }

    /// Creates a link with the same target; returns false if the target is not UTF-8.
    async fn upload_link(&self, from: &Path, to: &str, ends: &CopyEnds) -> Result<bool> {
        let target = fs::read_link(from).map_err(|source| ends.local(FileAction::Read, from, source))?;
        let Some(target) = target.to_str() else { return Ok(false) };
        let (dir, name) = parent_and_name(to);
        let part = joined(dir, &unfinished(name));
        // OpenSSH has the two in another order than the draft. Source: OpenSSH, `PROTOCOL`, section
        // 4.1.
        if let Err(error) = self.raw.symlink(target, &part).await {
            return Err(self.unmade(FileAction::Make, to, error, ends).await);
        }
        if let Err(error) = self.rename(&part, to).await {
            let _ = self.raw.remove(&part).await;
            return Err(match self.raw.lstat(to).await {
                Ok(found) if kind(&found.attrs) == FileKind::Dir => {
                    ends.special("a directory", "in the guest")
                }
                _ => ends.remote(FileAction::Make, to, error),
            });
        }
        Ok(true)
    }

    async fn upload_file(
        &self,
        from: &Path,
        to: &str,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let ends = CopyEnds { from: from.display().to_string(), to: format!("{}:{to}", self.name) };
        let local = |source| ends.local(FileAction::Read, from, source);
        // It was a file when it was inspected, and may be a pipe by now: never wait for one.
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(from).map_err(local)?;
        let found = file.metadata().map_err(local)?;
        if !found.is_file() {
            return Err(ends.special(special(found.file_type()), "on this host"));
        }
        let content = UploadContent::File { file, mode: found.mode(), bytes: found.len() };
        self.upload_to(content, to, &ends, progress, report).await
    }

    /// Writes a file of the guest, which gets its name when it is complete.
    async fn upload_to(
        &self,
        content: UploadContent<'_>,
        to: &str,
        ends: &CopyEnds,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let found = self.look(to, ends).await?;
        let place = match &found {
            // A link to a file is kept, and its target is replaced.
            Some(found) if kind(found) == FileKind::File => self.resolved(to, ends).await?,
            Some(found) => return Err(ends.special(described(found), "in the guest")),
            None => to.to_owned(),
        };
        let (dir, name) = parent_and_name(&place);
        let part = joined(dir, &unfinished(name));
        self.set_unfinished(Some(part.clone()));
        progress.file = ends.from.clone();
        let mode = match &content {
            UploadContent::File { mode, .. } => Some(*mode),
            UploadContent::Stream(_) => found.and_then(|found| found.permissions).map(|mode| mode & 0o777),
        };
        let copied = self.write_part(content, mode, &part, ends, progress, report).await;
        let placed = match copied {
            Ok(()) => {
                let renamed = self.rename(&part, &place).await;
                renamed.map_err(|error| ends.remote(FileAction::Write, &place, error))
            }
            Err(error) => Err(error),
        };
        match placed {
            Ok(()) => self.set_unfinished(None),
            Err(_) => self.tidy_up().await,
        }
        placed?;
        progress.total.files += 1;
        Ok(())
    }

    async fn write_part(
        &self,
        content: UploadContent<'_>,
        mode: Option<u32>,
        part: &str,
        ends: &CopyEnds,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::EXCLUDE;
        // Until it is complete, only its owner has access; without a mode it has the guest's
        // default one.
        let attrs = FileAttributes { permissions: mode.map(|_| 0o600), ..FileAttributes::default() };
        let handle = match self.raw.open(part, flags, attrs).await {
            Ok(opened) => opened.handle,
            Err(error) => return Err(self.unmade(FileAction::Write, part, error, ends).await),
        };
        // Before anything is written: a leftover may fill the disk.
        if let Ok(begun) = self.raw.fstat(&handle).await {
            self.sweep(parent_and_name(part).0, &begun.attrs).await;
        }
        let mut draft = UploadDraft {
            files: self,
            handle: handle.clone(),
            part,
            ends,
            flying: VecDeque::new(),
            progress,
            report,
        };
        let written = draft.write_content(content).await;
        let size = match written {
            Ok(size) => size,
            Err(error) => {
                // Other files may be copied after this one.
                if !ends_all(&error) {
                    let _ = self.raw.close(handle).await;
                }
                return Err(error);
            }
        };
        let permissions = mode.map(|mode| mode & 0o7777);
        let attrs = FileAttributes { size: Some(size), permissions, ..FileAttributes::default() };
        let set = self.raw.fsetstat(&handle, attrs).await;
        let closed = self.raw.close(handle).await;
        match set.and(closed) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.unwritten(part, error, ends).await),
        }
    }

    /// Returns the error for a file that could not be written in the guest.
    async fn unwritten(&self, path: &str, error: SftpError, ends: &CopyEnds) -> crate::Error {
        let needed = 2 * u64::from(CHUNK_BYTES);
        match self.full(parent_and_name(path).0, &error, needed, ends).await {
            Some(full) => full,
            None => ends.remote(FileAction::Write, path, error),
        }
    }

    pub(super) fn tell(&self, progress: &mut CopyProgress, bytes: u64, report: CopyObserver<'_>) {
        progress.file_bytes += bytes;
        progress.total.bytes += bytes;
        report(progress);
    }
}

/// A temporary file of the guest that is being written.
struct UploadDraft<'a> {
    files: &'a GuestFiles,
    handle: String,
    part: &'a str,
    ends: &'a CopyEnds,
    /// The pending requests, the oldest first.
    flying: VecDeque<JoinHandle<Result<u64, SftpError>>>,
    progress: &'a mut CopyProgress,
    report: CopyObserver<'a>,
}

impl UploadDraft<'_> {
    /// Writes the whole content, and returns its length.
    async fn write_content(&mut self, content: UploadContent<'_>) -> Result<u64> {
        let size = match content {
            UploadContent::File { file, bytes, .. } => self.write_file(&file, bytes).await?,
            UploadContent::Stream(stream) => self.write_stream(stream).await?,
        };
        self.land_all().await?;
        Ok(size)
    }

    /// Writes a file of this host to its end, and returns where that was: its length may have
    /// changed, and the length of system files is never true.
    async fn write_file(&mut self, file: &File, bytes: u64) -> Result<u64> {
        let path = PathBuf::from(&self.ends.from);
        (self.progress.file_bytes, self.progress.file_size) = (0, bytes);
        let mut offset = 0;
        // A file with the length 0 has no holes, and may have content.
        let mut knows_holes = bytes > 0;
        loop {
            let next = if knows_holes { next_stretch(file, offset) } else { FileStretch::Unknown };
            let (begin, end) = match next {
                FileStretch::Data { begin, end } => (begin, end),
                FileStretch::Hole { end } => {
                    self.tell(end - offset);
                    return Ok(end);
                }
                FileStretch::Unknown => {
                    knows_holes = false;
                    (offset, u64::MAX)
                }
            };
            self.tell(begin - offset);
            offset = begin;
            while offset < end {
                let most = u64::from(CHUNK_BYTES).min(end - offset);
                let mut chunk = vec![0; usize::try_from(most).expect("a chunk is small")];
                let read = file.read_at(&mut chunk, offset);
                match read.map_err(|source| self.ends.local(FileAction::Read, &path, source))? {
                    0 => return Ok(offset),
                    read => chunk.truncate(read),
                }
                offset = self.write(chunk, offset).await?;
            }
        }
    }

    /// Writes a stream to its end, and returns its length.
    async fn write_stream(&mut self, stream: &mut (dyn AsyncRead + Send + Unpin)) -> Result<u64> {
        let path = PathBuf::from(&self.ends.from);
        (self.progress.file_bytes, self.progress.file_size) = (0, 0);
        let mut offset = 0;
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES as usize);
            let mut piece = (&mut *stream).take(CHUNK_BYTES.into());
            let read = piece.read_to_end(&mut chunk).await;
            if read.map_err(|source| self.ends.local(FileAction::Read, &path, source))? == 0 {
                return Ok(offset);
            }
            offset = self.write(chunk, offset).await?;
        }
    }

    /// Sends a piece, and returns where it ends.
    async fn write(&mut self, chunk: Vec<u8>, offset: u64) -> Result<u64> {
        if self.flying.len() >= IN_FLIGHT {
            self.land().await?;
        }
        let (raw, handle, bytes) = (self.files.raw.clone(), self.handle.clone(), chunk.len() as u64);
        self.flying
            .push_back(tokio::spawn(async move { raw.write(handle, offset, chunk).await.map(|_| bytes) }));
        Ok(offset + bytes)
    }

    /// Waits for the oldest pending request.
    async fn land(&mut self) -> Result<()> {
        let Some(oldest) = self.flying.pop_front() else { return Ok(()) };
        let written = oldest.await.map_err(|error| SftpError::UnexpectedBehavior(error.to_string()));
        match written.flatten() {
            Ok(bytes) => {
                self.tell(bytes);
                Ok(())
            }
            Err(error) => Err(self.files.unwritten(self.part, error, self.ends).await),
        }
    }

    async fn land_all(&mut self) -> Result<()> {
        while !self.flying.is_empty() {
            self.land().await?;
        }
        Ok(())
    }

    fn tell(&mut self, bytes: u64) {
        self.files.tell(self.progress, bytes, self.report);
    }
}

/// The next part of a file.
#[derive(Debug, PartialEq, Eq)]
enum FileStretch {
    Data {
        begin: u64,
        end: u64,
    },
    /// A hole up to the end of the file.
    Hole {
        end: u64,
    },
    /// The file system can't report it.
    Unknown,
}

/// Returns the start and the end of a file's next data.
///
/// Source: lseek(2), `SEEK_DATA` and `SEEK_HOLE`; a file system without holes reports one part.
fn next_stretch(file: &File, offset: u64) -> FileStretch {
    // The file may grow: its length only shows that there is no data beyond the offset if there is
    // none afterwards either.
    let mut end = None;
    loop {
        match (rustix::fs::seek(file, SeekFrom::Data(offset)), end) {
            (Ok(begin), _) => {
                return match rustix::fs::seek(file, SeekFrom::Hole(begin)) {
                    Ok(end) if end > begin => FileStretch::Data { begin, end },
                    _ => FileStretch::Unknown,
                };
            }
            (Err(Errno::NXIO), Some(end)) => return FileStretch::Hole { end },
            (Err(Errno::NXIO), None) => match file.metadata() {
                Ok(found) => end = Some(found.len().max(offset)),
                Err(_) => return FileStretch::Unknown,
            },
            (Err(_), _) => return FileStretch::Unknown,
        }
    }
}

/// Returns the last part of a path as it was typed; `None` if that is not a name in its directory.
fn typed_name(path: &Path) -> Option<&OsStr> {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|&byte| byte != b'/')? + 1;
    let name = bytes[..end].rsplit(|&byte| byte == b'/').next()?;
    (!matches!(name, b"." | b"..")).then(|| OsStr::from_bytes(name))
}

/// Returns whether a pipe has no name in any directory: a shell's `<(…)`, or standard input. A
/// named pipe is not read, since it is unknown whether a process ever writes to it.
pub(super) fn is_unnamed(pipe: &Path) -> bool {
    pipe.canonicalize().is_err()
}

/// Opens a pipe for waiting without blocking a thread.
fn open_pipe(path: &Path) -> io::Result<Receiver> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    Receiver::from_file(File::options().read(true).custom_flags(flags).open(path)?)
}

/// Returns the kind of a file, for errors.
pub(super) fn special(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a named pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    }
}

/// Returns whether the error is the end of the data.
pub(super) fn is_end(error: &SftpError) -> bool {
    matches!(error, SftpError::Status(status) if status.status_code == StatusCode::Eof)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_copy_is_the_one_that_was_typed() {
        let name = |path: &str| typed_name(Path::new(path)).map(|name| name.to_str().unwrap().to_owned());
        for (path, expected) in
            [("a", "a"), ("a/b", "b"), ("/a/b//", "b"), ("./...", "..."), ("../.a/", ".a")]
        {
            assert_eq!(name(path).as_deref(), Some(expected), "{path}");
        }
        for path in [".", "..", "/", "//", "a/.", "a/./", "a/..", "./"] {
            assert_eq!(name(path), None, "{path}");
        }
    }

    #[test]
    fn the_stretches_of_a_file_are_its_data_and_its_last_hole() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(next_stretch(&file, 0), FileStretch::Hole { end: 0 });
        file.set_len(1 << 20).unwrap();
        assert_eq!(next_stretch(&file, 0), FileStretch::Hole { end: 1 << 20 });
        file.write_all_at(&[7; 4096], 512 << 10).unwrap();
        let FileStretch::Data { begin, end } = next_stretch(&file, 0) else { panic!("there is data") };
        assert!(begin <= 512 << 10 && end >= (512 << 10) + 4096);
        assert_eq!(next_stretch(&file, end), FileStretch::Hole { end: 1 << 20 });
    }
}
