//! Whether this process can create the threads that a command needs, and has a stack for the first.
//!
//! Tokio panics where it can't create one, and a thread that is missing later leaves work half
//! done. So a command looks before it begins.

use std::sync::Mutex;
use std::thread;

use rustix::process::{Resource, getrlimit};
use vmkit::Error;

/// How many threads a command has beside its first at the same time: two that look at VMs, one for
/// blocking calls, and one each for standard input and output.
const NEEDED: usize = 5;
/// Enough for a thread that does nothing. Source: pthread_attr_setstacksize(3).
const STACK_BYTES: usize = 64 << 10;

/// The stack that the first thread of a command needs at least, with room to spare.
const FIRST_STACK_BYTES: u64 = 1 << 20;

/// Checks that the first thread's stack can grow: a command, and QEMU, would end in the middle.
///
/// # Errors
/// `Host` with the limit.
pub(crate) fn check_stack() -> Result<(), Error> {
    match getrlimit(Resource::Stack).current {
        Some(most) if most < FIRST_STACK_BYTES => {
            let problem = format!(
                "a stack has at most {most} bytes, by `ulimit -s` (expected at least {FIRST_STACK_BYTES})"
            );
            Err(Error::host("RLIMIT_STACK", problem))
        }
        _ => Ok(()),
    }
}

/// Checks that the threads of a command can be created.
///
/// # Errors
/// `Host` with the limit.
pub(crate) fn check() -> Result<(), Error> {
    let gate = Mutex::new(());
    let closed = gate.lock();
    let created = thread::scope(|scope| {
        let wait = || drop(gate.lock());
        let one = || thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, wait);
        let created = (0..NEEDED).try_for_each(|_| one().map(drop));
        drop(closed);
        created
    });
    created.map_err(|error| {
        let most = getrlimit(Resource::Nproc).current;
        let most = most.map_or_else(|| "without bound".to_owned(), |most| most.to_string());
        let problem = format!(
            "the system refuses {NEEDED} threads to this command ({error}): the limit of this user's processes and \
             threads is {most}, by `ulimit -u`; a container's own limit, pids.max, may be lower"
        );
        Error::host("RLIMIT_NPROC", problem)
    })
}
