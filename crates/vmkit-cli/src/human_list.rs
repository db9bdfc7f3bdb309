//! How all VMs look to a person: a table, without a promise.

use std::collections::BTreeSet;

use vmkit::spec::NetworkConfig;
use vmkit::vmfile::MachineOrigin;
use vmkit::{VmEntry, VmHandle, VmState};

use crate::human::ports;
use crate::output::TextTable;

/// A column: its head, and what stands in it for a VM.
type Column = (&'static str, fn(&VmEntry) -> String);

/// Returns the table of all VMs; a `wide` one has every column, and cuts off nothing.
pub(crate) fn list(listed: &[VmEntry], wide: bool) -> TextTable {
    let columns = columns(listed, wide);
    let mut table = TextTable::new(&columns.iter().map(|(head, _)| *head).collect::<Vec<_>>());
    for one in listed {
        table.row(columns.iter().map(|(_, cell)| cell(one)));
    }
    table
}

/// Returns the columns that these VMs need, so that a line of them fits a terminal.
fn columns(listed: &[VmEntry], wide: bool) -> Vec<Column> {
    let vms = || listed.iter().filter_map(vm);
    let has_projects = vms().any(|vm| MachineOrigin::of(&vm.spec).is_some());
    let backends: BTreeSet<&str> = vms().map(|vm| vm.backend.as_str()).collect();
    let columns: [(bool, Column); 9] = [
        (true, ("NAME", |one| one.name.to_string())),
        (true, ("STATE", |one| one.handle.as_ref().map_or("unknown", |vm| vm.state.name()).to_owned())),
        (
            true,
            (
                "IMAGE",
                if wide { |one| image(one).to_owned() } else { |one| shortened(image(one)).to_owned() },
            ),
        ),
        (wide || has_projects, ("PROJECT", project)),
        (true, ("CPUS", |one| of_vm(one, |vm| vm.spec.cpus().to_string()))),
        (true, ("MEMORY", |one| of_vm(one, |vm| vm.spec.memory().to_string()))),
        (wide || backends.len() > 1, ("BACKEND", |one| of_vm(one, |vm| vm.backend.to_string()))),
        (true, ("PORTS", |one| one.handle.as_ref().map_or_else(|_| "-".to_owned(), network))),
        (true, ("NOTE", if wide { note } else { |one| in_short(&note(one)) })),
    ];
    columns.into_iter().filter_map(|(is_needed, column)| is_needed.then_some(column)).collect()
}

/// Returns the VM as it is, else as it was recorded.
fn vm(listed: &VmEntry) -> Option<&VmHandle> {
    listed.handle.as_ref().ok().or(listed.recorded.as_ref())
}

fn of_vm(listed: &VmEntry, show: fn(&VmHandle) -> String) -> String {
    vm(listed).map_or_else(|| "-".to_owned(), show)
}

fn image(listed: &VmEntry) -> &str {
    vm(listed).and_then(|vm| vm.spec.image_name()).unwrap_or("-")
}

/// Returns as much of an image's name as tells images apart: of a file or an address its last part.
fn shortened(image: &str) -> &str {
    let path = match image.split_once("://") {
        Some(("oci", rest)) => rest,
        Some((_, rest)) => rest.split(['?', '#']).next().unwrap_or(rest),
        None => image,
    };
    path.rsplit('/').find(|part| !part.is_empty()).unwrap_or(image)
}

fn project(listed: &VmEntry) -> String {
    let origin = vm(listed).and_then(|vm| MachineOrigin::of(&vm.spec));
    origin.map_or("-", |origin| origin.project).to_owned()
}

/// Returns what else there is to know of a VM in the list.
fn note(listed: &VmEntry) -> String {
    let what = match &listed.handle {
        Err(error) => error.chain().to_string(),
        Ok(VmHandle { state: VmState::Failed { cause }, .. }) => {
            cause.detail.lines().next().unwrap_or_default().to_owned()
        }
        Ok(_) => String::new(),
    };
    let work = match &listed.intent {
        Some(intent) if listed.interrupted => format!("{} was interrupted", intent.operation),
        Some(intent) => format!("{}, by process {}", intent.operation, intent.pid),
        None => return what,
    };
    // Of what was interrupted the state itself may say so.
    let is_said = listed.interrupted && what.contains("was interrupted");
    match (what.is_empty(), is_said) {
        (true, _) => work,
        (_, true) => what,
        _ => format!("{work}; {what}"),
    }
}

/// The most characters of a note that is in short.
const NOTE_CHARS: usize = 60;

/// Returns the beginning of a text, as far as a line of a terminal has room for it: up to a blank,
/// where there is one.
fn in_short(text: &str) -> String {
    let Some((end, _)) = text.char_indices().nth(NOTE_CHARS) else { return text.to_owned() };
    let begin = &text[..end];
    let words = begin.rsplit_once(' ').map_or(begin, |(words, _)| words);
    format!("{} …", words.trim_end_matches([' ', ',', ':', ';']))
}

/// Returns how the guest is reached, in a few characters.
fn network(vm: &VmHandle) -> String {
    let ports = ports(vm);
    match vm.spec.network() {
        NetworkConfig::Tap { bridge } => format!("bridge {bridge}"),
        NetworkConfig::Vnic { link } => format!("link {link}"),
        _ if ports.is_empty() => "-".to_owned(),
        _ => ports.join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_a_short_line() {
        assert_eq!(in_short("QEMU ended, signal 9"), "QEMU ended, signal 9");
        let long = format!("QEMU ended, exit code 1: Could not open '/{}': no such file", "x".repeat(200));
        assert_eq!(in_short(&long), "QEMU ended, exit code 1: Could not open …");
        assert_eq!(in_short(&"ü".repeat(300)).chars().count(), NOTE_CHARS + 2);
    }

    #[test]
    fn of_a_file_or_an_address_the_last_part_is_shown() {
        for (image, expected) in [
            ("debian:12", "debian:12"),
            ("-", "-"),
            ("/srv/images/web.qcow2", "web.qcow2"),
            ("https://host/a/b.raw.zst?token=1/2#sha256=00", "b.raw.zst"),
            ("oci://registry:5000/team/web:v1", "web:v1"),
            ("oci://registry/team/web@sha256:0011", "web@sha256:0011"),
            ("zfs:rpool/images/debian@12", "debian@12"),
            ("https://host/", "host"),
        ] {
            assert_eq!(shortened(image), expected, "{image}");
        }
    }
}
