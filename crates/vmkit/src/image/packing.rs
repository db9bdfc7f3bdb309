//! How an image is compressed, and readers of what is in it.
//!
//! The input is not trusted: a decoder may need [`MOST_WINDOW_BYTES`] of memory for its window and
//! no more.

use std::io::{self, BufRead, Read};

/// The largest window, or dictionary, of a compressed image: the image is verified only at its end,
/// and could demand gigabytes before. `xz -9` has 64 MiB, `zstd --ultra` 128 MiB.
pub(super) const MOST_WINDOW_BYTES: u64 = 128 << 20;
/// How many bytes of the start are needed to detect the format.
pub(super) const HEAD_BYTES: usize = 512;

/// Returns the first decompressed bytes of this start of a file; `None` if it is not compressed in
/// a supported way.
pub(super) fn unpacked_head(packed: Vec<u8>) -> Option<Vec<u8>> {
    let packing = ImageCompression::of(&packed)?;
    let mut reader = packing.reader(io::Cursor::new(packed));
    let mut head = Vec::with_capacity(HEAD_BYTES);
    let mut block = [0; HEAD_BYTES];
    // The file continues after this part, so its end is an error.
    while let Ok(count @ 1..) = reader.read(&mut block) {
        head.extend_from_slice(&block[..count]);
        if head.len() >= HEAD_BYTES {
            break;
        }
    }
    Some(head)
}

/// How an image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ImageCompression {
    Gzip,
    Xz,
    Zstandard,
    Bzip2,
}

impl ImageCompression {
    /// Returns how an image is compressed, by its first bytes.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstandard),
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstandard => "Zstandard",
            Self::Bzip2 => "bzip2",
        }
    }

    /// Returns a reader of the decompressed bytes; several concatenated streams are one.
    pub(super) fn reader(self, packed: impl BufRead + 'static) -> Box<dyn Read> {
        match self {
            Self::Gzip => Box::new(GzipReader(Some(flate2::bufread::GzDecoder::new(packed)))),
            Self::Xz => {
                use liblzma::stream::{CONCATENATED, Stream};
                // The decoder needs some KiB besides its window.
                match Stream::new_stream_decoder(MOST_WINDOW_BYTES + (1 << 20), CONCATENATED) {
                    Ok(stream) => Box::new(liblzma::bufread::XzDecoder::new_stream(packed, stream)),
                    Err(error) => Box::new(FailingReader(Some(error.into()))),
                }
            }
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(packed)),
            Self::Zstandard => {
                let bounded = zstd::stream::read::Decoder::with_buffer(packed).and_then(|mut decoder| {
                    decoder.window_log_max(MOST_WINDOW_BYTES.ilog2())?;
                    Ok(decoder)
                });
                match bounded {
                    Ok(decoder) => Box::new(decoder),
                    Err(error) => Box::new(FailingReader(Some(error))),
                }
            }
        }
    }
}

/// Decompresses concatenated members of gzip, and ignores zeros after the last one as padding, as
/// `gzip` does.
struct GzipReader<R>(Option<flate2::bufread::GzDecoder<R>>);

impl<R: BufRead> Read for GzipReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = &mut self.0 {
            let count = decoder.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            let packed = self.0.take().map(flate2::bufread::GzDecoder::into_inner);
            let mut packed = packed.expect("it was there a moment ago");
            match packed.fill_buf()?.first() {
                None => {}
                Some(0) => skip_zeros(packed)?,
                Some(_) => self.0 = Some(flate2::bufread::GzDecoder::new(packed)),
            }
        }
        Ok(0)
    }
}

fn skip_zeros(mut packed: impl BufRead) -> io::Result<()> {
    loop {
        let bytes = packed.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "data that is not gzip follows its end"));
        }
        let count = bytes.len();
        packed.consume(count);
    }
}

/// Returns whether an error is that of a decoder that needs more memory than its limit.
pub(super) fn needs_too_much_memory(error: &io::Error) -> bool {
    let of_xz = error.get_ref().and_then(|error| error.downcast_ref::<liblzma::stream::Error>());
    // zstd reports it only by a text: that of ZSTD_error_frameParameter_windowTooLarge.
    of_xz == Some(&liblzma::stream::Error::MemLimit) || error.to_string().contains("requires too much memory")
}

/// A reader that could not be created.
struct FailingReader(Option<io::Error>);

impl Read for FailingReader {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}
