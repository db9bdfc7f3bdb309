//! `vmkit ls`.

use clap::Args;

use crate::context::Context;
use crate::failure::Failure;
use crate::{human, json, output};

/// Lists all VMs, each with the state that it has now.
///
/// No VM is waited for: one that does not answer within a second is listed as unknown, and so is one whose record can't
/// be read, with the path of that record.
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Prints a JSON array.
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let listed = context.block_on_threads(async { Ok(manager.list().await?) })?;
        match self.json {
            true => output::json(&listed.iter().map(json::Row::of).collect::<Vec<_>>()),
            false => output::text(human::list(&listed)),
        }
    }
}
