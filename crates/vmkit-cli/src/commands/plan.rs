//! `--dry-run`: prints what would be done.

use std::fmt::Display;

use serde::Serialize;
#[cfg(target_os = "linux")]
use vmkit::error::Subject;
use vmkit::qemu::QemuPlan;
use vmkit::spec::VmSpec;
use vmkit::{BackendTag, Error, ErrorKind};

use crate::commands::TargetArgs;
use crate::context::{CliManager, CommandContext, DEFAULT_BACKEND};
use crate::failure::Failure;
use crate::output;

/// Prints the plan of a VM that does not exist yet.
///
/// # Errors
/// Those that `create` would have, as far as they can be found without creating anything.
pub(super) async fn print_new(
    context: &CommandContext,
    manager: &CliManager,
    spec: &VmSpec,
    json: bool,
) -> Result<(), Failure> {
    match manager.info(spec.name()).await {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(_) => return Err(Error::already_exists(Subject::Vm, spec.name()).into()),
    }
    match spec.backend().unwrap_or(&DEFAULT_BACKEND) {
        #[cfg(target_os = "linux")]
        BackendTag::Qemu => tell_qemu(&context.qemu_planner()?.plan(spec).await?, json),
        BackendTag::Propolis => tell(&context.propolis()?.plan(spec).await?, json),
        backend => Err(unsupported(backend)),
    }
}

/// Prints what starting these VMs would do.
pub(super) fn print_start(context: &CommandContext, targets: TargetArgs) -> Result<(), Failure> {
    let manager = context.manager()?;
    let names = targets.names(context, &manager, |state| !state.is_live())?;
    context.block_on(async {
        for name in &names {
            let vm = manager.info(name).await?;
            match &vm.backend {
                #[cfg(target_os = "linux")]
                BackendTag::Qemu => {
                    tell_qemu(&context.qemu_planner()?.plan_start(&vm).await?, targets.json)?;
                }
                BackendTag::Propolis => {
                    tell(&context.propolis()?.plan_start(&vm).await?, targets.json)?;
                }
                backend => return Err(unsupported(backend)),
            }
        }
        Ok(())
    })
}

fn unsupported(backend: &BackendTag) -> Failure {
    Error::Unsupported { backend: backend.clone(), what: "a dry run".to_owned() }.into()
}

#[cfg(target_os = "linux")]
fn tell_qemu(plan: &QemuPlan, json: bool) -> Result<(), Failure> {
    plan.warnings.iter().for_each(output::warning);
    tell(plan, json)
}

fn tell(plan: &(impl Serialize + Display), json: bool) -> Result<(), Failure> {
    match json {
        true => output::json(plan),
        false => output::text(output::printable(plan)),
    }
}
