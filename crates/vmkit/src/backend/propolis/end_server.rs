//! Ending the server of a VM by force, and what it left in the kernel.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::context::VmContext;
use super::hold::OperationLock;
use super::host::HostPrograms;
use super::prepare::destroy_kernel_vm;
use crate::backend::supervise::{alive, runfile};
use crate::error::Result;

/// Ends the server of a VM, and removes what it left in the kernel.
///
/// # Errors
/// `TimedOut` if the process survives even SIGKILL, `Busy` if the lock stays held.
pub(super) async fn end_server(
    site: &VmContext<'_>,
    host: &HostPrograms,
    hold: &OperationLock,
) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    drop(alive::take_and_silence(&site.place(), deadline).await?);
    clear_kernel(site, host, hold).await
}

/// Removes what the VM's server left in the kernel when it ended: its VM, and the one that it used
/// to query CPUID.
///
/// # Errors
/// `Host` with what the program printed.
pub(super) async fn clear_kernel(
    site: &VmContext<'_>,
    host: &HostPrograms,
    hold: &OperationLock,
) -> Result<()> {
    destroy_kernel_vm(host, &site.kernel_vm(), hold).await?;
    let run = runfile::read(&site.place().run_file).ok().flatten();
    let Some(server) = run.and_then(|run| run.hypervisor) else { return Ok(()) };
    // Its PID may be another process's by now.
    match server.open()? {
        None if !is_pid_taken(server.pid) => {
            let asked = site.settings.dev_vmm.join(format!("cpuid-gen-{}", server.pid));
            destroy_kernel_vm(host, &asked, hold).await
        }
        _ => Ok(()),
    }
}

fn is_pid_taken(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}
