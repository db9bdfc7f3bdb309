//! What a process inherits from the program that started it, and can't work with: ignored signals,
//! low limits, a file mode mask.
//!
//! Source: signal(7) and execve(2): a signal that was ignored stays ignored in the program that is
//! executed.

use std::ffi::c_int;
use std::io;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::sys;

/// The usual limit of a stack.
const STACK_BYTES: u64 = 8 << 20;
/// The bits of a file's mode that are its owner's.
const OWNER: u32 = 0o700;
/// The last number of a signal that can be set: signal(7), the real-time signals among them.
const LAST_SIGNAL: c_int = 64;

/// Sets what a command inherits to what vmkit works with.
///
/// - SIGCHLD has its default effect: while it is ignored, the ends of child processes are lost.
/// - A write beyond RLIMIT_FSIZE fails instead of ending the process; a child has the default
///   effect.
/// - As many descriptors can be open as RLIMIT_NOFILE's hard limit allows, and stacks can grow to
///   what is usual: QEMU's threads have stacks of RLIMIT_STACK.
/// - The file mode mask does not take away the owner's own permissions.
///
/// The library never does this by itself, for the process is its program's. A program for which
/// vmkit is the purpose, such as the command `vmkit`, calls it first in `main`, after
/// [`run_if_keeper`](crate::run_if_keeper).
pub fn settle() {
    default_effect(Signal::CHILD);
    survive_file_limit();
    raise_descriptor_limit();
    raise_stack_limit();
    let mask = rustix::process::umask(Mode::empty());
    rustix::process::umask(mask.difference(Mode::from_raw_mode(OWNER as _)));
}

/// Gives all signals their default effect, in this process and those that it starts, and blocks
/// none. There are two exceptions: std resets SIGPIPE for each child, and a write beyond
/// RLIMIT_FSIZE fails in this process only.
pub(crate) fn settle_keeper() {
    // It fails for no set of signals that the system has.
    let _ = sys::block_no_signal();
    for signal in 1..=LAST_SIGNAL {
        if signal != Signal::PIPE.as_raw() {
            // What can't be set, such as SIGKILL, has its default effect anyway.
            let _ = sys::default_effect(signal);
        }
    }
    survive_file_limit();
    raise_descriptor_limit();
    raise_stack_limit();
    make_room_for_processor_signal();
}

/// Returns the most descriptors that this process can have open: RLIMIT_NOFILE's hard limit.
pub(crate) fn most_descriptors() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Returns the limit that keeps this user from more processes and threads, for messages.
pub(crate) fn process_limit() -> String {
    let most = getrlimit(Resource::Nproc).current;
    let most = most.map_or_else(|| "any number of".to_owned(), |most| most.to_string());
    format!("RLIMIT_NPROC, `ulimit -u`, allows this user {most} processes and threads")
}

/// Returns what is wrong where a child can't be started, or its end was requested in vain; other
/// errors as they are.
pub(crate) fn child_problem(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) if errno == Errno::CHILD.raw_os_error() => {
            format!(
                "SIGCHLD is ignored in this process, so the ends of its children are lost ({error}): set SIGCHLD to its default"
            )
        }
        Some(errno) if errno == Errno::AGAIN.raw_os_error() => format!("{error}: {}", process_limit()),
        _ => error.to_string(),
    }
}

fn default_effect(signal: Signal) {
    // It fails only for what is no signal.
    let _ = sys::default_effect(signal.as_raw());
}

fn survive_file_limit() {
    let _ = sys::no_effect(Signal::XFSZ.as_raw());
}

/// Lets this process open as many descriptors as the system allows: a shell's soft limit may be
/// below the numbers that a hypervisor gets its sockets under.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it is refused, what needs it says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Raises the limit of stacks to what is usual, or as far as its hard limit allows: it is that of
/// each thread of QEMU.
fn raise_stack_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Stack);
    let most = maximum.map_or(STACK_BYTES, |most| most.min(STACK_BYTES));
    if current.is_some_and(|current| current < most) {
        // Where it is refused, what needs it says so.
        let _ = setrlimit(Resource::Stack, Rlimit { current: Some(most), maximum });
    }
}

/// Lets a child that uses up its CPU time end by SIGXCPU, which names the cause: at the hard limit
/// the kernel sends SIGKILL.
fn make_room_for_processor_signal() {
    let Rlimit { current, maximum } = getrlimit(Resource::Cpu);
    let Some(before) = maximum.map(|most| most.saturating_sub(1)) else { return };
    if before > 0 && current.is_none_or(|current| current > before) {
        // Where it is refused, the child ends by SIGKILL.
        let _ = setrlimit(Resource::Cpu, Rlimit { current: Some(before), maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lost_child_is_put_down_to_an_ignored_signal() {
        let lost = io::Error::from(Errno::CHILD);
        assert!(child_problem(&lost).starts_with("SIGCHLD is ignored in this process"), "{lost}");
        assert!(!child_problem(&io::Error::from(Errno::NOENT)).contains("SIGCHLD"));
        assert!(child_problem(&io::Error::from(Errno::AGAIN)).contains("RLIMIT_NPROC, `ulimit -u`, allows "));
    }
}
