//! A terminal in the guest that is set up like the user's own.

use std::io;
use std::os::fd::AsFd;

use russh::Pty;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize,
};

use super::{TerminalSize, TerminalSpec};

impl TerminalSize {
    /// Asks a terminal for its size now.
    ///
    /// # Errors
    /// What the system says where it is no terminal.
    pub fn of(terminal: impl AsFd) -> io::Result<Self> {
        let size = tcgetwinsize(terminal)?;
        Ok(Self { columns: size.ws_col, rows: size.ws_row })
    }
}

impl TerminalSpec {
    /// Creates a terminal of this kind that has the size, the keys and the modes of a real one, as
    /// they are now.
    ///
    /// # Errors
    /// What the system says where it is no terminal.
    pub fn like(terminal: impl AsFd, term: impl Into<String>) -> io::Result<Self> {
        let size = TerminalSize::of(&terminal)?;
        Ok(Self { term: term.into(), size, modes: modes(&tcgetattr(terminal)?) })
    }
}

/// Returns a terminal's keys and modes in SSH's words.
///
/// Source: RFC 4254, section 8; termios(3). 255 is a key that is off.
fn modes(termios: &Termios) -> Vec<(Pty, u32)> {
    let mut modes = Vec::new();
    for (pty, index) in [
        (Pty::VINTR, SpecialCodeIndex::VINTR),
        (Pty::VQUIT, SpecialCodeIndex::VQUIT),
        (Pty::VERASE, SpecialCodeIndex::VERASE),
        (Pty::VKILL, SpecialCodeIndex::VKILL),
        (Pty::VEOF, SpecialCodeIndex::VEOF),
        (Pty::VEOL, SpecialCodeIndex::VEOL),
        (Pty::VEOL2, SpecialCodeIndex::VEOL2),
        (Pty::VSTART, SpecialCodeIndex::VSTART),
        (Pty::VSTOP, SpecialCodeIndex::VSTOP),
        (Pty::VSUSP, SpecialCodeIndex::VSUSP),
        (Pty::VREPRINT, SpecialCodeIndex::VREPRINT),
        (Pty::VWERASE, SpecialCodeIndex::VWERASE),
        (Pty::VLNEXT, SpecialCodeIndex::VLNEXT),
        (Pty::VDISCARD, SpecialCodeIndex::VDISCARD),
    ] {
        let code = termios.special_codes[index];
        modes.push((pty, if code == 0 { 255 } else { u32::from(code) }));
    }
    let mut flag = |pty, is_set: bool| modes.push((pty, u32::from(is_set)));
    for (pty, mode) in [
        (Pty::IGNPAR, InputModes::IGNPAR),
        (Pty::PARMRK, InputModes::PARMRK),
        (Pty::INPCK, InputModes::INPCK),
        (Pty::ISTRIP, InputModes::ISTRIP),
        (Pty::INLCR, InputModes::INLCR),
        (Pty::IGNCR, InputModes::IGNCR),
        (Pty::ICRNL, InputModes::ICRNL),
        (Pty::IXON, InputModes::IXON),
        (Pty::IXANY, InputModes::IXANY),
        (Pty::IXOFF, InputModes::IXOFF),
        (Pty::IMAXBEL, InputModes::IMAXBEL),
        #[cfg(not(target_os = "illumos"))]
        (Pty::IUTF8, InputModes::IUTF8),
    ] {
        flag(pty, termios.input_modes.contains(mode));
    }
    for (pty, mode) in [
        (Pty::ISIG, LocalModes::ISIG),
        (Pty::ICANON, LocalModes::ICANON),
        (Pty::ECHO, LocalModes::ECHO),
        (Pty::ECHOE, LocalModes::ECHOE),
        (Pty::ECHOK, LocalModes::ECHOK),
        (Pty::ECHONL, LocalModes::ECHONL),
        (Pty::NOFLSH, LocalModes::NOFLSH),
        (Pty::TOSTOP, LocalModes::TOSTOP),
        (Pty::IEXTEN, LocalModes::IEXTEN),
        (Pty::ECHOCTL, LocalModes::ECHOCTL),
        (Pty::ECHOKE, LocalModes::ECHOKE),
    ] {
        flag(pty, termios.local_modes.contains(mode));
    }
    for (pty, mode) in [
        (Pty::OPOST, OutputModes::OPOST),
        (Pty::ONLCR, OutputModes::ONLCR),
        (Pty::OCRNL, OutputModes::OCRNL),
        (Pty::ONOCR, OutputModes::ONOCR),
        (Pty::ONLRET, OutputModes::ONLRET),
    ] {
        flag(pty, termios.output_modes.contains(mode));
    }
    flag(Pty::CS8, termios.control_modes.contains(ControlModes::CS8));
    modes
}
