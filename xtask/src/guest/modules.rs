//! Picks kernel modules, and the modules those need, out of an unpacked kernel package.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, PathContext, Result};
use crate::programs;

/// The modules of one kernel, by name.
pub(super) struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: String,
}

/// A module as it goes into a guest.
pub(super) struct Module {
    /// With underscores, as `lsmod` shows it.
    pub(super) name: String,
    /// The names of the modules it needs, directly.
    pub(super) needs: Vec<String>,
    /// The object file, uncompressed.
    pub(super) object: Vec<u8>,
}

impl Modules {
    /// Finds the modules under a directory such as `lib/modules/6.1.0-1-cloud-amd64`.
    pub(super) fn scan(directory: &Path) -> Result<Self> {
        let list = directory.join("modules.builtin");
        let builtin = std::fs::read_to_string(&list).at("read", &list)?;
        let mut files = BTreeMap::new();
        let mut pending = vec![directory.join("kernel")];
        while let Some(directory) = pending.pop() {
            for entry in std::fs::read_dir(&directory).at("list", &directory)? {
                let path = entry.at("list", &directory)?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Self { files, builtin })
    }

    /// Returns whether the kernel has the module, as a file.
    pub(super) fn has_file(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Returns whether the kernel carries the module in itself.
    pub(super) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.lines().any(|line| module_name(Path::new(line)).is_some_and(|builtin| builtin == name))
    }

    /// Returns the modules named and everything they need.
    ///
    /// # Errors
    ///
    /// A name without a file, or a file that can't be read or decompressed.
    pub(super) fn closure(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut pending: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut chosen: BTreeMap<String, Module> = BTreeMap::new();
        while let Some(name) = pending.pop() {
            if chosen.contains_key(&name) || self.is_builtin(&name) {
                continue;
            }
            let path = self
                .files
                .get(&name)
                .ok_or_else(|| Error::failed(format!("the kernel has no module {name}")))?;
            let object = read_object(path)?;
            let needs = needs(&object);
            pending.extend(needs.iter().cloned());
            chosen.insert(name.clone(), Module { name, needs, object });
        }
        Ok(chosen.into_values().collect())
    }
}

/// Writes the `modules.dep` that modprobe reads, for modules that lie beside it.
///
/// A line names everything that a module needs, and what is needed by others comes last: modprobe
/// loads from the end.
pub(super) fn modules_dep(modules: &[Module]) -> String {
    let by_name: BTreeMap<&str, &Module> =
        modules.iter().map(|module| (module.name.as_str(), module)).collect();
    let mut text = String::new();
    for module in modules {
        let mut needed = Vec::new();
        collect_needed(module, &by_name, &mut needed);
        write!(text, "{}.ko:", module.name).expect("a String takes every write");
        for name in needed.iter().rev() {
            write!(text, " {name}.ko").expect("a String takes every write");
        }
        text.push('\n');
    }
    text
}

fn collect_needed<'a>(module: &'a Module, by_name: &BTreeMap<&str, &'a Module>, into: &mut Vec<&'a str>) {
    for needed in module.needs.iter().filter_map(|name| by_name.get(name.as_str())) {
        if !into.contains(&needed.name.as_str()) {
            collect_needed(needed, by_name, into);
            into.push(&needed.name);
        }
    }
}

fn module_name(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

fn read_object(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => programs::capture(programs::command("xz")?.arg("-dc").arg(path)),
        Some("zst") => programs::capture(programs::command("zstd")?.arg("-dcq").arg(path)),
        _ => std::fs::read(path).at("read", path),
    }
}

/// Reads the `depends=` string out of the section `.modinfo`, whose strings end in NUL.
fn needs(object: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = object.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = object[start + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, needs: &[&str]) -> Module {
        let needs = needs.iter().map(ToString::to_string).collect();
        Module { name: name.to_owned(), needs, object: Vec::new() }
    }

    #[test]
    fn what_a_module_needs_is_read_from_its_modinfo() {
        assert_eq!(
            needs(b"ELF\0license=GPL\0depends=virtio,net-failover\0name=virtio_net\0"),
            ["virtio", "net_failover"]
        );
        assert!(needs(b"ELF\0depends=\0name=virtio_ring\0").is_empty());
        assert!(needs(b"ELF").is_empty());
    }

    #[test]
    fn modules_dep_lists_a_need_of_a_need_after_it() {
        let modules = [module("net", &["virtio", "ring"]), module("ring", &[]), module("virtio", &["ring"])];
        assert_eq!(modules_dep(&modules), "net.ko: virtio.ko ring.ko\nring.ko:\nvirtio.ko: ring.ko\n");
    }

    #[test]
    fn a_module_is_named_with_underscores_whatever_its_file_is_called() {
        assert_eq!(module_name(Path::new("kernel/virtio-rng.ko.xz")).unwrap(), "virtio_rng");
        assert!(module_name(Path::new("modules.order")).is_none());
    }
}
