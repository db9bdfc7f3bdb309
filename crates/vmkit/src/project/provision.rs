//! What is done inside a guest: it is entered, provisioned, and found ready.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use uuid::Uuid;

use super::archive::TarArchive;
use super::event::{EventKind, EventListener, MachineAction, ProjectEvent, ProjectReport};
use super::guests::{GuestConnector, GuestInput};
use super::inside::GuestShell;
use super::job::{MachineJob, RunContext};
use super::look::MachineVm;
use super::ports;
use super::provisioned::{ProvisionRecord, StepEnd, StepRecord};
use super::script::{GuestScript, TaskToken};
use super::task::{GuestTask, TaskKind, ToDo, UnreadableSource, tasks, to_do};
use super::{ProjectManager, ProjectOptions, ProvisionPolicy, chosen, unknown};
use crate::blocking::blocking;
use crate::boundedlog::BoundedLog;
use crate::error::{Error, ErrorKind, LiveResource, Result, Subject};
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::steps::step;
use crate::vmfile::{MachineConfig, Project, ReadyProbes};

/// The longest line that is told as one.
const MOST_LINE_BYTES: usize = 4096;

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Provisions machines that run: those that were chosen, and nothing but that.
    ///
    /// # Errors
    /// `NotFound` for a name that no machine, or none of the chosen ones' steps, has; `Busy`; those
    /// of the home.
    pub async fn provision(
        &self,
        project: &Project,
        what: &ProvisionPolicy,
        options: &ProjectOptions,
        listener: EventListener,
    ) -> Result<ProjectReport> {
        let machines = chosen(project, &options.machines)?;
        let known: Vec<String> =
            machines.iter().flat_map(|machine| tasks(machine)).map(|task| task.name).collect();
        if let Some(name) = what.steps.iter().find(|name| !known.contains(name)) {
            return Err(unknown(Subject::Step, name, known.iter()));
        }
        let _lock = self.lock(project, options, &listener).await?;
        let what = Arc::new(what.clone());
        let work = RunContext::new(project, options, listener);
        let report = self.in_turn(&work, machines, |mut turn| {
            let what = Arc::clone(&what);
            async move {
                let end = turn.provision_running(&what).await;
                turn.report(end)
            }
        });
        Ok(report.await)
    }
}

impl<H: Backend + 'static, G: GuestConnector> MachineJob<H, G> {
    async fn provision_running(&mut self, what: &ProvisionPolicy) -> Result<()> {
        let state = match self.engine.look(&self.work.project, &self.machine).await? {
            MachineVm::Vm { vm, .. } => vm.state,
            MachineVm::Nothing => {
                return Err(Error::not_found(Subject::Vm, &self.machine.vm));
            }
        };
        if state != VmState::Running {
            return Err(Error::NotLive { what: LiveResource::GuestLogin, state });
        }
        let to_do = self.to_do(what).await?;
        if to_do.is_empty() {
            return Ok(());
        }
        let inside = self.enter(Instant::now() + self.machine.ready.timeout).await?;
        self.provision(&inside, to_do).await
    }

    /// Provisions a running machine, and waits until it is ready.
    pub(super) async fn fit(&mut self) -> Result<()> {
        let to_do = self.to_do(&ProvisionPolicy::default()).await?;
        let ready = self.machine.ready.clone();
        if to_do.is_empty() && !asks_guest(&ready) {
            return Ok(());
        }
        let began = Instant::now();
        if !self.machine.is_entered() {
            self.tell(EventKind::Awaiting("its readiness".to_owned()));
            let listens = self.engine.listens(&self.machine, &ready.tcp, began + ready.timeout).await;
            return listens.map_err(bounded);
        }
        let inside = self.enter(began + ready.timeout).await?;
        let left = ready.timeout.saturating_sub(began.elapsed());
        self.provision(&inside, to_do).await?;
        if !ready.tcp.is_empty() || ready.command.is_some() {
            self.tell(EventKind::Awaiting("its readiness".to_owned()));
            // The steps have limits of their own, so what they took does not count.
            inside.answers(&ready, Instant::now() + left).await.map_err(bounded)?;
        }
        Ok(())
    }

    /// Returns what is to be done in the guest; files of the host are looked at on a thread that
    /// may wait for them.
    async fn to_do(&self, what: &ProvisionPolicy) -> Result<Vec<ToDo>> {
        let (kept, what) = (self.kept(), what.clone());
        let mut tasks = tasks(&self.machine);
        if !what.steps.is_empty() {
            tasks.retain(|task| what.steps.contains(&task.name));
        }
        let (provisioned, digests) = (kept.provisioned()?, self.work.digests.clone());
        let looked = blocking(move || to_do(tasks, &provisioned, what.force, &digests)).await?;
        looked.map_err(UnreadableSource::into_error)
    }

    /// Waits until the guest can be worked in.
    async fn enter(&self, deadline: Instant) -> Result<GuestShell<G::Guest>> {
        self.tell(EventKind::Awaiting("SSH".to_owned()));
        let mut notice = |text| self.tell(EventKind::Notice(text));
        let guest = self.engine.shared.guests.enter(&self.machine.vm, deadline, &mut notice).await?;
        let inside = GuestShell::new(guest, &self.machine.name);
        if self.machine.ready.cloud_init {
            self.tell(EventKind::Awaiting("cloud-init".to_owned()));
            inside.cloud_init(deadline).await?;
        }
        Ok(inside)
    }

    /// Does what is to be done, in order, until something fails.
    async fn provision(&mut self, inside: &GuestShell<G::Guest>, to_do: Vec<ToDo>) -> Result<()> {
        if to_do.is_empty() {
            return Ok(());
        }
        let kept = self.kept();
        let mut log = kept.log()?;
        let mut provisioned = kept.provisioned()?;
        if provisioned.has_loose_ends() {
            if provisioned.was_cut_off() {
                self.tell(EventKind::Awaiting("the end of the interrupted step".to_owned()));
            }
            // Nothing of an earlier time may go on beside what is begun now; what failed may have
            // left something, too.
            inside.end_tasks().await?;
        }
        for ToDo { task, why, digest, left_out } in to_do {
            let name = task.name.clone();
            self.tell(EventKind::Step { name: name.clone(), why });
            for path in left_out {
                self.tell(EventKind::LeftOut { step: name.clone(), path });
            }
            let digest = self.digest(&task, digest).await?;
            let script = task.script(&token()).map_err(UnreadableSource::into_error)?;
            let record = |end: StepEnd, provisioned: &mut ProvisionRecord| {
                provisioned.set(&task.key, StepRecord { digest: digest.clone(), end, at: now() });
                kept.write(provisioned)
            };
            record(StepEnd::Begun, &mut provisioned)?;
            log.append(format!("--- {name}: begun\n").as_bytes());
            let printer = StepPrinter::new(&name, &self.machine.name, &self.work.listener, &mut log);
            let ended = self.carry_out(inside, &task, &script, printer).await;
            let end = match &ended {
                Ok(end) => end.clone(),
                // The connection broke, and what it began may go on.
                Err(error @ Error::Ssh { .. }) => StepEnd::CutOff(error.to_string()),
                Err(error) => StepEnd::Failed(error.to_string()),
            };
            let how = end.failure().map(str::to_owned);
            log.append(
                match &how {
                    Some(how) => format!("--- {name}: failed: {how}\n").into_bytes(),
                    None => format!("--- {name}: done\n").into_bytes(),
                }
                .as_slice(),
            );
            record(end, &mut provisioned)?;
            ended?;
            if let Some(how) = how {
                let (machine, log) = (self.machine.name.clone(), kept.log_path());
                return Err(Error::Step { machine, step: name, how: how.into(), log });
            }
            self.done.push(MachineAction::Ran(name));
        }
        Ok(())
    }

    /// Returns what a task consists of now, where that was not looked at before.
    async fn digest(&self, task: &GuestTask, known: Option<String>) -> Result<String> {
        if let Some(digest) = known {
            return Ok(digest);
        }
        let (task, digests) = (task.clone(), self.work.digests.clone());
        blocking(move || task.digest(&digests)).await?.map_err(UnreadableSource::into_error)
    }

    /// Runs one task in the guest; returns how it ended.
    async fn carry_out(
        &self,
        inside: &GuestShell<G::Guest>,
        task: &GuestTask,
        script: &GuestScript,
        mut printer: StepPrinter<'_>,
    ) -> Result<StepEnd> {
        step("run a step in the guest").map_err(Error::io("run", &self.machine.name))?;
        let deadline = Instant::now() + task.limit;
        let mut print = |bytes: &[u8]| printer.print(bytes);
        let exit = match &task.what {
            TaskKind::Copy(copy) => {
                let (input, archive) = TarArchive::of(copy)?;
                let exit = inside.run(script, Box::pin(input), &mut print, deadline).await;
                if let Some((path, error)) = archive.failure().await {
                    return Err(task.unreadable("from", &path, error).into_error());
                }
                exit
            }
            TaskKind::Run { .. } => {
                let input: GuestInput = Box::pin(std::io::Cursor::new(script.input.clone()));
                inside.run_step(script, input, &mut print, deadline).await
            }
        };
        printer.end();
        match exit {
            Ok(exit) if exit.is_success() => Ok(StepEnd::Done),
            Ok(exit) => Ok(StepEnd::Failed(match task.script_named() {
                Some(script) => format!("{exit} of {script}"),
                None => exit.to_string(),
            })),
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                let late = format!("it did not end within {} s", task.limit.as_secs_f64());
                Ok(match inside.end_tasks().await {
                    Ok(()) => StepEnd::Failed(format!("{late}, and was ended")),
                    Err(error) => StepEnd::CutOff(format!("{late}, and may still run: {}", error.chain())),
                })
            }
            Err(error) => Err(error),
        }
    }
}

/// Returns whether a machine's readiness is asked of its guest.
pub(super) fn asks_guest(ready: &ReadyProbes) -> bool {
    ready.ssh || ready.cloud_init || !ready.tcp.is_empty() || ready.command.is_some()
}

impl<H: Backend + 'static, G> ProjectManager<H, G> {
    /// Waits until a guest that is not entered listens on these ports.
    pub(super) async fn listens(
        &self,
        machine: &MachineConfig,
        ports: &[u16],
        deadline: Instant,
    ) -> Result<()> {
        ports::listen(&self.shared.manager, &machine.vm, ports, deadline).await
    }
}

/// Says of what was awaited in vain which key bounds that.
fn bounded(error: Error) -> Error {
    match error {
        Error::TimedOut { awaited, after, console } => {
            let awaited = format!("{awaited}; `ready.timeout` says how long");
            Error::TimedOut { awaited, after, console }
        }
        error => error,
    }
}

fn token() -> TaskToken {
    TaskToken::new(Uuid::new_v4().as_u128())
}

/// Splits a step's output into lines, for the observer and for the log.
struct StepPrinter<'a> {
    step: &'a str,
    machine: &'a str,
    listener: &'a EventListener,
    log: &'a mut BoundedLog,
    line: Vec<u8>,
}

impl<'a> StepPrinter<'a> {
    fn new(step: &'a str, machine: &'a str, listener: &'a EventListener, log: &'a mut BoundedLog) -> Self {
        Self { step, machine, listener, log, line: Vec::new() }
    }

    fn print(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' || self.line.len() >= MOST_LINE_BYTES {
                self.flush();
            }
            if byte != b'\n' {
                self.line.push(byte);
            }
        }
    }

    fn end(&mut self) {
        if !self.line.is_empty() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
        self.line.clear();
        self.log.append(format!("{line}\n").as_bytes());
        let what = EventKind::Output { step: self.step.to_owned(), line };
        (self.listener)(ProjectEvent { machine: Some(self.machine.to_owned()), what });
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
