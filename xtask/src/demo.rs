//! `cargo xtask demo`: the whole life of a VM, on the real QEMU with a real Debian, shown as it
//! passes.
//!
//! It uses the library as any program would: a manager over a home of its own, typed cloud-init
//! with keys made for this one VM, and the guest agent. SSH is the system's own client, with the
//! guest's host key pinned beforehand.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmkit::qemu::GuestAgent;
use vmkit::spec::{
    CloudConfig, CloudInitConfig, GuestUser, MachineType, SshKeyPair, UserData, VmName, VmSpec,
};
use vmkit::store::Home;
use vmkit::{ActiveForward, QemuHypervisor, VmHandle, VmManager, WaitCondition};
use vmkit_testkit::guest;

use crate::error::{Error, PathContext, Result};
use crate::guest::{Guest, ensure_built};
use crate::setup;

/// How long the guest may take until SSH is ready: a minute under emulation on an idle host.
const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// How long the guest may take to shut itself down: five seconds on a quiet host.
const STOP_LIMIT: Duration = Duration::from_secs(180);

/// Sets up, builds the guest where it isn't cached, and plays.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    ensure_built(Guest::Debian, false)?;
    let scratch =
        tempfile::tempdir().map_err(|error| Error::failed(format!("no temporary directory: {error}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::failed(format!("no async runtime: {error}")))?;
    runtime.block_on(async {
        let manager = manager(scratch.path())?;
        let name = VmName::new("demo").map_err(failed)?;
        let played = play(&manager, &name, scratch.path()).await;
        if played.is_err() {
            // Whatever went wrong, nothing keeps running. That it was never made is fine too.
            let _ = manager.remove(&name, true).await;
        }
        played
    })
}

fn manager(dir: &Path) -> Result<VmManager<QemuHypervisor>> {
    let home = Home::at(dir.join("home")).map_err(failed)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let qemu =
        QemuHypervisor::builder(home.vms(), home.run()).cache_dir(home.cache()).search_path(&path).build();
    Ok(VmManager::new(qemu, home))
}

async fn play(manager: &VmManager<QemuHypervisor>, name: &VmName, dir: &Path) -> Result<()> {
    let mut laps = Laps::begin();
    let keys = Keys::make(dir)?;
    let spec = spec(name, &keys)?;
    println!("{}", manager.hypervisor().plan(&spec).await.map_err(failed)?);
    laps.skip();

    manager.create(spec).await.map_err(failed)?;
    laps.lap("create: overlay, cloud-init seed, record");
    let vm = manager.start(name).await.map_err(failed)?;
    laps.lap(&format!("start: QEMU answers, {}", facts(&vm)));
    manager.wait(name, WaitCondition::Ssh, BOOT_LIMIT).await.map_err(failed)?;
    laps.lap("wait: the guest's SSH server greets");
    let ssh = Ssh { port: ssh_port(&vm)?, keys: &keys };
    let said = ssh.run("cloud-init status --wait > /dev/null; cloud-init status")?;
    laps.lap(&format!("wait: cloud-init: {said:?}"));
    laps.lap_of(|| ssh.run("uname -sr; id -un"), "SSH")?;
    let said = by_agent(&vm, "/bin/cat", &["/etc/vmkit-demo"]).await?;
    laps.lap(&format!("guest agent: {said:?}"));

    manager.suspend(name).await.map_err(failed)?;
    laps.lap("suspend: the vCPUs stand still");
    manager.resume(name).await.map_err(failed)?;
    laps.lap("resume: they run");
    laps.lap_of(|| ssh.run("uptime -p"), "SSH after resume")?;
    manager.stop(name, STOP_LIMIT).await.map_err(failed)?;
    laps.lap("stop: the guest shut itself down");
    let vm = manager.start(name).await.map_err(failed)?;
    laps.lap(&format!("start again: {}", facts(&vm)));
    manager.remove(name, true).await.map_err(failed)?;
    laps.lap("rm: by force, while it boots");
    let left = manager.list().await.map_err(failed)?.len();
    println!("{:>9}  the whole demo; {left} VMs left", seconds(laps.began.elapsed()));
    Ok(())
}

fn spec(name: &VmName, keys: &Keys) -> Result<VmSpec> {
    let file = vmkit::spec::GuestFile {
        path: "/etc/vmkit-demo".into(),
        content: "written by cloud-init\n".to_owned(),
        mode: 0o644,
        owner: None,
    };
    let user = GuestUser {
        name: "demo".to_owned(),
        ssh_keys: vec![keys.user_public.clone()],
        sudo: true,
        shell: None,
    };
    let config = CloudConfig {
        users: vec![user],
        files: vec![file],
        ssh_host_key: Some(keys.host.clone()),
        ..CloudConfig::default()
    };
    let cloud_init = CloudInitConfig { user_data: UserData::Typed(config), ..CloudInitConfig::default() };
    guest::debian()
        .spec(name.as_str(), MachineType::Q35, "")
        .accel(vmkit::spec::Accel::Auto)
        .cpus(2)
        .cloud_init(cloud_init)
        .build()
        .map_err(failed)
}

/// Keys for this one VM: the user's, and the host's, so that the guest makes none and is known
/// beforehand.
struct Keys {
    user_private: PathBuf,
    user_public: String,
    host: SshKeyPair,
    known_hosts: PathBuf,
}

impl Keys {
    fn make(dir: &Path) -> Result<Self> {
        let user_private = dir.join("user");
        let host_private = dir.join("host");
        let known_hosts = dir.join("known_hosts");
        for path in [&user_private, &host_private] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "vmkit demo", "-f"]).arg(path);
            finished(keygen.output(), "ssh-keygen")?;
        }
        let read = |path: &Path| std::fs::read_to_string(path).at("read", path);
        let public = |path: &Path| read(&path.with_extension("pub")).map(|text| text.trim().to_owned());
        let host = SshKeyPair { private: read(&host_private)?, public: public(&host_private)? };
        std::fs::write(&known_hosts, format!("vmkit-demo {}\n", host.public)).at("write", &known_hosts)?;
        Ok(Self { user_public: public(&user_private)?, user_private, host, known_hosts })
    }
}

struct Ssh<'a> {
    port: u16,
    keys: &'a Keys,
}

impl Ssh<'_> {
    /// Runs a command in the guest and returns what it printed.
    fn run(&self, command: &str) -> Result<String> {
        let mut ssh = Command::new("ssh");
        ssh.arg("-i").arg(&self.keys.user_private).args(["-F", "none", "-p", &self.port.to_string()]);
        let known_hosts = format!("UserKnownHostsFile={}", self.keys.known_hosts.display());
        let options = [
            known_hosts.as_str(),
            "HostKeyAlias=vmkit-demo",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "ConnectTimeout=60",
        ];
        for option in options {
            ssh.args(["-o", option]);
        }
        ssh.args(["demo@127.0.0.1", "--", command]).stdin(Stdio::null());
        let output = finished(ssh.output(), &format!("ssh {command}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().replace('\n', ", "))
    }
}

fn finished(output: std::io::Result<Output>, what: &str) -> Result<Output> {
    let output = output.map_err(|error| Error::failed(format!("{what}: {error}")))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::failed(format!("{what}: {}: {}", output.status, said.trim())))
}

async fn by_agent(vm: &VmHandle, program: &str, args: &[&str]) -> Result<String> {
    let socket = vm.run.as_ref().and_then(|run| run.agent.as_deref());
    let socket = socket.ok_or_else(|| Error::failed("the VM has no guest agent"))?;
    let timeout = Duration::from_secs(60);
    let mut agent = GuestAgent::connect(socket, timeout).await.map_err(failed)?;
    let output = agent.exec(program, args, None, timeout).await.map_err(failed)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn facts(vm: &VmHandle) -> String {
    let run = vm.run.clone().unwrap_or_default();
    format!("PID {}, SSH on port {}", run.pid.unwrap_or_default(), ssh_port(vm).unwrap_or_default())
}

fn ssh_port(vm: &VmHandle) -> Result<u16> {
    let forwards = vm.run.as_ref().map(|run| run.forwards.as_slice()).unwrap_or_default();
    let ssh = |forward: &&ActiveForward| forward.guest_port.get() == 22;
    let found = forwards.iter().find(ssh).map(|forward| forward.host.port());
    found.ok_or_else(|| Error::failed("no port leads to the guest's SSH"))
}

pub(crate) fn failed(error: vmkit::Error) -> Error {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    Error::failed(text)
}

/// Prints how long each part took.
pub(crate) struct Laps {
    began: Instant,
    last: Instant,
}

impl Laps {
    pub(crate) fn begin() -> Self {
        Self { began: Instant::now(), last: Instant::now() }
    }

    fn skip(&mut self) {
        self.last = Instant::now();
    }

    pub(crate) fn lap(&mut self, what: &str) {
        println!("{:>9}  {what}", seconds(self.last.elapsed()));
        self.skip();
    }

    fn lap_of(&mut self, work: impl FnOnce() -> Result<String>, what: &str) -> Result<()> {
        let said = work()?;
        self.lap(&format!("{what}: {said:?}"));
        Ok(())
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.3} s", duration.as_secs_f64())
}
