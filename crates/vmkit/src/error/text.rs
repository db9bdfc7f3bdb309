//! The parts of an error's text that depend on what there is to say.
//!
//! Pure: this module knows nothing of the host.

use std::fmt;

use crate::lifecycle::VmState;

pub(super) struct NameList<'a, T>(pub(super) &'a [T]);

impl<T: fmt::Display> fmt::Display for NameList<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, tag) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}`{tag}`")?;
        }
        Ok(())
    }
}

/// How many names an error lists at most.
const MOST_NAMES: usize = 20;

pub(super) struct LocationOf<'a>(pub(super) &'a [String]);

impl fmt::Display for LocationOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("there is none");
        }
        let names: Vec<String> = self.0.iter().take(MOST_NAMES).map(|name| format!("`{name}`")).collect();
        write!(f, "there {} {}", if self.0.len() == 1 { "is" } else { "are" }, names.join(", "))?;
        match self.0.len().saturating_sub(MOST_NAMES) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

pub(super) struct SuggestionOf<'a>(pub(super) Option<&'a str>);

impl fmt::Display for SuggestionOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(meant) => write!(f, ": did you mean `{meant}`?"),
            None => Ok(()),
        }
    }
}

pub(super) struct HolderOf(pub(super) Option<u32>);

impl fmt::Display for HolderOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pid) => write!(f, " by process {pid}"),
            None => Ok(()),
        }
    }
}

pub(super) struct BackingUsers<'a, T>(pub(super) &'a [T]);

impl<T: fmt::Display> fmt::Display for BackingUsers<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(|name| format!("`{name}`")).collect();
        match &names[..] {
            [name] => write!(f, "disk of the VM {name}"),
            names => write!(f, "disks of the VMs {}", names.join(", ")),
        }
    }
}

pub(super) struct CauseOf<'a>(pub(super) &'a VmState);

impl fmt::Display for CauseOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            VmState::Failed { cause } => write!(f, ": {cause}"),
            _ => Ok(()),
        }
    }
}

pub(super) struct LastLines<'a>(pub(super) &'static str, pub(super) &'a str);

impl fmt::Display for LastLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.1.trim_end();
        if text.is_empty() {
            return Ok(());
        }
        write!(f, "; {}:", self.0)?;
        for line in text.lines() {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}
