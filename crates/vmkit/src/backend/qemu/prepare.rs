//! Creating, updating and removing a VM's files, by the steps of its plan.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use uuid::Uuid;

use super::elsewhere::is_served;
use super::facts::ImageMedia;
use super::layout::QemuLayout;
use super::plan::{PrepareStep, QemuPlan, SeedStep, UpdateStep};
use super::{layers, snapshot_files};
use crate::backend::supervise::alive;
use crate::backend::supervise::files::{make_private_dir, remove_dir, remove_file};
use crate::cloud_init::write_seed;
use crate::disk_files::{check_apart, check_paths};
use crate::error::{Error, Result, Subject};
use crate::host::ports::{port_holder, port_is_free};
use crate::image::{
    ImageFacts, check_disc, create_blank, create_overlay_at_home, grow_disk, inspect, inspect_for,
    refuse_disc, settle_backing,
};
use crate::input_file::InputFile;
use crate::kernel_file::{check_initrd, check_kernel};
use crate::network::check_bridge;
use crate::spec::{Boot, DataDisk, NetworkConfig, PortForward, RootDisk, VmSpec};
use crate::steps::step;

/// The images of a spec, as inspected on this host.
pub(super) struct InspectedMedia {
    pub(super) root: Option<ImageFacts>,
    pub(super) media: ImageMedia,
}

/// Inspects every file that the spec names, before anything is created.
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

/// Checks what else the spec needs of this host: the bridge and the host ports.
///
/// # Errors
/// `InvalidInput` with the field and the value. If a port is taken later, QEMU refuses it.
pub(super) async fn check_network(spec: &VmSpec) -> Result<()> {
    match spec.network() {
        NetworkConfig::Tap { bridge } => check_bridge(bridge).await?,
        NetworkConfig::User(user) => {
            for forward in &user.forwards {
                check_port(forward)?;
            }
        }
        NetworkConfig::Vnic { link } => {
            let there = "VNICs exist on illumos only (expected user, or a tap on a bridge)";
            return Err(Error::invalid("network.link", link, there));
        }
        NetworkConfig::None => {}
    }
    Ok(())
}

/// Refuses a forward whose host port is in use.
pub(super) fn check_port(forward: &PortForward) -> Result<()> {
    let Some(port) = forward.host_port else { return Ok(()) };
    if port_is_free(forward.protocol, forward.host_addr.into(), port)? {
        return Ok(());
    }
    let holder = port_holder(forward.protocol, forward.host_addr, port);
    let by = holder.map_or_else(String::new, |holder| format!(" by {holder}"));
    let why = format!("the host's port {port} is in use{by}; choose another, or omit it to get a free one");
    Err(Error::invalid("forward", forward, why))
}

fn check_absolute(field: &'static str, path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(Error::invalid(
            field,
            path.display(),
            "the path must be absolute: QEMU's current directory is `/`",
        )),
    }
}

/// Applies the plan of a new VM. On an error everything that was created is removed again.
///
/// # Errors
/// `AlreadyExists` if the directory is another VM's, `Busy` while an operation is at work there;
/// `Io` and `InvalidInput` from the steps.
pub(super) fn apply(plan: &QemuPlan) -> Result<()> {
    let mut undo = UndoPrepare { plan, lock: None, is_armed: true };
    let done = plan.prepare.iter().try_for_each(|one| match one {
        PrepareStep::Directory { path, id } => undo.claim(path, *id),
        PrepareStep::Overlay { image, path, size } => create_overlay_at_home(image, path, *size).map(drop),
        PrepareStep::Disk { path, size } => create_blank(path, *size),
        PrepareStep::Layer { source, path } => layers::link(source, path),
        PrepareStep::LayerOverlay { layer, path } => layers::create_over(layer, path),
        PrepareStep::FirmwareVariables { template, path } => copy_private(template, path),
        PrepareStep::Seed(SeedStep { path, seed }) => write_seed(seed, path),
    });
    undo.is_armed &= done.is_err();
    done
}

/// Applies the steps of a start's plan. The caller holds the lock `alive`. Changes before an error
/// remain: the next start continues from there.
///
/// # Errors
/// `Io`, `Host` and `InvalidInput` from the steps.
pub(super) fn update(plan: &QemuPlan) -> Result<()> {
    plan.update.iter().try_for_each(|one| match one {
        UpdateStep::Seed(SeedStep { path, seed }) => write_seed(seed, path),
        UpdateStep::BackingFile { path, image } => settle_backing(path, image),
        UpdateStep::Grow { path, size } => grow_disk(path, *size),
    })
}

/// Refuses a VM with a file of another user, before the guest is ended for a removal that would
/// fail.
///
/// # Errors
/// [`Error::OtherUser`].
pub(super) fn refuse_other_users(layout: &QemuLayout) -> Result<()> {
    for path in [&layout.work, &layout.alive_lock(), &layout.run] {
        crate::store::refuse_other_user(path)?;
    }
    Ok(())
}

/// Removes everything that `prepare` and `start` may have created, and the directories if they are
/// empty then. `data_disks` is the number of the VM's data disks.
///
/// # Errors
/// `Io` for what can't be removed.
pub(super) fn remove(layout: &QemuLayout, data_disks: usize) -> Result<()> {
    remove_run_dir(layout)?;
    snapshot_files::remove_all(layout)?;
    for file in layout.work_files(data_disks) {
        remove_file(&file)?;
    }
    remove_dir(&layout.work)
}

/// Removes the sockets of a run and their directory, unless this VM is a copy and they belong to
/// the original.
pub(super) fn remove_run_dir(layout: &QemuLayout) -> Result<()> {
    if is_served(layout) {
        tracing::debug!(run = %layout.run.display(), "the sockets of a VM of another home are there: they are kept");
        return Ok(());
    }
    for file in layout.run_files() {
        remove_file(&file)?;
    }
    remove_dir(&layout.run)
}

/// Syncs a directory.
///
/// # Errors
/// `Io`.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    step("sync a directory").and_then(|()| File::open(dir)?.sync_all()).map_err(Error::io("sync", dir))
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

/// Removes a partly created VM when it is dropped, unless it is disarmed.
struct UndoPrepare<'a> {
    plan: &'a QemuPlan,
    /// Held until everything is created, or removed again.
    lock: Option<OwnedFd>,
    is_armed: bool,
}

impl UndoPrepare<'_> {
    /// Creates the VM's directory, locks it and writes its owner, so that no other VM takes it over
    /// and no other VM's directory is removed.
    fn claim(&mut self, path: &Path, id: Uuid) -> Result<()> {
        let layout = &self.plan.layout;
        make_private_dir(path)?;
        self.lock = alive::try_take(&layout.place())?;
        // Until the directory has this VM's mark, its content may be another's.
        self.is_armed = false;
        if self.lock.is_none() {
            return Err(Error::Busy {
                what: format!("the directory of VM `{}`", layout.name()),
                holder: None,
            });
        }
        let mark = layout.owner_mark();
        let new = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&mark);
        let made = step("prepare: claim").and_then(|()| new());
        if let Err(error) = &made
            && error.kind() == io::ErrorKind::AlreadyExists
        {
            return Err(Error::already_exists(Subject::Vm, layout.name()));
        }
        self.is_armed = true;
        let mut file = made.map_err(Error::io("create", &mark))?;
        writeln!(file, "{id}").map_err(Error::io("write", &mark))
    }

    fn remove(&self) -> Result<()> {
        for one in &self.plan.prepare {
            if let PrepareStep::Disk { path, .. } | PrepareStep::LayerOverlay { path, .. } = one {
                remove_file(path)?;
            }
        }
        remove(&self.plan.layout, 0)
    }
}

impl Drop for UndoPrepare<'_> {
    fn drop(&mut self) {
        if self.is_armed
            && let Err(error) = self.remove()
        {
            let work = self.plan.layout.work.display();
            tracing::warn!(%work, %error, "could not undo a failed prepare; destroy will");
        }
    }
}
