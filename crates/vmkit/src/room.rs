//! Room on a disk, compared with what is to be written before the writing begins.
//!
//! Edge: asks the file system.

use std::path::Path;

use crate::error::{Error, Result};

/// Refuses what the file system of a directory has no room for; `wanted` says it of this many MiB.
///
/// # Errors
/// `Host`; `Io`.
pub(crate) fn check_room(dir: &Path, bytes: u64, wanted: impl FnOnce(u64) -> String) -> Result<()> {
    let system = rustix::fs::statvfs(dir).map_err(|errno| Error::io("examine", dir)(errno.into()))?;
    let free_bytes = system.f_bavail.saturating_mul(system.f_frsize);
    if bytes > free_bytes {
        let problem =
            format!("{}, and {} MiB are free there", wanted(bytes.div_ceil(1 << 20)), free_bytes >> 20);
        return Err(Error::host(format!("room in {}", dir.display()), problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = |mib| format!("{mib} MiB are to come");
        check_room(dir.path(), 0, wanted).unwrap();
        let error = check_room(dir.path(), u64::MAX, wanted).unwrap_err().to_string();
        let start = format!("room in {}: {} MiB are to come, and ", dir.path().display(), 1_u64 << 44);
        assert!(error.starts_with(&start) && error.ends_with(" MiB are free there"), "{error}");
    }
}
