//! The terminal of a program in the guest.
//!
//! Pure: data; `host_terminal` reads it from a terminal of this host.

use russh::Pty;

/// A terminal's kind, size and modes.
#[derive(Debug, Clone)]
pub struct TerminalSpec {
    /// Its kind, such as `xterm-256color`.
    pub term: String,
    /// Its size.
    pub size: TerminalSize,
    pub(super) modes: Vec<(Pty, u32)>,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// How many characters a line has.
    pub columns: u16,
    /// How many lines it has.
    pub rows: u16,
}

impl TerminalSpec {
    /// Creates a terminal with the guest's own modes.
    pub fn new(term: impl Into<String>, size: TerminalSize) -> Self {
        Self { term: term.into(), size, modes: Vec::new() }
    }

    pub(super) fn modes(&self) -> &[(Pty, u32)] {
        &self.modes
    }
}
