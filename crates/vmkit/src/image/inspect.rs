//! Detects the format of an image file from its content, never from its name.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::facts::{ImageFacts, SECTOR_BYTES};
use super::qcow2_header::{self, BackingName, Qcow2Header};
use crate::error::{Error, Result, ValueProblem};
use crate::image_format::ImageFormat;
use crate::input_file::InputFile;
#[cfg(all(target_os = "linux", feature = "qemu"))]
use crate::input_file::open_regular;

/// The largest JSON file that is examined: a server's reply is shorter.
const JSON_BYTES: u64 = 64 << 10;

/// Returns the format of the image at `path`, raw or qcow2, and the size of its disk.
///
/// Of a qcow2 it reads the header, the L1 table and the last L2 table in the file, which detects an
/// interrupted download; it does not check the rest as `qemu-img check` does. It never blocks: a
/// FIFO or a device is refused without opening it.
///
/// # Errors
/// `InvalidInput` on `image` if the file does not exist, is no regular file, is empty, or can't be
/// read; if it has another format or is compressed as a whole; and for a qcow2 that is damaged,
/// encrypted, has its data in another file, or has a backing file: an image from outside could
/// refer to any file of the host there.
pub fn inspect(path: &Path) -> Result<ImageFacts> {
    inspect_for("image", path)
}

/// Like [`inspect`], for another field than `image`.
pub(crate) fn inspect_for(field: &'static str, path: &Path) -> Result<ImageFacts> {
    inspect_from(field, path, None)
}

/// Returns whether a file begins with the header of a qcow2 image, with or without a backing file.
///
/// # Errors
/// Why it can't be read.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) fn has_qcow2_header(path: &Path) -> io::Result<bool> {
    let least = u64::from(qcow2_header::V3_HEADER_BYTES);
    let head = read_range(&open_regular(path)?, 0, least)?;
    Ok(head.starts_with(&qcow2_header::MAGIC) && head.len() as u64 == least)
}

/// The origin of an image that is stored temporarily: a file of the user's, or a server.
#[derive(Debug)]
pub(super) struct ImageOrigin {
    /// Its name in errors.
    pub(super) shown: String,
    /// The file that it is a copy of, which is next to a backing file, if it has one.
    pub(super) file: Option<PathBuf>,
}

#[cfg(feature = "images")]
impl ImageOrigin {
    /// Returns an error about the temporary file as one about the image's origin.
    pub(super) fn named(&self, error: Error) -> Error {
        match error {
            Error::Invalid { field, expected, problem, source, .. } if field == "image" => {
                Error::Invalid { field, value: self.shown.clone(), expected, problem, source }
            }
            // Errors in the image's content, not in the file.
            Error::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Error::invalid("image", &self.shown, source.to_string())
            }
            error => error,
        }
    }
}

/// Like [`inspect`], for an image from elsewhere.
pub(super) fn inspect_from(
    field: &'static str,
    path: &Path,
    origin: Option<&ImageOrigin>,
) -> Result<ImageFacts> {
    let shown = origin.map_or_else(|| path.display().to_string(), |origin| origin.shown.clone());
    let refused = |why: String| Error::invalid(field, &shown, why);
    let InputFile { file, path: found, bytes: file_bytes } = InputFile::open(field, path)?;
    if file_bytes == 0 {
        return Err(refused("the file is empty: was it downloaded completely?".to_owned()));
    }
    let head = read_range(&file, 0, 4096).map_err(Error::io("read", path))?;
    if !head.starts_with(&qcow2_header::MAGIC) {
        // A downloaded or imported image is decompressed already, and is never attached for
        // writing.
        if field == "image"
            && origin.is_none()
            && let Some((how, problem)) = importable(&file, &head).map_err(Error::io("read", path))?
        {
            return Err(refused(how).with_problem(problem));
        }
        if let Some(other) = foreign_format(&head) {
            return Err(refused(other));
        }
        if file_bytes < JSON_BYTES && is_json(&file).map_err(Error::io("read", path))? {
            return Err(refused("JSON, not an image: a server sent it instead of one".to_owned()));
        }
        return Ok(ImageFacts {
            path: found,
            format: ImageFormat::Raw,
            virtual_size_bytes: file_bytes.next_multiple_of(SECTOR_BYTES),
            file_bytes,
        });
    }
    let head = read_range(&file, 0, qcow2_header::MAX_CLUSTER_BYTES).map_err(Error::io("read", path))?;
    let damaged = |why: String| refused(format!("a qcow2 image that can't be used: {why}"));
    let header = qcow2_header::parse(&head, file_bytes).map_err(damaged)?;
    let original = origin.map_or(Some(&found), |origin| origin.file.as_ref());
    check_use(&header, original.map(PathBuf::as_path)).map_err(refused)?;
    check_whole(&file, &header, file_bytes).map_err(Error::io("read", path))?.map_err(damaged)?;
    Ok(ImageFacts {
        path: found,
        format: ImageFormat::Qcow2,
        virtual_size_bytes: header.virtual_size_bytes.next_multiple_of(SECTOR_BYTES),
        file_bytes,
    })
}

/// Returns whether the bytes of a raw disk are text: the user gave the wrong file.
#[cfg(feature = "images")]
pub(super) fn is_text(facts: &ImageFacts) -> bool {
    const LOOKED_AT: u64 = 4096;
    let mut begin = Vec::new();
    let read = File::open(&facts.path).and_then(|file| file.take(LOOKED_AT).read_to_end(&mut begin));
    // A disk has zeros near its start, or bytes that are not text.
    let is_text = match std::str::from_utf8(&begin) {
        Ok(text) => !text.contains('\0'),
        Err(error) => error.error_len().is_none() && !begin.contains(&0),
    };
    facts.format == ImageFormat::Raw && read.is_ok_and(|bytes| bytes > 0) && is_text
}

/// Refuses features of qcow2 that an image from outside must not use.
///
/// `image` is the original file, if it is on this host.
fn check_use(header: &Qcow2Header, image: Option<&Path>) -> Result<(), String> {
    if header.marked_corrupt {
        return Err("a qcow2 image that is marked corrupt: repair a copy with `qemu-img check -r all`".into());
    }
    if header.encrypted {
        return Err("an encrypted qcow2 image: decrypt it with `qemu-img convert` first".into());
    }
    if header.external_data_file {
        return Err(
            "a qcow2 image whose data is in another file: convert it with `qemu-img convert -O qcow2`".into(),
        );
    }
    if let Some(backing) = &header.backing {
        return Err(backing_refusal(backing, image));
    }
    if header.virtual_size_bytes == 0 {
        return Err("a qcow2 image of a disk of 0 bytes (expected a disk with data)".into());
    }
    Ok(())
}

fn backing_refusal(backing: &BackingName, image: Option<&Path>) -> String {
    let name = Path::new(std::ffi::OsStr::from_bytes(&backing.name));
    // A colon before any slash is a protocol of QEMU's, so it refers to no file.
    let protocol = backing.name.split(|&byte| byte == b'/').next().is_some_and(|head| head.contains(&b':'));
    let beside = image.map(|image| image.parent().unwrap_or(Path::new("/")).join(name));
    let is_missing = !protocol && beside.is_some_and(|beside| !beside.exists());
    let missing = if is_missing { ", which is missing" } else { "" };
    let format = backing.format.as_deref().map(|format| format!(" ({format})")).unwrap_or_default();
    format!(
        "a qcow2 image that is only the difference to {name:?}{format}{missing}: an image can't have a \
         backing file; if you trust it, merge the two with `qemu-img convert -O qcow2 IMAGE NEW` or \
         `qemu-img rebase -b \"\" IMAGE`"
    )
}

/// Checks that the tables of a qcow2 refer only to offsets within the file.
fn check_whole(file: &File, header: &Qcow2Header, file_bytes: u64) -> io::Result<Result<(), String>> {
    let l1_table = read_range(file, header.l1_offset, u64::from(header.l1_entries) * 8)?;
    let furthest = match qcow2_header::furthest_l2_table(&l1_table, header, file_bytes) {
        Ok(Some(offset)) => offset,
        Ok(None) => return Ok(Ok(())),
        Err(problem) => return Ok(Err(problem)),
    };
    let l2_table = read_range(file, furthest, header.cluster_bytes())?;
    Ok(qcow2_header::check_l2_table(&l2_table, header, file_bytes))
}

/// Reads this many bytes, or fewer at the end of the file.
fn read_range(file: &File, offset: u64, most_bytes: u64) -> io::Result<Vec<u8>> {
    struct HeaderReader<'a>(&'a File, u64);
    impl Read for HeaderReader<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read_at(buffer, self.1)?;
            self.1 += count as u64;
            Ok(count)
        }
    }
    let mut bytes = Vec::new();
    HeaderReader(file, offset).take(most_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Formats that vmkit does not support: the position of the magic bytes, the bytes, and the name.
const FOREIGN_IMAGES: &[(usize, &[u8], &str)] = &[
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "the descriptor of a VMDK image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (0, b"QED\0", "a QED image"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
];

/// Files that contain an image, to be unpacked first.
const PACKED: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "compressed with gzip: decompress it with `gunzip`"),
    (0, b"\xfd7zXZ\0", "compressed with xz: decompress it with `unxz`"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with Zstandard: decompress it with `unzstd`"),
    (0, b"BZh", "compressed with bzip2: decompress it with `bunzip2`"),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4: decompress it with `unlz4`"),
    (0, b"LZIP", "compressed with lzip: decompress it with `lzip -d`"),
    (0, b"PK\x03\x04", "a zip archive: unpack it with `unzip`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it with `7z x`"),
    (257, b"ustar", "a tar archive (an .ova is one): unpack it with `tar -x`"),
];

/// How much of a compressed file is read to detect its content: a block of bzip2 has at most 900
/// kB.
#[cfg(feature = "images")]
const PACKED_HEAD_BYTES: u64 = 1 << 20;

/// Returns that an import decompresses the file, or that it is an archive, which an import does not
/// accept.
#[cfg(feature = "images")]
fn importable(file: &File, head: &[u8]) -> io::Result<Option<(String, ValueProblem)>> {
    if !PACKED[..4].iter().any(|(_, mark, _)| head.starts_with(mark)) {
        return Ok(None);
    }
    let Some(unpacked) = super::packing::unpacked_head(read_range(file, 0, PACKED_HEAD_BYTES)?) else {
        return Ok(None);
    };
    let (_, _, what) = PACKED.iter().find(|(_, mark, _)| head.starts_with(mark)).expect("one of them fitted");
    let how = what.split(':').next().unwrap_or(what);
    Ok(Some(match unpacked.get(257..262) == Some(b"ustar") {
        true => (
            format!("this is a tar archive {how}: unpack it with `tar -xf`, then pass the disk in it"),
            ValueProblem::Other,
        ),
        false => (
            format!("this is {how}: import it as an image, which decompresses it"),
            ValueProblem::CompressedImage,
        ),
    }))
}

#[cfg(not(feature = "images"))]
fn importable(_: &File, _: &[u8]) -> io::Result<Option<(String, ValueProblem)>> {
    Ok(None)
}

/// Returns the format of a file that is neither raw nor qcow2, as far as its first bytes show.
fn foreign_format(head: &[u8]) -> Option<String> {
    let begins = |(at, mark, _): &&(usize, &[u8], &str)| head.get(*at..).is_some_and(|h| h.starts_with(mark));
    if let Some((_, _, what)) = FOREIGN_IMAGES.iter().find(begins) {
        return Some(format!("{what}: convert it with `qemu-img convert -O qcow2 IMAGE NEW`"));
    }
    if let Some((_, _, what)) = PACKED.iter().find(begins) {
        return Some(format!("this is {what}, then pass the result"));
    }
    if is_lzma(head) {
        return Some(
            "this is compressed with lzma: decompress it with `unlzma`, then pass the result".to_owned(),
        );
    }
    if head.starts_with(b"\x7fELF") {
        return Some("an ELF file, which is a program, a library or a kernel, not a disk".to_owned());
    }
    is_web_page(head).then(|| "a web page, not an image: the download failed".to_owned())
}

/// Returns whether these bytes start a web page, such as a login or an error page in place of an
/// image.
pub(super) fn is_web_page(head: &[u8]) -> bool {
    const MARKS: [&[u8]; 6] = [b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--"];
    let head = text_begin(head);
    MARKS.iter().any(|mark| head.get(..mark.len()).is_some_and(|head| head.eq_ignore_ascii_case(mark)))
}

/// Returns a text without what may precede its first letter.
fn text_begin(head: &[u8]) -> &[u8] {
    head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start()
}

/// Returns whether a file is one JSON object.
fn is_json(file: &File) -> io::Result<bool> {
    let text = read_range(file, 0, JSON_BYTES)?;
    let text = text_begin(&text);
    Ok(text.starts_with(b"{")
        && serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(text).is_ok())
}

/// Returns whether these bytes start a file of the old `.lzma` format, which has no magic bytes.
///
/// Source: `lzma-file-format.txt` of XZ Utils, which detects it in the same way: the usual
/// properties, a dictionary of 2^n or 2^n + 2^(n-1) bytes, and a size that is unknown or below 256
/// GiB.
fn is_lzma(head: &[u8]) -> bool {
    let (Some([0x5d]), Some(dictionary), Some(size)) = (head.get(..1), head.get(1..5), head.get(5..13))
    else {
        return false;
    };
    let dictionary = u32::from_le_bytes(dictionary.try_into().expect("these are 4 bytes"));
    let size = u64::from_le_bytes(size.try_into().expect("these are 8 bytes"));
    let rest = dictionary & dictionary.wrapping_sub(1);
    let is_usual =
        dictionary >= 4096 && (rest == 0 || (rest.is_power_of_two() && dictionary == rest | rest >> 1));
    is_usual && (size == u64::MAX || size < 1 << 38)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::image::tests::qemu_img;
    use rustix::fs::{CWD, FileType, Mode};

    fn refusal(path: &Path) -> String {
        let error = inspect(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let text = error.to_string();
        assert!(text.starts_with("image: ") && text.contains(path.to_str().unwrap()), "{text}");
        text
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(&dir.path().join("none.img")).contains("no such file"));
        assert!(refusal(dir.path()).contains("a directory"));
        assert!(refusal(Path::new("/dev/null")).contains("a device"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(refusal(&fifo).contains("a pipe"));
        let file = dir.path().join("empty.img");
        std::fs::write(&file, "").unwrap();
        assert!(refusal(&file).contains("the file is empty"));
        assert!(refusal(&file.join("below")).contains("not a directory"));
    }

    #[test]
    fn an_unreadable_image_is_refused() {
        if rustix::process::geteuid().is_root() {
            println!("SKIP: root reads everything");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        rustix::fs::fchmod(file.as_file(), Mode::empty()).unwrap();
        assert!(refusal(file.path()).contains("may not read it"));
    }

    #[test]
    fn other_formats_are_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        for (at, mark, what) in FOREIGN_IMAGES.iter().chain(PACKED) {
            let mut bytes = vec![0; 4096];
            bytes[*at..at + mark.len()].copy_from_slice(mark);
            std::fs::write(&image, bytes).unwrap();
            let text = refusal(&image);
            assert!(text.contains(what.split(':').next().unwrap()), "{text}");
            let ways = ["convert -O qcow2", "unpack it with", "decompress it with", "import it as an image"];
            assert!(ways.iter().any(|way| text.contains(way)), "{text}");
        }
    }

    #[cfg(feature = "images")]
    #[test]
    fn a_packed_disk_is_to_be_imported_and_a_packed_archive_to_be_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let mut disk = vec![7; 3 << 20];
        for is_archive in [false, true] {
            if is_archive {
                disk[257..262].copy_from_slice(b"ustar");
            }
            for program in ["gzip", "xz", "zstd", "bzip2"] {
                std::fs::write(dir.path().join("disk"), &disk).unwrap();
                let mut command = std::process::Command::new(program);
                let output = match command.arg("-c").arg(dir.path().join("disk")).output() {
                    Ok(output) if output.status.success() => output,
                    _ => {
                        println!("SKIP: {program} can't be run");
                        continue;
                    }
                };
                std::fs::write(&image, output.stdout).unwrap();
                let (text, other) =
                    (refusal(&image), inspect_for("data_disks", &image).unwrap_err().to_string());
                let said = if is_archive { "`tar -xf`" } else { "import it as an image" };
                assert!(text.contains(said) && text.contains("compressed with"), "{program}: {text}");
                assert!(other.contains("decompress it with"), "{other}");
            }
        }
    }

    #[test]
    fn what_is_evidently_no_disk_is_refused_by_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let lzma = |dictionary: u32, size: u64| {
            [&b"\x5d"[..], &dictionary.to_le_bytes(), &size.to_le_bytes(), &[0; 600]].concat()
        };
        for (content, what) in [
            (b"\n<!DOCTYPE html><title>404</title>".to_vec(), "a web page"),
            (b"\xef\xbb\xbf  <HTML>".to_vec(), "a web page"),
            (b"<!-- 404 -->\n<html>no".to_vec(), "a web page"),
            (b"<?xml version='1.0'?><Error/>".to_vec(), "a web page"),
            (b"{\"error\": \"not found\"}\n".to_vec(), "JSON, not an image"),
            (b"\xef\xbb\xbf\n{}".to_vec(), "JSON, not an image"),
            ([&b"\x7fELF\x02\x01\x01"[..], &[0; 600]].concat(), "an ELF file"),
            (lzma(8 << 20, u64::MAX), "unlzma"),
            (lzma(12 << 20, 5 << 30), "unlzma"),
        ] {
            std::fs::write(&image, &content).unwrap();
            assert!(refusal(&image).contains(what), "{what}: {}", refusal(&image));
        }
        let long = format!("{{\"a\": \"{}\"}}", "x".repeat(1 << 16));
        for content in [
            b"{ this is no JSON }".to_vec(),
            long.into_bytes(),
            b"<p>".to_vec(),
            lzma(8 << 20, 1 << 40),
            lzma((8 << 20) + 1, 0),
            lzma(0, 0),
        ] {
            std::fs::write(&image, &content).unwrap();
            assert_eq!(inspect(&image).unwrap().format, ImageFormat::Raw);
        }
    }

    #[test]
    fn a_raw_image_is_known_by_its_bytes_and_rounded_up_to_sectors() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("liar.qcow2");
        std::fs::write(&image, [0xEB; 1000]).unwrap();
        let link = dir.path().join("latest");
        std::os::unix::fs::symlink("liar.qcow2", &link).unwrap();
        let facts = inspect(&link).unwrap();
        assert_eq!(facts.path, image.canonicalize().unwrap());
        assert_eq!(
            (facts.format, facts.virtual_size_bytes, facts.file_bytes),
            (ImageFormat::Raw, 1024, 1000)
        );
    }

    #[test]
    fn images_of_qemu_img_are_read_in_every_shape() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for options in [
            "compat=1.1",
            "compat=0.10",
            "cluster_size=512",
            "cluster_size=2M",
            "extended_l2=on",
            "preallocation=metadata",
            "lazy_refcounts=on,refcount_bits=1",
        ] {
            let image = path(options);
            if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "100M"]) {
                return;
            }
            let facts = inspect(Path::new(&image)).unwrap();
            assert_eq!(
                (facts.format, facts.virtual_size_bytes),
                (ImageFormat::Qcow2, 100 << 20),
                "{options}"
            );
        }
    }

    #[test]
    fn a_qcow2_that_is_cut_off_anywhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (raw, whole, cut) = (path("raw"), path("whole"), path("cut"));
        let noise: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        std::fs::write(&raw, noise).unwrap();
        for compressed in [&[][..], &["-c"]] {
            let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
            arguments.extend(compressed);
            arguments.extend([raw.as_str(), whole.as_str()]);
            if !qemu_img(&arguments) {
                return;
            }
            inspect(Path::new(&whole)).unwrap();
            let bytes = std::fs::read(&whole).unwrap();
            for percent in [1, 10, 50, 90, 98] {
                std::fs::write(&cut, &bytes[..bytes.len() * percent / 100]).unwrap();
                assert!(refusal(Path::new(&cut)).contains("truncated"), "{percent} %");
            }
        }
    }

    #[test]
    fn a_qcow2_that_leads_elsewhere_is_refused_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (base, image, data) = (path("base"), path("image"), path("data"));
        std::fs::write(&base, vec![0; 1 << 20]).unwrap();
        let backed = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", &image];
        if !qemu_img(&backed) {
            return;
        }
        let text = refusal(Path::new(&image));
        assert!(text.contains("difference to \"base\" (raw): an image"), "{text}");
        std::fs::remove_file(&base).unwrap();
        let text = refusal(Path::new(&image));
        assert!(text.contains("which is missing") && text.contains("qemu-img convert -O qcow2"), "{text}");

        let external = format!("data_file={data}");
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", &external, &image, "1M"]));
        assert!(refusal(Path::new(&image)).contains("data is in another file"));
    }

    #[test]
    fn a_qcow2_that_is_encrypted_or_marked_corrupt_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        for (at, byte, what) in [(35, 2, "an encrypted qcow2"), (79, 2, "marked corrupt")] {
            crate::image::create_blank(&image, crate::spec::Mib::new(1).unwrap()).unwrap();
            let mut bytes = std::fs::read(&image).unwrap();
            bytes[at] = byte;
            std::fs::write(&image, bytes).unwrap();
            assert!(refusal(&image).contains(what));
            std::fs::remove_file(&image).unwrap();
        }
    }

    #[test]
    fn a_spoilt_header_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, [&b"QFI\xfb"[..], &[0xFF; 600]].concat()).unwrap();
        assert!(refusal(&image).contains("qcow2 version is 4294967295"));
    }
}
