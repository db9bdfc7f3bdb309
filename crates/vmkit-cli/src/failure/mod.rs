//! The failures of a command: their exit codes, and what there is to say.
//!
//! It prints nothing, and looks nothing up.

mod hints;

use std::io;

use vmkit::ErrorKind;
use vmkit::error::Subject;
use vmkit::spec::VmName;
use vmkit::vmfile::VmfileError;

pub(crate) use hints::DOCTOR;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An error of the library, about this VM if there is one.
    Library { of: Option<Box<ErrorSubject>>, error: vmkit::Error },
    /// The arguments were not understood.
    Usage(clap::Error),
    /// The output can't be written.
    Output(io::Error),
    /// A check failed, and its result is already printed.
    Unfit,
    /// The program in the guest ended with this code, and has printed its own output.
    Exit(u8),
    /// A failure of vmkit itself, if the exit code is otherwise that of the program in the guest.
    Own { code: u8, failure: Box<Failure> },
    /// A failure with a hint that does not follow from the error alone.
    Hinted { failure: Box<Failure>, hint: String },
    /// Several VMs failed, each with its failure.
    Several(Vec<Failure>),
}

/// The VM that an error is about.
#[derive(Debug, Clone)]
pub(crate) struct ErrorSubject {
    /// The name that the user gave: the VM's, or that of a machine in a file.
    pub(crate) called: String,
    /// The VM.
    pub(crate) vm: VmName,
    /// Whether its hypervisor has a log here that is not empty.
    pub(crate) has_log: bool,
}

/// What there is to say about a failure.
#[derive(Debug, Default)]
pub(crate) struct FailureReport<'a> {
    /// What went wrong.
    pub(crate) errors: Vec<ReportedError<'a>>,
    /// What may be done about it.
    pub(crate) hints: Vec<String>,
}

/// One of the things that went wrong.
#[derive(Debug)]
pub(crate) enum ReportedError<'a> {
    /// An error of the library; `of` is the VM or machine that its text does not name.
    Library { of: Option<&'a str>, error: &'a vmkit::Error },
    /// A mistake in a file of machines, or in what it says of this machine.
    Vmfile { machine: Option<&'a str>, error: &'a VmfileError },
    /// What clap says of the arguments.
    Usage(&'a clap::Error),
    /// Standard output can't be written.
    Unwritten(&'a io::Error),
}

/// The exit codes, as `--help` and `docs/exit-codes.md` list them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the operation failed: the hypervisor, the guest or the system
  2  bad input, or a host that can't do it
  3  no such VM, or what was asked of it does not exist yet
  4  not possible in the VM's present state
  5  a timeout passed
  6  another process holds the VM or its console
  7  the VM's backend does not support it
`exec`, `shell` and `launch … -- COMMAND` exit with the command's own code, and 255 if it was lost.";

/// The exit code for a program whose end is unknown.
const UNKNOWN: u8 = 255;

impl Failure {
    /// Creates the failure for a lost connection to a program in the guest: how it ended is
    /// unknown.
    pub(crate) fn unknown(error: vmkit::Error) -> Self {
        Failure::Own { code: UNKNOWN, failure: Box::new(error.into()) }
    }

    /// Returns the failure as one of this VM, unless it already has one, or is about the arguments.
    pub(crate) fn of_vm(self, vm: &VmName) -> Self {
        match self {
            Failure::Library { of: None, error } if error.kind() != ErrorKind::InvalidInput => {
                Failure::Library { of: Some(ErrorSubject::vm(vm)), error }
            }
            Failure::Own { code, failure } => Failure::Own { code, failure: Box::new(failure.of_vm(vm)) },
            Failure::Hinted { failure, hint } => {
                Failure::Hinted { failure: Box::new(failure.of_vm(vm)), hint }
            }
            other => other,
        }
    }

    /// Returns the failure with whether `has_log` finds a log of its VM's hypervisor that can be
    /// printed, if it is the hypervisor's.
    pub(crate) fn looked_up(self, has_log: &dyn Fn(&VmName) -> bool) -> Self {
        match self {
            Failure::Library { of: Some(of), error } if error.kind() == ErrorKind::Hypervisor => {
                let has_log = has_log(&of.vm);
                Failure::Library { of: Some(Box::new(ErrorSubject { has_log, ..*of })), error }
            }
            Failure::Own { code, failure } => {
                Failure::Own { code, failure: Box::new(failure.looked_up(has_log)) }
            }
            Failure::Hinted { failure, hint } => {
                Failure::Hinted { failure: Box::new(failure.looked_up(has_log)), hint }
            }
            Failure::Several(failures) => {
                Failure::Several(failures.into_iter().map(|failure| failure.looked_up(has_log)).collect())
            }
            other => other,
        }
    }

    /// Returns the result of a command that may have failed several times.
    ///
    /// # Errors
    /// `Several` with the failures; a single one as it is.
    pub(crate) fn of(mut failures: Vec<Failure>) -> Result<(), Failure> {
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0)),
            _ => Err(Failure::Several(failures)),
        }
    }

    /// Returns the exit code; of several failures, the first one's.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Library { error, .. } => of_error(error),
            Failure::Usage(error) => u8::try_from(error.exit_code()).unwrap_or(2),
            // The reader closed the pipe since it has what it needs.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Failure::Output(_) => 1,
            Failure::Unfit => 2,
            Failure::Exit(code) | Failure::Own { code, .. } => *code,
            Failure::Hinted { failure, .. } => failure.exit_code(),
            Failure::Several(failures) => failures.first().map_or(0, Failure::exit_code),
        }
    }

    /// Returns what to say: what went wrong, then what may be done about it.
    pub(crate) fn report(&self) -> FailureReport<'_> {
        let mut report = FailureReport::default();
        self.add_to(&mut report);
        report.hints.dedup();
        report
    }

    /// Returns the names of the VMs that were not found.
    pub(crate) fn missing_vms(&self) -> Vec<&str> {
        match self {
            Failure::Library { error: vmkit::Error::NotFound { what: Subject::Vm, name }, .. } => vec![name],
            Failure::Own { failure, .. } => failure.missing_vms(),
            Failure::Several(failures) => failures.iter().flat_map(Failure::missing_vms).collect(),
            _ => Vec::new(),
        }
    }

    /// Returns the error that is due to the host, if there is one.
    pub(crate) fn of_host(&self) -> Option<&vmkit::Error> {
        match self {
            // Its text says what to do.
            Failure::Library { error: vmkit::Error::OtherUser { .. }, .. } => None,
            Failure::Library { error, .. } => (error.kind() == ErrorKind::Host).then_some(error),
            Failure::Own { failure, .. } | Failure::Hinted { failure, .. } => failure.of_host(),
            Failure::Several(failures) => failures.iter().find_map(Failure::of_host),
            Failure::Usage(_) | Failure::Output(_) | Failure::Unfit | Failure::Exit(_) => None,
        }
    }

    fn add_to<'a>(&'a self, report: &mut FailureReport<'a>) {
        match self {
            Failure::Library { of, error: vmkit::Error::Vmfile(error) } => {
                let machine = of.as_ref().map(|of| of.called.as_str());
                report.errors.push(ReportedError::Vmfile { machine, error });
            }
            Failure::Library { of, error } => {
                let called = of.as_ref().map(|of| of.called.as_str());
                let of_called = called.filter(|called| !names(error, called));
                report.errors.push(ReportedError::Library { of: of_called, error });
                report.hints.extend(hints::hint(error, of.as_deref()));
            }
            Failure::Usage(error) => report.errors.push(ReportedError::Usage(error)),
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Failure::Output(error) => report.errors.push(ReportedError::Unwritten(error)),
            Failure::Unfit | Failure::Exit(_) => {}
            Failure::Own { failure, .. } => failure.add_to(report),
            Failure::Hinted { failure, hint } => {
                failure.add_to(report);
                report.hints.push(hint.clone());
            }
            Failure::Several(failures) => failures.iter().for_each(|failure| failure.add_to(report)),
        }
    }
}

impl ErrorSubject {
    /// Returns the subject of a VM's error.
    pub(crate) fn vm(vm: &VmName) -> Box<Self> {
        Box::new(Self { called: vm.to_string(), vm: vm.clone(), has_log: true })
    }
}

impl From<vmkit::Error> for Failure {
    fn from(error: vmkit::Error) -> Self {
        Failure::Library { of: None, error }
    }
}

fn of_error(error: &vmkit::Error) -> u8 {
    if matches!(error, vmkit::Error::QemuExited { .. }) {
        // QEMU refused its arguments.
        return 2;
    }
    match error.kind() {
        ErrorKind::InvalidInput | ErrorKind::AlreadyExists | ErrorKind::Record | ErrorKind::Host => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::InvalidState => 4,
        ErrorKind::TimedOut => 5,
        ErrorKind::Busy => 6,
        ErrorKind::Unsupported => 7,
        // Hypervisor, guest, servers and I/O, and kinds that a later library may add.
        _ => 1,
    }
}

/// Returns whether an error's own text contains the VM's name.
fn names(error: &vmkit::Error, called: &str) -> bool {
    use vmkit::Error as E;
    // `web:/etc/hosts`.
    let is_place =
        matches!(error, E::Ssh { .. } | E::Copy { .. } | E::NotRecursive { .. } | E::CopyPart { .. });
    let text = error.to_string();
    is_place || [format!("`{called}`"), format!("@{called} (")].iter().any(|name| text.contains(name))
}

#[cfg(test)]
mod tests {
    use vmkit::error::Subject;

    use super::*;

    #[test]
    fn every_kind_has_its_exit_code() {
        let of_kind = |kind| of_error(&vmkit::Error::Backend { message: String::new(), kind, source: None });
        for (kind, code) in [
            (ErrorKind::InvalidInput, 2),
            (ErrorKind::AlreadyExists, 2),
            (ErrorKind::NotFound, 3),
            (ErrorKind::InvalidState, 4),
            (ErrorKind::Unsupported, 7),
            (ErrorKind::Busy, 6),
            (ErrorKind::TimedOut, 5),
            (ErrorKind::Record, 2),
            (ErrorKind::Host, 2),
            (ErrorKind::Hypervisor, 1),
            (ErrorKind::Guest, 1),
            (ErrorKind::Io, 1),
            (ErrorKind::Remote, 1),
        ] {
            assert_eq!(of_kind(kind), code, "{kind:?}");
        }
    }

    #[test]
    fn a_failure_gets_the_name_of_its_vm_unless_its_text_has_it_or_it_is_about_the_arguments() {
        let vm = VmName::new("web").unwrap();
        let whose = |failure: Failure| match failure.of_vm(&vm) {
            Failure::Library { of, .. } => of.map(|of| of.called),
            other => panic!("{other:?}"),
        };
        let busy = || vmkit::Error::Busy { what: "it".into(), holder: None };
        assert_eq!(whose(busy().into()).as_deref(), Some("web"));
        assert_eq!(whose(vmkit::Error::invalid("env", "A", "write NAME=VALUE").into()), None);
        let other = VmName::new("db").unwrap();
        assert_eq!(whose(Failure::from(busy()).of_vm(&other)).as_deref(), Some("db"));
        assert!(names(&vmkit::Error::not_found(Subject::Vm, "web"), "web"));
        assert!(!names(&busy(), "web"));
    }

    #[test]
    fn a_qemu_that_refuses_to_start_is_bad_input() {
        let error = vmkit::Error::QemuExited {
            status: "exit code 1".into(),
            stderr: String::new(),
            log: "/log".into(),
        };
        assert_eq!(of_error(&error), 2);
    }

    #[test]
    fn a_closed_pipe_is_not_a_failure() {
        assert_eq!(Failure::Output(io::ErrorKind::BrokenPipe.into()).exit_code(), 0);
        assert_eq!(Failure::Output(io::ErrorKind::StorageFull.into()).exit_code(), 1);
    }
}
