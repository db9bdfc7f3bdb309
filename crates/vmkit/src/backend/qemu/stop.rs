//! Ending a run: ask the guest, then QEMU, then the kernel; always waiting on the process itself.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, timeout_at};

use super::ENDING_LIMIT;
use super::layout::QemuLayout;
use super::qmp::client::{QmpClient, RunState};
use super::status;
use crate::backend::supervise::alive;
use crate::backend::supervise::process::{self, ProcessState};
use crate::deadline::later;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::host::process::ProcessFd;
use crate::steps::step;

/// How long QEMU may take to obey `quit`, and then SIGTERM: it flushes its disks.
const FORCE_GRACE: Duration = Duration::from_secs(2);
/// How long one word with the monitor may take while the guest is asked.
const MONITOR_LIMIT: Duration = Duration::from_secs(2);
/// How long a start that is under way may hold the lock before it shows a process.
pub(super) const LAUNCH_LIMIT: Duration = Duration::from_secs(10);
/// How often the power button is pressed: a guest that is still booting hears only a later press,
/// and there is no event for "the guest listens to its button now".
const PRESS_EVERY: Duration = Duration::from_secs(1);

/// Stops what runs, by force once `timeout` has passed.
///
/// # Errors
/// `TimedOut` where the process survives even SIGKILL.
pub(super) async fn stop(vm: &VmHandle, layout: &QemuLayout, timeout: Duration) -> Result<()> {
    let deadline = later(timeout);
    let can_ask = status::monitor(layout).exists();
    if let ProcessState::Live(process) = process::look(&layout.place()).await?
        && !timeout.is_zero()
    {
        let has_ended = match can_ask {
            true => ask_guest(vm, layout, &process, deadline).await?,
            // It may be about to end, and have removed its sockets already.
            false => process.wait(deadline.min(Instant::now() + ENDING_LIMIT)).await?,
        };
        if has_ended {
            process::settled(&layout.place()).await?;
            mark_asked(layout);
            return Ok(());
        }
    }
    // Not before: if this is cut off while the guest is asked, a later kill from outside is still
    // one from outside.
    let was_asked = layout.stop_mark().exists();
    mark_asked(layout);
    let ended = end_run(layout, timeout, deadline, can_ask).await;
    if ended.is_err() && !was_asked {
        // It runs on, and was not stopped by what ends it later.
        let _ = fs::remove_file(layout.stop_mark());
    }
    ended
}

/// Ends what runs by force.
async fn end_run(layout: &QemuLayout, timeout: Duration, deadline: Instant, can_ask: bool) -> Result<()> {
    let process = match process::look(&layout.place()).await? {
        ProcessState::Live(process) => process,
        // Nothing to ask yet, and nothing to lose: it ends before it has begun.
        ProcessState::Launching | ProcessState::Starting(_) => {
            return alive::take_and_silence(&layout.place(), Instant::now() + LAUNCH_LIMIT).await.map(drop);
        }
        ProcessState::Nothing | ProcessState::Ended(_) | ProcessState::Rebooted | ProcessState::Copied => {
            return Ok(());
        }
    };
    if !timeout.is_zero() {
        let why = match (can_ask, Instant::now() < deadline) {
            (false, _) => {
                let (usual, spare) = (layout.qmp_socket(), layout.spare_socket());
                format!(
                    "the guest can't be asked, for both sockets of QEMU's monitor are gone ({}, {})",
                    usual.display(),
                    spare.display()
                )
            }
            (true, true) => "the guest can't hear its power button any more".to_owned(),
            (true, false) => "the guest did not power itself off in time".to_owned(),
        };
        tracing::warn!(vm = %layout.name(), "{why}, so it is ended by force");
    }
    let ended = !timeout.is_zero() && force(layout, &process).await?;
    if ended { process::settled(&layout.place()).await } else { process::kill(&layout.place()).await }
}

/// Writes down that the end was asked for, so that even an end by force counts as `Stopped`.
///
/// A full or a read-only disk is no reason to leave a guest running: then an end by force looks
/// like one from outside.
pub(super) fn mark_asked(layout: &QemuLayout) {
    let mark = layout.stop_mark();
    let opened = step("stop: mark")
        .and_then(|()| OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&mark));
    if let Err(error) = opened {
        tracing::warn!(vm = %layout.name(), %error, "cannot create {}, which says that the end was asked for", mark.display());
    }
}

/// Presses the power button until the guest has gone or the deadline has passed; answers whether it
/// has gone.
async fn ask_guest(
    vm: &VmHandle,
    layout: &QemuLayout,
    process: &ProcessFd,
    deadline: Instant,
) -> Result<bool> {
    let mut has_room = true;
    loop {
        let press = timeout_at(deadline, press_button(vm, layout, &mut has_room)).await;
        let next = match press {
            // A guest that can't hear any more need not be waited for.
            Ok(Ok(ButtonPress::Deaf)) => return Ok(false),
            Ok(Ok(ButtonPress::Yes)) => Instant::now() + PRESS_EVERY,
            Ok(Err(error)) => {
                // The monitor goes away together with a QEMU that is just ending, and a busy one
                // may answer later.
                tracing::debug!(%error, "the power button could not be pressed");
                Instant::now() + PRESS_EVERY
            }
            Err(_) => deadline,
        };
        if process.wait(next.min(deadline)).await? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
    }
}

enum ButtonPress {
    Yes,
    Deaf,
}

/// Presses the button; `has_room` says whether the disks of a guest that waits for room are worth
/// another try.
async fn press_button(vm: &VmHandle, layout: &QemuLayout, has_room: &mut bool) -> Result<ButtonPress> {
    let limit = Instant::now() + MONITOR_LIMIT;
    let (mut qmp, state) = QmpClient::with_status(&status::monitor(layout), limit).await?;
    match state {
        RunState::Paused | RunState::Prelaunch => {
            qmp.cont(limit).await?;
        }
        // There may be room by now. If not, it is back here before the next press.
        RunState::IoError if *has_room => {
            *has_room = false;
            qmp.cont(limit).await?;
        }
        // The button does not wake a guest that sleeps.
        RunState::Suspended => {
            qmp.wake(limit).await?;
        }
        RunState::GuestPanicked | RunState::InternalError | RunState::Shutdown | RunState::IoError => {
            return Ok(ButtonPress::Deaf);
        }
        _ if status::ended_in_panic(vm, layout).is_some() => return Ok(ButtonPress::Deaf),
        _ => {}
    }
    qmp.power_down(limit).await?;
    Ok(ButtonPress::Yes)
}

/// Ends QEMU itself: `quit`, then SIGTERM; answers whether it has ended. What is left is SIGKILL.
async fn force(layout: &QemuLayout, process: &ProcessFd) -> Result<bool> {
    let limit = Instant::now() + FORCE_GRACE;
    let quit = async { QmpClient::connect(&status::monitor(layout), limit).await?.quit(limit).await };
    match quit.await {
        Ok(()) => {
            if process.wait(limit).await? {
                return Ok(true);
            }
        }
        Err(error) => tracing::debug!(%error, "QEMU did not take `quit`"),
    }
    process::end(process, Signal::TERM, FORCE_GRACE).await
}
