//! `bhyvectl`, as far as it destroys.
//!
//! Source: illumos, `usr/src/cmd/bhyvectl/bhyvectl.c`: a VM that is not there is told on the
//! standard output.

use std::io;

use super::{Illumos, ToolOutput};

pub(super) fn run(illumos: &Illumos, args: &[String]) -> io::Result<ToolOutput> {
    let (mut vm, mut destroy) = (None, false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--destroy" => destroy = true,
            "--vm" => vm = args.next().cloned(),
            other => match other.strip_prefix("--vm=") {
                Some(name) => vm = Some(name.to_owned()),
                None => return Ok(usage()),
            },
        }
    }
    let Some(vm) = vm.filter(|name| !name.is_empty() && !name.contains('/')) else { return Ok(usage()) };
    let entry = illumos.vmm().join(&vm);
    if !entry.exists() {
        return Ok(ToolOutput {
            stdout: format!("VM:{vm} is not created.\n"),
            code: 1,
            ..ToolOutput::default()
        });
    }
    if destroy {
        std::fs::remove_file(entry)?;
    }
    Ok(ToolOutput::default())
}

fn usage() -> ToolOutput {
    ToolOutput::failed(1, "Usage: bhyvectl --vm=<vmname>\n       [--destroy]")
}
