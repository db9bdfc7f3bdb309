//! The server: the API of a machine, its listening socket and its log.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dropshot::{
    ClientSpecifiesVersionInHeader, ConfigDropshot, HandlerTaskMode, HttpServer, ServerBuilder, VersionPolicy,
};
use slog::{Drain, Level, Logger, info, o};

use super::api;
use super::behaviour::PropolisBehaviour;
use super::gates::MachineGates;
use super::host::FakeHost;
use super::illumos::Illumos;
use super::machine::{DieHook, PropolisMachine};

/// The largest body of a request, in bytes.
const MOST_BYTES: usize = 1024 * 1024;

/// A line of the log of at least a pipe's atomic write, which arrives in two pieces.
const CUT_LINE: (&str, &str) = (
    r#"{"msg":"instance spec","v":0,"name":"propolis-server","level":30,"time":"2026-01-01T00:00:00.000000000Z","hostname":"fake","pid":1,"spec":"Spec { board: Board { cpus: 2, memory_mb: 1024, chip"#,
    "set: I440Fx(I440Fx { enable_pcie: false }) }, serial: {Name(\"com1\"): SerialPort { num: Com1 } } }\",\"component\":\"vm\"}\n",
);
/// The least number of CPUs reported, for tests on machines with fewer.
const LEAST_CPUS: u8 = 4;

/// The options of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The address to listen on; with port 0 the log has the port that was chosen.
    pub address: SocketAddr,
    /// The firmware, which must exist and have a valid size when a VM is created, or the server
    /// panics.
    pub bootrom: PathBuf,
    /// Its working directory, which gets `debug.out`.
    pub cwd: PathBuf,
    /// The directory that stands for `/dev/vmm`: each VM of the kernel is an entry there.
    pub vmm: PathBuf,
    /// The directory of the stand-ins for the host's tools, where links and disks are looked up.
    pub illumos: Option<PathBuf>,
    /// The address of VNC: the port is bound, and connections get no reply.
    pub vnc: Option<SocketAddr>,
    /// How it behaves.
    pub behaviour: PropolisBehaviour,
}

/// Serves until the process ends; where the real server panics, this process aborts.
///
/// `log` gets one line of JSON for each event.
///
/// # Errors
/// Fails if it can't listen.
pub async fn serve(
    options: ServerOptions,
    level: Level,
    log: impl Write + Send + 'static,
) -> Result<(), String> {
    let die: DieHook = Arc::new(|why| {
        // Without a keeper that reads them, a panic's message is lost, as with the real server. It
        // comes between two writes of a long line of the log.
        let _ = io::stdout().write_all(CUT_LINE.0.as_bytes()).and_then(|()| io::stdout().flush());
        let _ = write!(
            io::stderr(),
            "\nthread 'tokio-rt-worker' panicked at bin/propolis-server/src/lib/vm/state_driver.rs:329:17:\n{why}\n\
             note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n"
        );
        let _ = io::stdout().write_all(CUT_LINE.1.as_bytes()).and_then(|()| io::stdout().flush());
        std::process::abort();
    });
    let _vnc = options.vnc.map(std::net::TcpListener::bind).transpose().map_err(|error| error.to_string())?;
    let (server, _) = start(options, logger(level, log), die, MachineGates::default())?;
    server.await
}

pub(super) fn logger(level: Level, log: impl Write + Send + 'static) -> Logger {
    let drain = Mutex::new(slog_bunyan::with_name("propolis-server", io::LineWriter::new(log)).build());
    Logger::root(slog::LevelFilter::new(drain, level).ignore_res(), o!())
}

/// Starts a server in this runtime.
pub(super) fn start(
    options: ServerOptions,
    log: Logger,
    die: DieHook,
    gates: MachineGates,
) -> Result<(HttpServer<Arc<PropolisMachine>>, Arc<PropolisMachine>), String> {
    let illumos = options.illumos.map(Illumos::at);
    let alive =
        illumos.as_ref().map(Illumos::register_server).transpose().map_err(|error| error.to_string())?;
    let online = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    let online = u8::try_from(online).unwrap_or(u8::MAX).max(LEAST_CPUS);
    let host = FakeHost {
        vmm: options.vmm,
        cpus: options.behaviour.host_cpus.unwrap_or(online),
        illumos,
        _alive: alive.map(Arc::new),
        bootrom: options.bootrom,
        cwd: options.cwd,
    };
    let latest = options.behaviour.latest_version.as_deref().unwrap_or("5.0.0");
    let latest = latest.parse().map_err(|error| format!("{latest} is no version: {error}"))?;
    let machine = PropolisMachine::new(log.clone(), host, options.behaviour, die, gates);
    let config = ConfigDropshot {
        bind_address: options.address,
        default_request_body_max_bytes: MOST_BYTES,
        default_handler_task_mode: HandlerTaskMode::Detached,
        ..ConfigDropshot::default()
    };
    let header = "api-version".parse().expect("it is a header's name");
    let policy = VersionPolicy::Dynamic(Box::new(ClientSpecifiesVersionInHeader::new(header, latest)));
    info!(log, "Starting server...");
    let server = ServerBuilder::new(api::api(), Arc::clone(&machine), log)
        .config(config)
        .version_policy(policy)
        .start()
        .map_err(|error| format!("failed to start server: {error}"))?;
    Ok((server, machine))
}
