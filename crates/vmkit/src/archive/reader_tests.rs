//! Archives that are whole, truncated, damaged and lying.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use uuid::Uuid;

use super::blocks::{BLOCK_BYTES, EntryHead};
use super::*;
use crate::error::{ErrorKind, Result};
use crate::handle::BackendTag;
use crate::spec::VmName;

const SHOWN: &str = "/backup/web.vmkit";

fn header(files: &[(&str, u64, u64)]) -> ExportHeader {
    let name = VmName::new("web").unwrap();
    let mut header = ExportHeader::new(name, Uuid::from_u128(7), BackendTag::Qemu, "stopped".to_owned());
    let listed = files.iter().map(|(name, bytes, stored_bytes)| ListedFile {
        name: (*name).to_owned(),
        bytes: *bytes,
        stored_bytes: *stored_bytes,
    });
    header.files = listed.collect();
    header
}

/// Writes an archive of a record, and of a file with a hole in its middle and one at its end.
fn archive(dir: &Path) -> Vec<u8> {
    let path = dir.join("disk");
    let disk = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    disk.write_all_at(b"start", 0).unwrap();
    disk.write_all_at(b"middle", 128 << 10).unwrap();
    disk.set_len(256 << 10).unwrap();
    let extents = FileExtents::of(&disk).unwrap();
    let stored = extents.stored_bytes();
    let header = header(&[(RECORD, 2, 2), ("files/root.qcow2", 256 << 10, stored), ("kept/key", 0, 0)]);
    let mut writer = ArchiveWriter::begin(Vec::new(), Path::new(SHOWN), 0, &header).unwrap();
    writer.bytes(RECORD, b"{}").unwrap();
    writer.file("files/root.qcow2", (&disk, &extents, &path), |_| Ok(())).unwrap();
    writer.bytes("kept/key", b"").unwrap();
    writer.finish().unwrap().0
}

fn read(bytes: &[u8], to: &Path) -> Result<()> {
    let (mut reader, header) = ArchiveReader::open(bytes, Path::new(SHOWN))?;
    for listed in &header.files {
        if listed.name == RECORD {
            reader.bytes(listed, MOST_RECORD_BYTES)?;
            continue;
        }
        let file = File::options().write(true).create(true).truncate(true).open(to).unwrap();
        let to = (listed.name == "files/root.qcow2").then_some((file, to));
        reader.file(listed, to, |_| Ok(()))?;
    }
    reader.finish()
}

fn problem(bytes: &[u8], to: &Path) -> String {
    let error = read(bytes, to).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let text = error.to_string();
    assert!(text.starts_with(&format!("file: {SHOWN:?}: ")), "{text}");
    text
}

#[test]
fn a_file_comes_back_with_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, to) = (archive(dir.path()), dir.path().join("to"));
    assert!(bytes.len() < 1 << 16, "{}", bytes.len());
    read(&bytes, &to).unwrap();
    let first = fs::read(dir.path().join("disk")).unwrap();
    // The last file that was read into it is empty.
    let (mut reader, header) = ArchiveReader::open(&bytes[..], Path::new(SHOWN)).unwrap();
    reader.bytes(&header.files[0], 2).unwrap();
    let file = File::options().write(true).create(true).truncate(true).open(&to).unwrap();
    reader.file(&header.files[1], Some((file, &to)), |_| Ok(())).unwrap();
    assert!(fs::read(&to).unwrap() == first);
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 17);
}

#[test]
fn gnu_tar_and_sha256sum_read_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.tar"), archive(dir.path())).unwrap();
    let script = "tar -xSf a.tar && sha256sum -c SHA256SUMS && cmp disk files/root.qcow2";
    let output = Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn every_truncation_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, to) = (archive(dir.path()), dir.path().join("to"));
    let near_a_block = |length: &usize| {
        let over = length % BLOCK_BYTES;
        over <= 1 || over == BLOCK_BYTES - 1
    };
    let lengths = (0..bytes.len()).filter(|length| *length < 2048 || near_a_block(length));
    for length in lengths {
        let text = problem(&bytes[..length], &to);
        assert!(text.contains("truncated") || text.contains("empty"), "{length}: {text}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(problem(&longer, &to).contains("something follows"));
}

#[test]
fn every_changed_byte_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bytes, to) = (archive(dir.path()), dir.path().join("to"));
    // Of the zeros, which are many, fewer.
    let is_left_out = |at: &usize| !at.is_multiple_of(if bytes[*at] == 0 { 61 } else { 5 });
    let places: Vec<usize> = (0..bytes.len()).filter(|at| !is_left_out(at)).collect();
    for at in places {
        bytes[at] ^= 1 << (at % 8);
        assert!(read(&bytes, &to).is_err(), "byte {at} can be changed unnoticed");
        bytes[at] ^= 1 << (at % 8);
    }
    read(&bytes, &to).unwrap();
}

#[test]
fn foreign_files_are_named_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let foreign = "this is not an export of a VM";
    assert!(problem(b"", &to).contains("the file is empty"));
    assert!(problem(&[7; 4096], &to).contains(foreign));
    assert!(problem(&[0; 4096], &to).contains(foreign));
    assert!(problem(&[b"\x1f\x8b\x08".as_slice(), &[0; 1024]].concat(), &to).contains("compressed"));
    let mut tar = tar::Builder::new(Vec::new());
    let mut head = tar::Header::new_gnu();
    head.set_size(2);
    tar.append_data(&mut head, "etc/passwd", &b"hi"[..]).unwrap();
    assert!(problem(&tar.into_inner().unwrap(), &to).contains(foreign));
}

/// Returns an archive whose header announces one thing and whose entry is another.
fn lying(announced: (&str, u64, u64), head: &EntryHead, content: &[u8]) -> Vec<u8> {
    let header = header(&[(RECORD, 2, 2), announced]);
    let mut writer = ArchiveWriter::begin(Vec::new(), Path::new(SHOWN), 0, &header).unwrap();
    writer.bytes(RECORD, b"{}").unwrap();
    let (mut bytes, _) = writer.finish().unwrap();
    // Without the checksums and the end.
    bytes.truncate(bytes.len() - 4 * BLOCK_BYTES);
    bytes.extend(head.encode(0));
    bytes.extend(content);
    bytes
}

#[test]
fn what_is_not_as_announced_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let head = |name: &str, bytes, pieces: &[(u64, u64)]| EntryHead {
        name: name.to_owned(),
        bytes,
        pieces: pieces.to_vec(),
    };
    let huge = 1_u64 << 50;
    for (announced, head, why) in [
        (("files/a", 512, 512), head("files/b", 512, &[(0, 512)]), "where files/a is announced"),
        (("files/a", 512, 512), head("files/a", huge, &[(0, 512)]), "are announced"),
        (("files/a", huge, 512), head("files/a", 512, &[(0, 512)]), "are announced"),
        (("files/a", huge, huge), head("files/a", huge, &[(0, huge)]), "truncated"),
    ] {
        let text = problem(&lying(announced, &head, &[1; 512]), &to);
        assert!(text.contains(why), "{announced:?}: {text}");
    }
}

#[test]
fn any_bytes_after_a_whole_start_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, to) = (archive(dir.path()), dir.path().join("to"));
    proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), kept in 0..4_usize)| {
        let start = &whole[..kept * 1024];
        bytes.splice(..0, start.iter().copied());
        prop_assert!(read(&bytes, &to).is_err());
    });
}
