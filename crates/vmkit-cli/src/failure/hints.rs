//! Hints: what the user can do about an error.

use std::error::Error as StdError;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vmkit::error::{Subject, ValueProblem};
use vmkit::lifecycle::{InvalidTransition, Operation};
use vmkit::spec::VmName;
use vmkit::store::Misplacement;
use vmkit::{Error, ErrorKind, LoginPart, VmState};

use super::ErrorSubject;

/// For an unknown image.
const IMAGES: &str = "`vmkit image ls` lists the local images, with --available those of the catalogue";

/// For a URL in the place of a file.
const URL: &str = "download the file first: `vmkit image pull URL` fetches a disk image, `vmkit image convert URL FILE` \
     writes it to a file";

/// For a VM that has nothing to boot from.
const NOTHING_TO_BOOT: &str = "`--image debian:12` creates the root disk from an image, `--kernel FILE` boots a kernel, \
     `--data-disk FILE` boots a disk as it is, `--cdrom FILE` a disc; `vmkit image ls --available` lists the images";

/// For a failed check of `vmkit doctor`.
pub(crate) const DOCTOR: &str = "`vmkit doctor` shows what this host lacks";

/// Returns a hint about an error, with the VM's name if it is about one that still exists.
pub(super) fn hint(error: &Error, of: Option<&ErrorSubject>) -> Option<String> {
    let hint = match error {
        Error::WrongFormat { .. } => "`vmkit image convert IMAGE FILE` writes its disk as a raw file",
        Error::Misplaced { path, vm, how } => return misplaced(path, vm, *how),
        // Their texts say what to do.
        Error::OtherUser { .. } | Error::SameVm { .. } => return None,
        Error::NotContinued { .. } => {
            let vm = &of?.vm;
            return Some(format!("`vmkit start --discard-saved {vm}` boots it without its memory"));
        }
        Error::VmPart { .. } => return Some(format!("`vmkit rm {}` removes the VM", of?.vm)),
        Error::NotRecursive { .. } => "`vmkit cp -r` copies directories",
        Error::AlreadyExists { what: Subject::MachinesFile, .. } => {
            "`vmkit plan` shows what `vmkit up` would do"
        }
        Error::AlreadyExists { what: Subject::File, .. } => "--force replaces it",
        Error::Foreign { .. } => {
            "if the file was moved, move it back, or remove its VMs by `vmkit rm`; else give the project another `name`"
        }
        Error::AlreadyExists { what: Subject::Vm, name } => {
            return Some(format!(
                "`vmkit info {name}` shows its state, `vmkit start {name}` boots it, `vmkit rm --force {name}` removes it"
            ));
        }
        Error::Fetch { status: None, .. } => {
            "`vmkit image import` gives a name to an image that you have as a file; VMKIT_MIRROR sets a mirror"
        }
        Error::ImageInUse { vms, .. } => {
            let names: Vec<&str> = vms.iter().map(|vm| vm.as_str()).collect();
            let what = if names.len() == 1 { "the VM with its disk" } else { "the VMs with their disks" };
            return Some(format!("`vmkit rm {}` removes {what}", names.join(" ")));
        }
        Error::NotFound { what: Subject::Vm, .. } => "`vmkit ls` lists the VMs",
        Error::NotFound { what: Subject::Snapshot, .. } => {
            return of.map(|of| format!("`vmkit snapshot ls {}` lists its snapshots", of.vm));
        }
        Error::NotFound { what: Subject::Image, .. } => IMAGES,
        Error::NotFound { what: Subject::HypervisorLog, .. } => {
            "the log of a server that vmkit did not start is on that server's host"
        }
        Error::Invalid { value, problem, .. } if *problem != ValueProblem::Other => {
            return of_value(value, *problem);
        }
        Error::NoLogin { missing: LoginPart::HostKey, .. } => {
            "pass the server's key with --host-key, or accept any key with --any-host-key"
        }
        Error::NoLogin { missing: LoginPart::Port, vm } => {
            return Some(format!("`vmkit forward {vm} 22` forwards a port to it"));
        }
        Error::NoLogin { .. } => "this VM was created without a login: pass --user NAME --identity FILE",
        _ => {
            return of_limit(error)
                .or_else(|| of.and_then(|of| of_vm(error, of)))
                .or_else(|| refused(error))
                .or_else(|| of_kind(error.kind()));
        }
    };
    Some(hint.to_owned())
}

/// Returns a hint about a directory whose record belongs to the VM `vm`.
fn misplaced(path: &Path, vm: &VmName, how: Misplacement) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    Some(match how {
        Misplacement::Link => format!("`vmkit rm {name}` removes the link, and nothing of `{vm}`"),
        Misplacement::Copy => format!("`vmkit rm {name}` removes the copy, and nothing of `{vm}`"),
        Misplacement::Replaced => format!("`vmkit rm {name}` removes it, and nothing of the current `{vm}`"),
        // Its text says what to do.
        _ => return None,
    })
}

/// Returns a hint with a command for the VM.
fn of_vm(error: &Error, of: &ErrorSubject) -> Option<String> {
    let vm = &of.vm;
    let is_machine = of.called != vm.as_str();
    Some(match error {
        Error::NotLive { .. } if is_machine => format!("`vmkit up {}` starts it", of.called),
        Error::NotLive { state: VmState::Suspended, .. } => format!("`vmkit resume {vm}` resumes it"),
        Error::NotLive { state: VmState::Saved, .. } => format!("`vmkit start {vm}` continues it"),
        Error::Step { .. } => {
            format!("`vmkit shell {vm}` opens a shell in it; `vmkit up` continues with this step")
        }
        Error::NotLive { .. } => format!("`vmkit start {vm}` boots it"),
        Error::Transition(InvalidTransition { operation, state }) => match operation {
            Operation::Destroy => format!("`vmkit rm --force {vm}` stops and removes it"),
            Operation::Start if *state == VmState::Suspended => format!("`vmkit resume {vm}` resumes it"),
            Operation::Suspend if *state == VmState::Saved => format!("`vmkit start {vm}` continues it"),
            Operation::Suspend | Operation::Resume | Operation::Save => {
                format!("`vmkit start {vm}` boots it")
            }
            _ => return None,
        },
        Error::LoginRefused { user, .. } if user == "root" => {
            format!("`vmkit exec {vm} -- sudo COMMAND` runs a command as root")
        }
        Error::Record { path, .. } if path.ends_with("vm.json") => {
            format!("the file was not changed: `vmkit rm --force {vm}` removes the VM, unless it runs")
        }
        _ => match error.kind() {
            ErrorKind::TimedOut => {
                format!("`vmkit logs {vm}` prints the whole console, `vmkit info {vm}` the VM's state")
            }
            ErrorKind::Hypervisor if !of.has_log => return None,
            ErrorKind::Hypervisor => format!("`vmkit logs --hypervisor {vm}` prints its whole log"),
            _ => return None,
        },
    })
}

/// Returns the resource limit of this process that a system error is due to.
fn of_limit(error: &Error) -> Option<String> {
    let limit = |resource| getrlimit(resource).current;
    let memory = || {
        let all = limit(Resource::As).map(|most| ("RLIMIT_AS", "v", most));
        let (name, letter, most) = all.or(limit(Resource::Data).map(|most| ("RLIMIT_DATA", "d", most)))?;
        Some(format!("{name} allows {most} bytes of memory: `ulimit -{letter}` shows and sets it"))
    };
    let processes = || {
        let most = limit(Resource::Nproc)?;
        Some(format!(
            "RLIMIT_NPROC allows this user {most} processes and threads: `ulimit -u` shows and sets it"
        ))
    };
    if let Error::QemuExited { stderr, .. } = error {
        // QEMU has only this text for it, no error code. Source: QEMU, `util/qemu-thread-posix.c`.
        let is_without_thread = stderr.contains("thread_create: Resource temporarily unavailable");
        return if is_without_thread { processes() } else { memory() };
    }
    let mut cause: Option<&dyn StdError> = Some(error);
    let errno = loop {
        match cause?.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            Some(errno) => break errno,
            None => cause = cause?.source(),
        }
    };
    match Errno::from_raw_os_error(errno) {
        Errno::MFILE => limit(Resource::Nofile).map(|most| {
            format!("RLIMIT_NOFILE allows {most} open files: `ulimit -n` raises that, up to its hard limit")
        }),
        Errno::FBIG => limit(Resource::Fsize).map(|most| {
            format!("RLIMIT_FSIZE allows files of at most {most} bytes: `ulimit -f` shows and sets it")
        }),
        Errno::AGAIN => processes(),
        Errno::NOMEM => memory(),
        _ => None,
    }
}

/// Returns what may prevent the login of an existing user with the right key: it is not visible
/// from outside.
fn refused(error: &Error) -> Option<String> {
    matches!(error, Error::LoginRefused { .. }).then(|| {
        "the guest's sshd_config may allow other users only (`AllowUsers`, `AllowGroups`): check it in `vmkit console`".to_owned()
    })
}

fn of_kind(kind: ErrorKind) -> Option<String> {
    let hint = match kind {
        ErrorKind::Record => "the file was not changed: repair it, or move it away",
        _ => return None,
    };
    Some(hint.to_owned())
}

/// Returns a hint about a value that was refused.
fn of_value(value: &str, problem: ValueProblem) -> Option<String> {
    let file = shell_word(value);
    Some(match problem {
        ValueProblem::UnknownImage => IMAGES.to_owned(),
        ValueProblem::NothingToBoot => NOTHING_TO_BOOT.to_owned(),
        ValueProblem::UrlNotFetched => URL.to_owned(),
        ValueProblem::NeedsRecreate => {
            "recreate the VM with `vmkit rm` and `vmkit create`: its disks are lost".to_owned()
        }
        ValueProblem::CompressedImage => {
            format!("`vmkit image import {file} --name NAME` stores it decompressed, as the image NAME")
        }
        ValueProblem::DiscImage => {
            format!("`vmkit create NAME --cdrom {file} --disk 20GiB --start` boots it, with an empty disk")
        }
        ValueProblem::HostFiles => {
            "--host-files accepts them, if you know who wrote the file; they have to be on this host"
                .to_owned()
        }
        _ => return None,
    })
}

/// Quotes a word for a shell if necessary.
fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%".contains(c);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint_of(error: &Error) -> Option<String> {
        let vm = VmName::new("web").expect("a name");
        hint(error, Some(&ErrorSubject::vm(&vm)))
    }

    #[test]
    fn the_hint_about_a_value_depends_on_the_problem_and_not_on_the_text() {
        let refused = |problem| Error::invalid("image", "my disc.iso", "…").with_problem(problem);
        for (problem, expected) in [
            (ValueProblem::UnknownImage, "`vmkit image ls`"),
            (ValueProblem::NothingToBoot, "--kernel FILE"),
            (ValueProblem::CompressedImage, "`vmkit image import 'my disc.iso' --name NAME`"),
            (ValueProblem::DiscImage, "--cdrom 'my disc.iso'"),
            (ValueProblem::UrlNotFetched, "`vmkit image pull URL`"),
            (ValueProblem::NeedsRecreate, "`vmkit rm`"),
        ] {
            let hint = hint_of(&refused(problem)).unwrap_or_default();
            assert!(hint.contains(expected), "{problem:?}: {hint}");
        }
        assert_eq!(hint_of(&refused(ValueProblem::Other)), None);
    }

    #[test]
    fn a_refused_root_gets_a_hint_about_sudo_and_others_about_the_servers_rules() {
        let refused = |user: &str| Error::LoginRefused {
            target: format!("{user}@web (127.0.0.1:2222)"),
            user: user.to_owned(),
            description: String::new(),
        };
        assert!(hint_of(&refused("root")).is_some_and(|hint| hint.contains("sudo COMMAND")));
        assert!(hint_of(&refused("vmkit")).is_some_and(|hint| hint.contains("AllowUsers")));
        assert_eq!(refused("vmkit").kind(), ErrorKind::Guest);
    }
}
