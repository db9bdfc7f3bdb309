//! The guests that tests boot, built from the distribution's packages into a cache.
//!
//! The cache is `$VMKIT_GUESTS`, else `$XDG_CACHE_HOME/vmkit/guests`, else `~/.cache/vmkit/guests`,
//! so it outlives a clean clone. In it, `tiny` and `debian` are symbolic links to directories that
//! are named after a hash of the recipe:
//!
//! ```text
//! guests/lock                     held by flock while a guest is built: two builds at once are one
//! guests/tiny -> tiny-9f0c…       replaced by rename, so that it never names a half-built guest
//! guests/tiny-9f0c…/guest.json    written last; the module `manifest` documents it
//! ```

mod cmdline;
mod debian;
mod initramfs;
mod manifest;
mod modules;
mod packages;
mod tiny;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::{Error, PathContext, Result};
use crate::host::Distribution;
use manifest::GuestFile;

/// What `cargo xtask guest` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which guest to build.
    #[arg(value_enum, default_value = "all")]
    which: Which,
    /// Builds it again even if it is cached, with the packages of today.
    #[arg(long)]
    rebuild: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    Tiny,
    Debian,
    All,
}

/// A guest that can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// A kernel and an initramfs; two seconds to userspace under TCG.
    Tiny,
    /// A whole distribution with cloud-init and SSH.
    Debian,
}

/// Builds what the arguments name and prints the directories.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let guests = match arguments.which {
        Which::Tiny => vec![Guest::Tiny],
        Which::Debian => vec![Guest::Debian],
        Which::All => vec![Guest::Tiny, Guest::Debian],
    };
    for guest in guests {
        println!("{}", ensure_built(guest, arguments.rebuild)?.display());
    }
    Ok(())
}

/// Returns the directory of a guest, after building it if the cache has no guest of this recipe, or
/// if `rebuild` asks for it.
pub(crate) fn ensure_built(guest: Guest, rebuild: bool) -> Result<PathBuf> {
    let cache = cache_directory()?;
    let link = cache.join(guest.name());
    let recipe = guest.recipe_hash(&Distribution::of_this_machine()?);
    let directory = format!("{}-{recipe}", guest.name());
    if !rebuild && is_current(&link, &directory) {
        return Ok(link);
    }
    fs::create_dir_all(&cache).at("create", &cache)?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).at("create", &lock_path)?;
    lock.lock().at("lock", &lock_path)?;
    // The previous holder of the lock may have built it.
    if rebuild || !is_current(&link, &directory) {
        build(guest, &recipe, &cache, &directory)?;
    }
    Ok(link)
}

fn build(guest: Guest, recipe: &str, cache: &Path, directory: &str) -> Result<()> {
    let started = Instant::now();
    eprintln!("guest {}: building; this takes {}", guest.name(), guest.usual_duration());
    // Left by a build that was killed: under the lock no other build runs.
    remove_matching(cache, |name| name.starts_with("build-"))?;
    let scratch =
        tempfile::Builder::new().prefix("build-").tempdir_in(cache).at("create a directory in", cache)?;
    let output = scratch.path().join("output");
    fs::create_dir(&output).at("create", &output)?;
    let manifest = match guest {
        Guest::Tiny => tiny::build(scratch.path(), &output)?,
        Guest::Debian => debian::build(scratch.path(), &output)?,
    };
    write_manifest(&output, &GuestFile { schema: 1, name: guest.name(), recipe, manifest: &manifest })?;
    publish(guest, scratch.path(), cache, directory)?;
    eprintln!("guest {}: built in {} s", guest.name(), started.elapsed().as_secs());
    Ok(())
}

fn write_manifest(output: &Path, file: &GuestFile) -> Result<()> {
    let path = output.join("guest.json");
    let text =
        serde_json::to_string_pretty(file).expect("a manifest has only strings, numbers and string keys");
    fs::write(&path, text + "\n").at("write", &path)
}

/// Gives a finished build its name, then forgets the builds before it.
fn publish(guest: Guest, scratch: &Path, cache: &Path, directory: &str) -> Result<()> {
    let target = cache.join(directory);
    if target.exists() {
        // A rebuild of the same recipe. The link dangles for the moment between the two renames.
        let old = scratch.join("old");
        fs::rename(&target, &old).at("move away", &target)?;
    }
    fs::rename(scratch.join("output"), &target).at("create", &target)?;
    let link = scratch.join("link");
    std::os::unix::fs::symlink(directory, &link).at("create", &link)?;
    let published = cache.join(guest.name());
    fs::rename(&link, &published).at("create", &published)?;
    let prefix = format!("{}-", guest.name());
    remove_matching(cache, |name| name.starts_with(&prefix) && name != directory)
}

fn remove_matching(cache: &Path, matches: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(cache).at("list", cache)? {
        let entry = entry.at("list", cache)?;
        if matches(&entry.file_name().to_string_lossy()) {
            fs::remove_dir_all(entry.path()).at("remove", &entry.path())?;
        }
    }
    Ok(())
}

fn is_current(link: &Path, directory: &str) -> bool {
    fs::read_link(link).is_ok_and(|target| target == Path::new(directory))
        && link.join("guest.json").is_file()
}

fn cache_directory() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = variable("VMKIT_GUESTS")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("vmkit/guests")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/vmkit/guests")))
        .ok_or_else(|| {
            Error::unready("none of VMKIT_GUESTS, XDG_CACHE_HOME and HOME says where to keep the guests")
        })?;
    std::path::absolute(&directory).at("resolve", &directory)
}

/// Returns the one entry of a directory whose name begins with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).at("list", directory)? {
        let entry = entry.at("list", directory)?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    let count = found.len();
    match (found.pop(), count) {
        (Some(path), 1) => Ok(path),
        _ => Err(Error::failed(format!(
            "{} has {count} entries that begin with `{prefix}`, not 1",
            directory.display()
        ))),
    }
}

impl Guest {
    fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Debian => "debian",
        }
    }

    fn usual_duration(self) -> &'static str {
        match self {
            Self::Tiny => "a few seconds, and a download of 35 MB",
            Self::Debian => "one or two minutes, and a download of 150 MB",
        }
    }

    /// Hashes what decides the guest, but for the versions of packages: asking for those would need
    /// the network.
    fn recipe_hash(self, distribution: &Distribution) -> String {
        let parts = match self {
            Self::Tiny => tiny::RECIPE,
            Self::Debian => debian::RECIPE,
        };
        let shared = [include_str!("manifest.rs"), distribution.id.as_str(), distribution.codename.as_str()];
        format!("{:016x}", fnv1a(parts.iter().copied().chain(shared)))
    }
}

/// FNV-1a with 64 bits, over the parts and the borders between them.
fn fnv1a<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = parts.flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_of_another_release_is_another_recipe() {
        let release = |codename: &str| Distribution {
            id: "debian".into(),
            codename: codename.into(),
            pretty_name: String::new(),
        };
        assert_ne!(
            Guest::Tiny.recipe_hash(&release("bookworm")),
            Guest::Tiny.recipe_hash(&release("trixie"))
        );
        assert_ne!(fnv1a(["ab", "c"].into_iter()), fnv1a(["a", "bc"].into_iter()));
    }

    #[test]
    fn a_link_to_another_recipe_or_to_a_half_guest_is_not_current() {
        let cache = tempfile::tempdir().unwrap();
        let link = cache.path().join("tiny");
        fs::create_dir(cache.path().join("tiny-1")).unwrap();
        std::os::unix::fs::symlink("tiny-1", &link).unwrap();
        assert!(!is_current(&link, "tiny-1"));
        fs::write(link.join("guest.json"), "{}").unwrap();
        assert!(is_current(&link, "tiny-1"));
        assert!(!is_current(&link, "tiny-2"));
    }

    #[test]
    fn publishing_replaces_the_link_and_removes_the_guest_before_it() {
        let cache = tempfile::tempdir().unwrap();
        for directory in ["tiny-1", "tiny-2", "tiny-2"] {
            let scratch = tempfile::tempdir_in(cache.path()).unwrap();
            let output = scratch.path().join("output");
            fs::create_dir(&output).unwrap();
            fs::write(output.join("guest.json"), "{}").unwrap();
            publish(Guest::Tiny, scratch.path(), cache.path(), directory).unwrap();
            assert!(is_current(&cache.path().join("tiny"), directory));
        }
        assert!(!cache.path().join("tiny-1").exists());
    }
}
