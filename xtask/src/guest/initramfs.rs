//! Writes an initramfs: the "newc" archive that the kernel unpacks into its first root file system.
//!
//! Written here and not by `cpio`, so that the device node needs no privilege and the bytes depend
//! on nothing but the input.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that grows entry by entry. Paths are relative to the root, without a leading slash;
/// the directories above an entry are added by themselves.
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Initramfs {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), directories: BTreeSet::new(), entries: 0 }
    }

    /// Adds a directory, unless it is there.
    pub(super) fn directory(&mut self, path: &str) {
        if !self.directories.insert(path.to_owned()) {
            return;
        }
        self.parents(path);
        self.entry(path, DIRECTORY | 0o755, (0, 0), b"");
    }

    /// Adds a file that is data.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | 0o644, (0, 0), content);
    }

    /// Adds a file that can be run.
    pub(super) fn program(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | 0o755, (0, 0), content);
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds the node of a character device, by its major and minor number.
    pub(super) fn character_device(&mut self, path: &str, device: (u32, u32)) {
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE | 0o600, device, b"");
    }

    /// Ends the archive and returns its bytes.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of a test guest is far smaller than 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is far shorter than 4 GiB");
        // inode, mode, uid, gid, links, mtime, size, the device it lies on (two), the device it is
        // (two), name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_padded_content() {
        let mut archive = Initramfs::new();
        archive.file("a", b"hello");
        let header = "070701\
            00000001000081a4000000000000000000000001000000000000000500000000000000000000000000000000\
            0000000200000000";
        let mut expected = header.as_bytes().to_vec();
        expected.extend_from_slice(b"a\0");
        assert_eq!(expected.len(), 112);
        expected.extend_from_slice(b"hello\0\0\0");
        assert_eq!(archive.bytes, expected);
    }

    #[test]
    fn a_directory_comes_once_and_before_what_is_in_it() {
        let mut archive = Initramfs::new();
        archive.file("etc/one", b"");
        archive.file("etc/two", b"");
        let text = String::from_utf8(archive.finish()).unwrap();
        let at = |name: &str| text.find(name).unwrap();
        assert!(
            at("etc\0") < at("etc/one\0")
                && at("etc/one\0") < at("etc/two\0")
                && at("etc/two\0") < at("TRAILER")
        );
        assert_eq!(text.matches("etc\0").count(), 1);
    }
}
