//! Shows the progress of a launch: a spinner on a terminal, and a line for each stage that has
//! ended.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmkit::image::ImageRef;
use vmkit::launch::{LaunchEvent, LaunchStage};
use vmkit::spec::VmName;

use crate::output;
use crate::progress::{ImageProgressBar, seconds};

/// The likely reasons for a guest that accepts no login, and what to do about them.
pub(crate) const MISSING: &str = "does this image have cloud-init and an SSH server? `vmkit console` looks in, `launch --no-wait` does not wait";
/// The same for a machine of a file, before the name of its VM.
pub(crate) const MISSING_IN_MACHINE: &str =
    "does its image have cloud-init and an SSH server? look in with `vmkit console";

/// The progress of a launch.
pub(crate) struct LaunchProgress {
    image: String,
    vm: Option<VmName>,
    pull: Option<ImageProgressBar>,
    /// Hidden if standard error is no terminal.
    spinner: ProgressBar,
    stages: Vec<(LaunchStage, Duration)>,
}

impl LaunchProgress {
    /// Creates the progress, which shows nothing yet.
    pub(crate) fn new(image: Option<&ImageRef>) -> Self {
        let style = ProgressStyle::with_template("{msg}  {spinner} {elapsed}");
        let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10))
            .with_style(style.expect("the template is part of the program"));
        let image = image.map(output::printable).unwrap_or_default();
        Self { image, vm: None, pull: None, spinner, stages: Vec::new() }
    }

    /// Shows an event.
    pub(crate) fn hear(&mut self, event: LaunchEvent) {
        match event {
            LaunchEvent::Named(vm) => self.vm = Some(vm),
            LaunchEvent::Began(LaunchStage::Image) => {}
            LaunchEvent::Began(stage) => {
                self.spinner.set_message(stage.to_string());
                self.spinner.reset_elapsed();
                self.spinner.enable_steady_tick(Duration::from_millis(200));
            }
            LaunchEvent::Pulling(progress) => {
                let image = &self.image;
                self.pull.get_or_insert_with(|| ImageProgressBar::new(image)).show(progress);
            }
            LaunchEvent::CloudInit(stage) => {
                self.spinner.set_message(output::printable(format_args!("cloud-init: {stage}")));
            }
            LaunchEvent::Notice(text) => {
                let line = output::printable(format_args!("{text}: {MISSING}"));
                self.spinner.suspend(|| output::warning(line));
            }
            LaunchEvent::Ended(stage, took) => {
                self.pull = None;
                self.stages.push((stage, took));
                let line = format!("{stage:<10} {:>8}", seconds(took));
                self.spinner.suspend(|| output::status(line));
            }
            _ => {}
        }
    }

    /// Removes the spinner from the terminal.
    pub(crate) fn finish(&mut self) {
        self.pull = None;
        self.spinner.finish_and_clear();
    }

    /// Returns the VM, once it may exist.
    pub(crate) fn vm(&self) -> Option<&VmName> {
        self.vm.as_ref()
    }

    /// Returns how long each stage took.
    pub(crate) fn stages(&self) -> &[(LaunchStage, Duration)] {
        &self.stages
    }
}
