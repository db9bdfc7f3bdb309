//! Making and removing what a VM has on disk: the steps of a plan, each with its undo.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::elsewhere::is_served;
use super::facts::ImageMedia;
use super::layout::QemuLayout;
use super::plan::{PrepareStep, QemuPlan};
use crate::backend::supervise::alive;
use crate::backend::supervise::files::{is_gone, make_private_dir, remove_dir, remove_file};
use crate::cloud_init::SeedOf;
use crate::disk_files::{check_apart, check_paths};
use crate::error::{Error, Result};
use crate::host::ports::{port_holder, port_is_free};
use crate::image::{
    ImageFacts, check_disc, create_blank, create_overlay_at_home, inspect, inspect_for, refuse_disc,
};
use crate::input_file::{InputFile, open_regular};
use crate::kernel_file::{check_initrd, check_kernel};
use crate::network::{MacAddr, check_bridge};
use crate::spec::{Boot, DataDisk, Firmware, NetworkConfig, PortForward, RootDisk, VmSpec};
use crate::steps::step;
use crate::store::denied;

/// More than an owner's mark has: an id, and the end of the line.
const MARK_BYTES: usize = 64;

/// The images of a spec, looked at: what only the host can tell.
pub(super) struct InspectedMedia {
    pub(super) root: Option<ImageFacts>,
    pub(super) media: ImageMedia,
}

/// Looks at every file that the spec names, before anything is made.
///
/// # Errors
/// `InvalidInput` with the field and the path.
pub(super) fn look_at_files(spec: &VmSpec) -> Result<InspectedMedia> {
    let root = spec.disk().and_then(RootDisk::base).map(inspect).transpose()?;
    if let Some(root) = &root {
        refuse_disc(&root.path, &root.path.display().to_string())?;
    }
    if let Some(disc) = spec.cdrom() {
        check_absolute("cdrom", disc)?;
        check_disc(disc)?;
    }
    let formats = spec.data_disks().iter().map(|disk| match disk {
        DataDisk::Fresh { .. } => Ok(None),
        DataDisk::Existing { path, readonly } => {
            InputFile::data_disk(path, *readonly)?;
            inspect_for("data_disks", path).map(|facts| Some(facts.format))
        }
    });
    let data_formats = formats.collect::<Result<_>>()?;
    check_paths(spec)?;
    check_apart(spec)?;
    if let Boot::Kernel(kernel) = spec.boot() {
        check_absolute("kernel", &kernel.path)?;
        check_kernel(&kernel.path, spec.machine().arch())?;
        if let Some(initrd) = &kernel.initrd {
            check_absolute("initrd", initrd)?;
            check_initrd(initrd)?;
        }
    }
    Ok(InspectedMedia { root, media: ImageMedia { data_formats } })
}

/// Checks what else the spec asks of this host: the bridge, and the ports that it names.
///
/// # Errors
/// `InvalidInput` with the field and the value. A port that is taken after this is QEMU's to
/// refuse.
pub(super) async fn check_network(spec: &VmSpec) -> Result<()> {
    match spec.network() {
        NetworkConfig::Tap { bridge } => check_bridge(bridge).await?,
        NetworkConfig::User(user) => {
            for forward in &user.forwards {
                check_port(forward)?;
            }
        }
        NetworkConfig::Vnic { link } => {
            let there = "illumos has VNICs, and QEMU on Linux has none; take user, or a tap on a bridge";
            return Err(Error::invalid("network.link", link, there));
        }
        NetworkConfig::None => {}
    }
    Ok(())
}

/// Refuses a forward whose port of the host somebody else has.
pub(super) fn check_port(forward: &PortForward) -> Result<()> {
    let Some(port) = forward.host_port else { return Ok(()) };
    if port_is_free(forward.protocol, forward.host_addr.into(), port)? {
        return Ok(());
    }
    let holder = port_holder(forward.protocol, forward.host_addr, port);
    let by = holder.map_or_else(String::new, |holder| format!(" by {holder}"));
    let why = format!("the host's port {port} is in use{by}; name another, or none to have one chosen");
    Err(Error::invalid("forward", forward, why))
}

fn check_absolute(field: &'static str, path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(Error::invalid(field, path.display(), "the path must be absolute: QEMU works in `/`")),
    }
}

/// Creates what the plan says. On an error everything made is removed again.
///
/// # Errors
/// `AlreadyExists` where another VM lives in the directory; `Io` and `InvalidInput` from the steps.
pub(super) fn make(
    spec: &VmSpec,
    id: Uuid,
    layout: &QemuLayout,
    plan: &QemuPlan,
    root: Option<&ImageFacts>,
) -> Result<()> {
    let mut undo = UndoPrepare { layout, spec, id, armed: true, alone: None };
    make_private_dir(&layout.work)?;
    undo.alone = alive::try_take(&layout.place())?;
    if undo.alone.is_none() {
        undo.disarm();
        return Err(Error::Busy { what: format!("the directory of VM `{}`", spec.name()), holder: None });
    }
    claim(spec, id, layout)?;
    for one in &plan.prepare {
        match one {
            PrepareStep::Directory { path } => make_private_dir(path)?,
            PrepareStep::Overlay { path, size, .. } => {
                let image =
                    root.expect("a plan with an overlay comes from a spec with a disk that was looked at");
                create_overlay_at_home(image, path, *size)?;
            }
            PrepareStep::Disk { path, size } => create_blank(path, *size)?,
            PrepareStep::FirmwareVariables { template, path } => copy_private(template, path)?,
            PrepareStep::Seed { path } => write_seed(spec, id, path)?,
        }
    }
    undo.disarm();
    Ok(())
}

/// Writes the cloud-init seed of a spec that has one, over an earlier one.
pub(super) fn write_seed(spec: &VmSpec, id: Uuid, path: &Path) -> Result<()> {
    let Some(config) = spec.cloud_init() else {
        return Ok(());
    };
    let mac = match spec.network() {
        NetworkConfig::None => None,
        NetworkConfig::User(_) | NetworkConfig::Tap { .. } | NetworkConfig::Vnic { .. } => {
            Some(MacAddr::of_vm(id))
        }
    };
    SeedOf { config, name: spec.name(), id, mac }.write_iso(path)
}

/// Writes down whose directory this is, so that nobody takes over, or removes, another VM's.
fn claim(spec: &VmSpec, id: Uuid, layout: &QemuLayout) -> Result<()> {
    let mark = layout.owner_mark();
    step("prepare: claim").map_err(Error::io("create", &mark))?;
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&mark);
    match made {
        Ok(mut file) => writeln!(file, "{id}").map_err(Error::io("write", &mark)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::AlreadyExists { what: "VM", name: spec.name().to_string() })
        }
        Err(error) => Err(Error::io("create", &mark)(error)),
    }
}

/// Refuses a VM of which a part belongs to another user, before the guest is ended for a removal
/// that could not go on.
///
/// # Errors
/// [`Error::OtherUser`].
pub(super) fn refuse_other_users(layout: &QemuLayout) -> Result<()> {
    for path in [&layout.work, &layout.alive_lock(), &layout.run] {
        crate::store::refuse_other_user(path)?;
    }
    Ok(())
}

/// Returns whose directory this is; `None` where nobody has claimed it.
///
/// # Errors
/// `Io` where the mark can't be read. What is no mark, such as one cut short by a crash, is no
/// claim.
pub(super) fn owner(layout: &QemuLayout) -> Result<Option<Uuid>> {
    let mark = layout.owner_mark();
    let mut text = [0; MARK_BYTES];
    match open_regular(&mark).and_then(|mut file| file.read(&mut text)) {
        Ok(read) => Ok(std::str::from_utf8(&text[..read]).ok().and_then(|text| text.trim().parse().ok())),
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(denied("read", &mark)(error)),
    }
}

/// Finds a part that `prepare` made and that is gone: without it the VM is fit for nothing but to
/// be removed. The seed can be written again.
pub(super) fn missing_part(spec: &VmSpec, layout: &QemuLayout) -> Option<PathBuf> {
    let root = spec.disk().map(|_| layout.root_disk());
    let vars = matches!(spec.boot(), Boot::Firmware(Firmware::Uefi)).then(|| layout.efi_vars());
    let fresh =
        spec.data_disks().iter().enumerate().filter(|(_, disk)| matches!(disk, DataDisk::Fresh { .. }));
    let fresh = fresh.map(|(index, _)| layout.data_disk(index));
    let gone = |part: &PathBuf| matches!(fs::symlink_metadata(part), Err(error) if is_gone(&error));
    root.into_iter().chain(vars).chain(fresh).find(gone)
}

/// Removes everything that `prepare` and `start` may have made, and the directories when nothing
/// else is in them.
///
/// # Errors
/// `Io` for what can't be removed.
pub(super) fn remove(spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
    remove_run_dir(layout)?;
    for file in layout.work_files(spec.data_disks().len()) {
        remove_file(&file)?;
    }
    remove_dir(&layout.work)
}

/// Removes the sockets of a run and their directory, unless they are the original's of which this
/// VM is a copy.
pub(super) fn remove_run_dir(layout: &QemuLayout) -> Result<()> {
    if is_served(layout) {
        tracing::debug!(run = %layout.run.display(), "a VM of another home has its sockets there: they stay");
        return Ok(());
    }
    for file in layout.run_files() {
        remove_file(&file)?;
    }
    remove_dir(&layout.run)
}

fn copy_private(template: &Path, path: &Path) -> Result<()> {
    step("prepare: copy").map_err(Error::io("create", path))?;
    let bytes = fs::read(template).map_err(Error::io("read", template))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))?;
    file.write_all(&bytes).map_err(Error::io("write", path))
}

/// Removes what was made, unless the whole came off.
struct UndoPrepare<'a> {
    layout: &'a QemuLayout,
    spec: &'a VmSpec,
    id: Uuid,
    armed: bool,
    /// Held until all is made, or removed again.
    alone: Option<OwnedFd>,
}

impl UndoPrepare<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for UndoPrepare<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        // Another VM's directory is left alone; one that was never claimed holds nothing but,
        // perhaps, itself.
        let removed = match owner(self.layout) {
            Ok(Some(owner)) if owner != self.id => return,
            Ok(_) => remove(self.spec, self.layout),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(work = %self.layout.work.display(), %error, "could not undo a failed prepare; destroy will");
        }
    }
}
