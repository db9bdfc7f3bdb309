//! The terminal in raw mode, and its way back.

use std::io;
use std::panic;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// How the terminal was. Global, since a panic must find it, too: the release build aborts without
/// dropping anything.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode until this is dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Sets the terminal at standard input to raw mode; nothing where there is none.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            report(panic);
        }));
        // From here on the drop restores, even if the terminal took only half of it.
        let entered = Self(());
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(entered))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}
