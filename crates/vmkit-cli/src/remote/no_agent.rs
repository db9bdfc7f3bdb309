//! The guest agent where there is none: only QEMU's guests have one.

use std::time::Duration;

use vmkit::ssh::GuestCommand;
use vmkit::{Error, VmHandle};

use super::Interaction;
use crate::context::CliManager;
use crate::failure::Failure;

/// Returns that there is no way by a guest agent.
///
/// # Errors
/// `Unsupported`, always.
pub(crate) async fn attend(
    _manager: &CliManager,
    vm: &VmHandle,
    _command: &GuestCommand,
    _feed_stdin: bool,
    _timeout: Duration,
) -> Result<Interaction, Failure> {
    let what = format!("a guest agent in the VM `{}`", vm.name());
    Err(Error::Unsupported { backend: vm.backend.clone(), what }.into())
}
