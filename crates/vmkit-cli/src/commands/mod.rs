//! The commands, a file for each.

mod clone;
mod completions;
mod console;
mod cp;
mod create;
pub(crate) mod doctor;
mod exec;
mod export;
mod fork;
mod forward;
mod image;
mod import;
mod info;
mod init;
mod ip;
mod launch;
mod logs;
mod ls;
mod machine;
mod plan;
mod project;
mod restart;
mod resume;
mod rm;
mod schema;
mod set;
mod shell;
mod snapshot;
mod ssh_config;
mod start;
mod stop;
mod suspend;
mod wait;

use std::time::Duration;

use clap::{Args, Subcommand};
use vmkit::spec::VmName;
use vmkit::{VmHandle, VmState};

use crate::context::{CliManager, CommandContext, has_hypervisor_log};
use crate::failure::Failure;
use crate::values::seconds;
use crate::{human, json, output, several};

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Launch(Box<launch::LaunchArgs>),
    Create(Box<create::CreateArgs>),
    Start(start::StartArgs),
    Stop(stop::StopArgs),
    Restart(restart::RestartArgs),
    Suspend(suspend::SuspendArgs),
    Resume(resume::ResumeArgs),
    #[command(visible_aliases = ["delete", "remove"])]
    Rm(rm::RmArgs),
    #[command(visible_aliases = ["list", "ps"])]
    Ls(ls::LsArgs),
    Info(info::InfoArgs),
    Ip(ip::IpArgs),
    Wait(wait::WaitArgs),
    Set(Box<set::SetArgs>),
    Snapshot(snapshot::SnapshotArgs),
    Export(export::ExportArgs),
    Import(import::ImportArgs),
    Clone(clone::CloneArgs),
    Fork(fork::ForkArgs),
    Forward(forward::ForwardArgs),
    #[command(visible_alias = "ssh")]
    Shell(shell::ShellArgs),
    Exec(Box<exec::ExecArgs>),
    Cp(Box<cp::CpArgs>),
    SshConfig(ssh_config::SshConfigArgs),
    Init(init::InitArgs),
    Up(project::up::UpArgs),
    Down(project::down::DownArgs),
    Plan(project::plan::PlanArgs),
    Reload(project::reload::ReloadArgs),
    Provision(project::provision::ProvisionArgs),
    Status(project::status::StatusArgs),
    Console(console::ConsoleArgs),
    Logs(logs::LogsArgs),
    Image(image::ImageArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Schema(schema::SchemaArgs),
    /// Print the version.
    Version,
}

impl Command {
    /// Runs the command.
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let vm = self.vm().cloned();
        let done = self.go(context);
        match vm {
            Some(vm) => done.map_err(|failure| {
                let failure = failure.of_vm(&vm);
                match context.manager() {
                    Ok(manager) => failure.looked_up(&|vm| has_hypervisor_log(&manager, vm)),
                    Err(_) => failure,
                }
            }),
            None => done,
        }
    }

    /// Returns the one existing VM that the command is about, if any.
    fn vm(&self) -> Option<&VmName> {
        match self {
            Command::Info(info::InfoArgs { name, .. })
            | Command::Ip(ip::IpArgs { name, .. })
            | Command::Wait(wait::WaitArgs { name, .. })
            | Command::Forward(forward::ForwardArgs { name, .. })
            | Command::Shell(shell::ShellArgs { name, .. })
            | Command::Console(console::ConsoleArgs { name, .. })
            | Command::Logs(logs::LogsArgs { name, .. }) => Some(name),
            Command::Exec(exec) => Some(&exec.name),
            Command::Set(set) => Some(&set.name),
            Command::Snapshot(snapshot) => Some(snapshot.vm()),
            Command::Export(export) => Some(&export.name),
            Command::Clone(clone) => Some(&clone.source.vm),
            Command::Fork(fork) => Some(&fork.source.vm),
            _ => None,
        }
    }

    fn go(self, context: &CommandContext) -> Result<(), Failure> {
        match self {
            Command::Launch(command) => command.run(context),
            Command::Create(command) => command.run(context),
            Command::Start(command) => command.run(context),
            Command::Stop(command) => command.run(context),
            Command::Restart(command) => command.run(context),
            Command::Suspend(command) => command.run(context),
            Command::Resume(command) => command.run(context),
            Command::Rm(command) => command.run(context),
            Command::Ls(command) => command.run(context),
            Command::Info(command) => command.run(context),
            Command::Ip(command) => command.run(context),
            Command::Wait(command) => command.run(context),
            Command::Set(command) => command.run(context),
            Command::Snapshot(command) => command.run(context),
            Command::Export(command) => command.run(context),
            Command::Import(command) => command.run(context),
            Command::Clone(command) => command.run(context),
            Command::Fork(command) => command.run(context),
            Command::Forward(command) => command.run(context),
            Command::Shell(command) => command.run(context),
            Command::Exec(command) => command.run(context),
            Command::Cp(command) => command.run(context),
            Command::SshConfig(command) => command.run(context),
            Command::Init(command) => command.run(context),
            Command::Up(command) => command.run(context),
            Command::Down(command) => command.run(context),
            Command::Plan(command) => command.run(context),
            Command::Reload(command) => command.run(context),
            Command::Provision(command) => command.run(context),
            Command::Status(command) => command.run(context),
            Command::Console(command) => command.run(context),
            Command::Logs(command) => command.run(context),
            Command::Image(command) => command.run(context),
            Command::Doctor(command) => command.run(context),
            Command::Completions(command) => command.run(),
            Command::Schema(command) => command.run(),
            Command::Version => output::text(format_args!("vmkit {}", env!("CARGO_PKG_VERSION"))),
        }
    }
}

/// The VMs that a command changes, and how it prints them.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// The VMs.
    #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
    names: Vec<VmName>,
    /// All VMs in a matching state, instead of names.
    #[arg(long)]
    all: bool,
    /// Print each VM afterwards, as one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// How long a guest has to shut down.
#[derive(Debug, Args)]
pub(crate) struct StopTimeout {
    /// How long the guest may take to shut down before it is killed; 0: kill at once.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
}

impl TargetArgs {
    /// Returns the named VMs, or with `--all` those in a state that `is_meant` accepts.
    fn names(
        &self,
        context: &CommandContext,
        manager: &CliManager,
        is_meant: fn(&VmState) -> bool,
    ) -> Result<Vec<VmName>, Failure> {
        match self.all {
            true => several::all(context, manager, is_meant),
            false => Ok(self.names.clone()),
        }
    }

    /// Runs an operation on each VM and prints the result; `doing` is the progress shown meanwhile.
    fn operate<F>(
        self,
        context: &CommandContext,
        doing: &str,
        is_meant: fn(&VmState) -> bool,
        operation: impl Fn(CliManager, VmName) -> F,
    ) -> Result<(), Failure>
    where
        F: Future<Output = vmkit::Result<VmHandle>> + Send + 'static,
    {
        let manager = context.manager()?;
        let json = self.json;
        let names = self.names(context, &manager, is_meant)?;
        for name in &names {
            output::progress(format_args!("{name}: {doing} …"));
        }
        context.block_on(several::each(&manager, names, operation, |_, vm| tell(&vm, json)))
    }
}

/// Prints a VM after an operation: as JSON if requested, else as progress on a terminal.
fn tell(vm: &VmHandle, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(&json::VmView::of(vm));
    }
    output::progress(format_args!("{}: {}", vm.name(), human::with_ports(vm)));
    Ok(())
}
