//! Receives the bytes of an image: writes, hashes and decompresses them concurrently.
//!
//! ```text
//! take() ──▶ keeper ──▶ `download`, sparse          each arrow is a bounded channel, so that memory
//!              ├──────▶ hash of what came           stays small and the slowest sets the pace
//!              └──────▶ unpacker ──▶ `disk`, sparse, and its hash
//! ```
//!
//! The bytes are stored as they were received, so that an interrupted download resumes where it
//! ended, even in another process: the keeper then reads the stored bytes again. The compression is
//! detected from the first bytes. An uncompressed image is its own disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc as threads;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::downloads::{DOWNLOAD, DownloadDir};
use super::inspect::is_web_page;
use super::packing::{HEAD_BYTES, ImageCompression, MOST_WINDOW_BYTES, needs_too_much_memory};
use super::sparse::SparseFile;
use crate::blocking::spawn;
use crate::error::{Error, Result};
use crate::steps::step;

/// How many pieces may be queued between two threads. A piece from the network has at most some 400
/// KiB.
const PIECES: usize = 8;
/// How many bytes are read or decompressed at a time.
const BLOCK_BYTES: usize = 256 << 10;

/// The name of the image in errors, until the caller replaces it by the image's origin.
const UNNAMED: &str = "the image";

/// The file with the decompressed disk.
const DISK: &str = "disk";

/// An image that is being received.
#[derive(Debug)]
pub(super) struct ImageIntake {
    /// `None` after the intake was abandoned.
    sender: Option<mpsc::Sender<IntakePiece>>,
    outcome: oneshot::Receiver<Result<ReceivedImage>>,
}

/// An image that was received completely.
#[derive(Debug)]
pub(super) struct ReceivedImage {
    /// The file with the disk; it is not synced yet.
    pub(super) disk: PathBuf,
    /// The checksum of the disk.
    pub(super) disk_digest: Digest,
    /// The checksum of the bytes as received.
    pub(super) digest: Digest,
}

#[derive(Debug)]
enum IntakePiece {
    Bytes(Bytes),
    /// The end; without it, the sender has been dropped before the end.
    End,
}

impl ImageIntake {
    /// Starts to receive an image in a directory of its own; the bytes are hashed with `algorithm`.
    ///
    /// The first `kept_bytes` exist already from an earlier attempt.
    ///
    /// # Errors
    /// `Io` and `Host` if the files can't be written.
    pub(super) fn begin(place: &DownloadDir, algorithm: DigestAlgorithm, kept_bytes: u64) -> Result<Self> {
        let path = place.dir.join(DOWNLOAD);
        let open = || {
            step("image: create the download")?;
            if kept_bytes == 0 {
                remove_earlier(&path)?;
            }
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)
        };
        let file = open().map_err(Error::io("create", &path))?;
        let (sender, receiver) = mpsc::channel(PIECES);
        let (answer, outcome) = oneshot::channel();
        let place = place.clone();
        spawn("vmkit-keep", move || {
            // The thread owns the whole value, so that nothing else writes there before it and the
            // decompressor have ended: a closure that uses only one field would capture only that
            // field.
            let place = place;
            if let Some(taken) = keep(&place.dir, file, algorithm, kept_bytes, receiver).transpose() {
                // The caller may be gone; the stored bytes stay for the next attempt.
                let _ = answer.send(taken);
            }
        })?;
        Ok(Self { sender: Some(sender), outcome })
    }

    /// Receives the next bytes; returns false if that fails, and then [`finish`](Self::finish)
    /// returns why.
    pub(super) async fn take(&mut self, bytes: Bytes) -> bool {
        match &self.sender {
            Some(sender) => sender.send(IntakePiece::Bytes(bytes)).await.is_ok(),
            None => false,
        }
    }

    /// Abandons the intake, and waits until nothing is written any more; the stored bytes stay.
    pub(super) async fn give_up(&mut self) {
        if self.sender.take().is_some() {
            // The keeper returns `None` then, or an earlier failure, which no longer matters.
            let _ = (&mut self.outcome).await;
        }
    }

    /// Finishes the intake: no more bytes follow.
    ///
    /// # Errors
    /// `Host` and `Io` if a write failed; `InvalidInput` on `image` if the image can't be
    /// decompressed or is a web page.
    pub(super) async fn finish(self) -> Result<ReceivedImage> {
        if let Some(sender) = &self.sender {
            // If the keeper has ended already, its result has the reason.
            let _ = sender.send(IntakePiece::End).await;
        }
        self.outcome.await.expect("the keeper replies after the end")
    }
}

/// Removes a file of an earlier attempt: the new file is another inode, so a late write to the old
/// one does no harm.
fn remove_earlier(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes, hashes and passes on the received bytes; returns `None` if the sender is gone.
fn keep(
    dir: &Path,
    file: File,
    algorithm: DigestAlgorithm,
    kept_bytes: u64,
    mut receiver: mpsc::Receiver<IntakePiece>,
) -> Result<Option<ReceivedImage>> {
    let path = dir.join(DOWNLOAD);
    let mut download = SparseFile::new(file);
    let mut branches = IntakeBranches::new(dir, algorithm)?;
    while download.end() < kept_bytes {
        let wanted = usize::try_from(kept_bytes - download.end()).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        let mut block = vec![0; wanted];
        download.reread(&mut block).map_err(Error::io("read", &path))?;
        branches.feed(Bytes::from(block))?;
    }
    loop {
        match receiver.blocking_recv() {
            Some(IntakePiece::Bytes(bytes)) => {
                download.append(&bytes).map_err(Error::io("write", &path))?;
                branches.feed(bytes)?;
            }
            Some(IntakePiece::End) => break,
            None => {
                drop(download.finish().map_err(Error::io("write", &path))?);
                return Ok(None);
            }
        }
    }
    drop(download.finish().map_err(Error::io("write", &path))?);
    branches.finish(path).map(Some)
}

/// The consumers of the bytes besides the file.
struct IntakeBranches {
    dir: PathBuf,
    /// The first bytes, while they are too few to detect the format.
    head: Option<Vec<u8>>,
    digest: IntakeBranch<Digest>,
    /// The hash of an uncompressed image, if it needs another algorithm than the requested one.
    disk_digest: Option<IntakeBranch<Digest>>,
    unpacked: Option<IntakeBranch<Digest>>,
}

impl IntakeBranches {
    fn new(dir: &Path, algorithm: DigestAlgorithm) -> Result<Self> {
        let digest = IntakeBranch::hash(algorithm)?;
        let disk_digest = match algorithm {
            DigestAlgorithm::Sha256 => None,
            DigestAlgorithm::Sha512 => Some(IntakeBranch::hash(DigestAlgorithm::Sha256)?),
        };
        Ok(Self { dir: dir.to_owned(), head: Some(Vec::new()), digest, disk_digest, unpacked: None })
    }

    fn feed(&mut self, bytes: Bytes) -> Result<()> {
        let bytes = match self.head.take() {
            None => bytes,
            Some(mut head) => {
                head.extend_from_slice(&bytes);
                if head.len() < HEAD_BYTES {
                    self.head = Some(head);
                    return Ok(());
                }
                self.begin(&head)?;
                Bytes::from(head)
            }
        };
        self.send(bytes)
    }

    /// Detects the format, and starts to decompress if needed.
    fn begin(&mut self, head: &[u8]) -> Result<()> {
        if is_web_page(head) {
            return Err(Error::invalid("image", UNNAMED, "a web page, not an image"));
        }
        if let Some(packing) = ImageCompression::of(head) {
            self.disk_digest = None;
            self.unpacked = Some(IntakeBranch::unpack(packing, self.dir.join(DISK))?);
        }
        Ok(())
    }

    fn send(&mut self, bytes: Bytes) -> Result<()> {
        if let Some(hash) = &mut self.disk_digest {
            hash.send(bytes.clone())?;
        }
        if let Some(unpacker) = &mut self.unpacked {
            unpacker.send(bytes.clone())?;
        }
        self.digest.send(bytes)
    }

    fn finish(mut self, download: PathBuf) -> Result<ReceivedImage> {
        if let Some(head) = self.head.take() {
            self.begin(&head)?;
            self.send(Bytes::from(head))?;
        }
        let digest = self.digest.finish()?;
        let (disk, disk_digest) = match (self.unpacked, self.disk_digest) {
            (Some(unpacked), _) => (self.dir.join(DISK), unpacked.finish()?),
            (None, Some(hash)) => (download, hash.finish()?),
            (None, None) => (download, digest.clone()),
        };
        Ok(ReceivedImage { disk, disk_digest, digest })
    }
}

/// A thread that is fed bytes and returns a result once, at the end or when it fails.
///
/// Dropping it waits for the thread's end: a late write after the start of the next attempt would
/// damage that one's file.
struct IntakeBranch<T> {
    feed: Option<threads::SyncSender<Bytes>>,
    answer: threads::Receiver<Result<T>>,
    /// The result, if the thread ended early.
    early: Option<T>,
}

impl IntakeBranch<Digest> {
    fn hash(algorithm: DigestAlgorithm) -> Result<Self> {
        Self::spawn("vmkit-hash", move |pieces| {
            let mut hasher = Hasher::new(algorithm);
            pieces.into_iter().for_each(|bytes| hasher.update(&bytes));
            Ok(hasher.finish())
        })
    }

    fn unpack(packing: ImageCompression, path: PathBuf) -> Result<Self> {
        Self::spawn("vmkit-unpack", move |pieces| unpack(packing, pieces, &path))
    }
}

impl<T: Send + 'static> IntakeBranch<T> {
    fn spawn(
        name: &str,
        work: impl FnOnce(threads::Receiver<Bytes>) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let (feed, fed) = threads::sync_channel(PIECES);
        let (answers, answer) = threads::sync_channel(1);
        spawn(name, move || {
            // The keeper may have failed meanwhile, and then the result is not needed.
            let _ = answers.send(work(fed));
        })?;
        Ok(Self { feed: Some(feed), answer, early: None })
    }

    /// Sends bytes to the thread; if it has ended early, returns why.
    fn send(&mut self, bytes: Bytes) -> Result<()> {
        if let Some(feed) = &self.feed
            && feed.send(bytes).is_err()
        {
            self.feed = None;
            self.early = Some(self.outcome()?);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<T> {
        self.feed = None;
        match self.early.take() {
            Some(answer) => Ok(answer),
            None => self.outcome(),
        }
    }

    fn outcome(&self) -> Result<T> {
        self.answer.recv().expect("the thread replies before it ends")
    }
}

impl<T> Drop for IntakeBranch<T> {
    fn drop(&mut self) {
        self.feed = None;
        while self.answer.recv().is_ok() {}
    }
}

/// Decompresses the received bytes into a sparse file, and returns its checksum.
fn unpack(packing: ImageCompression, pieces: threads::Receiver<Bytes>, path: &Path) -> Result<Digest> {
    let open = || {
        remove_earlier(path)?;
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    };
    let mut disk = SparseFile::new(open().map_err(Error::io("create", path))?);
    let mut hash = IntakeBranch::hash(DigestAlgorithm::Sha256)?;
    let mut reader = packing.reader(ChannelReader { pieces, current: Bytes::new() });
    let damaged = |error: io::Error| {
        if needs_too_much_memory(&error) {
            let (name, most) = (packing.name(), MOST_WINDOW_BYTES >> 20);
            let why =
                format!("the image can't be decompressed: its {name} needs more than {most} MiB of memory");
            return Error::invalid("image", UNNAMED, why);
        }
        let why = format!("the image can't be decompressed as {}", packing.name());
        Error::invalid("image", UNNAMED, why).with_source(error)
    };
    loop {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        reader.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block).map_err(damaged)?;
        if block.is_empty() {
            break;
        }
        disk.append(&block).map_err(Error::io("write", path))?;
        hash.send(Bytes::from(block))?;
    }
    drop(disk.finish().map_err(Error::io("write", path))?);
    hash.finish()
}

/// Reads from a channel; the input ends when the sender is dropped.
struct ChannelReader {
    pieces: threads::Receiver<Bytes>,
    current: Bytes,
}

impl BufRead for ChannelReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.pieces.recv() {
                Ok(piece) => self.current = piece,
                Err(threads::RecvError) => break,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        drop(self.current.split_to(amount));
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}
