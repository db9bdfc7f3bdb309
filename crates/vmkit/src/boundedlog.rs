//! A log that never grows over its bound: two halves, the older one thrown away when the newer is
//! full.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::log_position::{FileMark, LogPosition, older_log};

/// A log that is written to and stays within its bound: a file, which becomes the older half
/// (`.1` behind its name) whenever it has reached half of the bound.
///
/// It is what [`VmHandle::console_log`](crate::VmHandle::console_log) of a backend is expected to
/// be. [`LogReader`](crate::LogReader) and [`tail_of_log`] read it.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("console.log");
/// let mut log = vmkit::BoundedLog::open(&path, 1 << 20)?;
/// log.append(b"an earlier run\n");
/// let since = log.position()?; // `VmHandle::console_since` of the run that begins
/// log.append(b"login: ");
/// assert_eq!(vmkit::tail_of_log_since(&path, &since, 4096)?, b"login: ");
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    file: Option<File>,
    written_bytes: u64,
    half_bytes: u64,
}

impl BoundedLog {
    /// Opens the log to append, private to this user. Both halves together stay within
    /// `bound_bytes`.
    ///
    /// # Errors
    /// Why the file can't be opened.
    pub fn open(path: &Path, bound_bytes: u64) -> io::Result<Self> {
        let file = append_to(path)?;
        let written_bytes = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
            written_bytes,
            half_bytes: (bound_bytes / 2).max(1),
        })
    }

    /// Moves what is there to the older half, so that the newer one has only what is written from
    /// now on.
    pub fn rotate(&mut self) {
        if self.written_bytes > 0 {
            self.cut();
        }
    }

    /// Returns the place that is written to next.
    ///
    /// # Errors
    /// Why the file can't be looked at.
    pub fn position(&self) -> io::Result<LogPosition> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok(LogPosition { file: FileMark::of(file)?, at_bytes: self.written_bytes })
    }

    /// Appends, cutting where the bound says. A full disk loses log lines and nothing else: the
    /// guest goes on.
    pub fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.written_bytes >= self.half_bytes {
                self.cut();
            }
            let room = usize::try_from(self.half_bytes - self.written_bytes).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            if let Some(file) = &mut self.file {
                let _ = file.write_all(now);
            }
            self.written_bytes += now.len() as u64;
            bytes = later;
        }
    }

    fn cut(&mut self) {
        if fs::rename(&self.path, older_log(&self.path)).is_err() {
            // Without the rename the bound is kept by losing the half itself.
            let _ = fs::remove_file(&self.path);
        }
        self.file = append_to(&self.path).ok();
        self.written_bytes = 0;
    }
}

impl FileMark {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        let since = found.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born_ns = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
        Ok(Self { inode: found.ino(), born_ns })
    }
}

impl LogPosition {
    /// Returns the beginning of a log, as one of its halves is open here: what is written to this
    /// file is behind it.
    ///
    /// # Errors
    /// Why the file can't be looked at.
    pub fn at_start(file: &File) -> io::Result<Self> {
        Ok(Self { file: FileMark::of(file)?, at_bytes: 0 })
    }

    /// Returns the end of a bounded log, as it is now; nothing where there is no log.
    ///
    /// # Errors
    /// Why the log can't be looked at.
    pub fn end_of(path: &Path) -> io::Result<Option<Self>> {
        let Some(file) = opened(path)? else { return Ok(None) };
        Ok(Some(Self { file: FileMark::of(&file)?, at_bytes: file.metadata()?.len() }))
    }

    /// Returns the place in this file, one of the log's halves; `None` where it is in another one.
    ///
    /// What was written since begins there, goes on in the newer half where this is the older one,
    /// and is all that there is where the place is in neither.
    ///
    /// # Errors
    /// Why the file can't be looked at.
    pub fn in_file(&self, file: &File) -> io::Result<Option<u64>> {
        Ok((FileMark::of(file)? == self.file).then_some(self.at_bytes))
    }
}

/// Reads the last `most_bytes` of what was written to a bounded log since `mark`.
pub fn tail_of_log_since(path: &Path, mark: &LogPosition, most_bytes: u64) -> io::Result<Vec<u8>> {
    let mark_of = |file: &Option<File>| file.as_ref().map(FileMark::of).transpose();
    loop {
        let (newer, older) = (opened(path)?, opened(&older_log(path))?);
        // In between the newer half may have become the older one.
        if mark_of(&opened(path)?)? != mark_of(&newer)? {
            continue;
        }
        let place = |file: &Option<File>| file.as_ref().map(|file| mark.in_file(file)).transpose();
        let (in_newer, in_older) = (place(&newer)?.flatten(), place(&older)?.flatten());
        let newer = newer.map(|newer| tail_from(newer, in_newer.unwrap_or(0), most_bytes));
        let mut tail = newer.transpose()?.unwrap_or_default();
        let missing = most_bytes - tail.len() as u64;
        if let Some(older) = older.filter(|_| in_newer.is_none() && missing > 0) {
            tail.splice(0..0, tail_from(older, in_older.unwrap_or(0), missing)?);
        }
        return Ok(tail);
    }
}

fn opened(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// Reads the last `most_bytes` of a file that lie behind a place in it.
fn tail_from(mut file: File, at: u64, most_bytes: u64) -> io::Result<Vec<u8>> {
    let bytes = file.metadata()?.len();
    let begin = bytes.saturating_sub(most_bytes).max(at.min(bytes));
    file.seek(SeekFrom::Start(begin))?;
    let mut tail = Vec::new();
    file.take(bytes - begin).read_to_end(&mut tail)?;
    Ok(tail)
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Reads the last `most_bytes` of a bounded log, both halves as one; nothing where there is none.
pub fn tail_of_log(path: &Path, most_bytes: u64) -> io::Result<Vec<u8>> {
    let newer = tail_of_file(path, most_bytes)?;
    let missing = most_bytes - newer.len() as u64;
    if missing == 0 {
        return Ok(newer);
    }
    let mut both = tail_of_file(&older_log(path), missing)?;
    both.extend(newer);
    Ok(both)
}

/// Reads the last `most_bytes` of one file; nothing where there is none.
pub(crate) fn tail_of_file(path: &Path, most_bytes: u64) -> io::Result<Vec<u8>> {
    opened(path)?.map_or(Ok(Vec::new()), |file| tail_from(file, 0, most_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_log_keeps_its_bound_and_its_end(chunks in proptest::collection::vec(1usize..300, 1..60)) {
            const BOUND: u64 = 1000;
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console.log");
            let mut log = BoundedLog::open(&path, BOUND).unwrap();
            let mut all = Vec::new();
            for (index, length) in chunks.into_iter().enumerate() {
                let chunk = vec![b'a' + (index % 26) as u8; length];
                log.append(&chunk);
                all.extend(chunk);
                let size = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
                prop_assert!(size(&path) + size(&older_log(&path)) <= BOUND);
            }
            let tail = tail_of_log(&path, BOUND).unwrap();
            prop_assert!(all.ends_with(&tail));
            prop_assert!(tail.len() as u64 >= (BOUND / 2).min(all.len() as u64));
        }
    }

    proptest! {
        #[test]
        fn a_position_shows_what_was_written_since(
            before in proptest::collection::vec(1usize..300, 0..20),
            since in proptest::collection::vec(1usize..300, 0..40),
            most in 1u64..1500,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console.log");
            let mut log = BoundedLog::open(&path, 1000).unwrap();
            before.iter().for_each(|length| log.append(&vec![b'.'; *length]));
            let mut log = BoundedLog::open(&path, 1000).unwrap();
            let mark = log.position().unwrap();
            let mut all = Vec::new();
            for (index, length) in since.into_iter().enumerate() {
                let chunk = vec![b'a' + (index % 26) as u8; length];
                log.append(&chunk);
                all.extend(chunk);
            }
            let tail = tail_of_log_since(&path, &mark, most).unwrap();
            let kept = tail_of_log(&path, 1000).unwrap().len();
            prop_assert_eq!(tail.as_slice(), &all[all.len() - all.len().min(kept).min(most as usize)..]);
        }
    }

    #[test]
    fn a_rotated_log_keeps_what_was_there_in_its_older_half() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.log");
        BoundedLog::open(&path, 100).unwrap().append(b"first run ");
        let mut log = BoundedLog::open(&path, 100).unwrap();
        log.rotate();
        log.append(b"second run");
        assert_eq!(tail_of_file(&path, 100).unwrap(), b"second run");
        assert_eq!(tail_of_log(&path, 100).unwrap(), b"first run second run");
    }

    #[test]
    fn a_log_that_was_there_is_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        BoundedLog::open(&path, 100).unwrap().append(b"one ");
        BoundedLog::open(&path, 100).unwrap().append(b"two");
        assert_eq!(tail_of_log(&path, 100).unwrap(), b"one two");
    }
}
