//! From the guest to this host. Nothing that the guest says leads out of the directory that somebody named.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags};
use rustix::fs::{AtFlags, Mode, OFlags, fchmod, mkdirat, open, openat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;
use tokio::task::JoinHandle;

use super::upload::is_end;
use super::{
    Act, CHUNK_BYTES, Copied, Ends, Files, IN_FLIGHT, Kind, Progress, Report, is_missing, joined, kind,
    parent_and_name, shown, unfinished,
};
use crate::error::{ErrorKind, Result};
use crate::steps::step;

/// The smallest stretch of zeros that becomes a hole: a block of every usual file system.
const HOLE_BYTES: usize = 4096;
/// How many names one directory of the guest may have, and how many bytes they may have together: a guest that never stops
/// naming files would fill this process's memory.
const MOST_NAMES: usize = 1_000_000;
const MOST_NAME_BYTES: usize = 64 << 20;

/// A directory of this host, held open, and how it is called.
#[derive(Debug)]
struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// A name in a directory that is taken away again unless it was kept.
struct Part<'a> {
    dir: &'a Dir,
    name: String,
    kept: bool,
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = unlinkat(&self.dir.fd, &self.name, AtFlags::empty());
        }
    }
}

impl Files {
    /// Copies a file, or with `recursive` a directory and all below it, out of the guest.
    ///
    /// Where `to` is a directory, it is copied into that, under its own name; else `to` is its name here. Permission bits go
    /// along, without set-user-ID and its like; stretches of zeros become holes; a symbolic link below a directory is copied as
    /// one and never followed on this host. A file that is there is replaced as a whole.
    ///
    /// # Cancel safety
    /// A dropped copy leaves whole files only.
    ///
    /// # Errors
    /// `Copy` with both ends, what was tried and at which of them.
    pub async fn download(
        &self,
        from: &str,
        to: &Path,
        recursive: bool,
        report: Report<'_>,
    ) -> Result<Copied> {
        let mut progress = Progress::default();
        let ends =
            Ends { from: format!("{}:{from}", self.name), to: shown(&to.to_string_lossy()).to_owned() };
        let from = Self::path(from);
        let Some(found) = self.look(from, &ends).await? else {
            return Err(ends.problem(ErrorKind::NotFound, "there is no such file in the guest"));
        };
        if kind(&found) == Kind::Dir && !recursive {
            return Err(ends
                .problem(ErrorKind::InvalidInput, "this is a directory, which is copied only recursively"));
        }
        let into_dir = to.is_dir();
        let ends_with = |end: &[u8]| to.as_os_str().as_bytes().ends_with(end);
        let names_dir = ends_with(b"/.") || (ends_with(b"/") && kind(&found) != Kind::Dir);
        if names_dir && !into_dir {
            let there = Path::new(ends.to.trim_end_matches('/')).symlink_metadata().is_ok();
            return Err(ends.no_dir(there, "on this host"));
        }
        let place = if into_dir {
            let resolved = self.resolved(from, &ends).await?;
            // A link's own name is the one that somebody typed.
            let typed = parent_and_name(from.trim_end_matches('/')).1;
            let name = if matches!(typed, "." | ".." | "") { parent_and_name(&resolved).1 } else { typed };
            check_name(name, &ends)?;
            to.join(name)
        } else if let Ok(resolved) = to.canonicalize() {
            resolved
        } else {
            to.to_owned()
        };
        let (Some(name), Some(parent)) = (place.file_name().and_then(|name| name.to_str()), place.parent())
        else {
            return Err(
                ends.problem(ErrorKind::InvalidInput, "what is written needs a name, and one in UTF-8")
            );
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = open(parent, flags, Mode::empty());
        let fd = opened.map_err(|errno| ends.local(Act::Write, &place, errno.into()))?;
        let dir = Arc::new(Dir { fd, path: parent.to_owned() });
        if kind(&found) == Kind::Dir {
            let (from, name) = (from.to_owned(), name.to_owned());
            let unnamed = self.download_tree(from, dir, name, &found, &mut progress, report).await?;
            ends.check_names(&unnamed)?;
        } else {
            self.download_file(from, &found, &dir, name, &mut progress, report).await?;
        }
        Ok(progress.total)
    }

    async fn download_tree(
        &self,
        from: String,
        parent: Arc<Dir>,
        name: String,
        found: &FileAttributes,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<Vec<String>> {
        let (mut ahead, mut unnamed) = (vec![(from, parent, name, found.permissions)], Vec::new());
        while let Some((from, parent, name, mode)) = ahead.pop() {
            let path = parent.path.join(&name);
            let ends = Ends { from: format!("{}:{from}", self.name), to: path.display().to_string() };
            let dir = Arc::new(make_dir(&parent, &name, mode).map_err(|source| match source.kind() {
                io::ErrorKind::NotADirectory => {
                    ends.problem(ErrorKind::InvalidInput, "a file of that name is on this host already")
                }
                _ => ends.local(Act::Make, &path, source),
            })?);
            for (name, found) in self.list(&from, &ends).await? {
                let place = joined(&from, &name);
                // What is not UTF-8 comes with this in it, and then there is nothing of such a name.
                if name.contains(char::REPLACEMENT_CHARACTER)
                    && self.raw.lstat(&place).await.is_err_and(|error| is_missing(&error))
                {
                    unnamed.push(format!("the name of {}:{place}", self.name));
                } else if kind(&found) == Kind::Dir {
                    if ahead.len() >= MOST_NAMES {
                        let problem =
                            format!("the guest has more than {MOST_NAMES} directories side by side");
                        return Err(ends.problem(ErrorKind::Guest, problem));
                    }
                    ahead.push((place, Arc::clone(&dir), name, found.permissions));
                } else if kind(&found) == Kind::Link {
                    match self.download_link(&place, &dir, &name, &ends).await? {
                        true => progress.total.files += 1,
                        false => unnamed.push(format!("what the link {}:{place} leads to", self.name)),
                    }
                } else if kind(&found) == Kind::File {
                    self.download_file(&place, &found, &dir, &name, progress, report).await?;
                } else {
                    progress.total.skipped.push(format!("{}:{place}", self.name));
                }
            }
        }
        Ok(unnamed)
    }

    /// Answers what a directory of the guest has, no name in it leading anywhere else.
    async fn list(&self, path: &str, ends: &Ends) -> Result<Vec<(String, FileAttributes)>> {
        let failed = |error| ends.remote(Act::Read, path, error);
        let handle = self.raw.opendir(path).await.map_err(failed)?.handle;
        let (mut found, mut bytes) = (Vec::new(), 0);
        loop {
            match self.raw.readdir(&handle).await {
                Ok(names) => {
                    bytes += names.files.iter().map(|file| file.filename.len()).sum::<usize>();
                    found.extend(names.files.into_iter().map(|file| (file.filename, file.attrs)));
                    if found.len() > MOST_NAMES || bytes > MOST_NAME_BYTES {
                        let problem = format!(
                            "the guest names more than {MOST_NAMES} files, or {} MiB of names, in the directory {path}",
                            MOST_NAME_BYTES >> 20
                        );
                        return Err(ends.problem(ErrorKind::Guest, problem));
                    }
                }
                Err(error) if is_end(&error) => break,
                Err(error) => return Err(failed(error)),
            }
        }
        self.raw.close(handle).await.map_err(failed)?;
        found.retain(|(name, _)| name != "." && name != "..");
        for (name, _) in &found {
            check_name(name, ends)?;
        }
        Ok(found)
    }

    /// Makes a link that leads to the same, and tells whether that was UTF-8: what comes with a replacement character mostly was not.
    async fn download_link(&self, from: &str, dir: &Dir, name: &str, ends: &Ends) -> Result<bool> {
        let answer = self.raw.readlink(from).await.map_err(|error| ends.remote(Act::Read, from, error))?;
        let target = answer.files.into_iter().next().map(|file| file.filename).unwrap_or_default();
        if target.contains(char::REPLACEMENT_CHARACTER) {
            return Ok(false);
        }
        let path = dir.path.join(name);
        let part = Part { dir, name: unfinished(name), kept: false };
        let made = step("make a symbolic link")
            .and_then(|()| symlinkat(target, &dir.fd, &part.name).map_err(io::Error::from))
            .and_then(|()| place(part, name));
        made.map(|()| true).map_err(|source| ends.local(Act::Make, &path, source))
    }

    async fn download_file(
        &self,
        from: &str,
        found: &FileAttributes,
        dir: &Dir,
        name: &str,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<()> {
        let path = dir.path.join(name);
        let ends = Ends { from: format!("{}:{from}", self.name), to: path.display().to_string() };
        if kind(found) != Kind::File {
            return Err(ends.problem(ErrorKind::InvalidInput, "what is in the guest is not a regular file"));
        }
        if std::fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file() && !found.is_symlink()) {
            return Err(ends.problem(ErrorKind::InvalidInput, "what is on this host is not a regular file"));
        }
        let local = |source: io::Error| ends.local(Act::Write, &path, source);
        let part = Part { dir, name: unfinished(name), kept: false };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = step("create a file for a copy")
            .and_then(|()| Ok(openat(&dir.fd, &part.name, flags, Mode::from_raw_mode(0o600))?))
            .map_err(local)?;
        let file = File::from(file);
        progress.file.clone_from(&ends.from);
        (progress.file_bytes, progress.file_size) = (0, found.size.unwrap_or(0));
        self.read_into(&file, from, found.size.unwrap_or(0), &ends, progress, report).await?;
        let mode = found.permissions.map_or(0o600, |mode| mode & 0o777);
        fchmod(&file, Mode::from_raw_mode(mode)).map_err(|errno| local(errno.into()))?;
        place(part, name).map_err(local)?;
        progress.total.files += 1;
        Ok(())
    }

    /// Reads a file of the guest to its end, which may be elsewhere than where it was found to be.
    async fn read_into(
        &self,
        file: &File,
        from: &str,
        size: u64,
        ends: &Ends,
        progress: &mut Progress,
        report: Report<'_>,
    ) -> Result<()> {
        let failed = |error| ends.remote(Act::Read, from, error);
        let opened = self.raw.open(from, OpenFlags::READ, FileAttributes::default()).await;
        let handle = opened.map_err(failed)?.handle;
        type Piece = (u64, u32, JoinHandle<Result<Vec<u8>, SftpError>>);
        let mut flying: VecDeque<Piece> = VecDeque::new();
        let ask = |flying: &mut VecDeque<Piece>, offset: u64, bytes: u32, first: bool| {
            let (raw, handle) = (self.raw.clone(), handle.clone());
            let task =
                tokio::spawn(async move { raw.read(handle, offset, bytes).await.map(|data| data.data) });
            if first {
                flying.push_front((offset, bytes, task))
            } else {
                flying.push_back((offset, bytes, task))
            }
        };
        let (mut next, mut end) = (0, 0);
        loop {
            // Beyond where the end was found to be, one at a time: there may be more, and mostly is not.
            while flying.len() < IN_FLIGHT && (next < size || flying.is_empty()) {
                ask(&mut flying, next, CHUNK_BYTES, false);
                next += u64::from(CHUNK_BYTES);
            }
            let Some((offset, bytes, piece)) = flying.pop_front() else { break };
            let piece = piece.await.map_err(|error| SftpError::UnexpectedBehavior(error.to_string()));
            let data = match piece.flatten() {
                Ok(data) if data.is_empty() => break,
                Ok(data) => data,
                Err(error) if is_end(&error) => break,
                Err(error) => return Err(failed(error)),
            };
            write_sparse(file, &data, offset)
                .map_err(|source| ends.local(Act::Write, Path::new(&ends.to), source))?;
            end = offset + data.len() as u64;
            self.tell(progress, data.len() as u64, report);
            let short = bytes.saturating_sub(u32::try_from(data.len()).unwrap_or(bytes));
            if short > 0 {
                ask(&mut flying, end, short, true);
            }
        }
        self.raw.close(handle).await.map_err(failed)?;
        // What ends with a hole has no data there.
        file.set_len(end).map_err(|source| ends.local(Act::Write, Path::new(&ends.to), source))
    }
}

/// Writes all but the blocks of zeros: a new file has those by itself.
fn write_sparse(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    for (index, block) in data.chunks(HOLE_BYTES).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, offset + (index * HOLE_BYTES) as u64)?;
        }
    }
    Ok(())
}

/// Makes a directory that its owner can use, or opens the one that is there; never one behind a symbolic link.
fn make_dir(parent: &Dir, name: &str, mode: Option<u32>) -> io::Result<Dir> {
    let mode = Mode::from_raw_mode(mode.unwrap_or(0) & 0o777 | 0o700);
    step("make a directory for a copy")?;
    match mkdirat(&parent.fd, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(&parent.fd, name, flags, Mode::empty())?;
    Ok(Dir { fd, path: parent.path.join(name) })
}

/// Gives what is whole its name.
fn place(mut part: Part<'_>, name: &str) -> io::Result<()> {
    step("give a copied file its name")?;
    renameat(&part.dir.fd, &part.name, &part.dir.fd, name)?;
    part.kept = true;
    Ok(())
}

fn check_name(name: &str, ends: &Ends) -> Result<()> {
    if !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) {
        return Ok(());
    }
    let problem = format!("the guest names a file {name:?}, which would lead elsewhere");
    Err(ends.problem(ErrorKind::Guest, problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh_sftp::client::RawSftpSession;
    use russh_sftp::protocol::{File as SftpFile, Handle, Name, StatusCode};

    #[test]
    fn no_name_from_the_guest_leads_out_of_a_directory() {
        let ends = Ends { from: "web:/d".into(), to: "d".into() };
        for name in ["..", ".", "", "/etc/passwd", "a/b", "../x", "a\0b"] {
            assert!(check_name(name, &ends).is_err(), "{name:?}");
        }
        check_name("...", &ends).unwrap();
    }

    /// A guest whose directory has no end.
    struct Endless;

    impl russh_sftp::server::Handler for Endless {
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
    async fn a_directory_without_an_end_is_given_up_with_the_bound() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        russh_sftp::server::run(theirs, Endless).await;
        let raw = RawSftpSession::new(ours);
        raw.init().await.unwrap();
        let files = Files {
            raw: Arc::new(raw),
            name: "web".to_owned(),
            replaces: false,
            unfinished: std::sync::Mutex::default(),
            swept: std::sync::Mutex::default(),
        };
        let ends = Ends { from: "web:/d".into(), to: "d".into() };
        let error = files.list("/d", &ends).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Guest);
        assert!(error.to_string().contains("more than 1000000 files"), "{error}");
    }

    #[test]
    fn zeros_are_left_out_and_everything_else_is_where_it_was() {
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
