//! The progress of a launch, as data.
//!
//! Pure, but for the clock.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::image::PullProgress;
use crate::spec::VmName;

/// The stages of a launch, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LaunchStage {
    /// The image is found, or fetched.
    Image,
    /// The VM is made: its disk, its keys, its seed.
    Disk,
    /// The hypervisor starts.
    Boot,
    /// The guest's address becomes known.
    Network,
    /// The guest's SSH server is reached and accepts the key.
    Ssh,
    /// cloud-init does the rest.
    CloudInit,
}

impl LaunchStage {
    /// Returns the stage's name, such as `cloud-init`.
    pub fn as_str(self) -> &'static str {
        match self {
            LaunchStage::Image => "image",
            LaunchStage::Disk => "disk",
            LaunchStage::Boot => "boot",
            LaunchStage::Network => "network",
            LaunchStage::Ssh => "ssh",
            LaunchStage::CloudInit => "cloud-init",
        }
    }
}

impl fmt::Display for LaunchStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Something that happened on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LaunchEvent {
    /// The VM is there, by this name.
    Named(VmName),
    /// A stage has begun.
    Began(LaunchStage),
    /// The image has come so far.
    Pulling(PullProgress),
    /// The guest is up and not as it has to be: this is odd about it. The launch goes on.
    Notice(String),
    /// cloud-init is in this stage of its own, such as `modules-config`.
    CloudInit(String),
    /// A stage has ended well, after so long.
    Ended(LaunchStage, Duration),
}

/// Why a launch did not reach its end.
#[derive(Debug)]
#[non_exhaustive]
pub struct LaunchFailed {
    /// Where it stood.
    pub stage: LaunchStage,
    /// The VM, where there is one; it is left as it is.
    pub vm: Option<VmName>,
    /// What went wrong.
    pub error: Error,
}

impl fmt::Display for LaunchFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the launch failed at the stage {}", self.stage)
    }
}

impl std::error::Error for LaunchFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Receives each stage's beginning and end.
pub(super) struct StageReporter<'a> {
    tell: &'a mut (dyn FnMut(LaunchEvent) + Send),
    stage: LaunchStage,
    since: Option<Instant>,
    name: Option<VmName>,
}

impl<'a> StageReporter<'a> {
    pub(super) fn new(tell: &'a mut (dyn FnMut(LaunchEvent) + Send)) -> Self {
        Self { tell, stage: LaunchStage::Image, since: None, name: None }
    }

    pub(super) fn tell(&mut self, event: LaunchEvent) {
        (self.tell)(event);
    }

    pub(super) fn begin(&mut self, stage: LaunchStage) {
        self.end();
        (self.stage, self.since) = (stage, Some(Instant::now()));
        self.tell(LaunchEvent::Began(stage));
    }

    pub(super) fn end(&mut self) {
        if let Some(since) = self.since.take() {
            self.tell(LaunchEvent::Ended(self.stage, since.elapsed()));
        }
    }

    /// From here on there is a VM of this name.
    pub(super) fn name(&mut self, name: &VmName) {
        self.name = Some(name.clone());
        self.tell(LaunchEvent::Named(name.clone()));
    }

    pub(super) fn failed(self, error: Error) -> LaunchFailed {
        LaunchFailed { stage: self.stage, vm: self.name, error }
    }
}
