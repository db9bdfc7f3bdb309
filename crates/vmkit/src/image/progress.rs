//! The progress of a pull, an import, a conversion, or an export of a VM, as data.
//!
//! Pure: data.

/// The progress of an image, or of a VM's export or import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullProgress {
    /// The present phase.
    pub stage: PullStage,
    /// How many bytes were received, compressed or not, including those of an earlier attempt.
    pub done_bytes: u64,
    /// The total number of bytes, if the server named it.
    pub total_bytes: Option<u64>,
}

/// A phase of a pull, an import, a conversion, or an export of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PullStage {
    /// The checksum and its signature are fetched.
    #[default]
    Asking,
    /// Another process or task fetches the same image; this one waits for it.
    Waiting,
    /// The image is fetched, hashed and unpacked.
    Fetching,
    /// The image is converted; the bytes are those of the disk.
    Converting,
    /// The files of a VM are checked, and written to an export.
    Exporting,
    /// The files of a VM are read from an export.
    Importing,
    /// The image is complete; its checksum is compared, and it is synced.
    Finishing,
}
