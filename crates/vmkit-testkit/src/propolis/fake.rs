//! A fake server that a test controls, as a thread of the test or as a process.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use slog::Level;
use tempfile::TempDir;
use tokio::sync::{OwnedMutexGuard, mpsc};

use super::behaviour::{BEHAVIOUR, Gate, PropolisBehaviour};
use super::gates::MachineGates;
use super::guest::{GuestEvent, GuestOrder};
use super::illumos;
use super::machine::PropolisMachine;
use super::server::{self, ServerOptions};

/// How long a server may take to listen, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// The options of a fake server.
///
/// By default it listens on a free port of the loopback address, has a directory of its own for
/// everything, and behaves well.
#[derive(Debug, Default)]
pub struct FakeSetup {
    behaviour: PropolisBehaviour,
    address: Option<SocketAddr>,
    vmm: Option<PathBuf>,
    illumos: Option<PathBuf>,
}

impl FakeSetup {
    /// Sets its behaviour.
    pub fn behaviour(mut self, behaviour: PropolisBehaviour) -> Self {
        self.behaviour = behaviour;
        self
    }

    /// Sets the newest version of the API that it serves, such as `1.0.0`.
    pub fn latest_version(mut self, version: &str) -> Self {
        self.behaviour.latest_version = Some(version.to_owned());
        self
    }

    /// Sets the address to listen on.
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.address = Some(address);
        self
    }

    /// Sets the directory of the kernel's VMs, so that several servers can share one kernel.
    pub fn vmm(mut self, vmm: &Path) -> Self {
        self.vmm = Some(vmm.to_owned());
        self
    }

    /// Sets the directory of the stand-ins for the host; the kernel's VMs are there too.
    pub fn illumos(mut self, dir: &Path) -> Self {
        self.illumos = Some(dir.to_owned());
        self
    }

    fn options(&self, dir: &Path) -> io::Result<ServerOptions> {
        let bootrom = dir.join("OVMF_CODE.fd");
        std::fs::write(&bootrom, illumos::BOOTROM)?;
        let of_illumos = self.illumos.as_ref().map(|dir| illumos::Illumos::at(dir.clone()).vmm());
        Ok(ServerOptions {
            address: self.address.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into()),
            bootrom,
            cwd: dir.to_owned(),
            vmm: self.vmm.clone().or(of_illumos).unwrap_or_else(|| dir.join("vmm")),
            illumos: self.illumos.clone(),
            vnc: None,
            behaviour: self.behaviour.clone(),
        })
    }

    /// Starts the server as a thread of this process.
    ///
    /// What would end the process of the real server ends the thread: its connections break, and
    /// its VMs in the kernel leak.
    ///
    /// # Errors
    /// Fails if the server can't listen.
    pub fn spawn(self) -> io::Result<FakePropolis> {
        let dir = tempfile::tempdir()?;
        let options = self.options(dir.path())?;
        let vmm = options.vmm.clone();
        let log = SharedLog::default();
        let (started, starts) = channel();
        let (end, ended) = mpsc::unbounded_channel();
        let gates = MachineGates::default();
        let thread = {
            let (log, gates, end) = (log.clone(), gates.clone(), end.clone());
            std::thread::spawn(move || run(options, log, gates, end, ended, &started))
        };
        let (address, machine) = starts
            .recv_timeout(PATIENCE)
            .map_err(|error| io::Error::new(io::ErrorKind::TimedOut, error))?
            .map_err(io::Error::other)?;
        let how = ServerHost::Thread { end, thread: Some(thread), machine, gates };
        Ok(FakePropolis { address, vmm, log, how, _dir: dir })
    }

    /// Starts the program `vmkit-fake-propolis`, which an integration test of this crate finds at
    /// `env!("CARGO_BIN_EXE_vmkit-fake-propolis")`.
    ///
    /// # Errors
    /// Fails if the server can't listen.
    pub fn spawn_process(self, program: &Path) -> io::Result<FakePropolis> {
        let dir = tempfile::tempdir()?;
        let options = self.options(dir.path())?;
        let mut command = Command::new(program);
        command.arg("run").arg(&options.bootrom).arg(options.address.to_string());
        command.current_dir(&options.cwd).env(BEHAVIOUR, serde_json::to_string(&options.behaviour)?);
        command.env(illumos::VMM, &options.vmm);
        match &options.illumos {
            Some(dir) => command.env(illumos::DIR, dir),
            None => command.env_remove(illumos::DIR),
        };
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().expect("it was requested");
        let log = SharedLog::default();
        let found = read_log(stdout, log.clone());
        let how = ServerHost::Process { child: Some(child) };
        let unspecified = (Ipv4Addr::UNSPECIFIED, 0).into();
        // From here on, dropping it ends the child.
        let mut fake = FakePropolis { address: unspecified, vmm: options.vmm, log, how, _dir: dir };
        fake.address = found
            .recv_timeout(PATIENCE)
            .map_err(|_| io::Error::other(format!("it does not listen: {}", fake.log())))?;
        Ok(fake)
    }
}

/// Runs a server in a runtime of its own until it is told to end.
fn run(
    options: ServerOptions,
    log: SharedLog,
    gates: MachineGates,
    end: mpsc::UnboundedSender<()>,
    mut ended: mpsc::UnboundedReceiver<()>,
    started: &std::sync::mpsc::Sender<Result<(SocketAddr, Arc<PropolisMachine>), String>>,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return drop(started.send(Err(error.to_string()))),
    };
    runtime.block_on(async {
        // If the receiver is gone, the server is ending already.
        let die = Arc::new(move |_: &str| {
            let _ = end.send(());
        });
        let logger = server::logger(Level::Debug, log);
        match server::start(options, logger, die, gates) {
            Ok((server, machine)) => {
                if started.send(Ok((server.local_addr(), machine))).is_ok() {
                    ended.recv().await;
                }
            }
            Err(problem) => drop(started.send(Err(problem))),
        }
    });
    // Dropping the runtime would wait for blocking tasks.
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Reads a server's log until its end, and returns the address once the server logs it.
fn read_log(stdout: std::process::ChildStdout, mut log: SharedLog) -> Receiver<SocketAddr> {
    let (found, finds) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = writeln!(log, "{line}");
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["msg"] == "listening"
                && let Some(address) = event["local_addr"].as_str().and_then(|text| text.parse().ok())
            {
                // The caller may have given up.
                let _ = found.send(address);
            }
        }
    });
    finds
}

/// A log that can be read while it is written.
#[derive(Debug, Clone, Default)]
struct SharedLog(Arc<Mutex<Vec<u8>>>);

impl Write for SharedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no holder panics").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A fake Propolis server. Dropping it has the effect of a kill.
#[derive(Debug)]
pub struct FakePropolis {
    address: SocketAddr,
    vmm: PathBuf,
    log: SharedLog,
    how: ServerHost,
    _dir: TempDir,
}

enum ServerHost {
    Thread {
        end: mpsc::UnboundedSender<()>,
        thread: Option<JoinHandle<()>>,
        machine: Arc<PropolisMachine>,
        gates: MachineGates,
    },
    Process {
        child: Option<Child>,
    },
}

impl std::fmt::Debug for ServerHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Thread { .. } => f.write_str("Thread"),
            Self::Process { child } => f.debug_tuple("Process").field(child).finish(),
        }
    }
}

/// Holds a server at a [`Gate`] until it is dropped.
#[derive(Debug)]
pub struct HeldGate(#[expect(dead_code, reason = "only its drop is used")] OwnedMutexGuard<()>);

impl FakePropolis {
    /// Starts a server with this behaviour, as a thread.
    ///
    /// # Errors
    /// Fails if the server can't listen.
    pub fn spawn(behaviour: PropolisBehaviour) -> io::Result<Self> {
        FakeSetup::default().behaviour(behaviour).spawn()
    }

    /// Returns the address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the directory that stands for `/dev/vmm`: each entry is a VM of the kernel.
    pub fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// Returns the names of the kernel's VMs, in order.
    pub fn kernel_vms(&self) -> Vec<String> {
        illumos::names_in(&self.vmm)
    }

    /// Returns what the server has logged so far: a line of JSON for each event.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.0.lock().expect("no holder panics")).into_owned()
    }

    /// Returns the process id, if the server is a process.
    pub fn pid(&self) -> Option<u32> {
        match &self.how {
            ServerHost::Process { child } => child.as_ref().map(Child::id),
            ServerHost::Thread { .. } => None,
        }
    }

    /// Ends the server without any cleanup, and waits until it has ended.
    pub fn kill(&mut self) {
        match &mut self.how {
            ServerHost::Thread { end, thread, .. } => {
                // It may have ended by itself.
                let _ = end.send(());
                if let Some(thread) = thread.take() {
                    thread.join().expect("the server's thread does not panic");
                }
            }
            ServerHost::Process { child } => {
                if let Some(mut child) = child.take() {
                    // It may have ended by itself; it is reaped in any case.
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        }
    }

    /// Waits until the server ends by itself, and returns its exit status; a thread reports
    /// SIGABRT.
    ///
    /// # Errors
    /// Fails if waiting for the child fails.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.how {
            ServerHost::Thread { thread, .. } => {
                if let Some(thread) = thread.take() {
                    thread.join().expect("the server's thread does not panic");
                }
                Ok(ExitStatus::from_raw(6))
            }
            ServerHost::Process { child } => match child.take() {
                Some(mut child) => child.wait(),
                None => Ok(ExitStatus::from_raw(9)),
            },
        }
    }

    /// Holds the server the next time it reaches a gate.
    ///
    /// # Panics
    /// If the server is a process.
    pub async fn hold(&self, gate: Gate) -> HeldGate {
        match &self.how {
            ServerHost::Thread { gates, .. } => HeldGate(gates.of(gate).lock_owned().await),
            ServerHost::Process { .. } => panic!("only a server in this process can be held"),
        }
    }

    /// Waits until so many clients of the serial port, of all that there were, have been sent its
    /// history.
    ///
    /// # Panics
    /// If the server is a process.
    pub async fn attaching(&self, clients: usize) {
        match &self.how {
            ServerHost::Thread { gates, .. } => gates.attaching(clients).await,
            ServerHost::Process { .. } => panic!("only a server in this process can be watched"),
        }
    }

    /// Returns whether the server is pausing its VM's devices.
    ///
    /// # Panics
    /// If the server is a process.
    pub fn is_pausing(&self) -> bool {
        self.machine().is_pausing()
    }

    /// Prints something on the guest's console; returns whether there is a guest.
    ///
    /// # Panics
    /// If the server is a process: send `flood N` to its console instead.
    pub fn print(&self, bytes: &[u8]) -> bool {
        self.machine().order(GuestOrder::Print(bytes.to_vec()))
    }

    /// Shuts the guest down; returns whether there is one.
    ///
    /// # Panics
    /// If the server is a process: send `poweroff` to its console instead.
    pub fn power_off(&self) -> bool {
        self.machine().order(GuestOrder::Raise(GuestEvent::Halt))
    }

    /// Sends every client of the serial port the address `destination`, as a migration does;
    /// returns whether there is a VM.
    ///
    /// # Panics
    /// If the server is a process.
    pub fn say_migrating(&self, destination: SocketAddr) -> bool {
        let serial = self.machine().serial();
        serial.map(|serial| serial.say_migrating(destination)).is_some()
    }

    fn machine(&self) -> &PropolisMachine {
        match &self.how {
            ServerHost::Thread { machine, .. } => machine,
            ServerHost::Process { .. } => panic!("only a server in this process has a guest at hand"),
        }
    }
}

impl Drop for FakePropolis {
    fn drop(&mut self) {
        self.kill();
    }
}
