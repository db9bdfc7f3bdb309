//! Copying from the guest to this host. Nothing that the guest sends leads out of the directory
//! that the caller named.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags};
use rustix::fs::{AtFlags, Mode, OFlags, fchmod, mkdirat, open, openat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe::Sender;
use tokio::task::JoinHandle;

use super::ends::{CopyEnds, FileAction, LeftOut, ends_all};
use super::upload::{is_end, is_unnamed, special};
use super::{
    CHUNK_BYTES, CopyObserver, CopyProgress, CopySummary, FileKind, GuestFiles, IN_FLIGHT, described,
    is_missing, joined, kind, typed_name, unfinished,
};
use crate::error::{Error, ErrorKind, Result};
use crate::steps::step;

/// The smallest run of zeros that becomes a hole: a block of every usual file system.
const HOLE_BYTES: usize = 4096;
/// The limits of one directory of the guest: the number of names, and their total length. An
/// endless directory would fill this process's memory.
const MOST_NAMES: usize = 1_000_000;
const MOST_NAME_BYTES: usize = 64 << 20;

/// An open directory of this host, with its path.
#[derive(Debug)]
struct HostDir {
    fd: OwnedFd,
    path: PathBuf,
}

/// A file that is removed when this is dropped, unless it was kept.
struct PartialFile<'a> {
    dir: &'a HostDir,
    name: String,
    kept: bool,
}

impl Drop for PartialFile<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = unlinkat(&self.dir.fd, &self.name, AtFlags::empty());
        }
    }
}

/// Where the content of a file of the guest is written.
enum DownloadTarget<'a> {
    /// A new file of this host, with holes in the place of zeros.
    File(&'a File),
    /// A stream of bytes.
    Stream(&'a mut (dyn AsyncWrite + Send + Unpin)),
}

/// An open file of the guest, with its length when it was inspected.
struct GuestSource<'a> {
    handle: &'a str,
    path: &'a str,
    size: u64,
}

/// A directory of the guest that is still to be copied, with its destination.
struct PendingDir {
    from: String,
    to: Arc<HostDir>,
}

/// Checks the destination of a copy out of a guest before waiting for the guest: its directory has
/// to exist. `guest` is the guest's name in errors.
///
/// # Errors
/// `Copy`, as for [`GuestFiles::download`].
pub fn check_download(guest: &str, from: &str, to: &Path) -> Result<()> {
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    match parent {
        Some(parent) if to.symlink_metadata().is_err() => open_dir(parent)
            .map(drop)
            .map_err(|source| CopyEnds::of_download(guest, from, to).local(FileAction::Write, to, source)),
        _ => Ok(()),
    }
}

impl GuestFiles {
    /// Copies a file, or with `recursive` a directory and everything below it, out of the guest.
    ///
    /// If `to` is a directory, the copy is in it, with the name of its source; otherwise `to` is
    /// its path. For a directory named by `.` or `..`, such as `/srv/.`, the content is copied, as
    /// by `cp -r`. Permission bits are copied, without set-UID and the like; holes and runs of
    /// zeros become holes; a symbolic link below a directory is copied as one, and never followed
    /// on this host. An existing file is replaced as a whole. A pipe without a name, such as
    /// `/dev/fd/63`, is written to.
    ///
    /// # Cancel safety
    /// A dropped copy leaves only complete files.
    ///
    /// # Errors
    /// `Copy` with both ends, the failed action and its end; `CopyPart` if something below a
    /// directory could not be copied, and all else was.
    pub async fn download(
        &self,
        from: &str,
        to: &Path,
        recursive: bool,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        let ends = CopyEnds::of_download(&self.name, from, to);
        let from = Self::path(from);
        let found = self.look_for_source(from, &ends).await?;
        let is_dir = kind(&found) == FileKind::Dir;
        if is_dir && !recursive {
            return Err(ends.flat());
        }
        if !is_dir && to.metadata().is_ok_and(|found| found.file_type().is_fifo()) && is_unnamed(to) {
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            let opened = File::options().write(true).custom_flags(flags).open(to).and_then(Sender::from_file);
            let mut pipe = opened.map_err(|source| ends.local(FileAction::Write, to, source))?;
            return self.download_content(from, &found, &mut pipe, &ends, report).await;
        }
        let mut progress = CopyProgress::default();
        let name = typed_name(from);
        if is_dir && name.is_none() && to.is_dir() {
            let dir = HostDir {
                fd: open_dir(to).map_err(|source| ends.local(FileAction::Write, to, source))?,
                path: to.into(),
            };
            let ahead = PendingDir { from: from.to_owned(), to: Arc::new(dir) };
            let left_out = self.download_tree(ahead, &mut progress, report).await?;
            left_out.check(&ends, &progress.total.skipped)?;
            return Ok(progress.total);
        }
        let place = place_of(to, name, is_dir, &ends)?;
        let (Some(name), Some(parent)) = (place.file_name().and_then(|name| name.to_str()), place.parent())
        else {
            return Err(ends.problem(ErrorKind::InvalidInput, "the copy needs a name in UTF-8"));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let fd = open_dir(parent).map_err(|source| ends.local(FileAction::Write, &place, source))?;
        let dir = HostDir { fd, path: parent.to_owned() };
        if is_dir {
            let made = self.make_dir_here(from, &dir, name, found.permissions)?;
            let ahead = PendingDir { from: from.to_owned(), to: Arc::new(made) };
            let left_out = self.download_tree(ahead, &mut progress, report).await?;
            left_out.check(&ends, &progress.total.skipped)?;
        } else {
            self.download_file(from, &found, &dir, name, &mut progress, report).await?;
        }
        Ok(progress.total)
    }

    /// Copies a file of the guest to a stream; `name` is the stream's name in errors.
    ///
    /// # Errors
    /// `Copy` with both ends, the failed action and its end; also for a directory. What was
    /// received before a failure is written.
    pub async fn download_stream(
        &self,
        from: &str,
        to: &mut (dyn AsyncWrite + Send + Unpin),
        name: &str,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        let ends = CopyEnds { from: format!("{}:{from}", self.name), to: name.to_owned() };
        let from = Self::path(from);
        let found = self.look_for_source(from, &ends).await?;
        self.download_content(from, &found, to, &ends, report).await
    }

    async fn download_content(
        &self,
        from: &str,
        found: &FileAttributes,
        to: &mut (dyn AsyncWrite + Send + Unpin),
        ends: &CopyEnds,
        report: CopyObserver<'_>,
    ) -> Result<CopySummary> {
        if kind(found) != FileKind::File {
            return Err(ends.special(described(found), "in the guest"));
        }
        let mut progress = CopyProgress { file: ends.from.clone(), ..CopyProgress::default() };
        progress.file_size = found.size.unwrap_or(0);
        let target = DownloadTarget::Stream(&mut *to);
        self.read_into(target, from, progress.file_size, ends, &mut progress, report).await?;
        to.flush().await.map_err(|source| ends.local(FileAction::Write, Path::new(&ends.to), source))?;
        progress.total.files += 1;
        Ok(progress.total)
    }

    async fn look_for_source(&self, from: &str, ends: &CopyEnds) -> Result<FileAttributes> {
        let found = self.look(from, ends).await?;
        found.ok_or_else(|| ends.problem(ErrorKind::NotFound, "there is no such file in the guest"))
    }

    async fn download_tree(
        &self,
        top: PendingDir,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<LeftOut> {
        let mut left_out = LeftOut::default();
        let ends = |from: &str, to: &HostDir| CopyEnds {
            from: format!("{}:{from}", self.name),
            to: to.path.display().to_string(),
        };
        // A failure at the top is a failure of the whole copy.
        let listed = self.list(&top.from, &ends(&top.from, &top.to)).await?;
        let mut ahead = self.download_dir(&top, listed, &mut left_out, progress, report).await?;
        while let Some(next) = ahead.pop() {
            let below = match self.list(&next.from, &ends(&next.from, &next.to)).await {
                Ok(listed) => self.download_dir(&next, listed, &mut left_out, progress, report).await?,
                Err(failure) => {
                    left_out.add(failure)?;
                    continue;
                }
            };
            if ahead.len() + below.len() > MOST_NAMES {
                let problem = format!("the guest has more than {MOST_NAMES} directories in one directory");
                return Err(ends(&next.from, &next.to).problem(ErrorKind::Guest, problem));
            }
            ahead.extend(below);
        }
        Ok(left_out)
    }

    /// Copies everything in a directory of the guest except the content of its subdirectories,
    /// which are returned.
    async fn download_dir(
        &self,
        at: &PendingDir,
        listed: Vec<(String, FileAttributes)>,
        left_out: &mut LeftOut,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<Vec<PendingDir>> {
        let mut dirs = Vec::new();
        for (name, found) in listed {
            let place = joined(&at.from, &name);
            let path = at.to.path.join(&name);
            let ends = CopyEnds { from: format!("{}:{place}", self.name), to: path.display().to_string() };
            // A name that is not UTF-8 has this character in it, and no file has that name.
            if name.contains(char::REPLACEMENT_CHARACTER)
                && self.raw.lstat(&place).await.is_err_and(|error| is_missing(&error))
            {
                left_out.add_unnamed(format!("the name of {}:{place}", self.name));
                continue;
            }
            let done = match kind(&found) {
                FileKind::Dir => {
                    let made = self.make_dir_here(&place, &at.to, &name, found.permissions);
                    made.map(|made| dirs.push(PendingDir { from: place.clone(), to: Arc::new(made) }))
                }
                FileKind::Link => match self.download_link(&place, &at.to, &name, &ends).await {
                    Ok(true) => {
                        progress.total.files += 1;
                        Ok(())
                    }
                    Ok(false) => {
                        left_out.add_unnamed(format!("the target of the link {}:{place}", self.name));
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                FileKind::File => self.download_file(&place, &found, &at.to, &name, progress, report).await,
                FileKind::Other => {
                    progress.total.skipped.push(format!("{}:{place}", self.name));
                    Ok(())
                }
            };
            done.or_else(|failure| left_out.add(failure))?;
        }
        Ok(dirs)
    }

    /// Creates a directory of this host for one of the guest's, or opens an existing one.
    fn make_dir_here(&self, from: &str, parent: &HostDir, name: &str, mode: Option<u32>) -> Result<HostDir> {
        let path = parent.path.join(name);
        let ends = CopyEnds { from: format!("{}:{from}", self.name), to: path.display().to_string() };
        make_dir(parent, name, mode).map_err(|source| match source.kind() {
            io::ErrorKind::NotADirectory => ends.file_there("on this host"),
            _ => ends.local(FileAction::Make, &path, source),
        })
    }

    /// Returns the content of a directory of the guest, sorted by name, after checking that no name
    /// leads elsewhere.
    async fn list(&self, path: &str, ends: &CopyEnds) -> Result<Vec<(String, FileAttributes)>> {
        let failed = |error| ends.remote(FileAction::Read, path, error);
        let handle = self.raw.opendir(path).await.map_err(failed)?.handle;
        let read = self.names(&handle, path, ends).await;
        let mut found = self.close(handle, read, failed).await?;
        found.retain(|(name, _)| name != "." && name != "..");
        for (name, _) in &found {
            check_name(name, ends)?;
        }
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(found)
    }

    /// Returns the names in an open directory, as the guest sends them.
    async fn names(
        &self,
        handle: &str,
        path: &str,
        ends: &CopyEnds,
    ) -> Result<Vec<(String, FileAttributes)>> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        loop {
            match self.raw.readdir(handle).await {
                Ok(names) => {
                    bytes += names.files.iter().map(|file| file.filename.len()).sum::<usize>();
                    found.extend(names.files.into_iter().map(|file| (file.filename, file.attrs)));
                    if found.len() > MOST_NAMES || bytes > MOST_NAME_BYTES {
                        let problem = format!(
                            "the guest has more than {MOST_NAMES} files, or {} MiB of names, in the directory {path}",
                            MOST_NAME_BYTES >> 20
                        );
                        return Err(ends.problem(ErrorKind::Guest, problem));
                    }
                }
                Err(error) if is_end(&error) => return Ok(found),
                Err(error) => return Err(ends.remote(FileAction::Read, path, error)),
            }
        }
    }

    /// Creates a link with the same target; returns false if the target is probably not UTF-8,
    /// since it has a replacement character.
    async fn download_link(&self, from: &str, dir: &HostDir, name: &str, ends: &CopyEnds) -> Result<bool> {
        let answer =
            self.raw.readlink(from).await.map_err(|error| ends.remote(FileAction::Read, from, error))?;
        let target = answer.files.into_iter().next().map(|file| file.filename).unwrap_or_default();
        if target.contains(char::REPLACEMENT_CHARACTER) {
            return Ok(false);
        }
        let path = dir.path.join(name);
        let part = PartialFile { dir, name: unfinished(name), kept: false };
        let made = step("create a symbolic link")
            .and_then(|()| symlinkat(target, &dir.fd, &part.name).map_err(io::Error::from))
            .and_then(|()| place(part, name));
        made.map(|()| true).map_err(|source| ends.local(FileAction::Make, &path, source))
    }

    async fn download_file(
        &self,
        from: &str,
        found: &FileAttributes,
        dir: &HostDir,
        name: &str,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let path = dir.path.join(name);
        let ends = CopyEnds { from: format!("{}:{from}", self.name), to: path.display().to_string() };
        if kind(found) != FileKind::File {
            return Err(ends.special(described(found), "in the guest"));
        }
        match std::fs::symlink_metadata(&path) {
            Ok(there) if !there.is_file() && !there.is_symlink() => {
                return Err(ends.special(special(there.file_type()), "on this host"));
            }
            _ => {}
        }
        let local = |source: io::Error| ends.local(FileAction::Write, &path, source);
        let part = PartialFile { dir, name: unfinished(name), kept: false };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = step("create a file for a copy")
            .and_then(|()| Ok(openat(&dir.fd, &part.name, flags, Mode::from_raw_mode(0o600))?))
            .map_err(local)?;
        let file = File::from(file);
        progress.file.clone_from(&ends.from);
        (progress.file_bytes, progress.file_size) = (0, found.size.unwrap_or(0));
        let size = found.size.unwrap_or(0);
        self.read_into(DownloadTarget::File(&file), from, size, &ends, progress, report).await?;
        let mode = found.permissions.map_or(0o600, |mode| mode & 0o777);
        fchmod(&file, Mode::from_raw_mode(mode)).map_err(|errno| local(errno.into()))?;
        place(part, name).map_err(local)?;
        progress.total.files += 1;
        Ok(())
    }

    /// Reads a file of the guest to its end, which may have changed since the file was inspected.
    async fn read_into(
        &self,
        target: DownloadTarget<'_>,
        from: &str,
        size: u64,
        ends: &CopyEnds,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let failed = |error| ends.remote(FileAction::Read, from, error);
        let opened = self.raw.open(from, OpenFlags::READ, FileAttributes::default()).await;
        let handle = opened.map_err(failed)?.handle;
        let data = match &target {
            DownloadTarget::File(_) => self.data_of(from, size).await,
            // A stream needs the zeros, too.
            DownloadTarget::Stream(_) => None,
        };
        let wanted = data.unwrap_or_else(|| std::iter::once(0..size).collect());
        let source = GuestSource { handle: &handle, path: from, size };
        let read = self.read_open(source, wanted, target, ends, progress, report).await;
        self.close(handle, read, failed).await
    }

    /// Closes a file of the guest, also after a failure that does not end the copy.
    async fn close<T>(
        &self,
        handle: String,
        done: Result<T>,
        failed: impl FnOnce(SftpError) -> Error,
    ) -> Result<T> {
        if done.as_ref().is_err_and(ends_all) {
            return done;
        }
        let closed = self.raw.close(handle).await;
        let done = done?;
        closed.map(|_| done).map_err(failed)
    }

    /// Reads an open file of the guest: the wanted parts, and what is beyond the length that it had
    /// when it was inspected.
    async fn read_open(
        &self,
        source: GuestSource<'_>,
        wanted: Vec<Range<u64>>,
        mut target: DownloadTarget<'_>,
        ends: &CopyEnds,
        progress: &mut CopyProgress,
        report: CopyObserver<'_>,
    ) -> Result<()> {
        let GuestSource { handle, path, size } = source;
        let failed = |error| ends.remote(FileAction::Read, path, error);
        let local = |source: io::Error| ends.local(FileAction::Write, Path::new(&ends.to), source);
        let mut wanted = VecDeque::from(wanted);
        let mut flying: VecDeque<ReadRequest> = VecDeque::new();
        // The expected end of the file, and the end of what was received.
        let (mut tail, mut end) = (size, 0);
        loop {
            while flying.len() < IN_FLIGHT
                && let Some(bytes) = next_piece(&mut wanted)
            {
                flying.push_back(self.ask(handle, bytes));
            }
            if flying.is_empty() {
                // Beyond the expected end, one request at a time: usually there is nothing.
                flying.push_back(self.ask(handle, tail..tail + u64::from(CHUNK_BYTES)));
            }
            let Some((bytes, piece)) = flying.pop_front() else { break };
            let piece = piece.await.map_err(|error| SftpError::UnexpectedBehavior(error.to_string()));
            let data = match piece.flatten() {
                Ok(data) if !data.is_empty() => data,
                Err(error) if !is_end(&error) => return Err(failed(error)),
                _ => {
                    // A file that ends with a hole has no data there.
                    end = if bytes.start == tail { tail } else { end };
                    break;
                }
            };
            if bytes.start > end {
                self.tell(progress, bytes.start - end, report);
            }
            end = bytes.start + data.len() as u64;
            tail = tail.max(end);
            match &mut target {
                DownloadTarget::File(file) => write_sparse(file, &data, bytes.start).map_err(local)?,
                DownloadTarget::Stream(to) => to.write_all(&data).await.map_err(local)?,
            }
            self.tell(progress, data.len() as u64, report);
            if end < bytes.end && end < tail {
                flying.push_front(self.ask(handle, end..bytes.end));
            }
        }
        if end > progress.file_bytes {
            self.tell(progress, end - progress.file_bytes, report);
        }
        match target {
            DownloadTarget::File(file) => file.set_len(end).map_err(local),
            DownloadTarget::Stream(_) => Ok(()),
        }
    }

    /// Requests these bytes of a file of the guest.
    fn ask(&self, handle: &str, bytes: Range<u64>) -> ReadRequest {
        let (raw, handle, offset) = (self.raw.clone(), handle.to_owned(), bytes.start);
        let length = u32::try_from(bytes.end - bytes.start).unwrap_or(CHUNK_BYTES);
        let task = tokio::spawn(async move { raw.read(handle, offset, length).await.map(|data| data.data) });
        (bytes, task)
    }
}

/// A pending request, with the bytes that it is for.
type ReadRequest = (Range<u64>, JoinHandle<Result<Vec<u8>, SftpError>>);

/// Takes the bytes of the next request from the wanted parts of a file.
fn next_piece(wanted: &mut VecDeque<Range<u64>>) -> Option<Range<u64>> {
    loop {
        let first = wanted.front_mut()?;
        let piece = first.start..first.end.min(first.start + u64::from(CHUNK_BYTES));
        first.start = piece.end;
        if first.is_empty() {
            wanted.pop_front();
        }
        if !piece.is_empty() {
            return Some(piece);
        }
    }
}

/// Returns the path on this host for a copy with this name.
fn place_of(to: &Path, name: Option<&str>, is_dir: bool, ends: &CopyEnds) -> Result<PathBuf> {
    let ends_with = |end: &[u8]| to.as_os_str().as_bytes().ends_with(end);
    if to.is_dir() {
        let name = name.unwrap_or_default();
        check_name(name, ends)?;
        return Ok(to.join(name));
    }
    if ends_with(b"/.") || (ends_with(b"/") && !is_dir) {
        let there = Path::new(ends.to.trim_end_matches('/')).symlink_metadata().is_ok();
        return Err(ends.no_dir(there, "on this host"));
    }
    match to.canonicalize() {
        Ok(resolved) => Ok(resolved),
        Err(error) if error.kind() == io::ErrorKind::NotFound && to.is_symlink() => {
            Err(ends.dangling("on this host"))
        }
        Err(_) => Ok(to.to_owned()),
    }
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Writes everything but the blocks of zeros, which a new file has by itself.
fn write_sparse(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    for (index, block) in data.chunks(HOLE_BYTES).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, offset + (index * HOLE_BYTES) as u64)?;
        }
    }
    Ok(())
}

/// Creates a directory that its owner can use, or opens an existing one; never one behind a
/// symbolic link.
fn make_dir(parent: &HostDir, name: &str, mode: Option<u32>) -> io::Result<HostDir> {
    let mode = Mode::from_raw_mode(mode.unwrap_or(0) & 0o777 | 0o700);
    step("create a directory for a copy")?;
    match mkdirat(&parent.fd, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(&parent.fd, name, flags, Mode::empty())?;
    Ok(HostDir { fd, path: parent.path.join(name) })
}

/// Renames a complete file to its name.
fn place(mut part: PartialFile<'_>, name: &str) -> io::Result<()> {
    step("rename a copied file")?;
    renameat(&part.dir.fd, &part.name, &part.dir.fd, name)?;
    part.kept = true;
    Ok(())
}

fn check_name(name: &str, ends: &CopyEnds) -> Result<()> {
    if !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) {
        return Ok(());
    }
    let problem = format!("the guest sent the file name {name:?}, which would lead to another directory");
    Err(ends.problem(ErrorKind::Guest, problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh_sftp::client::RawSftpSession;
    use russh_sftp::protocol::{File as SftpFile, Handle, Name, StatusCode};

    #[test]
    fn no_name_from_the_guest_leads_out_of_a_directory() {
        let ends = CopyEnds { from: "web:/d".into(), to: "d".into() };
        for name in ["..", ".", "", "/etc/passwd", "a/b", "../x", "a\0b"] {
            assert!(check_name(name, &ends).is_err(), "{name:?}");
        }
        check_name("...", &ends).unwrap();
    }

    /// A guest with an endless directory.
    struct EndlessGuest;

    impl russh_sftp::server::Handler for EndlessGuest {
        type Error = StatusCode;

        fn unimplemented(&self) -> StatusCode {
            StatusCode::OpUnsupported
        }

        async fn opendir(&mut self, id: u32, _path: String) -> Result<Handle, StatusCode> {
            Ok(Handle { id, handle: "d".to_owned() })
        }

        async fn readdir(&mut self, id: u32, _handle: String) -> Result<Name, StatusCode> {
            let files = (0..2000).map(|number| SftpFile::dummy(format!("file-{number}"))).collect();
            Ok(Name { id, files })
        }
    }

    #[tokio::test]
    async fn an_endless_directory_is_refused_with_the_limit() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        russh_sftp::server::run(theirs, EndlessGuest).await;
        let raw = RawSftpSession::new(ours);
        raw.init().await.unwrap();
        let files = GuestFiles {
            raw: Arc::new(raw),
            connection: std::sync::Weak::new(),
            name: "web".to_owned(),
            replaces: false,
            unfinished: std::sync::Mutex::default(),
            swept: std::sync::Mutex::default(),
        };
        let ends = CopyEnds { from: "web:/d".into(), to: "d".into() };
        let error = files.list("/d", &ends).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Guest);
        assert!(error.to_string().contains("more than 1000000 files"), "{error}");
    }

    #[test]
    fn zeros_become_holes_and_everything_else_keeps_its_place() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        let mut data = vec![0; 1 << 20];
        data[700_001] = 7;
        write_sparse(&file, &data, 0).unwrap();
        file.set_len(data.len() as u64).unwrap();
        let mut read = vec![1; data.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == data);
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    }
}
