//! Setting the guest's clock by its agent, after its CPUs were stopped.
//!
//! `guest-set-time` sets the clock at once, and then lets the guest write it to its RTC, which
//! takes an emulated guest a second and may fail. So its reply is ignored, and the clock is read
//! again. In a guest without `hwclock`, such as a small Debian, the agent refuses before it sets
//! anything; then it runs `date`.
//!
//! Source: QEMU, `qga/commands-posix.c`.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::agent::GuestAgent;
use super::qmp::client::QmpClient;
use crate::abilities::ClockState;
use crate::clock::{self, CLOSE, ClockReading, SET};
use crate::deadline::left;
use crate::error::{Error, Peer, Result};
use crate::program::GuestExitStatus;

/// The timeout for all of it. Without load an emulated guest needs 1 s, and on a busy host ten
/// times as long.
const LIMIT: Duration = Duration::from_secs(20);
/// The timeout of the agent's first reply.
const GREETING: Duration = Duration::from_secs(5);
/// How often the clock is set: each time corrected by the delay of the time before.
const TRIES: usize = 10;
/// The maximum number of readings, if replies are slow.
const READINGS: usize = 3;
/// A round trip that is short enough to rely on.
const QUICK: Duration = Duration::from_millis(10);

/// Sets the clock of a resumed guest, if an agent runs in it and the clock is off.
///
/// The guest goes on if this fails; that is logged at debug level here, and the manager warns of
/// it.
pub(super) async fn keep_right(qmp: &mut QmpClient, agent: &Path, paused: Option<Duration>) -> ClockState {
    if paused.is_some_and(|paused| paused < CLOSE) {
        return ClockState::Right;
    }
    let deadline = Instant::now() + LIMIT;
    // In a guest without an agent, a request would only time out.
    match agent_listens(qmp, deadline).await {
        Ok(true) => {}
        Ok(false) => return ClockState::Unknown,
        Err(error) => {
            tracing::debug!(%error, "cannot find out whether a guest agent runs");
            return ClockState::Unknown;
        }
    }
    match set(agent, deadline).await {
        Ok(()) => ClockState::Right,
        Err(error) => {
            tracing::debug!(%error, "the guest agent did not set the clock");
            ClockState::Unknown
        }
    }
}

/// Returns whether a process in the guest has opened the agent's port. Source: QEMU,
/// `qapi/char.json`, `ChardevInfo`.
pub(super) async fn agent_listens(qmp: &mut QmpClient, deadline: Instant) -> Result<bool> {
    let answer = qmp.execute("query-chardev", None, deadline).await?;
    let mut devices = answer.as_array().into_iter().flatten();
    let agent = devices.find(|device| device["label"] == "agent");
    Ok(agent.is_some_and(|agent| agent["frontend-open"] == Value::Bool(true)))
}

async fn set(path: &Path, deadline: Instant) -> Result<()> {
    let mut agent = GuestAgent::connect(path, GREETING.min(left(deadline))).await?;
    let mut reading = read(&mut agent, deadline).await?;
    if !reading.is_to_be_set() {
        return Ok(());
    }
    // The delay between sending a time and setting it.
    let mut lag = reading.round_trip / 2;
    let mut by_date = false;
    for tries in 1..=TRIES {
        let set = match by_date {
            true => set_by_date(&mut agent, lag, deadline).await,
            false => agent.set_time(nanos(clock::now() + lag), left(deadline)).await,
        };
        reading = read(&mut agent, deadline).await?;
        if reading.is_right_after(tries) {
            return Ok(());
        }
        let off = Duration::from_nanos(u64::try_from(reading.ahead.unsigned_abs()).unwrap_or(u64::MAX));
        match set {
            Err(error) if by_date => return Err(error),
            Err(error) if off >= SET => {
                tracing::debug!(%error, "the guest agent does not set the clock itself");
                by_date = true;
            }
            _ if off < SET => lag = if reading.ahead < 0 { lag + off } else { lag.saturating_sub(off) },
            _ => {}
        }
    }
    let problem = format!("the clock was set {TRIES} times, and is {}", reading.described());
    Err(Error::protocol(Peer::GuestAgent, problem))
}

/// Sets the clock by `date` in the guest, at the start of a second: busybox's takes whole seconds
/// only.
async fn set_by_date(agent: &mut GuestAgent, lag: Duration, deadline: Instant) -> Result<()> {
    let second = (clock::now() + lag).as_secs() + 1;
    sleep(Duration::from_secs(second).saturating_sub(lag).saturating_sub(clock::now())).await;
    let arguments = ["-c", "exec date -u -s \"@$0\"", &second.to_string()];
    let done = agent.exec("/bin/sh", &arguments, None, left(deadline)).await?;
    match done.exit {
        GuestExitStatus::Code(0) => Ok(()),
        exit => {
            let words = String::from_utf8_lossy(&done.stderr);
            let problem = format!("`date` in the guest could not set the clock ({exit:?}): {}", words.trim());
            Err(Error::protocol(Peer::GuestAgent, problem))
        }
    }
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// Reads the guest's clock, and again if the reply was too slow to be accurate.
async fn read(agent: &mut GuestAgent, deadline: Instant) -> Result<ClockReading> {
    let mut best: Option<ClockReading> = None;
    for _ in 0..READINGS {
        let asked = clock::now();
        let guest = agent.time(left(deadline)).await?;
        let reading = ClockReading::of(guest, asked, clock::now());
        if best.is_none_or(|best| reading.round_trip < best.round_trip) {
            best = Some(reading);
        }
        if reading.round_trip < QUICK {
            break;
        }
    }
    Ok(best.expect("it was read at least once"))
}
