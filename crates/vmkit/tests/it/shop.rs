//! A project whose VMs and guests are files: what the tests of projects work on.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{FileHypervisor, World};
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use vmkit::GuestExitStatus;
use vmkit::image::{Catalogue, ImageStore};
use vmkit::project::{
    ConnectedGuest, EventListener, GuestConnector, GuestInput, GuestNotice, GuestOutput, MachineAction,
    MachineOutcome, ProjectEvent, ProjectManager, ProjectOptions, ProjectReport,
};
use vmkit::spec::VmName;
use vmkit::vmfile::{self, Project};
use vmkit::{Error, Result, VmManager};
use vmkit_testkit::crash::step;

/// Three machines that depend on each other, and one that does not.
pub(crate) const SHOP: &str = "
version = 1
[project]
name = 'shop'
[defaults]
kernel = 'vmlinuz'
cloud_init = {}

[machine.web]
depends_on = ['db']
files = [{ from = 'app', to = '/srv/app' }]
provision = [{ name = 'install', shell = 'echo web-install' }, { name = 'sync', shell = 'echo web-sync', run = 'changed' }]

[machine.db]
provision = [{ name = 'install', shell = 'echo db-install' }]
ready = { command = 'db-is-up' }

[machine.edge]
depends_on = ['web']
provision = [{ name = 'install', script = 'edge.sh' }]

[machine.other]
";

/// Guests that are a log each: what they are told goes to `said` below the directory, in the order
/// of all of them.
#[derive(Clone)]
pub(crate) struct FileGuests {
    dir: PathBuf,
    manager: VmManager<FileHypervisor>,
}

pub(crate) struct FileGuest {
    dir: PathBuf,
    vm: VmName,
}

impl GuestConnector for FileGuests {
    type Guest = FileGuest;

    async fn enter(&self, vm: &VmName, _: Instant, notice: GuestNotice<'_>) -> Result<FileGuest> {
        assert!(self.manager.info(vm).await?.state.is_live(), "a guest is entered that does not run");
        if self.dir.join("mute").exists() {
            std::future::pending::<()>().await;
        }
        if self.dir.join("odd").exists() {
            notice("the guest is odd".to_owned());
        }
        Ok(FileGuest { dir: self.dir.clone(), vm: vm.clone() })
    }
}

impl FileGuest {
    fn note(&self, file: &str, line: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(self.dir.join(file)).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

impl ConnectedGuest for FileGuest {
    fn user(&self) -> &str {
        "vmkit"
    }

    async fn cloud_init(&self, _deadline: Instant) -> Result<()> {
        Ok(())
    }

    async fn run(
        &self,
        argv: Vec<String>,
        mut input: GuestInput,
        output: GuestOutput<'_>,
        _deadline: Instant,
    ) -> Result<GuestExitStatus> {
        let mut sent = Vec::new();
        input.read_to_end(&mut sent).await.map_err(Error::io("read", "the input"))?;
        let sent = String::from_utf8_lossy(&sent);
        let text = &argv[if argv[0] == "sudo" { 8 } else { 2 }];
        if text.contains("for means in") {
            output(if self.dir.join("no-sudo").exists() { b"none\n" } else { b"sudo\n" });
            return Ok(GuestExitStatus::Code(0));
        }
        if text.contains("vmkit-step-*") {
            self.note("ended", "all");
            return Ok(GuestExitStatus::Code(0));
        }
        let told = match () {
            () if argv.iter().any(|word| word == "/srv/app") => "copy",
            () if sent.is_empty() => argv.last().unwrap(),
            () => sent.trim(),
        };
        let line = format!("{} {}\n", self.vm, told.lines().last().unwrap_or_default());
        step("a guest does what it is told").map_err(Error::io("run", &self.dir))?;
        self.note("said", line.trim());
        if told.contains("hang") {
            let awaited = "the end of a command in the guest".to_owned();
            return Err(Error::timed_out(awaited, Duration::ZERO));
        }
        output(format!("doing {told}\nhalf a ").as_bytes());
        output(b"line");
        Ok(GuestExitStatus::Code(if told.contains("fail") { 3 } else { 0 }))
    }
}

pub(crate) struct Shop {
    pub(crate) world: World,
    pub(crate) engine: ProjectManager<FileHypervisor, FileGuests>,
    pub(crate) events: Arc<Mutex<Vec<ProjectEvent>>>,
}

impl Shop {
    pub(crate) fn at(dir: &Path) -> Self {
        Self::over(World::at(dir))
    }

    pub(crate) fn over(world: World) -> Self {
        let dir = &world.dir;
        fs::create_dir_all(dir.join("app")).unwrap();
        if !dir.join("edge.sh").exists() {
            fs::write(dir.join("app/index.html"), "hello").unwrap();
            fs::write(dir.join("vmlinuz"), "a kernel").unwrap();
            fs::write(dir.join("edge.sh"), "echo edge-install").unwrap();
        }
        let manager = world.manager.clone();
        let guests = FileGuests { dir: dir.to_owned(), manager: manager.clone() };
        let images = ImageStore::new(manager.home(), Catalogue::built_in());
        Self { engine: ProjectManager::new(manager, guests, images), world, events: Arc::default() }
    }

    pub(crate) fn project(&self, text: &str) -> Project {
        vmfile::parse(&self.world.dir.join("vmkit.toml"), text, &|_| Err("not here".into())).unwrap()
    }

    pub(crate) fn listener(&self) -> EventListener {
        let events = Arc::clone(&self.events);
        Arc::new(move |event| events.lock().unwrap().push(event))
    }

    pub(crate) fn up_as(&self, text: &str, options: &ProjectOptions) -> ProjectReport {
        runtime().block_on(self.engine.up(&self.project(text), options, self.listener())).unwrap()
    }

    pub(crate) fn up(&self, text: &str) -> ProjectReport {
        self.up_as(text, &ProjectOptions::default())
    }

    pub(crate) fn down(&self, text: &str, remove: bool, options: &ProjectOptions) -> ProjectReport {
        runtime().block_on(self.engine.down(&self.project(text), remove, options, self.listener())).unwrap()
    }

    pub(crate) fn said(&self) -> Vec<String> {
        let said = fs::read_to_string(self.world.dir.join("said")).unwrap_or_default();
        said.lines().map(str::to_owned).collect()
    }

    pub(crate) fn place_of(&self, line: &str) -> usize {
        let said = self.said();
        said.iter().position(|said| said == line).unwrap_or_else(|| panic!("no `{line}` in {said:?}"))
    }

    pub(crate) fn state(&self, vm: &str) -> &'static str {
        let found = runtime().block_on(self.engine.manager().find(&VmName::new(vm).unwrap()));
        found.map_or("", |listed| listed.handle.unwrap().state.name())
    }
}

/// One thread, since steps are counted by thread.
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn shop() -> (tempfile::TempDir, Shop) {
    let temp = tempfile::tempdir().unwrap();
    let shop = Shop::at(temp.path());
    (temp, shop)
}

pub(crate) fn only(machines: &[&str]) -> ProjectOptions {
    ProjectOptions {
        machines: machines.iter().map(|&name| name.to_owned()).collect(),
        ..ProjectOptions::default()
    }
}

/// Returns how the work on a machine ended: `fine`, what failed, or what it was skipped for.
pub(crate) fn end(report: &ProjectReport, machine: &str) -> String {
    let found = report.machines.iter().find(|report| report.machine == machine).unwrap();
    match &found.end {
        MachineOutcome::Fine => "fine".to_owned(),
        MachineOutcome::Failed(error) => error.to_string(),
        MachineOutcome::Skipped(because) => format!("skipped for {because}"),
        _ => unreachable!("there is no other end"),
    }
}

pub(crate) fn done(report: &ProjectReport, machine: &str) -> Vec<MachineAction> {
    report.machines.iter().find(|report| report.machine == machine).unwrap().done.clone()
}
