//! Following a VM's state by its generations.
//!
//! The server reports only the newest state: others may be skipped, and a VM that stopped may be
//! `Destroyed` at once. A lost connection loses no state, since the next request asks for the
//! generation after the last that was seen.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::client::{ClientError, ClientResult, PropolisClient};
use super::instance_spec::InstanceState;

/// The pause before trying again after a network failure, for whose end there is no event.
const BACK_OFF: Duration = Duration::from_millis(200);
/// After this many refusals in a row the server is regarded as gone.
const MOST_REFUSALS: u32 = 5;

/// Waits until the VM is in a state that `wanted` accepts, or is gone for good; returns its state.
///
/// `Failed` is the last state of a VM that could not be created or started, and which the server
/// has released by then: include it in `wanted`. A network failure is waited out; a server that is
/// gone is not.
///
/// # Cancel safety
/// Waiting changes nothing.
pub(super) async fn until(
    client: &PropolisClient,
    wanted: impl Fn(InstanceState) -> bool,
    deadline: Instant,
) -> ClientResult<InstanceState> {
    let began = Instant::now();
    let (mut generation, mut refusals) = (0, 0);
    loop {
        match client.monitor(generation, deadline).await {
            Ok(seen) if wanted(seen.state) || seen.state == InstanceState::Destroyed => return Ok(seen.state),
            Ok(seen) => {
                generation = seen.r#gen + 1;
                refusals = 0;
            }
            // The server never reaches that generation: another client has seen the VM's last
            // state.
            Err(ClientError::Denied { status, .. }) if status.as_u16() == 410 => {
                return Ok(InstanceState::Destroyed);
            }
            Err(failure) if failure.is_of_the_network() || matches!(failure, ClientError::Refused(_)) => {
                refusals = if failure.is_of_the_network() { 0 } else { refusals + 1 };
                if refusals >= MOST_REFUSALS {
                    return Err(failure);
                }
                tracing::debug!(%failure, "could not get the state of the VM; trying again");
                let again = Instant::now() + BACK_OFF;
                if again >= deadline {
                    return Err(ClientError::TimedOut(began.elapsed()));
                }
                sleep_until(again).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}
