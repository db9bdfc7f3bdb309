//! Having a server end its VM, whatever became of that.
//!
//! ```text
//!  instance     ──▶ Destroyed, none (424), or another VM          gone
//!  Stop         ──▶ taken            ──▶ wait for Destroyed       gone
//!               ──▶ no active VM (424):  Failed                   gone: it never came to be
//!                                        Creating                 still being made: ask again
//!                                        else                     on its way out: wait for Destroyed
//! ```
//!
//! `Failed` alone tells nothing: a VM that could not be made is gone, and one that could not be started is still there, with its
//! disks, its links and its half in the kernel, and takes no other VM beside it.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::client::{Answer, Client, Failure};
use super::instance_spec::{InstanceState, Requested};
use super::monitor;

/// The pause before a server is asked again that is still making its VM, or that the network did not lead to. No event tells
/// of either: a VM is `Creating` before and after it is made.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the network may fail at a stretch.
const NETWORK_LIMIT: Duration = Duration::from_secs(5);

/// What one try to end a VM came to.
enum Tried {
    /// The server has let go of everything.
    Gone,
    /// It is still making the VM, and denies to have one.
    Creating,
}

/// Has a server end this VM, and comes back once it has let go of everything that the VM had.
///
/// That it has no such VM is success.
///
/// # Errors
/// `Refused` where nobody listens, so there is no server that could hold anything; any other failure leaves open what runs.
pub(super) async fn end(client: &Client, id: Uuid, deadline: Instant) -> Answer<()> {
    let began = Instant::now();
    let mut heard = began;
    loop {
        match end_once(client, id, deadline).await {
            Ok(Tried::Gone) => return Ok(()),
            Ok(Tried::Creating) => heard = Instant::now(),
            Err(failure) if failure.is_of_the_network() && heard.elapsed() < NETWORK_LIMIT => {
                tracing::debug!(%failure, "the server is asked again to end its VM");
            }
            Err(failure) => return Err(failure),
        }
        if Instant::now() + AGAIN >= deadline {
            return Err(Failure::TimedOut(began.elapsed()));
        }
        sleep(AGAIN).await;
    }
}

async fn end_once(client: &Client, id: Uuid, deadline: Instant) -> Answer<Tried> {
    let there = match client.instance(deadline).await {
        Err(failure) if failure.is_no_instance() => return Ok(Tried::Gone),
        there => there?,
    };
    if there.properties.id != id || there.state == InstanceState::Destroyed {
        return Ok(Tried::Gone);
    }
    match client.request(Requested::Stop, deadline).await {
        Err(failure) if failure.is_no_instance() => match there.state {
            InstanceState::Failed => return Ok(Tried::Gone),
            InstanceState::Creating => return Ok(Tried::Creating),
            _ => {}
        },
        told => told?,
    }
    match monitor::until(client, |_| false, deadline).await {
        Err(failure) if !failure.is_no_instance() => Err(failure),
        _ => Ok(Tried::Gone),
    }
}
