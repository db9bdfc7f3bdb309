//! A log of two halves, printed and followed: `console.log.1` is the older half, and when
//! `console.log` is full it takes that name.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod portable;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vmkit::{Error, LogPosition};

#[cfg(target_os = "linux")]
use self::linux::LogChanges;
#[cfg(not(target_os = "linux"))]
use self::portable::LogChanges;
use crate::failure::Failure;
use crate::output;

/// What of a log is printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogRange {
    /// What was written since; all that is kept without it.
    pub(crate) since: Option<LogPosition>,
    /// The last lines of that, so many of them.
    pub(crate) tail: Option<usize>,
}

/// Prints a part of a log.
///
/// # Errors
/// `Io` where it can't be read. A log that is not there yet is empty.
pub(crate) fn print(log: &Path, part: LogRange) -> Result<(), Failure> {
    LogHalves::open(log)?.print(part)
}

/// Prints a part of a log, and what is added from now on, until its directory is removed.
///
/// # Errors
/// As for [`print`].
pub(crate) fn follow(log: &Path, part: LogRange) -> Result<(), Failure> {
    // Watched before it is read, so that nothing is written unseen in between.
    let changes = LogChanges::watch(log)?;
    let mut followed = LogHalves::open(log)?;
    followed.print(part)?;
    loop {
        followed.catch_up()?;
        if !changes.wait()? {
            return followed.catch_up();
        }
    }
}

/// The two halves of a log, as they were when they were opened.
#[derive(Debug)]
struct LogHalves {
    path: PathBuf,
    older: Option<File>,
    newer: Option<File>,
}

/// Where in each half of a log something begins.
#[derive(Debug, Clone, Copy)]
struct StartOffsets {
    /// Not at all where it is `None`.
    older: Option<u64>,
    newer: u64,
}

impl Default for StartOffsets {
    fn default() -> Self {
        Self { older: Some(0), newer: 0 }
    }
}

impl LogHalves {
    fn open(path: &Path) -> Result<Self, Error> {
        loop {
            let newer = open(path)?;
            let older = open(&older_of(path))?;
            // In between the newer half may have become the older one.
            if is_at(newer.as_ref(), path)? {
                return Ok(Self { path: path.to_owned(), older, newer });
            }
        }
    }

    fn print(&mut self, part: LogRange) -> Result<(), Failure> {
        let failed = || Error::io("read", &self.path);
        let begin =
            part.since.map_or(Ok(StartOffsets::default()), |since| self.begin(&since)).map_err(failed())?;
        self.go_to(begin).map_err(failed())?;
        let skipped = match part.tail {
            Some(lines) => self.lines().map_err(failed())?.saturating_sub(lines),
            None => 0,
        };
        self.go_to(begin).map_err(failed())?;
        let mut both = self.both();
        for _ in 0..skipped {
            both.skip_until(b'\n').map_err(Error::io("read", &self.path))?;
        }
        copy(&mut both, &self.path)
    }

    /// Returns where in the halves begins what was written since.
    fn begin(&self, since: &LogPosition) -> io::Result<StartOffsets> {
        let place = |half: &Option<File>| half.as_ref().map(|file| since.in_file(file)).transpose();
        let (in_older, in_newer) = (place(&self.older)?.flatten(), place(&self.newer)?.flatten());
        Ok(match in_newer {
            Some(at) => StartOffsets { older: None, newer: at },
            None => StartOffsets { older: Some(in_older.unwrap_or(0)), newer: 0 },
        })
    }

    fn go_to(&self, begin: StartOffsets) -> io::Result<()> {
        if let Some(mut older) = self.older.as_ref() {
            older.seek(begin.older.map_or(SeekFrom::End(0), SeekFrom::Start))?;
        }
        if let Some(mut newer) = self.newer.as_ref() {
            newer.seek(SeekFrom::Start(begin.newer))?;
        }
        Ok(())
    }

    /// Counts the lines from here on, the last one even if it is not ended.
    fn lines(&self) -> io::Result<usize> {
        let mut lines = 0;
        let mut both = self.both();
        while both.skip_until(b'\n')? > 0 {
            lines += 1;
        }
        Ok(lines)
    }

    fn both(&self) -> impl BufRead + use<'_> {
        BufReader::new(half(&self.older).chain(half(&self.newer)))
    }

    /// Prints what was added since, whichever file it is in by now.
    fn catch_up(&mut self) -> Result<(), Failure> {
        self.rest()?;
        while !is_at(self.newer.as_ref(), &self.path)? {
            // The writer has gone on to another file, so this one is complete.
            self.rest()?;
            let before = self.newer.take();
            let next = Self::open(&self.path)?;
            // Two turns were made meanwhile: what is the older half now was never seen.
            if let (Some(_), Some(older)) = (&before, &next.older)
                && !is_at(before.as_ref(), &older_of(&self.path))?
            {
                copy(&mut &*older, &self.path)?;
            }
            self.newer = next.newer;
            self.rest()?;
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), Failure> {
        match &mut self.newer {
            Some(file) => copy(file, &self.path),
            None => Ok(()),
        }
    }
}

/// Prints all that is left to read.
fn copy(from: &mut impl Read, path: &Path) -> Result<(), Failure> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(bytes) => output::bytes(&chunk[..bytes])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", path)(error).into()),
        }
    }
}

fn half(file: &Option<File>) -> Box<dyn Read + '_> {
    match file {
        Some(file) => Box::new(file),
        None => Box::new(io::empty()),
    }
}

fn open(path: &Path) -> Result<Option<File>, Error> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

/// Returns whether the path still names this file, or still none. A path that names nothing any
/// more names no other file.
fn is_at(file: Option<&File>, path: &Path) -> Result<bool, Error> {
    let named = match fs::metadata(path) {
        Ok(named) => named,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Error::io("look at", path)(error)),
    };
    let Some(file) = file else { return Ok(false) };
    let held = file.metadata().map_err(Error::io("look at", path))?;
    Ok((held.dev(), held.ino()) == (named.dev(), named.ino()))
}

fn older_of(log: &Path) -> PathBuf {
    let mut older = log.as_os_str().to_owned();
    older.push(".1");
    older.into()
}
