//! Paths below the home, as records hold them: [`HomePaths`].
//!
//! Pure. A record names what lies below its home as `{home}/images/…`, so that a home can be
//! renamed, copied, restored from a backup and mounted at another place: where a VM lies is where
//! its record was found. Records of vmkit 0.1 name such paths in full; they are read as paths below
//! the home that the record says it was written in.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::record::VmRecord;
use crate::handle::{ConsoleEndpoint, RunInfo, VmHandle, VncAddress};
use crate::spec::VmName;

/// What stands for the home at the beginning of a path.
const HOME: &str = "{home}";
/// The directory of VMs, below the home.
const VMS: &str = "vms";

/// A home's own paths, as a record's reader and writer need them.
#[derive(Debug)]
pub(super) struct HomePaths {
    root: PathBuf,
    /// Other names of directories of the home, through symbolic links, and what they are below it.
    aliases: Vec<(PathBuf, &'static str)>,
}

impl HomePaths {
    /// Creates the paths of a home whose directories are also known by other names.
    pub(super) fn new(root: &Path, aliases: Vec<(PathBuf, &'static str)>) -> Self {
        Self { root: root.to_owned(), aliases }
    }

    /// Returns the record as it is written: what lies below the home is named from there.
    pub(super) fn portable(&self, mut record: VmRecord) -> VmRecord {
        for_each_path(&mut record.handle, |path, _| {
            if let Some(portable) = self.shortened(path) {
                *path = portable;
            }
        });
        record
    }

    /// Returns the record as it was written, with its paths in full. `is_there` tells whether a
    /// path names a file.
    pub(super) fn found(&self, mut record: VmRecord, is_there: impl Fn(&Path) -> bool) -> VmRecord {
        let former = former_home(&record.handle).filter(|former| *former != self.root);
        for_each_path(&mut record.handle, |path, kind| {
            if let Some(full) = self.full(path, former.as_deref(), kind, &is_there) {
                *path = full;
            }
        });
        record
    }

    fn shortened(&self, path: &Path) -> Option<PathBuf> {
        let roots = std::iter::once((self.root.as_path(), ""));
        let aliases = self.aliases.iter().map(|(alias, below)| (alias.as_path(), *below));
        roots.chain(aliases).find_map(|(prefix, below)| {
            // A home at the root of the file system would own every path.
            let rest = path.strip_prefix(prefix).ok().filter(|_| prefix.parent().is_some())?;
            Some(Path::new(HOME).join(below).join(rest))
        })
    }

    fn full(
        &self,
        path: &Path,
        former: Option<&Path>,
        kind: PathKind,
        is_there: &impl Fn(&Path) -> bool,
    ) -> Option<PathBuf> {
        if let Ok(rest) = path.strip_prefix(HOME) {
            return Some(self.root.join(rest));
        }
        if path.starts_with(&self.root) {
            return None;
        }
        let rest = former.and_then(|former| path.strip_prefix(former).ok());
        let moved = match (rest, kind) {
            (_, PathKind::Details) => return None,
            (Some(rest), _) => self.root.join(rest),
            // An image of the store is named by what it holds, so another home's of that name is
            // the same.
            (None, PathKind::Input) => {
                self.root.join(stored_image(path).filter(|it| is_there(&self.root.join(it)))?)
            }
            (None, PathKind::Own) => return None,
        };
        // What a VM is made of may have stayed where it was.
        let stayed = kind == PathKind::Input && !is_there(&moved) && is_there(path);
        (!stayed).then_some(moved)
    }
}

/// What a path of a record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathKind {
    /// A file that the VM was made of, which may lie anywhere.
    Input,
    /// A file of the VM itself.
    Own,
    /// What only the VM's backend knows: of an older record it may say where the VM was created.
    Details,
}

/// Returns the home in which a record was written that has paths in full.
fn former_home(vm: &VmHandle) -> Option<PathBuf> {
    let layout = vm.details.data.get("layout").and_then(|layout| layout.get("work"));
    let work = match layout.and_then(|work| work.as_str()) {
        Some(work) => PathBuf::from(work),
        None => vm.console_log.as_ref()?.parent()?.to_owned(),
    };
    home_of(&work, vm.name())
}

/// Returns the home of a VM's directory, `HOME/vms/NAME`.
fn home_of(work: &Path, name: &VmName) -> Option<PathBuf> {
    let vms = work.parent().filter(|_| work.is_absolute() && work.ends_with(name.as_str()))?;
    vms.parent().filter(|_| vms.ends_with(VMS)).map(Path::to_owned)
}

/// Returns what names an image of a store of images, below its home:
/// `images/sha256-HEX/disk.FORMAT`.
pub(crate) fn stored_image(path: &Path) -> Option<PathBuf> {
    let mut parts = path.components().rev();
    let mut next = || parts.next().and_then(|part| part.as_os_str().to_str());
    let (disk, image, images) = (next()?, next()?, next()?);
    let hex = image.strip_prefix("sha256-")?;
    let is_hex = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_stored = is_hex && images == "images" && disk.starts_with("disk.");
    is_stored.then(|| [images, image, disk].iter().collect())
}

fn for_each_path(vm: &mut VmHandle, mut visit: impl FnMut(&mut PathBuf, PathKind)) {
    for spec in std::iter::once(&mut vm.spec).chain(vm.next_spec.as_deref_mut()) {
        spec.for_each_path(&mut |path| visit(path, PathKind::Input));
        // What it was made from may be the name of an image, or a file.
        let named = spec.image_name().filter(|name| name.starts_with('/') || name.starts_with(HOME));
        if let Some(mut path) = named.map(PathBuf::from) {
            visit(&mut path, PathKind::Input);
            *spec = spec.clone().with_image_name(&path.to_string_lossy());
        }
    }
    for_each_text(&mut vm.details.data, &mut |text| {
        if text.starts_with('/') || text.starts_with(HOME) {
            let mut path = PathBuf::from(&*text);
            visit(&mut path, PathKind::Details);
            *text = path.to_string_lossy().into_owned();
        }
    });
    let mut own = |path: &mut PathBuf| visit(path, PathKind::Own);
    vm.console_log.iter_mut().for_each(&mut own);
    vm.hypervisor_log.iter_mut().for_each(&mut own);
    let Some(RunInfo { console, agent, monitor, vnc, .. }) = &mut vm.run else { return };
    if let ConsoleEndpoint::UnixSocket(socket) = console {
        own(socket);
    }
    agent.iter_mut().for_each(&mut own);
    monitor.iter_mut().for_each(&mut own);
    match vnc {
        Some(VncAddress::Unix(socket)) => own(socket),
        Some(VncAddress::Tcp { password_file, .. }) => own(password_file),
        None => {}
    }
}

fn for_each_text(data: &mut Value, visit: &mut impl FnMut(&mut String)) {
    match data {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter_mut().for_each(|item| for_each_text(item, visit)),
        Value::Object(fields) => fields.values_mut().for_each(|field| for_each_text(field, visit)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::{BackendDetails, BackendTag};
    use crate::spec::{Boot, DataDisk, Kernel, RootDisk, VmSpec};
    use uuid::Uuid;

    const DISK: &str =
        "images/sha256-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef/disk.qcow2";

    fn record(home: &str, image: &str) -> VmRecord {
        let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
        let data = DataDisk::Existing { path: "/data/d.raw".into(), readonly: true };
        let spec = VmSpec::builder(VmName::new("web").unwrap()).boot(Boot::Kernel(kernel));
        let spec =
            spec.disk(RootDisk { image: image.into(), size: None }).data_disks(vec![data]).build().unwrap();
        let mut vm = VmHandle::preparing(Uuid::from_u128(7), BackendTag::Qemu, spec.with_image_name(image));
        vm.console_log = Some(format!("{home}/vms/web/console.log").into());
        let console = ConsoleEndpoint::UnixSocket(format!("{home}/run/x/console.sock").into());
        vm.run = Some(RunInfo { console, ..RunInfo::default() });
        let data = serde_json::json!({"dirs": [format!("{home}/vms/web"), "/dev/x"], "n": 1});
        vm.details = BackendDetails { version: 1, data };
        VmRecord::settled(vm)
    }

    fn image(record: &VmRecord) -> String {
        record.handle.spec.disk().unwrap().image.display().to_string()
    }

    fn paths(root: &str) -> HomePaths {
        HomePaths::new(Path::new(root), Vec::new())
    }

    #[test]
    fn a_record_has_no_absolute_path_below_its_home_and_is_read_anywhere() {
        let written = paths("/old").portable(record("/old", &format!("/old/{DISK}")));
        let text = String::from_utf8(written.encode().unwrap()).unwrap();
        assert!(!text.contains("/old") && text.contains("/data/d.raw"), "{text}");
        let found = paths("/new").found(written, |_| false);
        assert_eq!(found, record("/new", &format!("/new/{DISK}")));
    }

    #[test]
    fn what_a_link_leads_to_is_named_from_the_home_as_well() {
        let home =
            HomePaths::new(Path::new("/link"), vec![("/disk/i".into(), "images"), ("/real".into(), "")]);
        let name = |path: &str| home.shortened(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(name("/real/vms/a").unwrap(), "{home}/vms/a");
        assert_eq!(name("/disk/i/x").unwrap(), "{home}/images/x");
        assert_eq!(name("/elsewhere/x"), None);
        assert_eq!(paths("/").shortened(Path::new("/boot/x")), None);
    }

    #[test]
    fn a_record_with_paths_in_full_is_read_as_one_of_the_home_that_it_is_found_in() {
        let mut old = record("/old", "/old/base.raw");
        let layout = serde_json::json!({"layout": {"work": "/old/vms/web", "run": "/old/run/x"}});
        old.handle.details = BackendDetails { version: 1, data: layout };
        let moved = paths("/new").found(old.clone(), |_| false);
        assert_eq!(image(&moved), "/new/base.raw");
        assert_eq!(moved.handle.console_log, record("/new", "/x.raw").handle.console_log);
        assert_eq!(moved.handle.run, record("/new", "/x.raw").handle.run);
        // What the VM was made of was left behind.
        let stayed = paths("/new").found(old.clone(), |path| path == Path::new("/old/base.raw"));
        assert_eq!(image(&stayed), "/old/base.raw");
        assert_eq!(paths("/old").found(old.clone(), |_| true), old);
    }

    #[test]
    fn an_image_of_a_store_is_this_homes_where_this_home_has_it() {
        let elsewhere = format!("/elsewhere/{DISK}");
        let has_it = paths("/new").found(record("/new", &elsewhere), |_| true);
        assert_eq!(image(&has_it), format!("/new/{DISK}"));
        let lacks_it = paths("/new").found(record("/new", &elsewhere), |path| !path.starts_with("/new"));
        assert_eq!(image(&lacks_it), elsewhere);
        assert_eq!(stored_image(Path::new("/x/images/sha256-12/disk.raw")), None);
    }
}
