//! Reads a bounded log from a place on, and goes on as it grows: [`LogReader`].
//!
//! The log is `console.log`, and `console.log.1` before it: if the newer half is full, it takes the
//! other name. A reader has the files open, so it reads each byte once whatever they are called.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::log_position::{LogPosition, older_log};
use crate::store::{RecordChanges, denied};

/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 64 << 10;

/// Reads a VM's log, of its console or its hypervisor, and follows it. Any number may read one log,
/// and none of them takes the console from others.
///
/// # Examples
/// ```no_run
/// # async fn example(manager: vmkit::VmManager<vmkit::QemuHypervisor>) -> vmkit::Result<()> {
/// let name = vmkit::spec::VmName::new("web")?;
/// let mut log = vmkit::LogReader::open(&manager.console_log(&name)?, None)?;
/// while let Some(bytes) = log.next().await? {
///     print!("{}", String::from_utf8_lossy(&bytes));
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    /// What is still to be read, in order; the last is what `path` named.
    files: VecDeque<File>,
    /// The directory of the log, as it was at first.
    dir: Option<File>,
    changes: Option<RecordChanges>,
}

impl LogReader {
    /// Opens a log to be read from a place on; without one, from the oldest byte that is kept.
    ///
    /// A log that is not there yet is empty.
    ///
    /// # Errors
    /// `Io` and `Host` if the log is there and can't be opened; [`Error::OtherUser`] if it belongs
    /// to another user.
    pub fn open(log: &Path, since: Option<&LogPosition>) -> Result<Self> {
        let (older, newer) = halves(log)?;
        let failed = || Error::io("read", log);
        let place = |file: &Option<File>| match (since, file) {
            (Some(since), Some(file)) => since.in_file(file),
            _ => Ok(None),
        };
        let (in_older, in_newer) = (place(&older).map_err(failed())?, place(&newer).map_err(failed())?);
        let mut files = VecDeque::new();
        if let Some(mut older) = older.filter(|_| in_newer.is_none()) {
            older.seek(SeekFrom::Start(in_older.unwrap_or(0))).map_err(failed())?;
            files.push_back(older);
        }
        if let Some(mut newer) = newer {
            newer.seek(SeekFrom::Start(in_newer.unwrap_or(0))).map_err(failed())?;
            files.push_back(newer);
        }
        Ok(Self { path: log.to_owned(), files, dir: None, changes: None })
    }

    /// Skips what is there now but for its last lines; the last line counts even if it has not
    /// ended.
    ///
    /// # Errors
    /// `Io` if the log can't be read.
    pub fn skip_to_last_lines(&mut self, lines: usize) -> Result<()> {
        let failed = || Error::io("read", &self.path);
        let begins: io::Result<Vec<u64>> = self.files.iter_mut().map(File::stream_position).collect();
        let begins = begins.map_err(failed())?;
        let mut found = 0;
        let mut all = BufReader::new(self.rest());
        while all.skip_until(b'\n').map_err(failed())? > 0 {
            found += 1_usize;
        }
        drop(all);
        let seek = |file: &mut File, to| file.seek(SeekFrom::Start(to)).map(drop);
        for (file, begin) in self.files.iter_mut().zip(&begins) {
            seek(file, *begin).map_err(failed())?;
        }
        let mut skipped = 0;
        let mut all = BufReader::new(self.rest());
        for _ in lines..found {
            skipped += all.skip_until(b'\n').map_err(failed())? as u64;
        }
        drop(all);
        for (file, begin) in self.files.iter_mut().zip(begins) {
            let here = skipped.min(file.metadata().map_err(failed())?.len().saturating_sub(begin));
            seek(file, begin + here).map_err(failed())?;
            skipped -= here;
        }
        Ok(())
    }

    /// Returns what comes next and is there already, 64 KiB at most; nothing at the log's present
    /// end.
    ///
    /// # Errors
    /// `Io` if the log can't be read.
    pub fn read(&mut self) -> Result<Vec<u8>> {
        loop {
            let chunk = self.read_files()?;
            if !chunk.is_empty() || is_at(self.files.back(), &self.path)? {
                return Ok(chunk);
            }
            // The writer has gone on to another file, so the one that is open is complete: what was
            // written to it meanwhile comes first.
            let chunk = self.read_files()?;
            let (older, newer) = halves(&self.path)?;
            let seen = |older: &File| match self.files.back() {
                Some(before) => is_same(before, older).map_err(Error::io("examine", &self.path)),
                None => Ok(false),
            };
            // It has gone on twice meanwhile if what is the older half now was never seen.
            if let Some(older) = older
                && !seen(&older)?
            {
                self.files.push_back(older);
            }
            self.files.extend(newer);
            if !chunk.is_empty() {
                return Ok(chunk);
            }
        }
    }

    /// Waits for what comes next; `None` once the log's directory is removed, and all that was
    /// written before was read.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    ///
    /// # Errors
    /// `Io` if the log can't be read, or its directory can't be watched.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let dir = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        if self.dir.is_none() {
            // Watched before it is read, so that nothing is written unseen in between.
            self.changes = Some(RecordChanges::of_logs(&dir)?);
            self.dir = Some(File::open(&dir).map_err(Error::io("open", &dir))?);
        }
        loop {
            let chunk = self.read()?;
            if !chunk.is_empty() {
                return Ok(Some(chunk));
            }
            let is_there = dir.exists() && is_at(self.dir.as_ref(), &dir)?;
            match &self.changes {
                Some(changes) if is_there => changes.next().await?,
                // Written before the end, and after it was read.
                _ => return Ok(Some(self.read()?).filter(|last| !last.is_empty())),
            }
        }
    }

    /// Returns a reader of all that is still to be read.
    fn rest(&self) -> Box<dyn Read + '_> {
        let empty: Box<dyn Read + '_> = Box::new(io::empty());
        self.files.iter().fold(empty, |all, file| Box::new(all.chain(file)))
    }

    fn read_files(&mut self) -> Result<Vec<u8>> {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Some(file) = self.files.front_mut() {
            match file.read(&mut chunk) {
                Ok(0) if self.files.len() > 1 => drop(self.files.pop_front()),
                Ok(bytes) => {
                    chunk.truncate(bytes);
                    return Ok(chunk);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.path)(error)),
            }
        }
        Ok(Vec::new())
    }
}

/// Opens both halves of a log, the older one first.
fn halves(log: &Path) -> Result<(Option<File>, Option<File>)> {
    loop {
        let newer = open(log)?;
        let older = open(&older_log(log))?;
        // In between the newer half may have become the older one.
        if is_at(newer.as_ref(), log)? {
            return Ok((older, newer));
        }
    }
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(denied("open", path)(error)),
    }
}

/// Returns whether the path still names this file, or still none. A path that names nothing any
/// more names no other file.
fn is_at(file: Option<&File>, path: &Path) -> Result<bool> {
    let named = match fs::metadata(path) {
        Ok(named) => named,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Error::io("examine", path)(error)),
    };
    let Some(file) = file else { return Ok(false) };
    let held = file.metadata().map_err(Error::io("examine", path))?;
    Ok((held.dev(), held.ino()) == (named.dev(), named.ino()))
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boundedlog::BoundedLog;
    use proptest::prelude::*;

    const BOUND: u64 = 1000;

    fn all(reader: &mut LogReader) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match reader.read().unwrap() {
                chunk if chunk.is_empty() => return all,
                chunk => all.extend(chunk),
            }
        }
    }

    fn lines(from: usize, to: usize) -> Vec<u8> {
        (from..to).flat_map(|line| format!("line {line}\n").into_bytes()).collect()
    }

    #[test]
    fn a_log_is_read_across_its_halves_and_from_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut early = LogReader::open(&path, None).unwrap();
        assert!(early.read().unwrap().is_empty(), "there is no log yet");
        let mut log = BoundedLog::open(&path, BOUND).unwrap();
        log.append(&lines(0, 10));
        let mark = log.position().unwrap();
        log.append(&lines(10, 70));
        assert!(older_log(&path).exists());
        assert_eq!(all(&mut LogReader::open(&path, None).unwrap()), lines(0, 70));
        assert_eq!(all(&mut LogReader::open(&path, Some(&mark)).unwrap()), lines(10, 70));
        assert_eq!(all(&mut early), lines(0, 70));
    }

    #[test]
    fn the_last_lines_are_counted_with_the_one_that_has_not_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = BoundedLog::open(&path, BOUND).unwrap();
        log.append(&lines(0, 70));
        log.append(b"more");
        let last = |count| {
            let mut reader = LogReader::open(&path, None).unwrap();
            reader.skip_to_last_lines(count).unwrap();
            all(&mut reader)
        };
        assert_eq!(last(0), b"");
        assert_eq!(last(1), b"more");
        assert_eq!(last(31), [lines(40, 70), b"more".to_vec()].concat());
        assert_eq!(last(900), [lines(0, 70), b"more".to_vec()].concat());
    }

    proptest! {
        #[test]
        fn a_reader_that_keeps_up_reads_each_byte_once(chunks in proptest::collection::vec(1usize..400, 1..40)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console.log");
            let mut log = BoundedLog::open(&path, BOUND).unwrap();
            let mut reader = LogReader::open(&path, None).unwrap();
            let (mut written, mut read) = (Vec::new(), Vec::new());
            for (index, length) in chunks.into_iter().enumerate() {
                let chunk = vec![b'a' + u8::try_from(index % 26).unwrap(); length];
                log.append(&chunk);
                written.extend(chunk);
                read.extend(all(&mut reader));
            }
            prop_assert_eq!(read, written);
        }
    }

    #[tokio::test]
    async fn a_follower_gets_what_is_written_later_and_ends_with_the_directory() {
        let above = tempfile::tempdir().unwrap();
        let dir = above.path().join("web");
        fs::create_dir(&dir).unwrap();
        let path = dir.join("console.log");
        let mut reader = LogReader::open(&path, None).unwrap();
        let follows = tokio::spawn(async move {
            let mut all = Vec::new();
            while let Some(chunk) = reader.next().await.unwrap() {
                all.extend(chunk);
            }
            all
        });
        let mut log = BoundedLog::open(&path, BOUND).unwrap();
        for line in 0..40 {
            log.append(&lines(line, line + 1));
            tokio::task::yield_now().await;
        }
        drop(log);
        fs::remove_dir_all(&dir).unwrap();
        let limit = std::time::Duration::from_secs(60);
        let read = tokio::time::timeout(limit, follows).await.unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&read), String::from_utf8_lossy(&lines(0, 40)));
    }
}
