//! How a snapshot looks to a person, without a promise.

use std::time::{Duration, SystemTime};

use vmkit::abilities::{Snapshot, SnapshotKind};

use crate::human::LabelLines;
use crate::output::TextTable;
use crate::progress::bytes;

/// Returns the table of a VM's snapshots: each is below the one that it was taken after.
pub(crate) fn tree(all: &[Snapshot]) -> TextTable {
    let mut table = TextTable::new(&["NAME", "AGE", "KIND", "SIZE", "NOTE"]);
    let is_there = |it: &Snapshot| all.iter().any(|other| Some(&other.name) == it.parent.as_ref());
    let roots = all.iter().filter(|it| !is_there(it)).rev();
    let mut next: Vec<(usize, &Snapshot)> = roots.map(|root| (0, root)).collect();
    while let Some((depth, it)) = next.pop() {
        let note = if it.is_current { "the VM continues from here" } else { "" };
        let name = format!("{}{}", "  ".repeat(depth), it.name);
        table.row([name, age(it), it.kind.to_string(), bytes(it.bytes), note.to_owned()]);
        let children = all.iter().filter(|other| other.parent.as_ref() == Some(&it.name)).rev();
        next.extend(children.map(|child| (depth + 1, child)));
    }
    table
}

/// Returns what one line says of a snapshot.
pub(crate) fn line(it: &Snapshot) -> String {
    format!("{} ({}, {})", it.name, it.kind, bytes(it.bytes))
}

/// Returns all that is known of a snapshot, a line each.
pub(crate) fn details(it: &Snapshot) -> String {
    let mut lines = LabelLines::default();
    lines.add("name", &it.name);
    if let Some(parent) = &it.parent {
        lines.add("parent", parent);
    }
    lines.add("age", age(it));
    let kind = match it.kind {
        SnapshotKind::Stopped => "stopped: the disks of a VM that did not run",
        SnapshotKind::Memory => "memory: the disks and the memory of a running guest",
        SnapshotKind::Quiesced => "quiesced: the disks of a running guest, its file systems frozen",
        SnapshotKind::CrashConsistent => {
            "crash-consistent: the disks of a running guest, as after a power cut"
        }
        other => other.as_str(),
    };
    lines.add("kind", kind);
    lines.add("size", bytes(it.bytes));
    if it.is_current {
        lines.add("note", "the VM continues from here");
    }
    lines.into_text()
}

/// Returns how long ago a snapshot was taken, in the largest unit that fits.
fn age(it: &Snapshot) -> String {
    let seconds = SystemTime::now().duration_since(it.created).unwrap_or(Duration::ZERO).as_secs();
    let (minute, hour, day) = (60, 3600, 86_400);
    match seconds {
        _ if seconds >= 2 * day => format!("{}d", seconds / day),
        _ if seconds >= 2 * hour => format!("{}h", seconds / hour),
        _ if seconds >= 2 * minute => format!("{}m", seconds / minute),
        _ => format!("{seconds}s"),
    }
}
