//! `vmkit launch`.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, ValueEnum};
use vmkit::Error;
use vmkit::image::{ImageRef, PullPolicy};
use vmkit::launch::{
    CopyOptions, LaunchFailed, LaunchNaming, LaunchOptions, LaunchStage, LaunchUntil, LaunchedVm, launch,
    launch_from, name_stem,
};
use vmkit::spec::{Blueprint, VmName, VmSource};
use vmkit::ssh::GuestCommand;

use crate::commands::exec::terminal;
use crate::commands::machine::SpecArgs;
use crate::console::signals::{CaughtSignals, die_of};
use crate::context::{CliManager, CommandContext};
use crate::failure::Failure;
use crate::launching::{LaunchProgress, MISSING};
use crate::remote::{self, Interaction, agent};
use crate::values::seconds;
use crate::{human, json, output};

/// Create a VM from an image, or from another VM, boot it, and wait until a login works and
/// cloud-init has ended.
///
/// The image is fetched unless it is local already. The VM gets a key and a host key of its own, so
/// `vmkit shell` and `vmkit exec` need no setup. If the launch fails, the VM is left for
/// inspection.
#[derive(Debug, Args)]
pub(crate) struct LaunchArgs {
    /// The image: debian:12, a file, an https:// address, or oci://REGISTRY/NAME:TAG.
    #[arg(value_name = "IMAGE", required_unless_present = "from")]
    image: Option<ImageRef>,
    /// Copy a VM instead: fork one that runs, or a snapshot with its memory, and clone any other.
    /// The copy has the configuration of its source; `--name` names it.
    #[arg(long, value_name = "VM[:SNAPSHOT]", conflicts_with_all = FROM_IMAGE)]
    from: Option<VmSource>,
    /// The VM's name [else: derived from the image's, such as debian-1].
    name: Option<VmName>,
    /// The VM's name, like NAME.
    #[arg(long = "name", value_name = "NAME", conflicts_with = "name")]
    named: Option<VmName>,
    /// Run this in the guest once it is ready, and exit with its exit code.
    #[arg(value_name = "COMMAND", last = true)]
    command: Vec<OsString>,
    /// Remove the VM once COMMAND has ended, or if the launch fails or is interrupted.
    #[arg(long, requires = "command")]
    rm: bool,
    /// Boot the VM without waiting until it is ready.
    #[arg(long, conflicts_with_all = ["command", "timeout"])]
    no_wait: bool,
    /// How long the guest may take from its start until it is ready.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
    /// When to fetch the image.
    #[arg(long, value_enum, default_value_t = PullWhen::Missing)]
    pull: PullWhen,
    /// Print the VM and how long each stage took, as a JSON object.
    #[arg(long, conflicts_with = "command")]
    json: bool,
    // Last, since options after a heading are listed below it.
    #[command(flatten)]
    options: SpecArgs,
}

/// What describes a VM that is created from an image.
const FROM_IMAGE: [&str; 7] =
    ["image", "name", "pull", "SpecFields", "SpecArgs", "NetworkArgs", "CloudInitArgs"];

/// When an image is fetched.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PullWhen {
    /// If it is not local yet.
    Missing,
    /// If the server has a newer one.
    Newer,
    /// Never.
    Never,
}

/// What is launched.
enum LaunchRequest {
    Image(Box<LaunchOptions>),
    Copy(CopyOptions),
}

/// How the command ended.
enum LaunchEnd {
    /// Regularly, with this exit code.
    Well(u8),
    /// By a signal to this process.
    Signal(i32),
}

impl LaunchArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let ended = context.block_on(async {
            for name in manager.remove_orphans().await? {
                output::progress(format_args!(
                    "{name}: removed, since the command that it belonged to has ended"
                ));
            }
            let mut signals = CaughtSignals::catch().map_err(Error::io("watch for", "signals"))?;
            self.with_signals(context, &manager, &mut signals).await
        })?;
        match ended {
            LaunchEnd::Well(0) => Ok(()),
            LaunchEnd::Well(code) => Err(Failure::Exit(code)),
            LaunchEnd::Signal(signal) => {
                die_of(signal);
                Err(Failure::Exit(255))
            }
        }
    }

    /// Launches the VM, runs the command, and removes what has to be removed, also after a failure.
    async fn with_signals(
        self,
        context: &CommandContext,
        manager: &CliManager,
        signals: &mut CaughtSignals,
    ) -> Result<LaunchEnd, Failure> {
        let (rm, timeout, mut show) = (self.rm, self.timeout, LaunchProgress::new(self.image.as_ref()));
        let bell = signals.bell().map_err(Error::io("watch for", "signals"))?;
        let (json, mut command) = (self.json, GuestCommand::new(self.command.clone()));
        // Checked before anything is created.
        command.line()?;
        let request = self.request()?;
        let mut hear = |event| show.hear(event);
        let launching = async {
            match request {
                LaunchRequest::Image(options) => {
                    let store = context.images()?;
                    Ok::<_, Failure>(launch(manager, &store, *options, &mut hear).await)
                }
                LaunchRequest::Copy(options) => Ok(launch_from(manager, options, &mut hear).await),
            }
        };
        let outcome = tokio::select! {
            launched = launching => Ok(launched?),
            signal = signals.next(&bell) => Err(signal),
        };
        show.finish();
        let mut ended = match outcome {
            Err(signal) => Ok(LaunchEnd::Signal(signal)),
            Ok(Err(failure)) => Err(failed(failure, rm)),
            Ok(Ok(launched)) => {
                warn(&launched);
                match command.argv.is_empty() {
                    true => tell(&launched, &show, json),
                    false => run_in(manager, &launched, &mut command, timeout).await.inspect_err(|_| {
                        if !rm {
                            let name = launched.vm.name();
                            output::warning(format_args!("the VM `{name}` is left; {}", left(name)));
                        }
                    }),
                }
            }
        };
        if rm {
            // The VM's owner ended with the launch.
            ended = removed(manager, show.vm(), ended).await;
        } else if let (Ok(LaunchEnd::Signal(_)), Some(name)) = (&ended, show.vm()) {
            output::warning(format_args!("interrupted; {}", left(name)));
        }
        ended
    }

    fn request(self) -> Result<LaunchRequest, Error> {
        let until = if self.no_wait { LaunchUntil::Booted } else { LaunchUntil::Ready };
        let image = match (self.from, self.image) {
            (Some(source), _) => {
                let mut options = CopyOptions::new(source);
                if let Some(name) = self.named {
                    (options.name, options.naming) = (name, LaunchNaming::Exact);
                }
                (options.until, options.timeout, options.ephemeral) = (until, self.timeout, self.rm);
                return Ok(LaunchRequest::Copy(options));
            }
            (None, Some(image)) => image,
            (None, None) => return Err(Error::invalid("IMAGE", "", "an image, or a VM with --from")),
        };
        let (name, naming) = match self.name.or(self.named) {
            Some(name) => (name, LaunchNaming::Exact),
            None => (name_stem(&image), LaunchNaming::Numbered),
        };
        let spec = self.options.spec(name, Some(&image))?;
        let mut options = LaunchOptions::new(Blueprint::new(spec)?.with_access());
        options.naming = naming;
        options.pull = match self.pull {
            PullWhen::Missing => PullPolicy::Missing,
            PullWhen::Newer => PullPolicy::Newer,
            PullWhen::Never => PullPolicy::Never,
        };
        (options.until, options.timeout, options.ephemeral) = (until, self.timeout, self.rm);
        Ok(LaunchRequest::Image(Box::new(options)))
    }
}

/// Removes the VM of a completed launch, and returns how the launch ended; it is a failure if the
/// VM can't be removed.
async fn removed(
    manager: &CliManager,
    vm: Option<&VmName>,
    ended: Result<LaunchEnd, Failure>,
) -> Result<LaunchEnd, Failure> {
    let removed = match vm {
        Some(name) => manager.remove_orphan(name).await.map(drop),
        // The launch may have been interrupted while it created the VM.
        None => manager.remove_orphans().await.map(drop),
    };
    let Err(error) = removed else { return ended };
    match ended {
        Ok(LaunchEnd::Well(_)) => Err(error.into()),
        ended => {
            let name = vm.map_or_else(|| "the VM".to_owned(), ToString::to_string);
            output::warning(format_args!(
                "{name} was not removed, and the next `vmkit ls` tries again: {}",
                error.chain()
            ));
            ended
        }
    }
}

/// Warns of errors that cloud-init has ignored: the guest may differ from what was requested.
fn warn(launched: &LaunchedVm) {
    for warning in launched.cloud_init.iter().flat_map(|done| &done.warnings) {
        output::warning(format_args!("{}: cloud-init: {warning}", launched.vm.name()));
    }
}

/// Prints the launched VM.
fn tell(launched: &LaunchedVm, show: &LaunchProgress, json: bool) -> Result<LaunchEnd, Failure> {
    let vm = &launched.vm;
    if json {
        output::json(&json::LaunchedView::of(
            vm,
            launched.image.as_deref().unwrap_or_default(),
            show.stages(),
        ))?;
    } else {
        let name = vm.name();
        let way_in = launched.session.as_ref().map(|_| format!("; `vmkit shell {name}` opens a shell"));
        output::progress(format_args!("{name}: {}{}", human::with_ports(vm), way_in.unwrap_or_default()));
        output::text(vm.name())?;
    }
    Ok(LaunchEnd::Well(0))
}

/// Runs the command in the VM, on the session that waited for it; without a network with the guest
/// agent, which has the same timeout as an SSH server.
async fn run_in(
    manager: &CliManager,
    launched: &LaunchedVm,
    command: &mut GuestCommand,
    timeout: Duration,
) -> Result<LaunchEnd, Failure> {
    let attended = match &launched.session {
        Some(session) => {
            command.terminal = remote::is_at_terminal().then(terminal);
            remote::attend(session, command, true).await?
        }
        None => agent::attend(manager, &launched.vm, command, true, timeout).await?,
    };
    Ok(match attended {
        Interaction::Exit(exit) => LaunchEnd::Well(exit.shell_code()),
        Interaction::Signal(signal) => LaunchEnd::Signal(signal),
    })
}

/// Returns the failure of a launch, after printing what it left behind.
fn failed(failed: LaunchFailed, rm: bool) -> Failure {
    if let Some(name) = failed.vm.as_ref().filter(|_| !rm) {
        output::warning(format_args!("{failed}; {}", left(name)));
    }
    let waits = matches!(failed.stage, LaunchStage::Network | LaunchStage::Ssh);
    let failure = Box::new(Failure::from(failed.error));
    match waits {
        true => Failure::Hinted { failure, hint: MISSING.to_owned() },
        false => *failure,
    }
}

fn left(name: &VmName) -> String {
    format!("`vmkit logs {name}` and `vmkit info {name}` show the VM, `vmkit rm --force {name}` removes it")
}
