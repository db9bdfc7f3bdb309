//! The points at which an operation can be made to fail or to die, so that tests can try every one
//! of them.
//!
//! Every effect that outlives the process (a file, a rename, a spawn, a kill, a socket) is preceded
//! by [`step`]. Without a hook that is one look at a thread-local. The fault loop has the Nth step
//! fail, the crash loop kills the process there.

use std::cell::RefCell;
use std::io;

type StepHook = Box<dyn FnMut(&'static str) -> io::Result<()>>;

thread_local! {
    static HOOK: RefCell<Option<StepHook>> = const { RefCell::new(None) };
}

/// Announces the effect that comes next; on an error, the caller acts as if the effect had failed
/// with this error.
pub(crate) fn step(name: &'static str) -> io::Result<()> {
    HOOK.with_borrow_mut(|hook| match hook {
        Some(hook) => hook(name),
        None => Ok(()),
    })
}

/// Runs `hook` before every effect of this thread from now on; `None` removes the hook.
///
/// For tests only: run the operations on a current-thread runtime, so that every step is taken on
/// this thread. The hook must not call into this library.
#[doc(hidden)]
pub fn set_step_hook(hook: Option<Box<dyn FnMut(&'static str) -> io::Result<()>>>) {
    HOOK.with_borrow_mut(|place| *place = hook);
}
