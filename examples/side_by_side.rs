//! Many short-lived VMs side by side: each boots, says something on its console within a limit, and
//! is removed, whatever happened.
//!
//! `cargo run -p vmkit-testkit --example side_by_side`
//!
//! The guest is the test kit's tiny one: `cargo xtask guest tiny` builds it.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use vmkit::spec::{MachineType, VmName};
use vmkit::store::Home;
use vmkit::{Error, QemuHypervisor, Result, VmManager};
use vmkit_testkit::guest;

/// How many VMs there are.
const JOBS: usize = 3;
/// How long a VM may take from its creation to its line.
const LIMIT: Duration = Duration::from_secs(180);
/// The line that a guest prints once it has booted.
const LINE: &str = "vmkit-guest: ready";

fn main() -> Result<()> {
    // First, before any thread: QEMU's parent is this program, started again.
    vmkit::run_if_keeper();
    run()
}

#[tokio::main]
async fn run() -> Result<()> {
    // A service has a directory of its own, such as /var/lib/ci.
    let dir = tempfile::tempdir().map_err(Error::io("create", "a directory"))?;
    let manager = VmManager::qemu(Home::at(dir.path())?);
    // What an earlier run of the service has left when it was killed.
    manager.remove_orphans().await?;

    let began = Instant::now();
    let mut jobs = JoinSet::new();
    for number in 0..JOBS {
        jobs.spawn(job(manager.clone(), number));
    }
    while let Some(ended) = jobs.join_next().await {
        let said = ended.expect("a job does not panic")?;
        println!("{said:?} after {:.1} s", began.elapsed().as_secs_f64());
    }
    assert!(manager.list().await?.is_empty(), "nothing is left");
    Ok(())
}

/// Runs one VM, and returns its line.
async fn job(manager: VmManager<QemuHypervisor>, number: usize) -> Result<String> {
    let name = VmName::new(format!("job-{number}"))?;
    let spec = guest::tiny().spec(name.as_str(), MachineType::Q35, "").build()?;
    // The VM goes with the guard: also if this process is killed, by the next `remove_orphans`.
    let (_vm, guard) = manager.create_ephemeral(spec).await?;
    let said = tokio::time::timeout(LIMIT, boot(&manager, &name)).await;
    drop(guard);
    manager.remove_orphan(&name).await?;
    said.unwrap_or_else(|_| Err(Error::timed_out(format!("{LINE:?} of the VM `{name}`"), LIMIT)))
}

/// Boots a VM, and returns what it prints up to its line.
async fn boot(manager: &VmManager<QemuHypervisor>, name: &VmName) -> Result<String> {
    manager.start(name).await?;
    let mut console = manager.attach_console(name).await?;
    let said = console.wait_for(LINE, LIMIT).await?;
    let said = String::from_utf8_lossy(&said);
    Ok(said.lines().last().unwrap_or_default().to_owned())
}
