//! What somebody may do about an error.

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

/// What helps who does not know which images there are.
const IMAGES: &str =
    "`vmkit image ls` lists the images that are here, with --available those that can be had";

/// What helps where a URL was given for a file.
const URL: &str = "download the file first; of a disk's image, `vmkit image pull URL` does, and `vmkit image convert URL FILE` \
     writes it to a file";

/// What helps where a VM has nothing to boot from.
const NOTHING_TO_BOOT: &str = "`--image debian:12` makes the root disk of an image, `--kernel FILE` boots a kernel, \
     `--data-disk FILE` boots a disk as it is, `--cdrom FILE` a disc; `vmkit image ls --available` lists the images";

/// What helps where a check of `vmkit doctor` fails.
pub(super) const DOCTOR: &str = "`vmkit doctor` tells what this host lacks";

/// Returns what may be done about an error, of this VM where it is one's that is still there.
pub(super) fn hint(error: &Error, of: Option<&ErrorSubject>) -> Option<String> {
    let hint = match error {
        Error::WrongFormat { .. } => "`vmkit image convert IMAGE FILE` writes its disk as a raw file",
        Error::Misplaced { path, vm, how } => return misplaced(path, vm, *how),
        // Their texts say what to do.
        Error::OtherUser { .. } | Error::SameVm { .. } => return None,
        Error::NotRecursive { .. } => "`vmkit cp -r` does",
        Error::AlreadyExists { what: Subject::MachinesFile, .. } => {
            "`vmkit plan` shows what `vmkit up` would do"
        }
        Error::AlreadyExists { what: Subject::File, .. } => "--force replaces it",
        Error::Foreign { .. } => {
            "if the file was moved, move it back, or remove its VMs by `vmkit rm`; else give the project another `name`"
        }
        Error::AlreadyExists { what: Subject::Vm, name } => {
            return Some(format!(
                "`vmkit info {name}` tells how it is, `vmkit start {name}` boots it, `vmkit rm --force {name}` removes it"
            ));
        }
        Error::Fetch { status: None, .. } => {
            "an image that is here already is kept under a name by `vmkit image import`; VMKIT_MIRROR names a mirror"
        }
        Error::ImageInUse { vms, .. } => {
            let names: Vec<&str> = vms.iter().map(|vm| vm.as_str()).collect();
            let what = if names.len() == 1 { "the VM with its disk" } else { "the VMs with their disks" };
            return Some(format!("`vmkit rm {}` removes {what}", names.join(" ")));
        }
        Error::NotFound { what: Subject::Vm, .. } => "`vmkit ls` lists the VMs",
        Error::NotFound { what: Subject::Image, .. } => IMAGES,
        Error::NotFound { what: Subject::HypervisorLog, .. } => {
            "the log of a server that somebody else has started is where that keeps it"
        }
        Error::Invalid { value, problem, .. } if *problem != ValueProblem::Other => {
            return of_value(value, *problem);
        }
        Error::NoLogin { missing: LoginPart::HostKey, .. } => {
            "say what the server has: --host-key, or --any-host-key to believe whoever answers"
        }
        Error::NoLogin { missing: LoginPart::Port, vm } => {
            return Some(format!("`vmkit forward {vm} 22` leads one there"));
        }
        Error::NoLogin { .. } => "this VM was made without; say who logs in: --user NAME --identity FILE",
        _ => {
            return of_limit(error)
                .or_else(|| of.and_then(|of| of_vm(error, of)))
                .or_else(|| refused(error))
                .or_else(|| of_kind(error.kind()));
        }
    };
    Some(hint.to_owned())
}

/// Returns what may be done with a directory whose record is of the VM `vm`.
fn misplaced(path: &Path, vm: &VmName, how: Misplacement) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    Some(match how {
        Misplacement::Link => format!("`vmkit rm {name}` removes the link, and nothing of `{vm}`"),
        Misplacement::Copy => format!("`vmkit rm {name}` removes the copy, and nothing of `{vm}`"),
        Misplacement::Replaced => format!("`vmkit rm {name}` removes it, and nothing of the `{vm}` of now"),
        // Its text says what to do.
        _ => return None,
    })
}

/// Returns what may be done with the VM.
fn of_vm(error: &Error, of: &ErrorSubject) -> Option<String> {
    let vm = &of.vm;
    let is_machine = of.called != vm.as_str();
    Some(match error {
        Error::NotLive { .. } if is_machine => format!("`vmkit up {}` brings it up", of.called),
        Error::NotLive { state: VmState::Suspended, .. } => format!("`vmkit resume {vm}` lets it go on"),
        Error::Step { .. } => format!("`vmkit shell {vm}` looks into it; `vmkit up` goes on with this step"),
        Error::NotLive { .. } => format!("`vmkit start {vm}` boots it"),
        Error::Transition(InvalidTransition { operation, state }) => match operation {
            Operation::Destroy => format!("`vmkit rm --force {vm}` ends it and removes it"),
            Operation::Start if *state == VmState::Suspended => format!("`vmkit resume {vm}` lets it go on"),
            Operation::Suspend | Operation::Resume => format!("`vmkit start {vm}` boots it"),
            _ => return None,
        },
        Error::LoginRefused { user, .. } if user == "root" => {
            format!("`vmkit exec {vm} -- sudo COMMAND` becomes root from the user that the VM was made with")
        }
        Error::Record { path, .. } if path.ends_with("vm.json") => {
            format!(
                "the file was left as it is: `vmkit rm --force {vm}` removes the VM, if nothing of it runs"
            )
        }
        _ => match error.kind() {
            ErrorKind::TimedOut => {
                format!("`vmkit logs {vm}` prints the whole console, `vmkit info {vm}` how the VM is now")
            }
            ErrorKind::Hypervisor if !of.has_log => return None,
            ErrorKind::Hypervisor => format!("`vmkit logs --hypervisor {vm}` prints all that it said"),
            _ => return None,
        },
    })
}

/// Returns which limit of this process an error of the system is due to.
fn of_limit(error: &Error) -> Option<String> {
    let limit = |resource| getrlimit(resource).current;
    let memory = || {
        let most = limit(Resource::As)?;
        Some(format!("RLIMIT_AS allows {most} bytes of memory: `ulimit -v` tells and sets it"))
    };
    let processes = || {
        let most = limit(Resource::Nproc)?;
        Some(format!(
            "RLIMIT_NPROC allows this user {most} processes and threads: `ulimit -u` tells and sets it"
        ))
    };
    if let Error::QemuExited { stderr, .. } = error {
        // QEMU's own words, which no error code of it goes with.
        // Source: QEMU, `util/qemu-thread-posix.c`.
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
            format!("RLIMIT_FSIZE allows files of {most} bytes at the most: `ulimit -f` tells and sets it")
        }),
        Errno::AGAIN => processes(),
        Errno::NOMEM => memory(),
        _ => None,
    }
}

/// Returns what may keep out a user who is there and has the key: nobody can look at it from
/// outside.
fn refused(error: &Error) -> Option<String> {
    matches!(error, Error::LoginRefused { .. }).then(|| {
        "the guest's sshd_config may let in others only (`AllowUsers`, `AllowGroups`): `vmkit console` looks in".to_owned()
    })
}

fn of_kind(kind: ErrorKind) -> Option<String> {
    let hint = match kind {
        ErrorKind::Record => "the file was left as it is: mend it, or move it away",
        _ => return None,
    };
    Some(hint.to_owned())
}

/// Returns what may be done about a value that was refused.
fn of_value(value: &str, problem: ValueProblem) -> Option<String> {
    let file = shell_word(value);
    Some(match problem {
        ValueProblem::UnknownImage => IMAGES.to_owned(),
        ValueProblem::NothingToBoot => NOTHING_TO_BOOT.to_owned(),
        ValueProblem::UrlNotFetched => URL.to_owned(),
        ValueProblem::NeedsRecreate => {
            "`vmkit rm` and then `vmkit create` make it anew: its disks are lost".to_owned()
        }
        ValueProblem::CompressedImage => {
            format!("`vmkit image import {file} --name NAME` keeps it unpacked, and NAME is the image then")
        }
        ValueProblem::DiscImage => {
            format!("`vmkit create NAME --cdrom {file} --disk 20GiB --start` boots it beside an empty disk")
        }
        _ => return None,
    })
}

/// Quotes a word for a shell, where it needs that.
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
    fn a_value_is_helped_by_what_is_wrong_with_it_whatever_the_words() {
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
    fn root_is_told_of_sudo_and_others_of_the_servers_rules() {
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
