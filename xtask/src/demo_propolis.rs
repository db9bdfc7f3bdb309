//! `cargo xtask demo --propolis`: the whole life of a VM in Propolis, its console included, shown
//! as it passes.
//!
//! The server is the test kit's fake, which has no guest but a text that stands for one, so this
//! runs anywhere and installs nothing.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use vmkit::propolis::SerialConsole;
use vmkit::spec::{NetworkConfig, RootDisk, VmName, VmSpec};
use vmkit::store::Home;
use vmkit::{ConsoleEndpoint, ErrorKind, PropolisHypervisor, VmManager};
use vmkit_testkit::propolis::{FakePropolis, PropolisBehaviour};

use crate::demo::{Laps, failed};
use crate::error::{Error, Result};

/// How long the console may take to say what it must.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a fake server, and plays.
pub(crate) fn run() -> Result<()> {
    let scratch =
        tempfile::tempdir().map_err(|error| Error::failed(format!("no temporary directory: {error}")))?;
    let server = FakePropolis::spawn(PropolisBehaviour::default());
    let server = server.map_err(|error| Error::failed(format!("no fake server: {error}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::failed(format!("no async runtime: {error}")))?;
    runtime.block_on(play(scratch.path(), &server))
}

async fn play(dir: &Path, server: &FakePropolis) -> Result<()> {
    println!("a fake Propolis server is at {}", server.address());
    let image = dir.join("base.raw");
    std::fs::write(&image, vec![0; 1 << 20]).map_err(|error| Error::failed(format!("no image: {error}")))?;
    let home = Home::at(dir.join("home")).map_err(failed)?;
    let propolis = PropolisHypervisor::builder(home.vms()).address(server.address()).build();
    let manager = VmManager::new(propolis, home);
    let name = VmName::new("demo").map_err(failed)?;
    let spec = VmSpec::builder(name.clone()).disk(RootDisk { image, size: None });
    let spec = spec.network(NetworkConfig::None).build().map_err(failed)?;
    println!("{}", manager.hypervisor().plan(&spec).await.map_err(failed)?);

    let mut laps = Laps::begin();
    manager.create(spec).await.map_err(failed)?;
    laps.lap("create: disk, record");
    manager.start(&name).await.map_err(failed)?;
    laps.lap("start: the server has made the VM, and it runs");
    talk(&manager, &name, &mut laps).await?;
    match manager.suspend(&name).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => laps.lap(&format!("suspend: {error}")),
        other => return Err(Error::failed(format!("suspend is refused, and was not: {other:?}"))),
    }
    manager.stop(&name, Duration::ZERO).await.map_err(failed)?;
    laps.lap("stop: hard, since nobody was named who asks the guest");
    laps.lap(&format!("logs: {:?}", logged(&manager, &name)?));
    manager.start(&name).await.map_err(failed)?;
    laps.lap("start again: another VM of the server's, on the same disk");
    talk(&manager, &name, &mut laps).await?;
    manager.stop(&name, Duration::ZERO).await.map_err(failed)?;
    laps.lap(&format!("stop; logs of both runs: {:?}", logged(&manager, &name)?));
    manager.remove(&name, false).await.map_err(failed)?;
    laps.lap("remove");
    match server.kernel_vms().is_empty() {
        true => Ok(()),
        false => Err(Error::failed("a VM is left in the fake kernel")),
    }
}

/// Returns what is kept of the console.
fn logged(manager: &VmManager<PropolisHypervisor>, name: &VmName) -> Result<String> {
    let log = manager.console_log(name).map_err(failed)?;
    std::fs::read_to_string(log).map_err(|error| Error::failed(format!("no log of the console: {error}")))
}

/// Listens to the guest at its console, types, and leaves.
async fn talk(manager: &VmManager<PropolisHypervisor>, name: &VmName, laps: &mut Laps) -> Result<()> {
    let ConsoleEndpoint::WebSocket(url) = manager.console_endpoint(name).map_err(failed)? else {
        return Err(Error::failed("a Propolis VM's console is at a WebSocket"));
    };
    laps.lap(&format!("console: at {url}"));
    let (mut ours, theirs) =
        UnixStream::pair().map_err(|error| Error::failed(format!("no sockets: {error}")))?;
    let console = SerialConsole::at(&url).map_err(failed)?;
    let carried = tokio::spawn(async move { console.pump(0, theirs, |event| println!("{event:?}")).await });
    let said = heard(&mut ours, "login: ").await?;
    laps.lap(&format!("console: {said:?}"));
    ours.write_all(b"hello\r").await.map_err(|error| Error::failed(format!("console: {error}")))?;
    let said = heard(&mut ours, "hello\r\n").await?;
    laps.lap(&format!("console, typed \"hello\": {said:?}"));
    drop(ours);
    let ending = carried.await.map_err(|error| Error::failed(format!("console: {error}")))?;
    laps.lap(&format!("console: {:?}", ending.map_err(failed)?));
    Ok(())
}

/// Reads until this was said, and returns all of it.
async fn heard(console: &mut UnixStream, end: &str) -> Result<String> {
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).ends_with(end) {
        let read = timeout(PATIENCE, console.read_buf(&mut said)).await;
        if !matches!(read, Ok(Ok(bytes)) if bytes > 0) {
            return Err(Error::failed(format!("the console did not say {end:?}")));
        }
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}
