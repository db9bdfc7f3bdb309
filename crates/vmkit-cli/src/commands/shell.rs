//! `vmkit shell`.

use clap::Args;
use vmkit::spec::{NetworkConfig, VmName};
use vmkit::{Error, VmHandle, VmState};

use super::exec::{ExecEnv, terminal};
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::remote;
use crate::remote::way::SshArgs;

/// Open a shell in a guest, and exit with its exit code.
///
/// A guest that is still booting is waited for. A new line and `~.` leave a shell that hangs. If
/// standard input is no terminal, the shell runs it as its script.
#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// The VM.
    pub(super) name: VmName,
    #[command(flatten)]
    way: SshArgs,
    #[command(flatten)]
    surroundings: ExecEnv,
}

/// Returns the error for a VM without a network: a shell can't use the guest agent, which does not
/// stream.
fn no_network(vm: VmHandle) -> Error {
    let name = vm.name();
    let what = format!(
        "a shell in the VM `{name}`, which has no network: `vmkit exec {name} -- COMMAND` runs a command \
         with its guest agent, `vmkit console {name}` opens its console"
    );
    Error::Unsupported { backend: vm.backend, what }
}

impl ShellArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let mut command = self.surroundings.around(Vec::new())?;
        command.line()?;
        let manager = context.manager()?;
        let exit = context.block_on(async {
            let vm = manager.info(&self.name).await?;
            if matches!(vm.spec.network(), NetworkConfig::None) && vm.state == VmState::Running {
                return Err(no_network(vm).into());
            }
            let session = self.way.session(&manager, &self.name).await?;
            command.terminal = remote::is_at_terminal().then(terminal);
            remote::run(&session, &command, true).await
        })?;
        match exit.shell_code() {
            0 => Ok(()),
            code => Err(Failure::Exit(code)),
        }
    }
}
