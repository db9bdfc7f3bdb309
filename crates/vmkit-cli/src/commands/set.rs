//! `vmkit set`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vmkit::spec::{Boot, Kernel, Mib, NetworkConfig, SpecChange, UserName, VmName, VmSpec, VmSpecBuilder};
use vmkit::vmfile::{self, MachineConfig, Project, VmfileProblem};
use vmkit::{Error, VmHandle};

use crate::commands::machine::{AccelName, FirmwareName, MachineName, VncName, cpus};
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::places::absolute;
use crate::values::value;
use crate::{human, json, output};

/// Change the configuration of a VM; what is not named stays as it is.
///
/// A VM that runs goes on as it is, and is what it was set to from its next start on:
/// `vmkit restart` does that now. A disk only grows. What a VM has to be recreated for is refused,
/// and so is the VM of a machine in a vmkit.toml: its file says what it is.
#[derive(Debug, Args)]
#[command(override_usage = "vmkit set [OPTIONS] <NAME>")]
pub(crate) struct SetArgs {
    /// The VM.
    pub(super) name: VmName,
    #[command(flatten)]
    wanted: SpecEdits,
    /// Print what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the VM and its changes as a JSON object.
    #[arg(long)]
    json: bool,
}

/// What the VM shall be; at least one of it has to be named.
#[derive(Debug, Default, PartialEq, Args)]
struct SpecEdits {
    /// Set the number of virtual CPUs, 1 to 255.
    #[arg(long, value_name = "N", value_parser = cpus, allow_negative_numbers = true)]
    cpus: Option<u32>,
    /// Set the guest's memory.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| value::<Mib>("memory", text))]
    memory: Option<Mib>,
    /// Grow the root disk to this size.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| value::<Mib>("disk", text))]
    disk: Option<Mib>,
    /// Put this image of a disc into the CD-ROM drive.
    #[arg(long, value_name = "FILE")]
    cdrom: Option<PathBuf>,
    /// Remove the CD-ROM drive.
    #[arg(long, conflicts_with = "cdrom")]
    no_cdrom: bool,
    /// Boot this kernel directly.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Give the kernel this initial ramdisk.
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Give the kernel this command line.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Choose the machine type.
    #[arg(long, value_enum)]
    machine: Option<MachineName>,
    /// Boot by the firmware instead of a kernel.
    #[arg(long, value_enum, conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    firmware: Option<FirmwareName>,
    /// Choose what runs the guest's code.
    #[arg(long, value_enum)]
    accel: Option<AccelName>,
    /// Show the screen on a Unix socket, on a port of loopback with a password, or nowhere.
    #[arg(long, value_enum)]
    vnc: Option<VncName>,
    /// Run the hypervisor as this user of the host; only root can ask for that.
    #[arg(long, value_name = "USER")]
    run_as: Option<UserName>,
    /// Connect the guest: user, tap:BRIDGE, vnic:LINK (illumos) or none.
    #[arg(long, value_name = "user|tap:BRIDGE|vnic:LINK|none")]
    network: Option<NetworkConfig>,
    /// Whether to keep the guest from everything but its forwards, with user networking.
    #[arg(long, value_name = "true|false")]
    restrict: Option<bool>,
}

/// What came of it, or would come.
#[derive(Serialize)]
struct SetOutcome<'a> {
    vm: json::VmView<'a>,
    changes: &'a [SpecChange],
}

impl SetArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let (vm, changes) = context.block_on(async { Ok(self.change(&manager).await?) })?;
        if self.json {
            return output::json(&SetOutcome { vm: json::VmView::of(&vm), changes: &changes });
        }
        if changes.is_empty() {
            output::line(format_args!("{}: it is so already", vm.name()));
        } else if vm.state.is_live() && !self.dry_run {
            let name = vm.name();
            output::line(format_args!("{name}: it runs as it was: `vmkit restart {name}` applies it now"));
        }
        changes.iter().try_for_each(|change| output::text(output::printable(human::change(change))))
    }

    async fn change(&self, manager: &CliManager) -> Result<(VmHandle, Vec<SpecChange>), Error> {
        if self.wanted == SpecEdits::default() {
            let why = "say what shall change, such as --memory 2GiB; `vmkit info` tells what the VM is";
            return Err(Error::invalid("set", &self.name, why));
        }
        let edit = |spec| self.wanted.applied_to(spec);
        let (vm, wanted, changes) = manager.plan_reconfigure(&self.name, edit).await?;
        if let Some(change) = changes.first() {
            refuse_machine(&vm, change)?;
        }
        if changes.is_empty() || self.dry_run {
            return Ok((vm, changes));
        }
        manager.check_host(&wanted).await?;
        let (written, changes) = manager.reconfigure_with(&self.name, edit).await?;
        Ok((VmHandle { state: vm.state, ..written }, changes))
    }
}

impl SpecEdits {
    /// Returns what a VM of this spec shall be.
    fn applied_to(&self, spec: VmSpec) -> Result<VmSpec, Error> {
        let cdrom = self.cdrom.as_deref().map(|disc| absolute("cdrom", disc)).transpose()?;
        let (boot, network) = (self.boot(spec.boot())?, self.network(spec.network())?);
        let disk = match (self.disk, spec.disk()) {
            (Some(size), None) => {
                return Err(Error::invalid("disk", size, "this VM has no root disk: it boots a kernel"));
            }
            (Some(size), Some(disk)) => Some(vmkit::spec::RootDisk { size: Some(size), ..disk.clone() }),
            (None, _) => None,
        };
        /// Sets what is given.
        fn with<T>(
            builder: VmSpecBuilder,
            value: Option<T>,
            set: impl FnOnce(VmSpecBuilder, T) -> VmSpecBuilder,
        ) -> VmSpecBuilder {
            match value {
                Some(value) => set(builder, value),
                None => builder,
            }
        }
        let mut builder = VmSpecBuilder::from(spec);
        builder = with(builder, self.cpus, VmSpecBuilder::cpus);
        builder = with(builder, self.memory, VmSpecBuilder::memory);
        builder = with(builder, disk, VmSpecBuilder::disk);
        builder = with(builder, cdrom, VmSpecBuilder::cdrom);
        if self.no_cdrom {
            builder = builder.without_cdrom();
        }
        builder = with(builder, boot, VmSpecBuilder::boot);
        builder = with(builder, self.machine.map(Into::into), VmSpecBuilder::machine);
        builder = with(builder, self.accel.map(Into::into), VmSpecBuilder::accel);
        builder = with(builder, self.vnc.map(Into::into), VmSpecBuilder::vnc);
        builder = with(builder, self.run_as.clone(), VmSpecBuilder::run_as);
        builder = with(builder, network, VmSpecBuilder::network);
        builder.build()
    }

    /// Returns what it shall boot, where that changes: of a kernel's three parts, those that are
    /// named.
    fn boot(&self, now: &Boot) -> Result<Option<Boot>, Error> {
        if let Some(firmware) = self.firmware {
            return Ok(Some(Boot::Firmware(firmware.into())));
        }
        let path = self.kernel.as_deref().map(|kernel| absolute("kernel", kernel)).transpose()?;
        let initrd = self.initrd.as_deref().map(|initrd| absolute("initrd", initrd)).transpose()?;
        if path.is_none() && initrd.is_none() && self.cmdline.is_none() {
            return Ok(None);
        }
        let kernel = match (now, path) {
            (Boot::Kernel(now), path) => {
                Kernel { path: path.unwrap_or_else(|| now.path.clone()), ..now.clone() }
            }
            (_, Some(path)) => Kernel { path, initrd: None, cmdline: String::new() },
            (_, None) => {
                let (field, value) = match &initrd {
                    Some(initrd) => ("initrd", initrd.display().to_string()),
                    None => ("cmdline", self.cmdline.clone().unwrap_or_default()),
                };
                return Err(Error::invalid(field, value, "this VM boots no kernel: name one as well"));
            }
        };
        Ok(Some(Boot::Kernel(Kernel {
            initrd: initrd.or(kernel.initrd),
            cmdline: self.cmdline.clone().unwrap_or(kernel.cmdline),
            path: kernel.path,
        })))
    }

    /// Returns how it shall be connected, where that changes; forwards stay as long as the network
    /// is the user's.
    fn network(&self, now: &NetworkConfig) -> Result<Option<NetworkConfig>, Error> {
        let mut network = match (&self.network, now) {
            (None, now) | (Some(NetworkConfig::User(_)), now @ NetworkConfig::User(_)) => now.clone(),
            (Some(wanted), _) => wanted.clone(),
        };
        match (self.restrict, &mut network) {
            (Some(restrict), NetworkConfig::User(user)) => user.restrict = restrict,
            (Some(restrict), _) => {
                return Err(Error::invalid(
                    "restrict",
                    restrict,
                    "only user networking can restrict the guest",
                ));
            }
            (None, _) => {}
        }
        Ok((network != *now).then_some(network))
    }
}

/// Refuses the VM of a machine that a file describes: the next `up` would set it back.
///
/// # Errors
/// `InvalidInput`, pointing to where the file says what shall change.
fn refuse_machine(vm: &VmHandle, change: &SpecChange) -> Result<(), Error> {
    let label = |key| vm.spec.labels().get(key);
    let (Some(file), Some(name)) = (label(Project::LABEL), label(MachineConfig::LABEL)) else {
        return Ok(());
    };
    let file = Path::new(file);
    if !file.exists() {
        return Ok(());
    }
    let Ok(project) = vmfile::load(file) else {
        let why = format!("this VM is the machine `{name}` of {}: change it there", file.display());
        return Err(Error::invalid(change.field, &change.to, why));
    };
    // A machine that the file no longer has is nobody's to set back.
    let Some(machine) = project.machine(name).filter(|machine| machine.vm == *vm.name()) else {
        return Ok(());
    };
    let problem = VmfileProblem::new(format!(
        "`{}`: this file says what the VM `{}` is, and its next `up` would set that back",
        change.field,
        vm.name()
    ));
    let problem = problem.help(format!("write `{} = …` here, then `vmkit up {name}`", change.field));
    Err(project.error_at(machine, change.field, problem).into())
}
