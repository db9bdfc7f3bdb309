//! Following a VM's state by its generations.
//!
//! The server tells the newest state only: those in between may be skipped, and a VM that stopped
//! may be seen `Destroyed` at once. A lost connection loses nothing, since the next question begins
//! at the generation after the last that was seen.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::client::{ClientError, ClientResult, PropolisClient};
use super::instance_spec::InstanceState;

/// The pause before a server that could not be reached is tried again. No event tells that it can
/// be.
const BACK_OFF: Duration = Duration::from_millis(200);
/// After so many refusals in a row nobody listens there any more.
const MOST_REFUSALS: u32 = 5;

/// Waits until the VM is in a state that `wanted` accepts, or is gone for good, and returns its
/// state.
///
/// `Failed` is the last state of a VM that could not be made or started, which the server has let
/// go of by then: say so by `wanted`. A network that fails is waited for; a server that is not
/// there is not.
///
/// # Cancel safety
/// Nothing is changed by waiting.
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
            // It will never come to that generation: the VM's last state was seen by somebody else.
            Err(ClientError::Denied { status, .. }) if status.as_u16() == 410 => {
                return Ok(InstanceState::Destroyed);
            }
            Err(failure) if failure.is_of_the_network() || matches!(failure, ClientError::Refused(_)) => {
                refusals = if failure.is_of_the_network() { 0 } else { refusals + 1 };
                if refusals >= MOST_REFUSALS {
                    return Err(failure);
                }
                tracing::debug!(%failure, "the state of the VM is asked again");
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
