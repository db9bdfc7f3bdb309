//! The server: the API over a machine, listening, with its log.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dropshot::{
    ClientSpecifiesVersionInHeader, ConfigDropshot, HandlerTaskMode, HttpServer, ServerBuilder, VersionPolicy,
};
use slog::{Drain, Level, Logger, info, o};

use super::api;
use super::behaviour::Behaviour;
use super::host::Host;
use super::illumos::Illumos;
use super::machine::{Die, Gates, Machine};

/// The largest body of a request, in bytes.
const MOST_BYTES: usize = 1024 * 1024;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 is any that is free, and the log tells which.
    pub address: SocketAddr,
    /// The firmware, which must be there when a VM is made, or the server panics.
    pub bootrom: PathBuf,
    /// Its working directory, which gets `debug.out`.
    pub cwd: PathBuf,
    /// What stands for `/dev/vmm`: each VM of the kernel is an entry there.
    pub vmm: PathBuf,
    /// The directory of the stand-ins for the host's tools, where links and disks are looked for.
    pub illumos: Option<PathBuf>,
    /// Where VNC would be served: the port is taken, and nobody answers.
    pub vnc: Option<SocketAddr>,
    /// How it behaves.
    pub behaviour: Behaviour,
}

/// Serves until the process ends; a panic of the real server is an abort of this process.
///
/// `log` gets one line of JSON for each event.
///
/// # Errors
/// Says why it can't listen.
pub async fn serve(options: Options, level: Level, log: impl Write + Send + 'static) -> Result<(), String> {
    let die: Die = Arc::new(|why| {
        // What a panic says, for whoever keeps the standard error; where nobody does, it is lost as there.
        let _ = writeln!(io::stderr(), "thread 'tokio-runtime-worker' panicked: {why}");
        std::process::abort();
    });
    let _vnc = options.vnc.map(std::net::TcpListener::bind).transpose().map_err(|error| error.to_string())?;
    let (server, _) = start(options, logger(level, log), die, Gates::default())?;
    server.await
}

pub(super) fn logger(level: Level, log: impl Write + Send + 'static) -> Logger {
    let drain = Mutex::new(slog_bunyan::with_name("propolis-server", io::LineWriter::new(log)).build());
    Logger::root(slog::LevelFilter::new(drain, level).ignore_res(), o!())
}

/// Starts a server in this runtime.
pub(super) fn start(
    options: Options,
    log: Logger,
    die: Die,
    gates: Gates,
) -> Result<(HttpServer<Arc<Machine>>, Arc<Machine>), String> {
    let illumos = options.illumos.map(Illumos::at);
    let alive =
        illumos.as_ref().map(Illumos::register_server).transpose().map_err(|error| error.to_string())?;
    let host = Host {
        vmm: options.vmm,
        illumos,
        _alive: alive.map(Arc::new),
        bootrom: options.bootrom,
        cwd: options.cwd,
    };
    let latest = options.behaviour.latest_version.as_deref().unwrap_or("5.0.0");
    let latest = latest.parse().map_err(|error| format!("{latest} is no version: {error}"))?;
    let machine = Machine::new(log.clone(), host, options.behaviour, die, gates);
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
