//! Files of a home that belong to other users, as `doctor` reports them.
//!
//! Pure: data; `store` finds them.

use std::path::PathBuf;

/// The files of a home that belong to other users than its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignFiles {
    /// The home.
    pub home: PathBuf,
    /// Its owner.
    pub owner: String,
    /// The files, each with its owner: a directory stands for its contents.
    pub found: Vec<(PathBuf, String)>,
    /// The command that gives the whole home back to its owner.
    pub repair: String,
}
