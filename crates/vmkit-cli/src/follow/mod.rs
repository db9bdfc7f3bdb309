//! A log of two halves, printed and followed: `console.log.1` is the older half, and when `console.log` is full it takes
//! that name.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod portable;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vmkit::Error;

#[cfg(target_os = "linux")]
use self::linux::Changes;
#[cfg(not(target_os = "linux"))]
use self::portable::Changes;
use crate::failure::Failure;
use crate::output;

/// Prints a log, or its last lines.
///
/// # Errors
/// `Io` where it can't be read. A log that is not there yet is empty.
pub(crate) fn print(log: &Path, tail: Option<usize>) -> Result<(), Failure> {
    Log::open(log)?.print(tail)
}

/// Prints a log, or its last lines, and what is added from now on, until its directory is removed.
///
/// # Errors
/// As for [`print`].
pub(crate) fn follow(log: &Path, tail: Option<usize>) -> Result<(), Failure> {
    // Watched before it is read, so that nothing is written unseen in between.
    let changes = Changes::watch(log)?;
    let mut followed = Log::open(log)?;
    followed.print(tail)?;
    loop {
        followed.catch_up()?;
        if !changes.wait()? {
            return followed.catch_up();
        }
    }
}

/// The two halves of a log, as they were when they were opened.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    older: Option<File>,
    newer: Option<File>,
}

impl Log {
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

    fn print(&mut self, tail: Option<usize>) -> Result<(), Failure> {
        let skipped = match tail {
            Some(lines) => self.lines().map_err(Error::io("read", &self.path))?.saturating_sub(lines),
            None => 0,
        };
        let mut both = self.both();
        for _ in 0..skipped {
            both.skip_until(b'\n').map_err(Error::io("read", &self.path))?;
        }
        copy(&mut both, &self.path)
    }

    /// Counts the lines, the last one even if it is not ended, and goes back to the beginning.
    fn lines(&mut self) -> io::Result<usize> {
        let mut lines = 0;
        let mut both = self.both();
        while both.skip_until(b'\n')? > 0 {
            lines += 1;
        }
        drop(both);
        for half in [&mut self.older, &mut self.newer].into_iter().flatten() {
            half.rewind()?;
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
            // Whoever writes has gone on to another file, so this one has an end now.
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

/// Tells whether the path still names this file, or still none. A path that names nothing any more names no other file.
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
