//! Starting a VM: a server, its VM, its guest, in this order; a failure undoes what was started
//! before.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncBufReadExt;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::client::{ClientError, ClientResult, PropolisClient};
use super::context::VmContext;
use super::end::{EndTimeouts, end, shown};
use super::end_server::{clear_kernel, end_server};
use super::files::{self, ServerFile};
use super::hold::OperationLock;
use super::instance_spec::{InstanceState, RequestedState};
use super::log;
use super::monitor;
use super::plan::{PropolisPlan, ServerPlan};
use super::prepare::{make_again, reshape};
use super::state::{LOG_BYTES, last_panic, last_words};
use super::stop::{StopRequest, end_elsewhere};
use crate::backend::supervise::files::{make_private_dir, remove_file};
use crate::backend::supervise::keeper::KeeperRequest;
use crate::backend::supervise::spawn::KeeperStream;
use crate::backend::supervise::{ALIVE_DESCRIPTOR, alive, process, spawn};
use crate::boundedlog::tail_of_log;
use crate::error::{Error, ErrorKind, Peer, Result};
use crate::handle::{ConsoleEndpoint, RunInfo};
use crate::steps::step;

/// The size limit of a server's log.
const SERVER_LOG_BYTES: u64 = 4 << 20;
/// How long the log may take to contain the reason of a failed request.
const WHY_LIMIT: Duration = Duration::from_secs(1);
/// The pause before the log is read again. Once the copy of the log is lost, there is no event for
/// a new line.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Starts a server for the VM, and the guest on it.
///
/// # Errors
/// `Host`, `Io` for what the host refused, `Hypervisor` with what the server printed, `TimedOut` at
/// the deadline. Nothing runs then.
pub(super) async fn owned(
    site: &VmContext<'_>,
    plan: &PropolisPlan,
    keeper: &Path,
    hold: &OperationLock,
    deadline: Instant,
) -> Result<RunInfo> {
    let ServerPlan::Owned { run, .. } = &plan.server else {
        unreachable!("a VM without a server elsewhere has one of its own");
    };
    // Removes what an earlier run, or a crash, has left.
    let alive = alive::take_and_silence(&site.place(), deadline).await?;
    clear_kernel(site, site.host(), hold).await?;
    remove_file(&site.layout.server_file())?;
    remove_file(&site.layout.console_mark())?;
    reshape(site.host(), &site.layout, &site.claim, &plan.update, hold).await?;
    make_again(site.host(), &plan.update, hold).await?;
    make_private_dir(&site.layout.server_dir())?;
    let launched = spawn::launch(keeper, &launch(site, run), &[alive])?;
    let begun = async {
        let (pid, mut words) = launched.started(deadline).await?;
        let address = listening(site, &mut words, deadline).await?;
        let client = site.client(address);
        ensure(site, &client, plan, ServerChoice::Own(&mut words), deadline)
            .await
            .map_err(|(error, _)| error)?;
        run_guest(site, &client, ServerFile::of_new_run(address), deadline).await?;
        Ok(RunInfo { pid: Some(pid), ..run_info(&client) })
    };
    match begun.await {
        Ok(info) => Ok(info),
        Err(error) => {
            if let Err(failure) = end_server(site, site.host(), hold).await {
                tracing::warn!(%failure, "could not end a server that failed to start its VM");
            }
            // The guest never ran: the end of this run is not a failure of the VM.
            if let Err(failure) = files::mark(&site.layout.stop_mark()) {
                tracing::debug!(%failure, "cannot record that the run was ended");
            }
            Err(error)
        }
    }
}

/// Creates the VM at a running server, and runs its guest.
///
/// # Errors
/// `Busy` if the server has another VM that lives; otherwise those of [`owned`].
pub(super) async fn elsewhere(
    site: &VmContext<'_>,
    client: &PropolisClient,
    plan: &PropolisPlan,
    hold: &OperationLock,
    deadline: Instant,
) -> Result<RunInfo> {
    let is_made = is_made_already(site, client, deadline).await?;
    if !is_made {
        reshape(site.host(), &site.layout, &site.claim, &plan.update, hold).await?;
    }
    remove_file(&site.layout.console_mark())?;
    let server = ServerFile::of_new_run(client.address);
    // Written before the first request: from then on the server may have a VM that is recorded only
    // here.
    files::write_synced(&site.layout.server_file(), &server)?;
    let begun = async {
        if !is_made {
            ensure(site, client, plan, ServerChoice::Elsewhere(hold), deadline).await?;
        }
        run_guest(site, client, server, deadline).await.map_err(|error| (error, StopRequest::Answered))
    };
    if let Err((error, asked)) = begun.await {
        if asked == StopRequest::MayBeAtWork {
            // From now on the VM is waited for, however long ago it was requested.
            files::write_synced(&site.layout.server_file(), &server)?;
        }
        if let Err(failure) = end_elsewhere(site, client, asked).await {
            tracing::warn!(%failure, "could not end a VM that failed to start");
        }
        files::mark(&site.layout.stop_mark())?;
        return Err(error);
    }
    Ok(run_info(client))
}

/// Prepares a server for the VM, and returns whether it already has it, after an interrupted start.
///
/// # Errors
/// `Busy` if the server has another VM that lives.
async fn is_made_already(site: &VmContext<'_>, client: &PropolisClient, deadline: Instant) -> Result<bool> {
    use InstanceState as State;
    let server = files::server(&site.layout)?;
    let watched_until = server.and_then(|server| files::watched_until(&site.layout, &server));
    let there = match shown(client, watched_until.unwrap_or_else(Instant::now), deadline).await {
        Ok(Some(there)) => there,
        Ok(None) => return Ok(false),
        Err(failure) => return Err(failure.into_error(client, "report its state", None)),
    };
    let is_ours = there.properties.id == site.vm.id;
    match there.state {
        State::Destroyed => Ok(false),
        // The VM's files may have changed since then, and a VM that failed can't be used again.
        State::Creating | State::Failed | State::Stopping | State::Stopped if is_ours => {
            let ended = end(client, site.vm.id, EndTimeouts::until(deadline)).await;
            ended.map_err(|failure| failure.into_error(client, "end the VM of an earlier run", None))?;
            Ok(false)
        }
        _ if is_ours => Ok(true),
        // Whether the failed VM still occupies the server, only the server knows.
        State::Failed => Ok(false),
        _ => {
            let what =
                format!("the Propolis server at {}: it has the VM {},", client.address, there.properties.id);
            Err(Error::Busy { what, holder: None })
        }
    }
}

/// Returns the information on a run at this server.
pub(super) fn run_info(client: &PropolisClient) -> RunInfo {
    RunInfo { console: ConsoleEndpoint::WebSocket(client.console_url()), ..RunInfo::default() }
}

fn launch(site: &VmContext<'_>, run: &[String]) -> KeeperRequest {
    let (program, args) = run.split_first().expect("a server has a program");
    let place = site.place();
    KeeperRequest {
        program: program.into(),
        args: args.iter().map(OsString::from).collect(),
        work_dir: Some(site.layout.server_dir()),
        copy_log: true,
        descriptors: vec![ALIVE_DESCRIPTOR],
        console_log_descriptor: None,
        events: None,
        console_log: site.layout.console_log(),
        console_log_bytes: site.vm.spec.console_log().bytes(),
        log: site.layout.server_log(),
        log_bytes: SERVER_LOG_BYTES,
        run_file: place.run_file,
        sockets: Vec::new(),
        run_dir: place.run_dir,
        accel: None,
        devices: None,
    }
}

/// Waits until the server prints where it listens.
async fn listening(site: &VmContext<'_>, words: &mut KeeperStream, deadline: Instant) -> Result<SocketAddr> {
    let began = Instant::now();
    let mut line = String::new();
    loop {
        line.clear();
        match timeout_at(deadline, words.read_line(&mut line)).await {
            Ok(Ok(bytes)) if bytes > 0 => {
                if let Some(address) = log::listening(&line) {
                    return Ok(address);
                }
            }
            // The server has ended, and its keeper after recording that.
            Ok(_) => return Err(ended(site).await),
            Err(_) => {
                let awaited =
                    format!("propolis-server to listen (its log: {})", site.layout.server_log().display());
                return Err(Error::timed_out(awaited, began.elapsed()));
            }
        }
    }
}

async fn ended(site: &VmContext<'_>) -> Error {
    let _ = process::settled(&site.place()).await;
    let words = last_words(site);
    let log = site.layout.server_log();
    let problem = format!(
        "the server ended before it listened (its log: {}); it printed:\n    {}",
        log.display(),
        words.replace('\n', "\n    ")
    );
    Error::protocol(Peer::PropolisProcess, problem)
}

/// The server that creates a VM.
enum ServerChoice<'a> {
    /// The VM's own, whose log has the reason of a failure.
    Own(&'a mut KeeperStream),
    /// One elsewhere.
    Elsewhere(&'a OperationLock),
}

/// Creates the VM at the server.
///
/// # Errors
/// Why it failed, and whether the server may still create the VM.
async fn ensure(
    site: &VmContext<'_>,
    client: &PropolisClient,
    plan: &PropolisPlan,
    by: ServerChoice<'_>,
    deadline: Instant,
) -> Result<(), (Error, StopRequest)> {
    let answered = |error| (error, StopRequest::Answered);
    step("server: create the VM").map_err(|source| answered(lost(client, source)))?;
    let (made, words) = match by {
        ServerChoice::Elsewhere(hold) => {
            (detached(client, plan, hold, deadline).await.map_err(answered)?, None)
        }
        ServerChoice::Own(words) => (client.ensure(&plan.request, deadline).await, Some(words)),
    };
    let Err(failure) = made else { return Ok(()) };
    if failure.is_taken() {
        let what = format!("the Propolis server at {}: it has a VM already,", client.address);
        return Err(answered(Error::Busy { what, holder: None }));
    }
    let why = match (failure.hidden(), words) {
        // A server that panicked and still runs mentions the panic in no reply.
        (Some(id), Some(words)) => match (why(site, words, id).await, last_panic(site)) {
            (Some(why), Some(panic)) => Some(format!("{why}; {panic}")),
            (why, panic) => why.or(panic),
        },
        _ => None,
    };
    let asked = match &failure {
        ClientError::Denied { .. } | ClientError::Refused(_) => StopRequest::Answered,
        _ => StopRequest::MayBeAtWork,
    };
    let hung_up = failure.is_of_the_network() || matches!(failure, ClientError::Refused(_));
    let died = hung_up && site.claim.options.address.is_none();
    let error = failure.into_error(client, "create the VM", why);
    if !died {
        return Err((error, asked));
    }
    // A panic ends the server: its message says more than that the connection was lost.
    let _ = process::settled(&site.place()).await;
    let problem = format!(
        "the server ended while it created the VM; it printed:\n    {}",
        last_words(site).replace('\n', "\n    ")
    );
    Err(answered(Error::protocol(Peer::PropolisProcess, problem)))
}

/// Creates the VM at a server elsewhere, in a task that holds the operation's lock until the server
/// has replied.
///
/// The server creates the VM even if the client is gone, and its process can't be ended from here.
/// If this future were dropped and the lock released, a `destroy` would find no VM yet, and leave
/// it behind.
async fn detached(
    client: &PropolisClient,
    plan: &PropolisPlan,
    hold: &OperationLock,
    deadline: Instant,
) -> Result<ClientResult<()>> {
    let lock = hold.as_input().map_err(|source| lost(client, source))?;
    let (client, request) = (*client, plan.request.clone());
    let made = tokio::spawn(async move {
        let _lock = lock;
        client.ensure(&request, deadline).await
    });
    made.await.map_err(|error| lost(&client, std::io::Error::other(error)))
}

/// Reads the reason of a failed request from the log: both from its stream and from the file, since
/// the stream of a long log is lost.
async fn why(site: &VmContext<'_>, words: &mut KeeperStream, request_id: &str) -> Option<String> {
    let copied = async {
        let mut line = String::new();
        while words.read_line(&mut line).await.is_ok_and(|bytes| bytes > 0) {
            if let Some(why) = log::why(&line, request_id) {
                return why;
            }
            line.clear();
        }
        // The rest is in the file.
        std::future::pending().await
    };
    let written = async {
        loop {
            let log = tail_of_log(&site.layout.server_log(), LOG_BYTES).unwrap_or_default();
            if let Some(why) = log::why(&String::from_utf8_lossy(&log), request_id) {
                return why;
            }
            sleep(LOOK_AGAIN).await;
        }
    };
    let either = async {
        tokio::select! {
            why = copied => why,
            why = written => why,
        }
    };
    timeout(WHY_LIMIT, either).await.ok()
}

/// Runs the guest of a VM that was created, and waits until it runs.
async fn run_guest(
    site: &VmContext<'_>,
    client: &PropolisClient,
    server: ServerFile,
    deadline: Instant,
) -> Result<()> {
    let server = ServerFile { is_begun: true, ..server };
    match site.claim.options.address {
        // A guest elsewhere survives a power cut here.
        Some(_) => files::write_synced(&site.layout.server_file(), &server)?,
        None => files::write(&site.layout.server_file(), &server)?,
    }
    remove_file(&site.layout.stop_mark())?;
    step("server: run the VM").map_err(|source| lost(client, source))?;
    let explained = |failure: ClientError| failure.into_error(client, "run the VM", None);
    client.request(RequestedState::Run, deadline).await.map_err(explained)?;
    let running = |state| matches!(state, InstanceState::Running | InstanceState::Failed);
    match monitor::until(client, running, deadline).await.map_err(explained)? {
        InstanceState::Running => Ok(()),
        // The guest ran, and has ended already.
        InstanceState::Destroyed => Ok(()),
        state => {
            let words = last_words(site);
            let colon = if words.is_empty() { "" } else { ": " };
            let message = format!("the guest did not start: its server reports {state:?}{colon}{words}");
            Err(Error::Backend { message, kind: ErrorKind::Hypervisor, source: None })
        }
    }
}

fn lost(client: &PropolisClient, source: std::io::Error) -> Error {
    Error::protocol(Peer::Propolis, format!("the connection to {} failed", client.address))
        .with_source(source)
}
