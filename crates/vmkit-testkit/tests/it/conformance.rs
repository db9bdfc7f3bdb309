//! The backends that run nothing keep the contract, and the suite finds those that don't.

use std::num::NonZeroU16;
use std::time::Duration;

use proptest::prelude::*;
use vmkit::error::Subject;
use vmkit::lifecycle::{FailureCause, FailureKind, Operation};
use vmkit::spec::{Accel, Protocol, VmName, VmSpec};
use vmkit::{
    Abilities, ActiveForward, Backend, BackendTag, ConsoleEndpoint, DynHypervisor, Error, Hypervisor,
    NoopHypervisor, Result, RouterHypervisor, RunInfo, VmHandle, VmState, VncAddress,
};
use vmkit_testkit::conformance::{CaseOutcome, ConformanceReport};
use vmkit_testkit::{Conformance, conformance, paper_spec, walk};

/// Returns the options for a backend over these books.
fn over(noop: &NoopHypervisor) -> Conformance {
    let (noop, off) = (noop.clone(), noop.clone());
    let cause = FailureCause { kind: FailureKind::GuestPanic, detail: "the suite wanted it".into() };
    Conformance::new(paper_spec)
        .powering_off(paper_spec, move |vm| off.power_off_guest(vm).expect("it runs"))
        .forwarding("4711".parse().expect("a port"))
        .breaking(move |vm| noop.break_vm(vm, cause.clone()).expect("it runs"))
}

fn erased(noop: &NoopHypervisor) -> impl Backend + use<> {
    DynHypervisor::new(noop.clone())
}

fn routed(noop: &NoopHypervisor) -> impl Backend + use<> {
    RouterHypervisor::new(BackendTag::Noop).with(noop.clone())
}

/// The no-op backend with consoles in a directory of its own, in which nothing may be left behind.
struct WithConsoles {
    noop: NoopHypervisor,
    _temp: tempfile::TempDir,
    options: Conformance,
}

impl WithConsoles {
    fn new() -> Self {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().to_owned();
        let noop = NoopHypervisor::new().with_consoles(&dir);
        let printing = noop.clone();
        let print = move |vm: &VmHandle| {
            printing.print(vm, "guest: ready\r\n").expect("it runs");
            "guest: ready".to_owned()
        };
        let leftovers = move || {
            let left = std::fs::read_dir(&dir).expect("the directory is there").flatten();
            left.map(|entry| entry.path().display().to_string()).collect()
        };
        let options = over(&noop).printing(print).finding_leftovers(leftovers);
        Self { noop, _temp: temp, options }
    }
}

fn all_passed(report: &ConformanceReport) {
    report.assert();
    // Nothing runs an SSH server here: the custom backend has one.
    assert_eq!(report.skipped(), 1, "{report}");
}

#[tokio::test]
async fn noop_without_consoles_keeps_the_contract() {
    let noop = NoopHypervisor::new();
    let options = over(&noop);
    all_passed(&conformance::run(move || noop.clone(), options).await);
}

#[tokio::test]
async fn noop_keeps_the_contract() {
    let WithConsoles { noop, _temp, options } = WithConsoles::new();
    all_passed(&conformance::run(move || noop.clone(), options).await);
}

#[tokio::test]
async fn noop_with_its_type_erased_keeps_the_contract() {
    let WithConsoles { noop, _temp, options } = WithConsoles::new();
    all_passed(&conformance::run(move || erased(&noop), options).await);
}

#[tokio::test]
async fn the_router_keeps_the_contract() {
    let WithConsoles { noop, _temp, options } = WithConsoles::new();
    all_passed(&conformance::run(move || routed(&noop), options).await);
}

fn walks_keep_to_the_table(backend: &impl Backend, steps: &[walk::WalkStep]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let name = VmName::new("walk").expect("a name");
    let options = Conformance::new(paper_spec);
    runtime.block_on(walk::along(backend, &options, name, steps)).map_err(TestCaseError::fail)
}

proptest! {
    #[test]
    fn noop_keeps_to_the_table_along_any_walk(steps in walk::steps(30)) {
        walks_keep_to_the_table(&NoopHypervisor::new(), &steps)?;
    }

    #[test]
    fn an_erased_hypervisor_keeps_to_the_table_along_any_walk(steps in walk::steps(30)) {
        walks_keep_to_the_table(&erased(&NoopHypervisor::new()), &steps)?;
    }

    #[test]
    fn the_router_keeps_to_the_table_along_any_walk(steps in walk::steps(30)) {
        walks_keep_to_the_table(&routed(&NoopHypervisor::new()), &steps)?;
    }
}

/// A way to break the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// `suspend` says yes and does nothing.
    SuspendIdle,
    /// `destroy` fails on what is gone.
    DestroyTwice,
    /// `start` returns a handle without the run's facts.
    NoFacts,
    /// `stop` believes the handle's state, which may be old.
    BelievesHandle,
    /// The capabilities deny what works.
    DeniesSuspend,
    /// The capabilities promise a console that is not there.
    PromisesConsole,
    /// `state` panics.
    Panics,
    /// A dropped `stop` loses the VM.
    LosesDropped,
    /// Every instance has VMs of its own.
    OwnBooks,
    /// `suspend` never ends.
    Endless,
    /// `prepare` takes a name twice.
    SameName,
    /// The run's accelerator is the one that was asked for, `auto`.
    RunAccel,
    /// The run has another console than `console_endpoint` returns.
    RunConsole,
    /// The run's monitor is nowhere.
    RunMonitor,
    /// The run's process has ended.
    RunPid,
    /// The run's screen is served to the network.
    RunScreen,
    /// The run has a forward that the spec has not.
    RunForward,
    /// A guest's own end is a failure.
    OwnEnd,
}

/// The reference, spoilt.
#[derive(Clone)]
struct Faulty {
    noop: NoopHypervisor,
    fault: Fault,
}

impl Faulty {
    fn spoil(&self, run: &mut RunInfo) {
        let everywhere = "0.0.0.0:5900".parse().unwrap();
        match self.fault {
            Fault::RunAccel => run.accel = Some(Accel::Auto),
            Fault::RunConsole => run.console = ConsoleEndpoint::UnixSocket("/nowhere/console".into()),
            Fault::RunMonitor => run.monitor = Some("/nowhere/monitor".into()),
            // No system gives a process this id.
            Fault::RunPid => run.pid = Some(u32::MAX),
            Fault::RunScreen => {
                run.vnc = Some(VncAddress::Tcp { addr: everywhere, password_file: "/nowhere".into() });
            }
            Fault::RunForward => {
                let guest_port = NonZeroU16::new(80).unwrap();
                run.forwards = vec![ActiveForward { protocol: Protocol::Tcp, host: everywhere, guest_port }];
            }
            _ => {}
        }
    }
}

impl Hypervisor for Faulty {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        match self.noop.prepare(spec).await {
            Err(Error::AlreadyExists { .. }) if self.fault == Fault::SameName => {
                let handle = VmHandle::preparing(uuid::Uuid::new_v4(), BackendTag::Noop, spec.clone());
                Ok(handle.in_state(VmState::Prepared))
            }
            answer => answer,
        }
    }
    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        let mut handle = self.noop.start(vm).await?;
        if self.fault == Fault::NoFacts {
            handle.run = None;
        }
        if let Some(run) = &mut handle.run {
            self.spoil(run);
        }
        Ok(handle)
    }
    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        if self.fault == Fault::LosesDropped {
            let handle = self.noop.stop(vm, timeout).await?;
            self.noop.destroy(vm.clone()).await?;
            tokio::task::yield_now().await;
            self.noop.prepare(&vm.spec).await?;
            self.noop.stop(vm, timeout).await?;
            return Ok(handle);
        }
        if self.fault == Fault::BelievesHandle && !vm.state.is_live() {
            return Ok(vm.clone().in_state(VmState::Stopped));
        }
        self.noop.stop(vm, timeout).await
    }
    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        match self.fault {
            Fault::SuspendIdle => Ok(vm.clone().in_state(VmState::Suspended)),
            Fault::Endless => std::future::pending().await,
            _ => self.noop.suspend(vm).await,
        }
    }
    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.noop.resume(vm).await
    }
    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        if self.fault == Fault::DestroyTwice && self.noop.state(&vm).await? == VmState::Destroyed {
            return Err(Error::not_found(Subject::Vm, vm.name()));
        }
        self.noop.destroy(vm).await
    }
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        assert!(self.fault != Fault::Panics, "the fault of this backend");
        let cause = || FailureCause { kind: FailureKind::GuestPanic, detail: "so it says".into() };
        match self.noop.state(vm).await? {
            VmState::Stopped if self.fault == Fault::OwnEnd => Ok(VmState::Failed { cause: cause() }),
            state => Ok(state),
        }
    }
    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.noop.guest_ip(vm).await
    }
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.noop.console_endpoint(vm)
    }
}

impl Backend for Faulty {
    fn tag(&self) -> BackendTag {
        BackendTag::Noop
    }
    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        let abilities = self.noop.abilities(tag);
        match self.fault {
            Fault::DeniesSuspend => abilities.without_suspend(),
            Fault::PromisesConsole => abilities.with_console(),
            _ => abilities,
        }
    }
}

#[tokio::test]
async fn the_suite_finds_every_fault_and_reports_what_it_saw() {
    let faults = [
        (
            Fault::SuspendIdle,
            "the table holds for suspend of a Running VM",
            "after suspend of a VM that is running the backend says Running",
        ),
        (Fault::DestroyTwice, "destroy succeeds on what is gone", "VM `conformance-"),
        (Fault::NoFacts, "start after stop gives a new run", "with the run None"),
        (Fault::BelievesHandle, "old handles are as good as new ones", "after stop of a VM that is running"),
        (
            Fault::DeniesSuspend,
            "the table holds for suspend of a Running VM",
            "must fail ([Unsupported]), but led to suspended",
        ),
        (
            Fault::PromisesConsole,
            "the console is where the capabilities say",
            "console in the capabilities: true",
        ),
        (Fault::Panics, "prepare answers a prepared vm", "it panicked"),
        (
            Fault::LosesDropped,
            "a dropped stop of a Running VM leaves nothing that destroy does not find",
            "after 1 polls of stop the VM is gone",
        ),
        (Fault::OwnBooks, "another instance knows the vm", "another instance says the VM is Destroyed"),
        (Fault::Endless, "the table holds for suspend of a Running VM", "suspend has not ended after 0.05 s"),
        (Fault::SameName, "prepare refuses a name in use and leaves its vm alone", "not AlreadyExists"),
        (Fault::RunAccel, "the accelerator of a run is the one in use", "is `auto`"),
        (
            Fault::RunConsole,
            "the console of a run is the one of console endpoint",
            "console_endpoint returns None",
        ),
        (Fault::RunMonitor, "the sockets of a run are there while it lives", "/nowhere/monitor"),
        (Fault::RunPid, "the process of a run lives as long as the run", "4294967295 does not"),
        (Fault::RunScreen, "the screen of a run is where the run says", "beyond loopback, at 0.0.0.0:5900"),
        (Fault::RunForward, "the forwards of a run are those of its spec", "0.0.0.0:5900"),
        (
            Fault::OwnEnd,
            "a guest that powers itself off is stopped and starts again",
            "a guest powered itself off, and its VM is Failed",
        ),
    ];
    for (fault, case, words) in faults {
        let noop = NoopHypervisor::new();
        let options = over(&noop).grace(Duration::from_millis(50));
        let make = move || Faulty {
            noop: if fault == Fault::OwnBooks { NoopHypervisor::new() } else { noop.clone() },
            fault,
        };
        let report = conformance::run(make, options).await;
        let found = report.cases.iter().find(|it| it.name == case).map(|it| &it.outcome);
        let Some(CaseOutcome::Failed(what)) = found else { panic!("{fault:?} was not found: {report}") };
        assert!(what.contains(words), "{fault:?}: {what}");
    }
}

#[tokio::test]
async fn the_suite_finds_a_second_guest() {
    let noop = NoopHypervisor::new();
    let options = over(&noop).counting_guests(|vm| if vm.run.is_some() { 2 } else { 0 });
    let text = conformance::run(move || noop.clone(), options).await.to_string();
    assert!(text.contains("2 guests run for the VM, not 1"), "{text}");
}

#[tokio::test]
async fn the_suite_finds_what_is_left_behind() {
    let noop = NoopHypervisor::new();
    let options = over(&noop).finding_leftovers(|| vec!["/run/left-behind".to_owned()]);
    let report = conformance::run(move || noop.clone(), options).await;
    assert_eq!(report.failed(), report.cases.len(), "{report}");
    assert!(report.to_string().contains("/run/left-behind"), "{report}");
}

#[tokio::test]
async fn without_a_way_to_make_a_vm_fail_those_cases_are_skipped_with_the_reason() {
    let noop = NoopHypervisor::new();
    let report = conformance::run(move || noop.clone(), Conformance::new(paper_spec)).await;
    report.assert();
    assert_eq!(report.skipped(), [Operation::Start; 8].len() + 6);
    assert!(report.to_string().contains("the suite has no way to make a VM fail"), "{report}");
}
