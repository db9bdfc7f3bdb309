//! `vmkit set`.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use vmkit::spec::{CdromPatch, NetworkConfig, SpecChange, SpecPatch, VmName};
use vmkit::vmfile::{self, MachineConfig, Project, VmfileProblem};
use vmkit::{Error, VmHandle, VmState};

use crate::commands::machine::SpecFields;
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::{human, json, output};

/// Change the configuration of a VM; options that are not given stay as they are.
///
/// For a running VM a change takes effect at its next start: `vmkit restart` applies it now. A disk
/// can only grow. Changes that need the VM recreated are refused, and so is the VM of a machine in
/// a vmkit.toml: edit that file instead.
#[derive(Debug, Args)]
#[command(override_usage = "vmkit set [OPTIONS] <NAME>")]
pub(crate) struct SetArgs {
    /// The VM.
    pub(super) name: VmName,
    #[command(flatten)]
    fields: SpecFields,
    /// Remove the CD-ROM drive.
    #[arg(long, conflicts_with = "cdrom")]
    no_cdrom: bool,
    /// Set how the guest is connected: user, tap:BRIDGE, vnic:LINK (illumos) or none.
    #[arg(long, value_name = "user|tap:BRIDGE|vnic:LINK|none")]
    network: Option<NetworkConfig>,
    /// Whether to restrict the guest to its forwards, with user networking.
    #[arg(long, value_name = "true|false")]
    restrict: Option<bool>,
    /// Print what would change, without changing it.
    #[arg(long)]
    dry_run: bool,
    /// Print the VM and its changes as a JSON object.
    #[arg(long)]
    json: bool,
}

/// The changes made, or with `--dry-run` those that would be.
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
            output::line(format_args!("{}: unchanged", vm.name()));
        } else if vm.state.has_memory() && !self.dry_run {
            let name = vm.name();
            let until = match vm.state {
                VmState::Saved => "until the saved guest boots again",
                _ => "for the next start",
            };
            output::line(format_args!(
                "{name}: the change waits {until}: `vmkit restart {name}` applies it now"
            ));
        }
        changes.iter().try_for_each(|change| output::text(output::printable(human::change(change))))
    }

    async fn change(&self, manager: &CliManager) -> Result<(VmHandle, Vec<SpecChange>), Error> {
        let patch = self.patch()?;
        if patch.is_empty() {
            let why = "no change is given (expected an option such as --memory 2GiB)";
            return Err(Error::invalid("set", &self.name, why));
        }
        let (vm, _, changes) = manager.plan_reconfigure(&self.name, |spec| patch.apply_to(spec)).await?;
        if let Some(change) = changes.first() {
            refuse_machine(&vm, change)?;
        }
        if changes.is_empty() || self.dry_run {
            return Ok((vm, changes));
        }
        let (written, changes) = manager.set(&self.name, &patch).await?;
        Ok((VmHandle { state: vm.state, ..written }, changes))
    }

    fn patch(&self) -> Result<SpecPatch, Error> {
        let mut patch = self.fields.patch()?;
        if self.no_cdrom {
            patch.cdrom = Some(CdromPatch::Remove);
        }
        patch.network.clone_from(&self.network);
        patch.restrict = self.restrict;
        Ok(patch)
    }
}

/// Refuses the VM of a machine that a file describes: the next `up` would revert the change.
///
/// # Errors
/// `InvalidInput`, with the line of the file to change.
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
    // No `up` reverts changes to a machine that the file no longer has.
    let Some(machine) = project.machine(name).filter(|machine| machine.vm == *vm.name()) else {
        return Ok(());
    };
    let problem = VmfileProblem::new(format!(
        "`{}`: this file describes the VM `{}`, and its next `up` would revert the change",
        change.field,
        vm.name()
    ));
    let problem = problem.help(format!("write `{} = …` here, then `vmkit up {name}`", change.field));
    Err(project.error_at(machine, change.field, problem).into())
}
