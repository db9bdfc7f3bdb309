//! Reading a file of machines, and the files that it names, from the disk.
//!
//! Edge: files.

use std::io::Read;
use std::path::Path;

use super::project::Project;
use super::resolve::parse;
use crate::error::{Error, Result, ValueProblem, VmfileError};
use crate::input_file::InputStream;
use crate::spec::CloudInitConfig;

/// More than any file of machines has, and little enough to read at once.
const MOST_BYTES: u64 = 1 << 20;

/// Reads the machines of a file, which an absolute path leads to.
///
/// Regular files and pipes are read, at most 1 MiB of each.
///
/// # Errors
/// `InvalidInput` ([`Error::Vmfile`]) with all that is wrong and where.
pub fn load(file: &Path) -> Result<Project> {
    load_from(file, file)
}

/// Reads the machines of a pipe or another file as if they were in `file`, which need not be there:
/// it is what relative paths start from, and what the machines are known by.
///
/// # Errors
/// As for [`load`].
pub fn load_from(source: &Path, file: &Path) -> Result<Project> {
    let unread = |why: String| Error::from(VmfileError::unread(source, why));
    let text = text_of(source, MOST_BYTES).map_err(unread)?;
    let read = |path: &Path| text_of(path, CloudInitConfig::MAX_BYTES as u64);
    Ok(parse(file, &text, &read)?)
}

/// Returns the text of a file, or what is wrong with it.
fn text_of(path: &Path, most: u64) -> Result<String, String> {
    let unusable = |error: Error| match error {
        Error::Invalid { expected, problem: ValueProblem::UrlNotFetched, .. } => {
            format!("{expected}: download the file first")
        }
        Error::Invalid { expected, .. } => expected,
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    let InputStream { file, .. } = InputStream::open("file", path).map_err(unusable)?;
    let mut bytes = Vec::new();
    // One byte more, since a file can grow after its length was asked.
    file.take(most + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > most {
        return Err(format!("the file has more than {most} bytes"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("the file is not UTF-8 from its byte {valid} on, in line {line}: write it as plain text")
    })
}
