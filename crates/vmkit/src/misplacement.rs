//! What is wrong with a directory in a home whose record names another VM.
//!
//! Pure: data and its text; `store` finds it.

use std::path::Path;

/// What a directory is whose record names another VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misplacement {
    /// A symbolic link to the directory of that VM.
    Link,
    /// A copy of the directory of that VM, which is there as well.
    Copy,
    /// The directory of that VM under another name.
    Renamed,
    /// The directory of that VM under another name; another VM has its name by now.
    Replaced,
}

impl Misplacement {
    /// Says what the directory is, and how it is mended where it can be.
    pub(crate) fn problem(self, dir: &Path, vm: &str) -> String {
        match self {
            Self::Link => format!("this is a symbolic link to the directory of the VM `{vm}`"),
            Self::Copy => format!(
                "this is a copy of the directory of the VM `{vm}`, with the identity of that VM, and can't be used as another"
            ),
            Self::Renamed => format!(
                "this is the directory of the VM `{vm}` under another name: `mv {} {}` gives it its name back",
                quoted(dir),
                quoted(&dir.with_file_name(vm))
            ),
            Self::Replaced => format!(
                "this is the directory of a VM `{vm}` under another name, and another VM is called `{vm}` by now"
            ),
        }
    }
}

/// Quotes a path for a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
