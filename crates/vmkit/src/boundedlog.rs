//! A log that never grows over its bound: two halves, the older one thrown away when the newer is full.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Appends to `path`, and moves it to `path.1` whenever it has reached half of the bound.
#[derive(Debug)]
pub(crate) struct BoundedLog {
    path: PathBuf,
    file: Option<File>,
    written_bytes: u64,
    half_bytes: u64,
}

impl BoundedLog {
    /// Opens the log to append, private to this user. Both halves together stay within `bound_bytes`.
    pub(crate) fn open(path: &Path, bound_bytes: u64) -> io::Result<Self> {
        let file = append_to(path)?;
        let written_bytes = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
            written_bytes,
            half_bytes: (bound_bytes / 2).max(1),
        })
    }

    /// Moves what is there to the older half, so that the newer one has only what is written from now on.
    pub(crate) fn begin_anew(&mut self) {
        if self.written_bytes > 0 {
            self.cut();
        }
    }

    /// Appends, cutting where the bound says. A full disk loses log lines and nothing else: the guest goes on.
    pub(crate) fn append(&mut self, mut bytes: &[u8]) {
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

/// Answers where the older half of a bounded log lies.
pub(crate) fn older_log(log: &Path) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    path.push(".1");
    path.into()
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
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(most_bytes)))?;
    let mut tail = Vec::new();
    file.take(most_bytes).read_to_end(&mut tail)?;
    Ok(tail)
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

    #[test]
    fn a_log_begun_anew_keeps_what_was_there_in_its_older_half() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.log");
        BoundedLog::open(&path, 100).unwrap().append(b"first run ");
        let mut log = BoundedLog::open(&path, 100).unwrap();
        log.begin_anew();
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
