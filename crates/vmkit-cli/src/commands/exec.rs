//! `vmkit exec`.

use std::env;
use std::ffi::OsString;
use std::io;

use clap::{Args, ValueEnum};
use vmkit::error::{LiveResource, Subject};
use vmkit::spec::{NetworkConfig, VmName};
use vmkit::ssh::{GuestCommand, TerminalSpec};
use vmkit::{Error, ErrorKind, VmState};

use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::remote::way::SshArgs;
use crate::remote::{self, agent};

/// Run a program in a guest with this command's streams, and exit with its exit code.
///
/// The arguments are passed unchanged, and no shell of the guest parses them: for pipes and
/// variables of the guest run `sh -c '…'`. The program gets a terminal if this command has one; a
/// new line and `~.` leave it. If a signal ends the program, the exit code is 128 plus the signal's
/// number.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The VM.
    pub(super) name: VmName,
    #[command(flatten)]
    way: SshArgs,
    #[command(flatten)]
    surroundings: ExecEnv,
    /// Allocate a terminal even if there is none here.
    #[arg(long, short = 't', conflicts_with = "no_tty")]
    tty: bool,
    /// Allocate no terminal even if there is one here.
    #[arg(long, short = 'T')]
    no_tty: bool,
    /// Close the program's standard input.
    #[arg(long, short = 'n')]
    no_stdin: bool,
    /// Choose how the guest is reached.
    #[arg(long, value_enum, default_value_t = ExecVia::Auto)]
    via: ExecVia,
    /// Exit with this code if vmkit itself fails, to distinguish it from the program's exit codes.
    #[arg(long, value_name = "CODE")]
    error_code: Option<u8>,
    /// The program and its arguments.
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// The environment of a program in the guest.
#[derive(Debug, Args)]
pub(crate) struct ExecEnv {
    /// Run the program in this directory of the guest [else: the user's home].
    #[arg(long, short = 'w', value_name = "DIR")]
    workdir: Option<OsString>,
    /// Set an environment variable; may be given more than once.
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    env: Vec<String>,
}

/// How a guest is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExecVia {
    /// SSH; the guest agent if the VM has no network, or no key to log in with.
    Auto,
    /// SSH.
    Ssh,
    /// The guest agent: needs no network, and prints the output at the end.
    Agent,
}

impl ExecEnv {
    /// Adds the environment to a program.
    pub(crate) fn around(self, argv: Vec<OsString>) -> Result<GuestCommand, Error> {
        let mut command = GuestCommand::new(argv);
        command.dir = self.workdir;
        for variable in self.env {
            let Some((name, value)) = variable.split_once('=') else {
                return Err(Error::invalid("env", variable, "write NAME=VALUE"));
            };
            command.env.push((name.to_owned(), value.into()));
        }
        Ok(command)
    }
}

/// Returns the terminal to allocate in a guest, like the one of this process.
pub(crate) fn terminal() -> TerminalSpec {
    let term = env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
    let size = vmkit::ssh::TerminalSize { columns: 80, rows: 24 };
    TerminalSpec::like(io::stdin(), &term).unwrap_or_else(|_| TerminalSpec::new(term, size))
}

impl ExecArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let own_code = self.error_code;
        match self.exit_code(context) {
            Ok(0) => Ok(()),
            Ok(code) => Err(Failure::Exit(code)),
            Err(failure) => Err(match own_code {
                Some(code) => Failure::Own { code, failure: Box::new(failure) },
                None => failure,
            }),
        }
    }

    fn exit_code(self, context: &CommandContext) -> Result<u8, Failure> {
        let mut command = self.surroundings.around(self.command)?;
        // Checked before any connection.
        command.line()?;
        let at_terminal = self.tty || (!self.no_tty && remote::is_at_terminal());
        let manager = context.manager()?;
        context.block_on(async {
            if self.via == ExecVia::Agent || goes_by_agent(self.via, &self.way, &manager, &self.name).await? {
                check_for_agent(&self.way, self.tty)?;
                let vm = manager.info(&self.name).await?;
                if vm.state != VmState::Running {
                    return Err(Error::NotLive { what: LiveResource::GuestAgent, state: vm.state }.into());
                }
                let attended =
                    agent::attend(&manager, &vm, &command, !self.no_stdin, self.way.timeout()).await?;
                return Ok(attended.or_die().shell_code());
            }
            let session = self.way.session(&manager, &self.name).await?;
            command.terminal = at_terminal.then(terminal);
            Ok(remote::run(&session, &command, !self.no_stdin).await?.shell_code())
        })
    }
}

/// Refuses options that the guest agent can't honour: it runs everything as root, without a
/// terminal.
fn check_for_agent(way: &SshArgs, tty: bool) -> Result<(), Error> {
    let asked = way.asked().or(tty.then(|| ("tty", "true".to_owned())));
    let Some((option, value)) = asked else { return Ok(()) };
    let expected = "the guest agent runs everything as root, without a login or a terminal, and SSH can't be used: omit this option";
    Err(Error::invalid(option, value, expected))
}

/// Returns whether SSH has no way into the guest, and the guest agent may have one.
async fn goes_by_agent(
    via: ExecVia,
    way: &SshArgs,
    manager: &CliManager,
    name: &VmName,
) -> Result<bool, Failure> {
    if via != ExecVia::Auto {
        return Ok(false);
    }
    let error = match manager.ssh_target(name, &way.login()?).await {
        Ok(_) => return Ok(false),
        Err(error) => error,
    };
    let no_vm = matches!(error, Error::NotFound { what: Subject::Vm, .. });
    if no_vm || !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) {
        return Err(error.into());
    }
    let vm = manager.info(name).await?;
    if !matches!(vm.spec.network(), NetworkConfig::None) && way.asked().is_some() {
        // Options for the login ask for SSH, so their error is reported.
        return Err(error.into());
    }
    match vm.run.and_then(|run| run.agent) {
        Some(_) => Ok(true),
        None => Err(error.into()),
    }
}
