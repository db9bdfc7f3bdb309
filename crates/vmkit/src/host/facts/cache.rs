//! Facts about the host that are too expensive to determine at every start, kept in small files.
//!
//! A cache is never needed and never trusted: a missing, foreign, torn or malformed file is
//! ignored, and a failed write is no error. So there are no temporary files either: a file that is
//! written concurrently, or half, does not parse.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::geteuid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::steps::step;

/// The most that is read of a cache file, in bytes.
const MOST_BYTES: u64 = 64 << 10;

/// Never follows a link, and never blocks on a named pipe.
const FLAGS: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK);

/// Reads what an earlier process of this user has written, if the file is valid.
///
/// Mark `T` with `deny_unknown_fields`, and include in it what the fact depends on.
pub(crate) fn load<T: DeserializeOwned>(dir: &Path, name: &str) -> Option<T> {
    match read(&dir.join(name)) {
        Ok(text) => serde_json::from_slice(&text).ok(),
        Err(_) => None,
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS.bits() as i32).open(path)?;
    let found = file.metadata()?;
    let own = found.is_file() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0;
    if !own || found.len() > MOST_BYTES {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut text = Vec::with_capacity(found.len() as usize);
    file.take(MOST_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

/// Writes a fact for later processes of this user; a failure is only logged.
pub(crate) fn store<T: Serialize>(dir: &Path, name: &str, value: &T) {
    let path = dir.join(name);
    if let Err(error) = write(dir, &path, value) {
        tracing::debug!(path = %path.display(), %error, "the cache can't be written");
    }
}

fn write<T: Serialize>(dir: &Path, path: &Path, value: &T) -> io::Result<()> {
    let text = serde_json::to_vec(value)?;
    step("write the host cache")?;
    // The owner of the directory could not read a file of another user.
    if std::fs::metadata(dir).is_ok_and(|dir| dir.uid() != geteuid().as_raw()) {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    if !dir.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let mut file = open_for_writing(path)?;
    // The umask or an older file may have set permissions that `load` refuses.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(&text)
}

fn open_for_writing(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600).custom_flags(FLAGS.bits() as i32);
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    file.set_len(0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct CachedAnswer {
        text: String,
    }

    fn answer() -> CachedAnswer {
        CachedAnswer { text: "yes".to_owned() }
    }

    #[test]
    fn a_cached_fact_is_found_again_and_its_directory_is_private() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("a/b");
        assert_eq!(load::<CachedAnswer>(&dir, "x.json"), None);
        store(&dir, "x.json", &answer());
        assert_eq!(load(&dir, "x.json"), Some(answer()));
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["x.json"]);
    }

    #[test]
    fn a_shorter_cached_fact_replaces_a_longer_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), "x.json", &CachedAnswer { text: "long".repeat(100) });
        store(dir.path(), "x.json", &answer());
        assert_eq!(load(dir.path(), "x.json"), Some(answer()));
    }

    #[test]
    fn a_file_that_others_may_write_is_not_believed_and_is_closed_at_the_next_write() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), "x.json", &answer());
        let path = dir.path().join("x.json");
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert_eq!(load::<CachedAnswer>(dir.path(), "x.json"), None);
        store(dir.path(), "x.json", &answer());
        assert_eq!(load(dir.path(), "x.json"), Some(answer()));
    }

    #[test]
    fn links_pipes_and_directories_are_neither_read_nor_written() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::write(&target, serde_json::to_vec(&answer()).unwrap()).unwrap();
        symlink(&target, dir.path().join("link")).unwrap();
        fs::create_dir(dir.path().join("directory")).unwrap();
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for name in ["link", "directory", "pipe"] {
            store(dir.path(), name, &CachedAnswer { text: "no".to_owned() });
            assert_eq!(load::<CachedAnswer>(dir.path(), name), None, "{name}");
        }
        assert_eq!(load(dir.path(), "target"), Some(answer()));
    }

    #[test]
    fn a_huge_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), "x.json", &CachedAnswer { text: "x".repeat(MOST_BYTES as usize) });
        assert_eq!(load::<CachedAnswer>(dir.path(), "x.json"), None);
    }

    proptest! {
        #[test]
        fn rubbish_in_a_cache_file_is_ignored(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let dir = tempfile::tempdir().unwrap();
            store(dir.path(), "x.json", &answer());
            fs::write(dir.path().join("x.json"), bytes).unwrap();
            prop_assert_eq!(load::<CachedAnswer>(dir.path(), "x.json"), None);
        }

        #[test]
        fn a_torn_cache_file_is_ignored(kept in 0usize..13) {
            let dir = tempfile::tempdir().unwrap();
            let whole = serde_json::to_vec(&answer()).unwrap();
            store(dir.path(), "x.json", &answer());
            fs::write(dir.path().join("x.json"), &whole[..kept]).unwrap();
            prop_assert_eq!(load::<CachedAnswer>(dir.path(), "x.json"), None);
        }
    }
}
