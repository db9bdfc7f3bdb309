//! `vmkit doctor`.

use clap::Args;
use vmkit::host::doctor::{DirFacts, Status, diagnose};
use vmkit::host::{HostFacts, ProbeOptions};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{self, Table};

/// Checks whether this host is fit to run VMs, and says what to do where it is not.
///
/// KVM is tried by running guest code. The exit code is 2 where a check fails; a warning is no failure.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Prints a JSON array.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let home = context.home()?;
        let mut options = ProbeOptions::new(context.search_path());
        options.kvm = true;
        let facts = context.block_on(async { Ok(HostFacts::probe(&options).await?) })?;
        let checks = diagnose(&facts, &DirFacts::probe(home.vms()), &DirFacts::probe(home.run()));
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
