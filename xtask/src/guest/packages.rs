//! Takes packages from the distribution without installing them.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{Error, PathContext, Result};
use crate::host::Distribution;
use crate::{programs, setup};

/// Returns the packages that these depend on directly, without alternatives that are virtual.
pub(super) fn dependencies(packages: &[String]) -> Result<Vec<String>> {
    let mut command = programs::command("apt-cache")?;
    command.args(["depends", "--important"]).args(packages);
    let text = match programs::capture_text(&mut command) {
        Ok(text) => text,
        // A machine whose package lists were never fetched knows no package at all.
        Err(_) => {
            setup::refresh_package_lists()?;
            programs::capture_text(&mut command)?
        }
    };
    Ok(parse_dependencies(&text))
}

/// Adds the libraries that packages need, and the libraries that those need.
pub(super) fn with_libraries(roots: &[&str]) -> Result<Vec<String>> {
    let mut level: Vec<String> = roots.iter().map(ToString::to_string).collect();
    let mut all: BTreeSet<String> = level.iter().cloned().collect();
    while !level.is_empty() {
        level = dependencies(&level)?;
        level
            .retain(|name| (name.starts_with("lib") || name.starts_with("zlib")) && all.insert(name.clone()));
    }
    Ok(all.into_iter().collect())
}

/// Downloads packages into `downloads` and unpacks them over each other into `root`.
pub(super) fn unpack(packages: &[String], downloads: &Path, root: &Path) -> Result<()> {
    std::fs::create_dir_all(downloads).at("create", downloads)?;
    std::fs::create_dir_all(root).at("create", root)?;
    let mut download = programs::command("apt-get")?;
    download.args(["--quiet", "download"]).args(packages).current_dir(downloads);
    if programs::capture(&mut download).is_err() {
        // Lists that are days old name versions that the archive no longer has.
        setup::refresh_package_lists()?;
        programs::capture(&mut download)?;
    }
    for entry in std::fs::read_dir(downloads).at("list", downloads)? {
        let file = entry.at("list", downloads)?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            programs::capture(programs::command("dpkg-deb")?.arg("-x").arg(&file).arg(root))?;
            std::fs::remove_file(&file).at("remove", &file)?;
        }
    }
    Ok(())
}

/// Returns the package that depends on the newest kernel for virtual machines.
pub(super) fn newest_kernel(distribution: &Distribution) -> Result<String> {
    let architecture = architecture()?;
    Ok(match distribution.id.as_str() {
        "ubuntu" => "linux-image-virtual".to_owned(),
        _ => format!("linux-image-cloud-{architecture}"),
    })
}

/// Returns the architecture in the words of dpkg, such as `amd64`.
fn architecture() -> Result<String> {
    let text = programs::capture_text(programs::command("dpkg")?.arg("--print-architecture"))?;
    match text.trim() {
        "amd64" => Ok("amd64".to_owned()),
        other => {
            Err(Error::unready(format!("the guests are built on amd64 only, and this machine is {other}")))
        }
    }
}

fn parse_dependencies(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.trim_start_matches([' ', '|']).split_once("Depends: "));
    names.filter(|(_, name)| !name.starts_with('<')).map(|(_, name)| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_without_virtual_packages() {
        let text = "qemu-guest-agent\n  PreDepends: init-system-helpers\n  Depends: libc6\n |Depends: <virtual>\n    real\n |Depends: libfirst\n  Depends: libsecond\n";
        assert_eq!(parse_dependencies(text), ["init-system-helpers", "libc6", "libfirst", "libsecond"]);
    }
}
