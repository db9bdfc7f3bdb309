//! What a backend can do beside the nine methods of [`Hypervisor`](crate::Hypervisor): a trait for
//! each ability, and [`Abilities`], the ones that a backend has.
//!
//! A backend implements the traits of what it can do and names them in
//! [`Backend::abilities`](crate::Backend::abilities). A router hands the call to the backend of the
//! VM, and `VmManager` knows these traits and no backend.
//!
//! | trait | what `VmManager` does with it |
//! | --- | --- |
//! | [`PortForwarding`] | `add_forward` and `remove_forward` of a VM that runs |
//! | [`Preflight`] | refuses a VM before its image is fetched, and a restart before the stop |
//! | [`GuestAgentChannel`] | waits for `WaitCondition::Agent`, and asks why no login succeeds |
//! | [`GuestClock`] | resumes a guest, and sets the clock itself, over SSH, only if that did not |
//! | [`ConsoleHistory`] | attaches to a console that is no Unix socket, and shows its last lines |
//! | [`ResetEvents`] | ends a session whose guest was reset |
//! | [`SaveToDisk`] | writes a guest's memory to disk; a start continues from there |
//! | [`Snapshots`] | keeps states of a VM, and goes back to them |
//! | [`Export`] | writes a VM to a file, and imports it into another home |
//! | [`Clones`] | creates VMs as copies of others |
//!
//! The traits know nothing of each other, of the backends and of the manager.

mod clones;
mod console_history;
mod export;
mod guest_agent;
mod guest_clock;
mod port_forwarding;
mod preflight;
mod reset_events;
mod save_to_disk;
mod snapshots;

use std::future::Future;
use std::pin::Pin;

use serde::{Deserialize, Serialize};

pub use clones::{CloneMode, CloneRequest, Clones, DynClones, IdentityPolicy};
pub use console_history::{AttachedStream, ConsoleHistory, DynConsoleHistory};
pub use export::{DynExport, Export, ExportedFile, ExportedVm, FileContent, ImportedVm};
pub use guest_agent::{DynGuestAgentChannel, GuestAgentChannel};
pub use guest_clock::{ClockState, ClockedVm, DynGuestClock, GuestClock};
pub(crate) use port_forwarding::in_force;
pub use port_forwarding::{DynPortForwarding, PortForwarding};
pub use preflight::{DynPreflight, Preflight};
pub use reset_events::{DynResetEvents, ResetEvents};
pub use save_to_disk::{DynSaveToDisk, SaveToDisk};
pub use snapshots::{DynSnapshots, MemoryMode, Snapshot, SnapshotKind, Snapshots};

use crate::error::Result;

/// What a method of an ability returns, its type erased.
type AbilityFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Declares a reference to any backend with an ability, its type erased: the object-safe twin of
/// the trait, and the type that calls it. The twin's methods have other names, or every call on a
/// backend would be ambiguous.
macro_rules! erased {
    (
        $(#[$meta:meta])*
        $reference:ident of $ability:ident by $twin:ident for $a:lifetime;
        $($(#[$method_meta:meta])* $method:ident as $erased:ident ($($arg:ident: $type:ty),*) -> $output:ty;)*
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub struct $reference<'r>(&'r dyn $twin);

        trait $twin: Send + Sync {
            $(fn $erased<$a>(&$a self, $($arg: $type),*) -> crate::abilities::AbilityFuture<$a, $output>;)*
        }

        impl<B: $ability> $twin for B {
            $(fn $erased<$a>(&$a self, $($arg: $type),*) -> crate::abilities::AbilityFuture<$a, $output> {
                Box::pin(self.$method($($arg),*))
            })*
        }

        impl<'r> $reference<'r> {
            /// Erases the type of a backend.
            pub fn new(backend: &'r impl $ability) -> Self {
                Self(backend)
            }

            $($(#[$method_meta])*
            pub async fn $method<$a>(self, $($arg: $type),*) -> crate::error::Result<$output> {
                self.0.$erased($($arg),*).await
            })*
        }

        impl std::fmt::Debug for $reference<'_> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(stringify!($reference))
            }
        }
    };
}
use erased;

/// What a backend can do with its VMs.
///
/// # Examples
/// ```
/// use vmkit::abilities::{Abilities, PortForwarding};
///
/// // What `Backend::abilities` of such a backend returns.
/// fn abilities(backend: &impl PortForwarding) -> Abilities<'_> {
///     Abilities::none().with_suspend().with_guest_ip().with_port_forwarding(backend)
/// }
/// assert!(abilities(&vmkit::NoopHypervisor::new()).capabilities().port_forwarding);
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Abilities<'a> {
    plain: Capabilities,
    port_forwarding: Option<DynPortForwarding<'a>>,
    preflight: Option<DynPreflight<'a>>,
    guest_agent: Option<DynGuestAgentChannel<'a>>,
    guest_clock: Option<DynGuestClock<'a>>,
    console_history: Option<DynConsoleHistory<'a>>,
    reset_events: Option<DynResetEvents<'a>>,
    save_to_disk: Option<DynSaveToDisk<'a>>,
    snapshots: Option<DynSnapshots<'a>>,
    export: Option<DynExport<'a>>,
    clones: Option<DynClones<'a>>,
}

impl<'a> Abilities<'a> {
    /// Returns the abilities of a backend that has the nine methods alone, of which `suspend`,
    /// `resume` and `guest_ip` are `Unsupported`, and which has no console.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds `suspend` and `resume`.
    #[must_use]
    pub fn with_suspend(mut self) -> Self {
        self.plain.suspend = true;
        self
    }

    /// Adds that `stop` can ask the guest to power down.
    #[must_use]
    pub fn with_graceful_stop(mut self) -> Self {
        self.plain.graceful_stop = true;
        self
    }

    /// Adds a serial console.
    #[must_use]
    pub fn with_console(mut self) -> Self {
        self.plain.console = true;
        self
    }

    /// Adds a serial console that serves many clients; see [`Capabilities::shared_console`].
    #[must_use]
    pub fn with_shared_console(mut self) -> Self {
        self.plain.console = true;
        self.plain.shared_console = true;
        self
    }

    /// Adds that `guest_ip` can find an address.
    #[must_use]
    pub fn with_guest_ip(mut self) -> Self {
        self.plain.guest_ip = true;
        self
    }

    /// Adds that a spec's paths are files of this host; see [`Capabilities::local_files`].
    #[must_use]
    pub fn with_local_files(mut self) -> Self {
        self.plain.local_files = true;
        self
    }

    /// Adds that VMs are found by their directories; see [`Capabilities::vm_is_directory`].
    #[must_use]
    pub fn with_vm_as_directory(mut self) -> Self {
        self.plain.vm_is_directory = true;
        self
    }

    /// Adds that `state` notices missing parts; see [`Capabilities::notices_missing_parts`].
    #[must_use]
    pub fn with_missing_parts_noticed(mut self) -> Self {
        self.plain.notices_missing_parts = true;
        self
    }

    /// Adds forwards of ports while a VM runs.
    #[must_use]
    pub fn with_port_forwarding(mut self, backend: &'a impl PortForwarding) -> Self {
        self.port_forwarding = Some(DynPortForwarding::new(backend));
        self
    }

    /// Adds checks before anything is created.
    #[must_use]
    pub fn with_preflight(mut self, backend: &'a impl Preflight) -> Self {
        self.preflight = Some(DynPreflight::new(backend));
        self
    }

    /// Adds a guest agent.
    #[must_use]
    pub fn with_guest_agent(mut self, backend: &'a impl GuestAgentChannel) -> Self {
        self.guest_agent = Some(DynGuestAgentChannel::new(backend));
        self
    }

    /// Adds that guests' clocks are set when they are resumed.
    #[must_use]
    pub fn with_guest_clock(mut self, backend: &'a impl GuestClock) -> Self {
        self.guest_clock = Some(DynGuestClock::new(backend));
        self
    }

    /// Adds a console whose past the backend itself has.
    #[must_use]
    pub fn with_console_history(mut self, backend: &'a impl ConsoleHistory) -> Self {
        self.console_history = Some(DynConsoleHistory::new(backend));
        self
    }

    /// Adds that a reset of a guest is noticed.
    #[must_use]
    pub fn with_reset_events(mut self, backend: &'a impl ResetEvents) -> Self {
        self.reset_events = Some(DynResetEvents::new(backend));
        self
    }

    /// Adds that guests are saved to disk.
    #[must_use]
    pub fn with_save_to_disk(mut self, backend: &'a impl SaveToDisk) -> Self {
        self.save_to_disk = Some(DynSaveToDisk::new(backend));
        self
    }

    /// Adds snapshots.
    #[must_use]
    pub fn with_snapshots(mut self, backend: &'a impl Snapshots) -> Self {
        self.snapshots = Some(DynSnapshots::new(backend));
        self
    }

    /// Adds exports and imports.
    #[must_use]
    pub fn with_export(mut self, backend: &'a impl Export) -> Self {
        self.export = Some(DynExport::new(backend));
        self
    }

    /// Adds clones.
    #[must_use]
    pub fn with_clones(mut self, backend: &'a impl Clones) -> Self {
        self.clones = Some(DynClones::new(backend));
        self
    }

    /// Returns the same without `suspend` and `resume`.
    #[must_use]
    pub fn without_suspend(mut self) -> Self {
        self.plain.suspend = false;
        self
    }

    /// Returns the ability to forward ports while a VM runs, if the backend has it.
    pub fn port_forwarding(&self) -> Option<DynPortForwarding<'a>> {
        self.port_forwarding
    }

    /// Returns the ability to check a spec beforehand, if the backend has it.
    pub fn preflight(&self) -> Option<DynPreflight<'a>> {
        self.preflight
    }

    /// Returns the channel to a guest agent, if the backend has it.
    pub fn guest_agent(&self) -> Option<DynGuestAgentChannel<'a>> {
        self.guest_agent
    }

    /// Returns the ability to set a guest's clock, if the backend has it.
    pub fn guest_clock(&self) -> Option<DynGuestClock<'a>> {
        self.guest_clock
    }

    /// Returns the consoles whose past the backend itself has, if it has such.
    pub fn console_history(&self) -> Option<DynConsoleHistory<'a>> {
        self.console_history
    }

    /// Returns the reports of resets, if the backend has them.
    pub fn reset_events(&self) -> Option<DynResetEvents<'a>> {
        self.reset_events
    }

    /// Returns the ability to save guests to disk, if the backend has it.
    pub fn save_to_disk(&self) -> Option<DynSaveToDisk<'a>> {
        self.save_to_disk
    }

    /// Returns the ability to take snapshots, if the backend has it.
    pub fn snapshots(&self) -> Option<DynSnapshots<'a>> {
        self.snapshots
    }

    /// Returns the ability to export VMs and to import them, if the backend has it.
    pub fn export(&self) -> Option<DynExport<'a>> {
        self.export
    }

    /// Returns the ability to clone VMs, if the backend has it.
    pub fn clones(&self) -> Option<DynClones<'a>> {
        self.clones
    }

    /// Returns the abilities as data.
    pub fn capabilities(&self) -> Capabilities {
        Capabilities {
            port_forwarding: self.port_forwarding.is_some(),
            preflight: self.preflight.is_some(),
            guest_agent: self.guest_agent.is_some(),
            guest_clock: self.guest_clock.is_some(),
            console_history: self.console_history.is_some(),
            reset_events: self.reset_events.is_some(),
            save_to_disk: self.save_to_disk.is_some(),
            snapshots: self.snapshots.is_some(),
            export: self.export.is_some(),
            clones: self.clones.is_some(),
            ..self.plain
        }
    }
}

/// What a backend can do, as data, so that a caller need not try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether `suspend` and `resume` work.
    pub suspend: bool,
    /// Whether `stop` can ask the guest; otherwise `stop` kills when its timeout has passed.
    pub graceful_stop: bool,
    /// Whether there is a serial console.
    pub console: bool,
    /// Whether the console's socket serves many clients at a time. `VmManager` otherwise lets one
    /// client at a time attach, and reports its process to the next one.
    pub shared_console: bool,
    /// Whether `guest_ip` can find an address.
    pub guest_ip: bool,
    /// Whether ports of a VM that runs can be forwarded ([`PortForwarding`]).
    pub port_forwarding: bool,
    /// Whether a spec can be checked beforehand ([`Preflight`]).
    pub preflight: bool,
    /// Whether a guest agent can be reached ([`GuestAgentChannel`]).
    pub guest_agent: bool,
    /// Whether a guest's clock is set when it is resumed ([`GuestClock`]).
    pub guest_clock: bool,
    /// Whether the backend itself has the console's past ([`ConsoleHistory`]).
    pub console_history: bool,
    /// Whether a reset of a guest is noticed ([`ResetEvents`]).
    pub reset_events: bool,
    /// Whether a guest can be saved to disk ([`SaveToDisk`]).
    pub save_to_disk: bool,
    /// Whether snapshots can be taken ([`Snapshots`]).
    pub snapshots: bool,
    /// Whether VMs can be exported and imported ([`Export`]).
    pub export: bool,
    /// Whether VMs can be cloned ([`Clones`]).
    pub clones: bool,
    /// Whether the paths in a spec are files of this host, which the VMs open. `VmManager` then
    /// refuses disks that another VM writes to, and sizes below an image's.
    pub local_files: bool,
    /// Whether a VM is what lies in its directory of the home: `destroy` of a directory that was
    /// copied by hand removes the copy, and nothing of the original. A backend that finds VMs by
    /// their ids must not say so.
    pub vm_is_directory: bool,
    /// Whether `state` returns `Destroyed`, or `Failed` as interrupted, once any part of a VM was
    /// removed: a VM whose removal was interrupted before that can be used again.
    pub notices_missing_parts: bool,
}
