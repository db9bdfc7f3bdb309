//! `vmkit doctor`.

use std::io;

use clap::{Args, ValueEnum};
use vmkit::Error;
use vmkit::host::doctor::{
    CheckStatus, DirFacts, HostCheck, ProcessLimits, diagnose_propolis, limits, owners, places,
};
#[cfg(target_os = "linux")]
use vmkit::host::{HostFacts, ProbeOptions, doctor::diagnose};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output::{self, TextTable};
use crate::propolis;

/// Check what this host can do, and print what to install or repair.
/// KVM is tested by running guest code. The exit code is 2 if a check fails; a warning is no
/// failure.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Check what this backend needs [default: qemu, on illumos propolis].
    #[arg(long, value_enum, value_name = "NAME")]
    backend: Option<BackendChoice>,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// A backend with requirements on the host.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendChoice {
    #[cfg(target_os = "linux")]
    Qemu,
    Propolis,
}

impl BackendChoice {
    fn usual() -> Self {
        #[cfg(target_os = "linux")]
        return BackendChoice::Qemu;
        #[cfg(not(target_os = "linux"))]
        BackendChoice::Propolis
    }

    fn checks(self, context: &CommandContext, kvm: KvmProbe) -> Result<Vec<HostCheck>, Failure> {
        let home = context.home()?;
        let (kept, run) = (DirFacts::probe(home.vms()), DirFacts::probe(home.run()));
        let owners = home.strangers().map(|strangers| owners(&strangers));
        let mut checks = match self {
            #[cfg(target_os = "linux")]
            BackendChoice::Qemu => {
                let mut options = ProbeOptions::new(context.search_path());
                options.kvm = matches!(kvm, KvmProbe::Try);
                let facts = context.block_on(async { Ok(HostFacts::probe(&options).await?) })?;
                diagnose(&facts, &kept, &run)
            }
            BackendChoice::Propolis => {
                let mut checks = diagnose_propolis(&propolis::host(context.search_path())?);
                checks.extend(places(&kept, &run, rustix::process::geteuid().as_raw()));
                checks
            }
        };
        if let Some(refused) = context.refused_runtime()
            && let Some(check) = checks.iter_mut().find(|check| check.name == "runtime")
        {
            check.found.push_str(&format!("; not used: {refused}"));
        }
        checks.extend(limits(&ProcessLimits::probe()));
        checks.extend(owners);
        Ok(checks)
    }
}

/// Whether guest code is run to test KVM.
#[derive(Debug, Clone, Copy)]
enum KvmProbe {
    Try,
    Leave,
}

/// Returns whether `vmkit doctor` would show the cause of an error of the host, without running
/// guest code.
pub(crate) fn finds_cause(context: &CommandContext, error: &Error) -> bool {
    let is_full = |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let wants_room = matches!(error, Error::Io { source, .. } if is_full(source.kind()));
    let is_cause = |check: &HostCheck| match check.status {
        CheckStatus::Fail => true,
        CheckStatus::Warn => wants_room && check.name == "room",
        CheckStatus::Ok => false,
    };
    BackendChoice::usual().checks(context, KvmProbe::Leave).is_ok_and(|checks| checks.iter().any(is_cause))
}

impl DoctorArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let checks = self.backend.unwrap_or_else(BackendChoice::usual).checks(context, KvmProbe::Try)?;
        if self.json {
            output::json(&checks)?;
        } else {
            let mut table = TextTable::new(&["CHECK", "STATUS", "FOUND"]);
            for check in &checks {
                let status = match check.status {
                    CheckStatus::Ok => "ok",
                    CheckStatus::Warn => "warn",
                    CheckStatus::Fail => "FAIL",
                };
                table.row([check.name.clone(), status.to_owned(), check.found.clone()]);
                if let Some(advice) = &check.advice {
                    table.row([String::new(), String::new(), format!("advice: {advice}")]);
                }
            }
            output::text(table)?;
        }
        match checks.iter().any(|check| check.status == CheckStatus::Fail) {
            true => Err(Failure::Unfit),
            false => Ok(()),
        }
    }
}
