//! Removing the unfinished files of killed copies in the guest.
//!
//! The next copy into the same directory removes them. A running copy has a file of the same kind,
//! but writes to it all the time, or gives up within [`PATIENCE`]: so a file that was not written
//! to for twice as long is a leftover.

use russh_sftp::protocol::FileAttributes;

use super::ends::PATIENCE;
use super::{FileKind, GuestFiles, joined, kind};

/// How many names of a directory are searched. In a larger one, leftovers may stay.
const MOST_NAMES: usize = 20_000;
/// The age of a leftover since its last write, in seconds.
const AGE_SECONDS: u32 = 2 * PATIENCE.as_secs() as u32;

impl GuestFiles {
    /// Removes the leftovers in a directory of the guest, once in a session; `now` are the
    /// attributes of a file that was written just now, for the guest's clock. What can't be removed
    /// stays.
    pub(super) async fn sweep(&self, dir: &str, now: &FileAttributes) {
        let Some(now) = now.mtime else { return };
        if !self.swept.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(dir.to_owned()) {
            return;
        }
        let Ok(opened) = self.raw.opendir(dir).await else { return };
        let (mut left, mut names) = (Vec::new(), 0);
        // The loop ends with an error: the end of the directory, or one that does not matter here.
        while let Ok(found) = self.raw.readdir(&opened.handle).await {
            names += found.files.len();
            let files = found.files.into_iter().filter(|file| is_left(&file.filename, &file.attrs, now));
            left.extend(files.map(|file| file.filename));
            if names > MOST_NAMES {
                break;
            }
        }
        let _ = self.raw.close(opened.handle).await;
        for name in left {
            let _ = self.raw.remove(joined(dir, &name)).await;
        }
    }
}

/// Returns whether this is an unfinished file or link of a copy that ended long ago.
fn is_left(name: &str, found: &FileAttributes, now: u32) -> bool {
    let is_hex = |mark: &str| mark.len() == 8 && mark.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_ours = name.starts_with('.') && name.rsplit_once(".vmkit-").is_some_and(|(_, mark)| is_hex(mark));
    let is_old = found.mtime.is_some_and(|mtime| mtime < now.saturating_sub(AGE_SECONDS));
    is_ours && is_old && matches!(kind(found), FileKind::File | FileKind::Link)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::files::unfinished;

    #[test]
    fn only_an_old_unfinished_file_is_a_leftover() {
        let found = |mode, mtime| FileAttributes {
            permissions: Some(mode),
            mtime: Some(mtime),
            ..FileAttributes::default()
        };
        let (now, old, file) = (10_000, 10_000 - AGE_SECONDS - 1, 0o100_600);
        assert!(is_left(&unfinished("big"), &found(file, old), now));
        assert!(is_left(&unfinished("link"), &found(0o120_777, old), now));
        assert!(
            !is_left(&unfinished("big"), &found(file, now - AGE_SECONDS), now),
            "its copy may be running"
        );
        assert!(!is_left(&unfinished("dir"), &found(0o040_700, old), now));
        for name in [
            "big",
            ".big",
            ".big.vmkit-",
            ".big.vmkit-0123456x",
            "big.vmkit-01234567",
            ".big.vmkit-012345678",
        ] {
            assert!(!is_left(name, &found(file, old), now), "{name}");
        }
        assert!(!is_left(&unfinished("big"), &FileAttributes::default(), now));
    }
}
