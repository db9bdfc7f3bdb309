//! What is made from the description of the command's arguments: manual pages, completions, and the
//! page `docs/cli.md`; and the schema of the files that the command reads.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum as _;
use clap_complete::Shell;

use crate::error::{Error, PathContext, Result};

/// Where the files go.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The directory, made if it is not there [else: `target/man`, `target/completions`]
    directory: Option<PathBuf>,
}

impl Arguments {
    fn directory(&self, usual: &str) -> Result<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
        let directory = self.directory.clone().unwrap_or_else(|| root.join("target").join(usual));
        fs::create_dir_all(&directory).at("create", &directory)?;
        Ok(directory)
    }
}

/// Writes a manual page for `vmkit` and one for each of its commands, and prints where.
pub(crate) fn manual(arguments: &Arguments) -> Result<()> {
    let directory = arguments.directory("man")?;
    clap_mangen::generate_to(vmkit_cli::command(), &directory)
        .map_err(|error| Error::failed(format!("manual pages in {}: {error}", directory.display())))?;
    println!("{}", directory.display());
    Ok(())
}

/// Writes the completions for every shell, and prints where.
pub(crate) fn completions(arguments: &Arguments) -> Result<()> {
    let directory = arguments.directory("completions")?;
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut vmkit_cli::command(), "vmkit", &directory)
            .map_err(|error| Error::failed(format!("completions for {shell}: {error}")))?;
    }
    println!("{}", directory.display());
    Ok(())
}

/// Writes `docs/cli.md`; a test of the command keeps it true.
pub(crate) fn reference() -> Result<()> {
    write_page("docs/cli.md", &vmkit_cli::reference())
}

/// Writes `docs/vmkit.schema.json`; a test of the command keeps it true.
pub(crate) fn schema() -> Result<()> {
    write_page("docs/vmkit.schema.json", &vmkit_cli::schema())
}

fn write_page(path: &str, content: &str) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
    let page = root.join(path);
    fs::write(&page, content).at("write", &page)?;
    println!("{}", page.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_manual_page() {
        let temp = tempfile::tempdir().unwrap();
        manual(&Arguments { directory: Some(temp.path().to_owned()) }).unwrap();
        for name in ["vmkit", "vmkit-create", "vmkit-wait", "vmkit-doctor"] {
            let page = fs::read_to_string(temp.path().join(format!("{name}.1"))).unwrap();
            assert!(page.contains(".SH NAME"), "{name}");
        }
    }

    #[test]
    fn every_shell_has_completions() {
        let temp = tempfile::tempdir().unwrap();
        completions(&Arguments { directory: Some(temp.path().to_owned()) }).unwrap();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), Shell::value_variants().len());
    }
}
