//! Where the file of machines is that a command is about.

use std::env;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use vmkit::Error;
use vmkit::vmfile::{self, Project};

use crate::places::input;

/// What a file of machines is called where none is named.
pub(crate) const FILE: &str = "vmkit.toml";

/// A file of machines: where its text is read, and the path that its machines are known by.
#[derive(Debug)]
pub(crate) struct ProjectFile {
    source: PathBuf,
    path: PathBuf,
}

impl ProjectFile {
    /// Reads the machines.
    ///
    /// # Errors
    /// Those of [`vmfile::load_from`].
    pub(crate) fn load(&self) -> Result<Project, Error> {
        vmfile::load_from(&self.source, &self.path)
    }
}

/// Finds the file that was named, or else the nearest one above the current directory. What comes
/// through a pipe is taken for `vmkit.toml` in the current directory, there or not: machines are
/// known by their file.
///
/// # Errors
/// `InvalidInput` where none was named and none is found, and for a URL.
pub(crate) fn find(named: Option<&Path>) -> Result<ProjectFile, Error> {
    let here = || env::current_dir().map_err(Error::io("find", "the current directory"));
    let path = match named {
        Some(named) => {
            check_is_no_url(named)?;
            let source = input("file", named)?;
            if is_passing(&source) {
                return Ok(ProjectFile { source, path: path_of_its_own(&here()?.join(FILE)) });
            }
            source
        }
        None => found_above(&here()?)?,
    };
    let path = path_of_its_own(&path);
    Ok(ProjectFile { source: path.clone(), path })
}

/// Refuses the URL of a web server, in place of which a file of this name may be there.
fn check_is_no_url(named: &Path) -> Result<(), Error> {
    let is_url = ["http:", "https:"].iter().any(|scheme| named.starts_with(scheme));
    if !is_url || named.exists() {
        return Ok(());
    }
    let url = named.display();
    let expected = "URLs are not fetched here: download the file, or pipe it, as in \
        `curl -fsSL URL | vmkit plan --file -`";
    Err(Error::invalid("file", url, expected))
}

/// Returns whether a path leads to a pipe, or to a descriptor of this process.
fn is_passing(path: &Path) -> bool {
    path.starts_with("/dev") || path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Returns the file of machines in a folder, or in the nearest one above it.
fn found_above(folder: &Path) -> Result<PathBuf, Error> {
    let found = folder.ancestors().map(|folder| folder.join(FILE)).find(|path| path.exists());
    found.ok_or_else(|| {
        let expected = format!(
            "not found in {} or any directory above it: change to a project's directory, pass --file FILE, \
             or create one with `vmkit init`",
            folder.display()
        );
        Error::invalid("file", FILE, expected)
    })
}

/// Returns the one path that a file has whichever way one came to its folder: machines are known by
/// it.
fn path_of_its_own(path: &Path) -> PathBuf {
    let (folder, name) = (path.parent().map(fs::canonicalize), path.file_name());
    match (folder, name) {
        (Some(Ok(folder)), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_file_above_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        let error = found_above(&deep).unwrap_err().to_string();
        assert!(error.contains("--file") && error.contains(deep.to_str().unwrap()), "{error}");
        fs::write(temp.path().join(FILE), "").unwrap();
        assert_eq!(found_above(&deep).unwrap(), temp.path().join(FILE));
        fs::write(temp.path().join("a/b").join(FILE), "").unwrap();
        assert_eq!(found_above(&deep).unwrap(), temp.path().join("a/b").join(FILE));
    }

    #[test]
    fn a_file_has_one_path_by_whatever_way_one_comes_to_it() {
        let temp = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(temp.path()).unwrap().join("real");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, temp.path().join("link")).unwrap();
        for way in ["real/vmkit.toml", "link/vmkit.toml", "real/../link/vmkit.toml"] {
            assert_eq!(path_of_its_own(&temp.path().join(way)), real.join(FILE));
        }
    }
}
