//! Reads a file or a pipe from its beginning to its end, on a thread of its own.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::mpsc;

use crate::blocking::spawn;
use crate::error::{Error, Result};

/// The most that is read at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// The blocks of a file. At most three are in memory: one is read, one waits, one is with the
/// caller.
///
/// The thread ends when this is dropped, even if nothing comes through a pipe.
#[derive(Debug)]
pub(super) struct FileBlocks {
    blocks: mpsc::Receiver<io::Result<Bytes>>,
    /// Its other end is with the thread, which notices when this one is closed.
    _wanted: OwnedFd,
}

impl FileBlocks {
    /// Starts to read.
    ///
    /// # Errors
    /// `Host` without a thread; `Io` without a descriptor.
    pub(super) fn begin(file: File) -> Result<Self> {
        let wanted = pipe_with(PipeFlags::CLOEXEC);
        let (abandoned, _wanted) = wanted.map_err(|errno| Error::io("create", "a pipe")(errno.into()))?;
        let (sender, blocks) = mpsc::channel(1);
        spawn("vmkit-read", move || read(file, &abandoned, &sender))?;
        Ok(Self { blocks, _wanted })
    }

    /// Returns the next block, `None` at the end.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self.blocks.recv().await {
            Some(block) => block.map(|block| (!block.is_empty()).then_some(block)),
            None => Err(io::Error::other("the thread that reads has ended")),
        }
    }
}

/// Sends one block after the other, and an empty one at the end.
fn read(mut file: File, abandoned: &OwnedFd, sender: &mpsc::Sender<io::Result<Bytes>>) {
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        let read = match wait(&file, abandoned) {
            Ok(false) => return,
            Ok(true) => file.read(&mut block),
            Err(errno) => Err(errno.into()),
        };
        let is_last = !matches!(read, Ok(1..));
        let read = read.map(|read_bytes| Bytes::copy_from_slice(&block[..read_bytes]));
        if sender.blocking_send(read).is_err() || is_last {
            return;
        }
    }
}

/// Waits until there is something to read, or the end; returns false if it is no longer wanted.
fn wait(file: &File, abandoned: &OwnedFd) -> Result<bool, Errno> {
    let mut awaited = [PollFd::new(file, PollFlags::IN), PollFd::new(abandoned, PollFlags::IN)];
    loop {
        match poll(&mut awaited, None) {
            Ok(_) => return Ok(awaited[1].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::event::Timespec;

    use super::*;

    fn pipe() -> (File, File) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (reader.into(), writer.into())
    }

    #[tokio::test]
    async fn a_pipe_and_a_file_are_read_to_their_ends() {
        let sent: Vec<u8> = (0_u32..800_000).flat_map(u32::to_le_bytes).collect();
        let (reader, mut writer) = pipe();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&sent).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let written = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&written).unwrap());
        for input in [reader, file] {
            let mut blocks = FileBlocks::begin(input).unwrap();
            let mut found = Vec::new();
            while let Some(block) = blocks.next().await.unwrap() {
                assert!(block.len() <= BLOCK_BYTES);
                found.extend_from_slice(&block);
            }
            assert!(found == sent);
        }
        writing.join().unwrap();
    }

    #[tokio::test]
    async fn a_read_that_fails_is_an_error_and_no_end() {
        let directory = File::open("/").unwrap();
        assert!(FileBlocks::begin(directory).unwrap().next().await.is_err());
    }

    #[tokio::test]
    async fn the_thread_ends_with_its_reader_though_a_pipe_is_silent() {
        let (reader, writer) = pipe();
        drop(FileBlocks::begin(reader).unwrap());
        // A pipe without a reader is in error.
        let mut writer = [PollFd::new(&writer, PollFlags::empty())];
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut writer, Some(&limit)).unwrap(), 1);
        assert!(writer[0].revents().contains(PollFlags::ERR));
    }
}
