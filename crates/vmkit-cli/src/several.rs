//! One operation on several VMs at once.

use std::sync::Arc;

use tokio::sync::Semaphore;
use vmkit::VmState;
use vmkit::spec::VmName;

use crate::context::{CliManager, CommandContext, has_hypervisor_log};
use crate::failure::{ErrorSubject, Failure};

/// How many are worked on at the same time: each needs a handful of descriptors, and a process
/// has 1024.
const AT_ONCE: usize = 32;

/// Returns the names of all VMs in a state that is meant. One whose state is not known is among
/// them: its operation says why.
///
/// # Errors
/// Where the home can't be read.
pub(crate) fn all(
    context: &CommandContext,
    manager: &CliManager,
    is_meant: fn(&VmState) -> bool,
) -> Result<Vec<VmName>, Failure> {
    let listed = context.block_on_threads(async { Ok(manager.list().await?) })?;
    let meant = listed.iter().filter(|one| one.handle.as_ref().map_or(true, |vm| is_meant(&vm.state)));
    Ok(meant.map(|one| one.name.clone()).collect())
}

/// Does the same to all VMs and tells of each, in the order given.
///
/// One that fails keeps no other from its turn.
///
/// # Errors
/// `Several` with the failures; with one VM the failure itself.
pub(crate) async fn each<T, F>(
    manager: &CliManager,
    names: Vec<VmName>,
    operation: impl Fn(CliManager, VmName) -> F,
    tell: impl Fn(&VmName, T) -> Result<(), Failure>,
) -> Result<(), Failure>
where
    T: Send + 'static,
    F: Future<Output = vmkit::Result<T>> + Send + 'static,
{
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut begun = Vec::new();
    for name in names {
        let (turns, work) = (Arc::clone(&turns), operation(manager.clone(), name.clone()));
        let task = tokio::spawn(async move {
            let _turn = turns.acquire_owned().await.expect("nothing closes the semaphore");
            work.await
        });
        begun.push((name, task));
    }
    let mut failures = Vec::new();
    // A reader who left is no reason to leave a VM half way: what was begun is done to its end.
    let mut told = Ok(());
    for (name, task) in begun {
        match task.await {
            Ok(Ok(done)) => told = told.and_then(|()| tell(&name, done)),
            Ok(Err(error)) => failures.push(Failure::Library { of: Some(ErrorSubject::vm(&name)), error }),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    Failure::of(failures)
        .map_err(|failure| failure.looked_up(&|vm| has_hypervisor_log(manager, vm)))
        .and(told)
}
