//! Ending a run: ask the guest, then QEMU, then the kernel; always waiting for the process itself.

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

/// How long QEMU may take to end after `quit`, and then after SIGTERM: it flushes its disks.
const FORCE_GRACE: Duration = Duration::from_secs(2);
/// The timeout of one exchange with the monitor while the guest is asked.
const MONITOR_LIMIT: Duration = Duration::from_secs(2);
/// How long a start in progress may hold the lock before its process is known.
pub(super) const LAUNCH_LIMIT: Duration = Duration::from_secs(10);
/// How often the power button is pressed: a guest ignores it while it boots, and there is no event
/// for the end of that.
const PRESS_EVERY: Duration = Duration::from_secs(1);

/// Stops what runs, by force when `timeout` has passed.
///
/// # Errors
/// `TimedOut` if the process survives even SIGKILL.
pub(super) async fn stop(vm: &VmHandle, layout: &QemuLayout, timeout: Duration) -> Result<()> {
    let deadline = later(timeout);
    let can_ask = status::monitor(layout).exists();
    if let ProcessState::Live(process) = process::look(&layout.place()).await?
        && !timeout.is_zero()
    {
        let has_ended = match can_ask {
            true => ask_guest(vm, layout, &process, deadline).await?,
            // It may be ending, and have removed its sockets already.
            false => process.wait(deadline.min(Instant::now() + ENDING_LIMIT)).await?,
        };
        if has_ended {
            process::settled(&layout.place()).await?;
            mark_asked(layout);
            return Ok(());
        }
    }
    // Not earlier: if this is interrupted while the guest is asked, a later kill from outside was
    // not requested.
    let was_asked = layout.stop_mark().exists();
    mark_asked(layout);
    let ended = end_run(layout, timeout, deadline, can_ask).await;
    if ended.is_err() && !was_asked {
        // It still runs, and what ends it later is not this stop.
        let _ = fs::remove_file(layout.stop_mark());
    }
    ended
}

/// Ends what runs, by force.
async fn end_run(layout: &QemuLayout, timeout: Duration, deadline: Instant, can_ask: bool) -> Result<()> {
    let process = match process::look(&layout.place()).await? {
        ProcessState::Live(process) => process,
        // The guest has not started, so there is nothing to ask and nothing to lose.
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
                    "the guest can't be asked, since both sockets of QEMU's monitor are gone ({}, {})",
                    usual.display(),
                    spare.display()
                )
            }
            (true, true) => "the guest can no longer react to its power button".to_owned(),
            (true, false) => "the guest did not power off in time".to_owned(),
        };
        tracing::warn!(vm = %layout.name(), "{why}, so it is ended by force");
    }
    let ended = !timeout.is_zero() && force(layout, &process).await?;
    if ended { process::settled(&layout.place()).await } else { process::kill(&layout.place()).await }
}

/// Records that the end was requested, so that even an end by force leads to `Stopped`.
///
/// A full or a read-only disk is no reason to leave a guest running: an end by force is reported as
/// one from outside then.
pub(super) fn mark_asked(layout: &QemuLayout) {
    let mark = layout.stop_mark();
    let opened = step("stop: mark")
        .and_then(|()| OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&mark));
    if let Err(error) = opened {
        tracing::warn!(vm = %layout.name(), %error, "cannot create {}, which records that the end was requested", mark.display());
    }
}

/// Presses the power button until the guest has ended or the deadline has passed; returns whether
/// it has ended.
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
            // A guest that can't react any more need not be waited for.
            Ok(Ok(ButtonPress::Deaf)) => return Ok(false),
            Ok(Ok(ButtonPress::Yes)) => Instant::now() + PRESS_EVERY,
            Ok(Err(error)) => {
                // A QEMU that is ending closes its monitor, and a busy one may reply later.
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

/// Presses the button. `has_room` is whether the disks of a guest that waits for space are worth
/// another try.
async fn press_button(vm: &VmHandle, layout: &QemuLayout, has_room: &mut bool) -> Result<ButtonPress> {
    let limit = Instant::now() + MONITOR_LIMIT;
    let (mut qmp, state) = QmpClient::with_status(&status::monitor(layout), limit).await?;
    match state {
        RunState::Paused | RunState::Prelaunch => {
            qmp.cont(limit).await?;
        }
        // There may be space by now. If not, the state is back before the next press.
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

/// Ends QEMU itself, by `quit`, then SIGTERM; returns whether it has ended. The caller's last
/// resort is SIGKILL.
pub(super) async fn force(layout: &QemuLayout, process: &ProcessFd) -> Result<bool> {
    let limit = Instant::now() + FORCE_GRACE;
    let quit = async { QmpClient::connect(&status::monitor(layout), limit).await?.quit(limit).await };
    match quit.await {
        Ok(()) => {
            if process.wait(limit).await? {
                return Ok(true);
            }
        }
        Err(error) => tracing::debug!(%error, "QEMU did not accept `quit`"),
    }
    process::end(process, Signal::TERM, FORCE_GRACE).await
}
