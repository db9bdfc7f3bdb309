//! `vmkit doctor`.

use std::io;

use clap::{Args, ValueEnum};
use vmkit::Error;
use vmkit::host::doctor::{
    Check, DirFacts, ProcessLimits, Status, diagnose_propolis, limits, owners, places,
};
#[cfg(target_os = "linux")]
use vmkit::host::{HostFacts, ProbeOptions, doctor::diagnose};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::propolis;

/// Check what this host can do, and say what to install or repair.
///
/// KVM is tried by running guest code. The exit code is 2 where a check fails; a warning is no
/// failure.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Check what this backend needs [default: qemu, on illumos propolis].
    #[arg(long, value_enum, value_name = "NAME")]
    backend: Option<Backend>,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// A backend that needs something of the host.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Backend {
    #[cfg(target_os = "linux")]
    Qemu,
    Propolis,
}

impl Backend {
    fn usual() -> Self {
        #[cfg(target_os = "linux")]
        return Backend::Qemu;
        #[cfg(not(target_os = "linux"))]
        Backend::Propolis
    }

    fn checks(self, context: &Context, kvm: Kvm) -> Result<Vec<Check>, Failure> {
        let home = context.home()?;
        let (kept, run) = (DirFacts::probe(home.vms()), DirFacts::probe(home.run()));
        let owners = home.strangers().map(|strangers| owners(&strangers));
        let mut checks = match self {
            #[cfg(target_os = "linux")]
            Backend::Qemu => {
                let mut options = ProbeOptions::new(context.search_path());
                options.kvm = matches!(kvm, Kvm::Try);
                let facts = context.block_on(async { Ok(HostFacts::probe(&options).await?) })?;
                diagnose(&facts, &kept, &run)
            }
            Backend::Propolis => {
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

/// Whether guest code is run to see what KVM is good for.
#[derive(Debug, Clone, Copy)]
enum Kvm {
    Try,
    Leave,
}

/// Returns whether `vmkit doctor` would show the cause of an error that is put down to the host.
/// Guest code is not run for this.
pub(crate) fn finds_cause(context: &Context, error: &Error) -> bool {
    let is_full = |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let wants_room = matches!(error, Error::Io { source, .. } if is_full(source.kind()));
    let is_cause = |check: &Check| match check.status {
        Status::Fail => true,
        Status::Warn => wants_room && check.name == "room",
        Status::Ok => false,
    };
    Backend::usual().checks(context, Kvm::Leave).is_ok_and(|checks| checks.iter().any(is_cause))
}

impl Doctor {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let checks = self.backend.unwrap_or_else(Backend::usual).checks(context, Kvm::Try)?;
        if self.json {
            output::json(&checks)?;
        } else {
            let mut table = Table::new(&["CHECK", "STATUS", "FOUND"]);
            for check in &checks {
                let status = match check.status {
                    Status::Ok => "ok",
                    Status::Warn => "warn",
                    Status::Fail => "FAIL",
                };
                table.row([check.name.clone(), status.to_owned(), check.found.clone()]);
                if let Some(advice) = &check.advice {
                    table.row([String::new(), String::new(), format!("do: {advice}")]);
                }
            }
            output::text(table)?;
        }
        match checks.iter().any(|check| check.status == Status::Fail) {
            true => Err(Failure::Unfit),
            false => Ok(()),
        }
    }
}
