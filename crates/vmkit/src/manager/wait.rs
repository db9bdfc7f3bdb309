//! Waiting until a condition of a VM holds.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use crate::deadline::later;
use crate::error::{Error, ErrorKind, LoginPart, Result, Subject};
use crate::handle::VmHandle;
use crate::host::process::{ProcessFd, ProcessId};
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::network::{FirstPackets, MacAddr};
use crate::spec::{NetworkConfig, Protocol, VmName};
use crate::store::RecordChanges;

use super::VmManager;
use super::probe::{RefusalClock, SshProbe};

/// The timeout of one attempt to reach the guest. A guest without KVM on a busy host needs seconds
/// to reply.
const ATTEMPT: Duration = Duration::from_secs(10);
/// How often the state is checked without an event. A guest's panic, or a pause by another client
/// of the monitor, ends no process and changes no record.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The shortest and the longest pause between two checks of what has no event.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(250));
/// The port of an SSH server.
const SSH: u16 = 22;

/// A condition to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitCondition {
    /// The vCPUs run.
    Running,
    /// The guest agent replies.
    Agent,
    /// The guest's SSH server greets.
    Ssh,
    /// No guest lives, and it did not fail.
    Stopped,
}

impl WaitCondition {
    /// All conditions.
    pub const ALL: &'static [WaitCondition] =
        &[WaitCondition::Running, WaitCondition::Agent, WaitCondition::Ssh, WaitCondition::Stopped];

    /// Returns the condition's name, such as `running`.
    pub fn as_str(self) -> &'static str {
        match self {
            WaitCondition::Running => "running",
            WaitCondition::Agent => "agent",
            WaitCondition::Ssh => "ssh",
            WaitCondition::Stopped => "stopped",
        }
    }
}

impl fmt::Display for WaitCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for WaitCondition {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|condition| condition.as_str() == text);
        found
            .copied()
            .ok_or_else(|| Error::invalid("condition", text, "wait for running, agent, ssh or stopped"))
    }
}

/// What a wait does next, given the VM's state.
enum WaitNext {
    /// The condition holds.
    Done,
    /// Ask the guest.
    Ask,
    /// Wait for an event.
    Wait,
    /// The condition can't hold any more.
    Never,
}

/// Returns the next step; `lived` is whether the VM was seen alive before.
fn next(state: &VmState, condition: WaitCondition, lived: bool) -> WaitNext {
    match (state, condition) {
        (VmState::Running, WaitCondition::Running) => WaitNext::Done,
        (VmState::Running, WaitCondition::Agent | WaitCondition::Ssh) => WaitNext::Ask,
        (VmState::Prepared | VmState::Stopped, WaitCondition::Stopped) => WaitNext::Done,
        (VmState::Failed { .. } | VmState::Destroyed, _) => WaitNext::Never,
        (VmState::Prepared | VmState::Stopped, _) if lived => WaitNext::Never,
        _ => WaitNext::Wait,
    }
}

impl<H: Backend + 'static> VmManager<H> {
    /// Waits until the condition holds, and returns the VM as it is then.
    ///
    /// `timeout` applies to the whole wait. A VM that does not live yet may be started by another
    /// process in the meantime.
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    ///
    /// # Errors
    /// `TimedOut` with the console's last lines; `InvalidState` as soon as the VM fails or ends
    /// while another condition was awaited, with the cause; `NotFound` without the VM, and
    /// ([`Error::NoLogin`]) without a port to its SSH server; `Unsupported` if the VM has no guest
    /// agent, or this build has no client for it.
    pub async fn wait(&self, name: &VmName, condition: WaitCondition, timeout: Duration) -> Result<VmHandle> {
        self.wait_timed(name, condition, timeout, RefusalClock::default()).await
    }

    /// Waits as [`wait`](Self::wait) does, and lets another task see how long the guest's SSH port
    /// has refused connections.
    pub(super) async fn wait_timed(
        &self,
        name: &VmName,
        condition: WaitCondition,
        timeout: Duration,
        refusals: RefusalClock,
    ) -> Result<VmHandle> {
        let (mut last, mut ways) = (None, WaitProbes { refusals, ..WaitProbes::default() });
        let waited = timeout_at(later(timeout), self.fulfilled(name, condition, &mut last, &mut ways)).await;
        if let Ok(fulfilled) = waited {
            return fulfilled;
        }
        let last = last.as_ref();
        let state = last.map_or(String::new(), |vm: &VmHandle| format!(", which is {}", vm.state));
        let failure = ways.probe.as_ref().and_then(SshProbe::failure);
        let failure = failure.map_or(String::new(), |failure| format!("; {failure}"));
        let console = match last {
            Some(vm) => self.console_tail(vm).await,
            None => None,
        };
        let is_mute = console.is_none() && last.is_some_and(|vm| vm.state == VmState::Running);
        let mute = if is_mute { "; no output on its serial console yet" } else { "" };
        let awaited = format!("{}{state}{failure}{mute}", awaited(name, condition));
        Err(Error::TimedOut { awaited, after: timeout, console })
    }

    async fn fulfilled(
        &self,
        name: &VmName,
        condition: WaitCondition,
        last: &mut Option<VmHandle>,
        ways: &mut WaitProbes,
    ) -> Result<VmHandle> {
        // Read first, since only a VM has a directory to watch.
        self.store.read(name)?;
        let changes = self.store.changes(name)?;
        let mut lived = false;
        let mut pause = BACK_OFF.0;
        loop {
            let (vm, process) = self.glance(name).await?;
            let Some(vm) = vm else {
                happened(&changes, process.as_ref(), LOOK_AGAIN).await?;
                continue;
            };
            lived |= vm.state.is_live();
            *last = Some(vm.clone());
            match next(&vm.state, condition, lived) {
                WaitNext::Done => return Ok(vm),
                WaitNext::Never => {
                    let (awaited, console) = (awaited(name, condition), self.console_tail(&vm).await);
                    return Err(Error::Ended { awaited, state: vm.state, console });
                }
                WaitNext::Wait => happened(&changes, process.as_ref(), LOOK_AGAIN).await?,
                WaitNext::Ask => tokio::select! {
                    answer = self.reach(&vm, condition, ways) => {
                        if answer? {
                            return Ok(vm);
                        }
                        // There is no event for an agent that replies, nor for every address that a
                        // guest may get.
                        tokio::select! {
                            ended = happened(&changes, process.as_ref(), pause) => ended?,
                            () = ways.arrivals(&vm).next() => {}
                        }
                        pause = (pause * 2).min(BACK_OFF.1);
                    }
                    ended = happened(&changes, process.as_ref(), ATTEMPT) => ended?,
                    () = self.runs_no_more(&vm) => {}
                },
            }
        }
    }

    /// Waits until a VM differs from `seen`, in its state or its run, and returns it as it is then.
    ///
    /// To watch a VM, call this again with each result. The end of a process, and what other
    /// programs do to the VM, are noticed at once; a guest's panic, and a pause by another client
    /// of the monitor, within 2 s. Changes that were undone between two calls are not reported.
    ///
    /// # Cancel safety
    /// Waiting changes nothing.
    ///
    /// # Errors
    /// `TimedOut`; `NotFound` when the VM is removed.
    pub async fn changed(&self, seen: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        let name = seen.name();
        let run = |vm: &VmHandle| vm.run.as_ref().and_then(|run| run.pid);
        let change = async {
            self.store.read(name)?;
            let changes = self.store.changes(name)?;
            loop {
                let (vm, process) = self.glance(name).await?;
                if let Some(vm) = vm {
                    if vm.id != seen.id {
                        return Err(Error::not_found(Subject::Vm, name));
                    }
                    if vm.state != seen.state || run(&vm) != run(seen) {
                        return Ok(vm);
                    }
                }
                happened(&changes, process.as_ref(), LOOK_AGAIN).await?;
            }
        };
        match timeout_at(later(timeout), change).await {
            Ok(changed) => changed,
            Err(_) => {
                let awaited = format!("a change of the VM `{name}`, which is {}", seen.state);
                Err(Error::timed_out(awaited, timeout))
            }
        }
    }

    /// Waits until the guest of a running VM is reset, by itself or from outside: what ran in it is
    /// gone, while the VM's state and run stay. Resets before the first poll do not count.
    ///
    /// # Cancel safety
    /// Nothing is changed by waiting.
    ///
    /// # Errors
    /// `Unsupported` for a backend that does not notice it; `Io` and `Host` if that fails.
    pub async fn guest_reset(&self, vm: &VmHandle) -> Result<()> {
        match self.abilities_of(vm).reset_events() {
            Some(events) => events.guest_reset(vm).await,
            None => Err(Error::Unsupported {
                backend: vm.backend.clone(),
                what: "noticing that a guest is reset".to_owned(),
            }),
        }
    }

    /// Waits until a running VM is in another state without an event of a process or a record.
    async fn runs_no_more(&self, vm: &VmHandle) {
        loop {
            sleep_until(Instant::now() + LOOK_AGAIN).await;
            if self.state(vm).await.is_ok_and(|state| state != VmState::Running) {
                return;
            }
        }
    }

    /// Looks at a VM, and opens its process; `None` if the VM is too busy to reply, or is just
    /// being started.
    async fn glance(&self, name: &VmName) -> Result<(Option<VmHandle>, Option<ProcessFd>)> {
        // In this order: a PID that belongs to a live VM after the descriptor was opened did so
        // before.
        let (record, is_cut_off) = self.store.read_now(name)?;
        let process = hold(&record.handle)?;
        match self.look(&record, is_cut_off).await {
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Busy) => {
                Ok((None, process))
            }
            state => Ok((Some(record.handle.in_state(state?)), process)),
        }
    }

    /// Tries to reach what is awaited in the guest, and returns whether it could; for SSH it keeps
    /// trying.
    async fn reach(&self, vm: &VmHandle, condition: WaitCondition, ways: &mut WaitProbes) -> Result<bool> {
        match condition {
            WaitCondition::Ssh => {
                let address = tokio::select! {
                    address = self.ssh_address(vm) => address?,
                    // Checked again: a guest agent that is not there takes long to fail.
                    () = ways.arrivals(vm).next() => self.ssh_address(vm).await?,
                };
                let Some(address) = address else { return Ok(false) };
                // At another address, probing starts again; otherwise an open connection may get
                // its reply at any moment.
                let probe = match ways.probe.take_if(|probe| probe.address() == address) {
                    Some(probe) => probe,
                    None => SshProbe::new(address, ways.refusals.clone()),
                };
                ways.probe.insert(probe).greeted(ways.console.of(vm)).await;
                Ok(true)
            }
            _ => {
                let agent = self.abilities_of(vm).guest_agent().ok_or_else(|| Error::Unsupported {
                    backend: vm.backend.clone(),
                    what: format!("a guest agent in the VM `{}`", vm.name()),
                })?;
                agent.agent_responds(vm, ATTEMPT).await
            }
        }
    }

    /// Waits until the guest's address is known, or the deadline has passed.
    ///
    /// Errors are ignored: waiting for SSH reports them as well, with the console's last lines.
    #[cfg(all(feature = "ssh", feature = "images"))]
    pub(crate) async fn address_known(&self, vm: &VmHandle, deadline: Instant) {
        let mut ways = WaitProbes::default();
        let known = async {
            loop {
                let asked = tokio::select! {
                    asked = self.hypervisor.guest_ip(vm) => asked,
                    () = ways.arrivals(vm).next() => continue,
                };
                if !asked.is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                    return;
                }
                // There is no event for every address that a guest may get.
                let _ = timeout_at(Instant::now() + BACK_OFF.1, ways.arrivals(vm).next()).await;
            }
        };
        let _ = timeout_at(deadline, known).await;
    }

    /// Returns the address of the guest's SSH server, if it is known.
    pub(super) async fn ssh_address(&self, vm: &VmHandle) -> Result<Option<SocketAddr>> {
        let mut forwards = vm.run.iter().flat_map(|run| &run.forwards);
        let forward = forwards.find(|f| f.protocol == Protocol::Tcp && f.guest_port.get() == SSH);
        if let Some(forward) = forward {
            return Ok(Some(forward.host.into()));
        }
        let is_user = matches!(vm.spec.network(), NetworkConfig::User(_));
        let no_port = || Error::NoLogin { vm: vm.name().clone(), missing: LoginPart::Port };
        // A backend that forwards ports has no other way into such a network.
        if is_user && self.abilities_of(vm).capabilities().port_forwarding {
            return Err(no_port());
        }
        match self.hypervisor.guest_ip(vm).await {
            Ok(address) => match address.parse() {
                // Loopback is where ports are forwarded, and otherwise this host's own.
                Ok(ip) if is_user && IpAddr::is_loopback(&ip) => Err(no_port()),
                Ok(ip) => Ok(Some(SocketAddr::new(ip, SSH))),
                Err(_) => Ok(None),
            },
            Err(error) if error.kind() == ErrorKind::Unsupported => Err(error),
            Err(_) => Ok(None),
        }
    }
}

/// What is known of the ways to the guest, between two looks.
#[derive(Default)]
struct WaitProbes {
    probe: Option<SshProbe>,
    refusals: RefusalClock,
    console: ConsoleGrowth,
    arrivals: Option<FirstPackets>,
}

impl WaitProbes {
    /// Returns the event of the guest's first packet on its bridge.
    fn arrivals(&mut self, vm: &VmHandle) -> &mut FirstPackets {
        self.arrivals.get_or_insert_with(|| match vm.spec.network() {
            NetworkConfig::Tap { .. } => FirstPackets::of(MacAddr::of_vm(vm.id)),
            _ => FirstPackets::none(),
        })
    }
}

/// The console's log as an event: it grows while the guest boots.
#[derive(Default)]
struct ConsoleGrowth(Option<RecordChanges>);

impl ConsoleGrowth {
    /// Returns the watch on the log, if it exists.
    fn of(&mut self, vm: &VmHandle) -> Option<&RecordChanges> {
        if self.0.is_none() {
            self.0 = vm.console_log.as_deref().and_then(|log| RecordChanges::of_log(log).ok());
        }
        self.0.as_ref()
    }
}

fn awaited(name: &VmName, condition: WaitCondition) -> String {
    format!("`{condition}` of the VM `{name}`")
}

/// Opens the VM's last known process, if it has one.
pub(super) fn hold(vm: &VmHandle) -> Result<Option<ProcessFd>> {
    let Some(pid) = vm.run.as_ref().and_then(|run| run.pid) else { return Ok(None) };
    match ProcessId::of(pid)? {
        Some(process) => process.open(),
        None => Ok(None),
    }
}

/// Waits until the VM's record changes, its process ends, or the time has passed.
async fn happened(changes: &RecordChanges, process: Option<&ProcessFd>, at_most: Duration) -> Result<()> {
    let deadline = Instant::now() + at_most;
    let ended = async {
        match process {
            Some(process) => process.wait(deadline).await.map(drop),
            None => {
                sleep_until(deadline).await;
                Ok(())
            }
        }
    };
    tokio::select! {
        changed = changes.next() => changed,
        ended = ended => ended,
    }
}
