//! A console at a WebSocket, made into a socket that can be polled: a thread carries it.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use tokio::runtime;
use vmkit::Error;
use vmkit::propolis::{ConsoleEnd, ConsoleEvent, HistoryRange, SerialConsole};

/// The thread that carries a console.
pub(crate) type CarrierThread = JoinHandle<Result<ConsoleEnd, Error>>;

/// Returns the console's recent past, and a socket to what comes behind it.
///
/// `tell` hears of what happens beside that, from the thread that carries it.
///
/// # Errors
/// Those of [`SerialConsole::history`].
pub(crate) fn open(
    url: &str,
    since: HistoryRange,
    tell: impl Fn(String) + Send + 'static,
) -> Result<(vmkit::propolis::SerialOutput, UnixStream, CarrierThread), Error> {
    let console = SerialConsole::at(url)?;
    let failed = || Error::io("make", "the console's thread");
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(failed())?;
    let past = runtime.block_on(console.history(since))?;
    let (ours, theirs) = UnixStream::pair().map_err(failed())?;
    ours.set_nonblocking(true).map_err(failed())?;
    theirs.set_nonblocking(true).map_err(failed())?;
    let next = past.end;
    let carry = move || {
        runtime.block_on(async {
            let theirs = tokio::net::UnixStream::from_std(theirs).map_err(failed())?;
            console.pump(next, theirs, move |event| tell(told(&event))).await
        })
    };
    let thread = std::thread::Builder::new().name("console".into()).spawn(carry).map_err(failed())?;
    Ok((past, ours, thread))
}

/// Returns why the thread has closed its socket.
///
/// # Errors
/// Whatever ended it but the VM's end.
pub(crate) fn outcome(carrier: CarrierThread) -> Result<ConsoleEnd, Error> {
    match carrier.join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn told(event: &ConsoleEvent) -> String {
    match event {
        ConsoleEvent::Lost => "the connection to the console was lost; connecting again".to_owned(),
        ConsoleEvent::Restored => "the console is connected again".to_owned(),
        ConsoleEvent::Moved { server } => format!("the VM has moved to {server}"),
        ConsoleEvent::Missed { bytes } => {
            format!("{bytes} bytes are missing here: the server no longer has them")
        }
        other => format!("{other:?}"),
    }
}
