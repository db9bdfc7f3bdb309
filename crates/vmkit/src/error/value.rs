//! What is wrong with a value, as far as a caller can do something about it: [`ValueProblem`].
//!
//! Pure: this module knows nothing of the host.

/// What is wrong with the value of an [`Error::Invalid`](super::Error::Invalid).
///
/// A variant exists because a caller can offer a way out; the text beside it says the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ValueProblem {
    /// No image has this name.
    UnknownImage,
    /// There is neither an image nor a kernel, nor a disk or disc of another kind.
    NothingToBoot,
    /// The image is compressed; an import unpacks it.
    CompressedImage,
    /// The image of a disc was given as that of a disk.
    DiscImage,
    /// A URL was given for a file.
    UrlNotFetched,
    /// An export's VM uses files of the host that imports it.
    HostFiles,
    /// Only a VM that is recreated can have another value.
    NeedsRecreate,
    /// Something else, which the text says.
    #[default]
    Other,
}
