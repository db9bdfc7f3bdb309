//! What the suite has to know of a backend.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmkit::VmHandle;
use vmkit::spec::{PortForward, VmName, VmSpec};

type MakeSpec = Arc<dyn Fn(VmName) -> VmSpec + Send + Sync>;
type BreakVm = Arc<dyn Fn(&VmHandle) + Send + Sync>;
type CountGuests = Arc<dyn Fn(&VmHandle) -> usize + Send + Sync>;
type PrintLine = Arc<dyn Fn(&VmHandle) -> String + Send + Sync>;
type Trigger = Arc<dyn Fn(&VmHandle) + Send + Sync>;
type FindLeftovers = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// A guest that powers itself off.
#[derive(Clone)]
pub(super) struct SelfPowerOff {
    pub(super) spec: MakeSpec,
    pub(super) trigger: Trigger,
}

/// What the suite has to know of a backend.
#[derive(Clone)]
pub struct Conformance {
    pub(crate) spec: MakeSpec,
    pub(crate) start_limit: Duration,
    pub(crate) stop_timeout: Duration,
    pub(crate) grace: Duration,
    pub(crate) polls: usize,
    pub(super) break_vm: Option<BreakVm>,
    pub(super) count_guests: Option<CountGuests>,
    pub(super) find_leftovers: Option<FindLeftovers>,
    pub(super) print: Option<PrintLine>,
    pub(super) forward: Option<PortForward>,
    pub(super) home: Option<PathBuf>,
    pub(super) power_off: Option<SelfPowerOff>,
    pub(super) serves_ssh: bool,
}

impl Conformance {
    /// Creates the options for a backend that can run the specs that `spec` returns.
    pub fn new(spec: impl Fn(VmName) -> VmSpec + Send + Sync + 'static) -> Self {
        Self {
            spec: Arc::new(spec),
            start_limit: Duration::from_secs(60),
            stop_timeout: Duration::from_millis(500),
            grace: Duration::from_secs(20),
            polls: 200,
            break_vm: None,
            count_guests: None,
            find_leftovers: None,
            print: None,
            forward: None,
            home: None,
            power_off: None,
            serves_ssh: false,
        }
    }

    /// Bounds `start`; 60 s unless set.
    #[must_use]
    pub fn start_limit(self, start_limit: Duration) -> Self {
        Self { start_limit, ..self }
    }

    /// Sets how long `stop` lets a guest shut itself down; 0.5 s unless set, for most guests are
    /// still booting then.
    #[must_use]
    pub fn stop_timeout(self, stop_timeout: Duration) -> Self {
        Self { stop_timeout, ..self }
    }

    /// Sets by how much any call may outlast its own bound before it counts as endless; 20 s unless
    /// set, so that a busy machine is not taken for a broken backend.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    /// Sets after how many polls of a future the suite stops to try what a drop leaves behind; 200
    /// unless set.
    #[must_use]
    pub fn polls(self, polls: usize) -> Self {
        Self { polls, ..self }
    }

    /// Names the way to make a running VM fail, such as to kill its process. It has failed once
    /// `break_vm` returns.
    #[must_use]
    pub fn breaking(self, break_vm: impl Fn(&VmHandle) + Send + Sync + 'static) -> Self {
        Self { break_vm: Some(Arc::new(break_vm)), ..self }
    }

    /// Names the way to count the guests that really run for a VM.
    #[must_use]
    pub fn counting_guests(self, count: impl Fn(&VmHandle) -> usize + Send + Sync + 'static) -> Self {
        Self { count_guests: Some(Arc::new(count)), ..self }
    }

    /// Names the way to have a running VM's guest print a line on its console, which is returned.
    /// A guest that prints a known line while it boots needs nothing more.
    #[must_use]
    pub fn printing(self, print: impl Fn(&VmHandle) -> String + Send + Sync + 'static) -> Self {
        Self { print: Some(Arc::new(print)), ..self }
    }

    /// Sets the spec whose guest powers itself off, without a `stop`, and what has it do so once it
    /// runs: nothing for a guest that does so by itself.
    #[must_use]
    pub fn powering_off(
        self,
        spec: impl Fn(VmName) -> VmSpec + Send + Sync + 'static,
        trigger: impl Fn(&VmHandle) + Send + Sync + 'static,
    ) -> Self {
        let off = SelfPowerOff { spec: Arc::new(spec), trigger: Arc::new(trigger) };
        Self { power_off: Some(off), ..self }
    }

    /// Says that the suite's guests run an SSH server, at a forward to their port 22 or at port 22
    /// of what `guest_ip` returns.
    #[must_use]
    pub fn serving_ssh(self) -> Self {
        Self { serves_ssh: true, ..self }
    }

    /// Names the home whose directories the backend has its files in, for what is tried over a
    /// `VmManager`; a temporary one unless set, for backends that have their files elsewhere.
    #[must_use]
    pub fn home(self, home: impl Into<PathBuf>) -> Self {
        Self { home: Some(home.into()), ..self }
    }

    /// Names a forward that no VM of the suite is started with, for backends that add them.
    #[must_use]
    pub fn forwarding(self, forward: PortForward) -> Self {
        Self { forward: Some(forward), ..self }
    }

    /// Names the way to list what is on the host because of the backend: it must list nothing once
    /// all VMs are destroyed.
    #[must_use]
    pub fn finding_leftovers(self, find: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        Self { find_leftovers: Some(Arc::new(find)), ..self }
    }
}
