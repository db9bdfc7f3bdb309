//! What a program in a guest left when it ended, over SSH and by the guest agent alike.
//!
//! Pure.

use std::fmt;

/// How a program in a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GuestExitStatus {
    /// By itself, with this code.
    Code(u32),
    /// By the signal of this name, such as `KILL`.
    Signal(String),
}

impl GuestExitStatus {
    /// Returns what a shell shows of it: the code, or 128 and the signal's number on Linux; 255 for
    /// a signal without one.
    pub fn shell_code(&self) -> u8 {
        match self {
            GuestExitStatus::Code(code) => u8::try_from(*code).unwrap_or(u8::MAX),
            GuestExitStatus::Signal(name) => signal_number(name).map_or(u8::MAX, |number| 128 | number),
        }
    }

    /// Returns an end by a signal of Linux; one without a name in SSH is called by its number.
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    pub(crate) fn of_signal(number: i32) -> Self {
        let known = SIGNALS.iter().find(|(_, known)| i32::from(*known) == number);
        GuestExitStatus::Signal(known.map_or_else(|| number.to_string(), |(name, _)| (*name).to_owned()))
    }

    /// Returns whether the program said that all went well.
    pub fn is_success(&self) -> bool {
        *self == GuestExitStatus::Code(0)
    }
}

impl fmt::Display for GuestExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestExitStatus::Code(code) => write!(f, "exit code {code}"),
            GuestExitStatus::Signal(name) => write!(f, "signal {name}"),
        }
    }
}

/// The signals that SSH has names for. Source: RFC 4254, section 6.10; signal(7).
const SIGNALS: [(&str, u8); 13] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
];

fn signal_number(name: &str) -> Option<u8> {
    let known = SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    known.or_else(|| name.parse().ok().filter(|number| *number < 128))
}

/// What a program that has ended left.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProgramOutput {
    /// How it ended.
    pub exit: GuestExitStatus,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// Whether only the first 16 MiB of one of them were kept.
    pub truncated: bool,
}

impl ProgramOutput {
    /// Creates the output of a program that wrote nothing and ended in this way.
    pub fn of(exit: GuestExitStatus) -> Self {
        Self { exit, stdout: Vec::new(), stderr: Vec::new(), truncated: false }
    }

    /// Returns the standard output as text; what is not UTF-8 is replaced by `U+FFFD`.
    pub fn stdout_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }

    /// Returns the standard error as text; what is not UTF-8 is replaced by `U+FFFD`.
    pub fn stderr_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.stderr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_shows_the_code_or_128_and_the_signal() {
        let shown = |status: GuestExitStatus| status.shell_code();
        assert_eq!([shown(GuestExitStatus::Code(3)), shown(GuestExitStatus::Code(4000))], [3, 255]);
        let signal = |name: &str| shown(GuestExitStatus::Signal(name.to_owned()));
        assert_eq!([signal("KILL"), signal("31"), signal("WINCH")], [137, 159, 255]);
        #[cfg(all(target_os = "linux", feature = "qemu"))]
        assert_eq!([9, 31].map(GuestExitStatus::of_signal).map(shown), [137, 159]);
    }
}
