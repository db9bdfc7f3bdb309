//! Which process has something of the host: [`ProcessHolder`].
//!
//! Edge: reads `/proc`. Another user's processes don't show what they have open, so a holder may
//! stay unknown.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that has something of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessHolder {
    pub(crate) pid: u32,
    pub(crate) program: String,
    /// The VM that the process runs, if it is a QEMU that was told its guest's name.
    pub(crate) vm: Option<String>,
}

impl fmt::Display for ProcessHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.vm {
            Some(vm) => write!(f, "the VM `{vm}` (process {})", self.pid),
            None => write!(f, "process {} ({})", self.pid, self.program),
        }
    }
}

/// Returns the process that has a descriptor for which `is_meant` holds; it is given the
/// descriptor's path below `/proc`.
///
/// Source: proc_pid_fd(5).
pub(crate) fn holder_of(is_meant: impl Fn(&Path) -> bool) -> Option<ProcessHolder> {
    let has_it = |process: &Path| {
        let mut opened = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        opened.any(|fd| is_meant(&fd.path()))
    };
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(pid) = pid.filter(|_| has_it(&process.path())) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let cmdline = fs::read(process.path().join("cmdline")).unwrap_or_default();
            return Some(ProcessHolder { pid, program: program.trim().to_owned(), vm: guest_name(&cmdline) });
        }
    }
    None
}

/// Returns the process that has a file open, by whatever path.
pub(crate) fn file_holder(path: &Path) -> Option<ProcessHolder> {
    let file = path.metadata().ok()?;
    holder_of(|fd| {
        // Only what is a file at all is examined: some descriptors block.
        fs::read_link(fd).is_ok_and(|target| target.is_absolute())
            && fd.metadata().is_ok_and(|other| (other.dev(), other.ino()) == (file.dev(), file.ino()))
    })
}

/// Returns what a QEMU's command line names its guest.
fn guest_name(cmdline: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(cmdline);
    let mut words = text.split('\0').skip_while(|word| *word != "-name").skip(1);
    let name = words.next()?.strip_prefix("guest=")?;
    name.split(',').next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_holder_of_a_file_is_found_by_any_of_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        let [path, hard] = ["disk", "hard"].map(|name| dir.path().join(name));
        fs::write(&path, "x").unwrap();
        fs::hard_link(&path, &hard).unwrap();
        assert_eq!(settled_holder(&path), None);
        let opened = fs::File::open(&path).unwrap();
        let holder = file_holder(&hard).expect("this process has it open");
        assert_eq!((holder.pid, holder.vm), (std::process::id(), None));
        drop(opened);
        assert_eq!(settled_holder(&path), None);
    }

    /// Returns who has a file open for longer than a moment: a child of another test has copies of
    /// all descriptors between fork and exec, and nothing tells when it has not any more.
    fn settled_holder(path: &Path) -> Option<ProcessHolder> {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let holder = file_holder(path);
            if holder.is_none() || Instant::now() > limit {
                return holder;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_qemu_is_known_by_the_guest_that_it_runs() {
        assert_eq!(guest_name(b"qemu\0-name\0guest=web,debug-threads=on\0").as_deref(), Some("web"));
        assert_eq!(guest_name(b"nginx\0-name"), None);
    }
}
