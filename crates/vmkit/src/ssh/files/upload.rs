//! From this host into the guest.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::task::JoinHandle;

use super::{
    Act, CHUNK_BYTES, Copied, Ends, Files, IN_FLIGHT, Kind, Progress, Report, joined, kind, parent_and_name,
    shown, unfinished,
};
use crate::error::{Error, ErrorKind, Result};
use crate::input_file::InputFile;

impl Files {
    /// Copies a file, or with `recursive` a directory and all below it, into the guest.
    ///
    /// Where `to` is a directory, it is copied into that, under its own name; else `to` is its name there. Permission bits go
    /// along; holes stay holes; a symbolic link below a directory is copied as one, whatever it leads to. A file that is there
    /// is replaced as a whole.
    ///
    /// # Cancel safety
    /// A dropped copy leaves whole files, and may leave one that [`tidy_up`](Self::tidy_up) removes; else the first copy into the same
    /// directory after two minutes does.
    ///
    /// # Errors
    /// `Copy` with both ends, what was tried and at which of them.
    pub async fn upload(&self, from: &Path, to: &str, recursive: bool, report: Report<'_>) -> Result<Copied> {
        let mut progress = Progress::default();
        let ends = Ends { from: from.display().to_string(), to: format!("{}:{}", self.name, shown(to)) };
        let local = |source| ends.local(Act::Find, from, source);
        let from = from.canonicalize().map_err(local)?;
        let metadata = from.metadata().map_err(local)?;
        let name = from.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            ends.problem(ErrorKind::InvalidInput, "what is copied needs a name, and one in UTF-8")
        })?;
        if metadata.is_dir() && !recursive {
            return Err(ends
                .problem(ErrorKind::InvalidInput, "this is a directory, which is copied only recursively"));
        }
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(ends.problem(ErrorKind::InvalidInput, "what is on this host is not a regular file"));
        }
        let to = Self::path(to);
        let place = match self.look(to, &ends).await? {
            Some(found) if kind(&found) == Kind::Dir => joined(to, name),
            Some(_) if metadata.is_dir() => {
                return Err(
                    ends.problem(ErrorKind::InvalidInput, "a file of that name is in the guest already")
                );
            }
            None if to.ends_with("/.") || (to.ends_with('/') && !metadata.is_dir()) => {
                let there = self.look(shown(to).trim_end_matches('/'), &ends).await?.is_some();
                return Err(ends.no_dir(there, "in the guest"));
            }
            _ => to.trim_end_matches('/').to_owned(),
        };
        if metadata.is_dir() {
            let unnamed = self.upload_tree(from, place, &mut progress, report).await?;
            ends.check_names(&unnamed)?;
        } else {
            self.upload_file(&from, &place, &mut progress, report).await?;
        }
        Ok(progress.total)
    }

    async fn upload_tree(
        &self,
        from: PathBuf,
        to: String,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<Vec<String>> {
        let (mut ahead, mut unnamed) = (vec![(from, to)], Vec::new());
        while let Some((from, to)) = ahead.pop() {
            let ends = Ends { from: from.display().to_string(), to: format!("{}:{to}", self.name) };
            let local = |source| ends.local(Act::Read, &from, source);
            let mode = from.metadata().map_err(local)?.mode();
            self.make_dir(&to, mode, &ends).await?;
            for entry in fs::read_dir(&from).map_err(local)? {
                let entry = entry.map_err(local)?;
                let path = entry.path();
                let kind = entry.file_type().map_err(|source| ends.local(Act::Read, &path, source))?;
                let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                    unnamed.push(format!("the name of {}", path.display()));
                    continue;
                };
                let place = joined(&to, &name);
                if kind.is_dir() {
                    ahead.push((path, place));
                } else if kind.is_symlink() {
                    match self.upload_link(&path, &place, &ends).await? {
                        true => progress.total.files += 1,
                        false => unnamed.push(format!("what the link {} leads to", path.display())),
                    }
                } else if kind.is_file() {
                    self.upload_file(&path, &place, progress, report).await?;
                } else {
                    progress.total.skipped.push(path.display().to_string());
                }
            }
        }
        Ok(unnamed)
    }

    /// Makes a directory that its owner can use, unless it is there.
    async fn make_dir(&self, path: &str, mode: u32, ends: &Ends) -> Result<()> {
        let attrs = FileAttributes { permissions: Some(mode & 0o777 | 0o700), ..FileAttributes::default() };
        let Err(error) = self.raw.mkdir(path, attrs).await else { return Ok(()) };
        match self.look(path, ends).await? {
            Some(found) if kind(&found) == Kind::Dir => Ok(()),
            _ => Err(self.unmade(Act::Make, path, error, ends).await),
        }
    }

    /// Makes a link that leads to the same, and tells whether that can be said in UTF-8.
    async fn upload_link(&self, from: &Path, to: &str, ends: &Ends) -> Result<bool> {
        let target = fs::read_link(from).map_err(|source| ends.local(Act::Read, from, source))?;
        let Some(target) = target.to_str() else { return Ok(false) };
        let (dir, name) = parent_and_name(to);
        let part = joined(dir, &unfinished(name));
        // OpenSSH takes the two the other way round than the draft has them. Source: OpenSSH, `PROTOCOL`, section 4.1.
        if let Err(error) = self.raw.symlink(target, &part).await {
            return Err(self.unmade(Act::Make, to, error, ends).await);
        }
        if let Err(error) = self.rename(&part, to).await {
            let _ = self.raw.remove(&part).await;
            return Err(ends.remote(Act::Make, to, error));
        }
        Ok(true)
    }

    async fn upload_file(
        &self,
        from: &Path,
        to: &str,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<()> {
        let ends = Ends { from: from.display().to_string(), to: format!("{}:{to}", self.name) };
        let input = InputFile::open("source", from).map_err(|error| match error {
            Error::Invalid { expected, .. } => {
                ends.problem(ErrorKind::InvalidInput, format!("{expected} on this host"))
            }
            error => error,
        })?;
        let mode = input.file.metadata().map_err(|source| ends.local(Act::Read, from, source))?.mode();
        let place = match self.look(to, &ends).await? {
            // A link to a file is kept, and what it leads to is replaced.
            Some(found) if kind(&found) == Kind::File => self.resolved(to, &ends).await?,
            Some(_) => {
                return Err(
                    ends.problem(ErrorKind::InvalidInput, "what is in the guest is not a regular file")
                );
            }
            None => to.to_owned(),
        };
        let (dir, name) = parent_and_name(&place);
        let part = joined(dir, &unfinished(name));
        self.set_unfinished(Some(part.clone()));
        progress.file = ends.from.clone();
        (progress.file_bytes, progress.file_size) = (0, input.bytes);
        let copied = self.write_part(&input.file, mode, &part, &ends, progress, report).await;
        let placed = match copied {
            Ok(()) => {
                let renamed = self.rename(&part, &place).await;
                renamed.map_err(|error| ends.remote(Act::Write, &place, error))
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
        file: &File,
        mode: u32,
        part: &str,
        ends: &Ends,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<()> {
        let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::EXCLUDE;
        let private = FileAttributes { permissions: Some(0o600), ..FileAttributes::default() };
        let handle = match self.raw.open(part, flags, private).await {
            Ok(opened) => opened.handle,
            Err(error) => return Err(self.unmade(Act::Write, part, error, ends).await),
        };
        // Before anything is written: it may be what fills the disk.
        if let Ok(begun) = self.raw.fstat(&handle).await {
            self.sweep(parent_and_name(part).0, &begun.attrs).await;
        }
        let failed = |error| ends.remote(Act::Write, part, error);
        let local = |source: std::io::Error| ends.local(Act::Read, Path::new(&ends.from), source);
        let mut flying: VecDeque<JoinHandle<Result<u64, SftpError>>> = VecDeque::new();
        let mut offset = 0;
        while let Some((begin, end)) = next_data(file, offset).map_err(local)? {
            self.tell(progress, begin - offset, report);
            offset = begin;
            while offset < end {
                let bytes = u64::from(CHUNK_BYTES).min(end - offset);
                let mut chunk = vec![0; usize::try_from(bytes).expect("a chunk is small")];
                let read = file.read_at(&mut chunk, offset).map_err(local)?;
                if read == 0 {
                    // It was cut off meanwhile.
                    break;
                }
                chunk.truncate(read);
                if flying.len() >= IN_FLIGHT {
                    self.land(&mut flying, progress, report).await.map_err(failed)?;
                }
                let (raw, handle) = (self.raw.clone(), handle.clone());
                flying.push_back(tokio::spawn(async move {
                    raw.write(handle, offset, chunk).await.map(|_| read as u64)
                }));
                offset += read as u64;
            }
            if offset < end {
                break;
            }
        }
        while !flying.is_empty() {
            self.land(&mut flying, progress, report).await.map_err(failed)?;
        }
        let size = file.metadata().map_err(local)?.len();
        self.tell(progress, size.saturating_sub(progress.file_bytes), report);
        let attrs =
            FileAttributes { size: Some(size), permissions: Some(mode & 0o777), ..FileAttributes::default() };
        self.raw.fsetstat(&handle, attrs).await.map_err(failed)?;
        self.raw.close(handle).await.map_err(failed)?;
        Ok(())
    }

    /// Waits for the oldest of the requests on their way.
    async fn land(
        &self,
        flying: &mut VecDeque<JoinHandle<Result<u64, SftpError>>>,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<(), SftpError> {
        if let Some(oldest) = flying.pop_front() {
            let written =
                oldest.await.map_err(|error| SftpError::UnexpectedBehavior(error.to_string()))??;
            self.tell(progress, written, report);
        }
        Ok(())
    }

    pub(super) fn tell(&self, progress: &mut Progress, bytes: u64, report: Report<'_>) {
        progress.file_bytes += bytes;
        progress.total.bytes += bytes;
        report(progress);
    }
}

/// Answers where the next data of a file begins and ends; nothing where only a hole is left.
///
/// Source: lseek(2), `SEEK_DATA` and `SEEK_HOLE`; a file system without holes answers one stretch.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
    let begin = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(begin) => begin,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    Ok(Some((begin, rustix::fs::seek(file, SeekFrom::Hole(begin))?)))
}

/// Tells whether the server has nothing more.
pub(super) fn is_end(error: &SftpError) -> bool {
    matches!(error, SftpError::Status(status) if status.status_code == StatusCode::Eof)
}
