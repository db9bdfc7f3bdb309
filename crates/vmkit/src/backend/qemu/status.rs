//! The state of a guest, as its running QEMU reports it, and as the guest's kernel printed it on
//! the console.
//!
//! QEMU is queried on its monitor in the runtime directory, or on the spare one if that directory
//! is gone. QEMU learns of a panic from a device (pvpanic), for which the cloud kernels of
//! distributions load a module late: until then a panicked guest is reported as running. So the
//! last lines of the console are checked as well.

use std::path::PathBuf;

use tokio::time::Instant;

use super::layout::QemuLayout;
use super::qmp::client::{QmpClient, RunState};
use super::{ASK_LIMIT, PAUSE_LIMIT, clock, start};
use crate::boundedlog::tail_of_log_since;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::lifecycle::{FailureKind, VmState};

/// How much of the console's end is searched for a panic, in bytes: a kernel may print more after
/// one, for example about other CPUs that hang.
const TAIL_BYTES: u64 = 4096;
/// The last line of a kernel's panic after which it does not reboot. Source: Linux,
/// `kernel/panic.c`.
const END_OF_PANIC: &str = "---[ end Kernel panic - not syncing: ";

/// Returns the socket of the monitor to connect to.
pub(super) fn monitor(layout: &QemuLayout) -> PathBuf {
    let usual = layout.qmp_socket();
    match usual.exists() {
        true => usual,
        false => Some(layout.spare_socket()).filter(|spare| spare.exists()).unwrap_or(usual),
    }
}

/// Returns the recorded state of a VM that runs and can't be queried.
pub(super) fn recorded(vm: &VmHandle) -> VmState {
    match vm.state {
        VmState::Suspended => VmState::Suspended,
        _ => VmState::Running,
    }
}

/// Resumes a guest whose disk had failed, and returns whether it runs.
pub(super) async fn go_on(vm: &VmHandle, layout: &QemuLayout) -> bool {
    let limit = Instant::now() + PAUSE_LIMIT;
    let went_on = async {
        let mut qmp = QmpClient::connect(&monitor(layout), limit).await?;
        qmp.cont(limit).await?;
        // It may have waited for space for hours.
        let _clock = clock::keep_right(&mut qmp, &layout.agent_socket(), None).await;
        Ok::<_, crate::Error>(())
    };
    if let Err(error) = went_on.await {
        tracing::debug!(%error, "could not resume a guest with a failed disk");
        return false;
    }
    ask(vm, layout).await.is_ok_and(|state| state == VmState::Running)
}

/// Queries the state of the guest of a running QEMU.
pub(super) async fn ask(vm: &VmHandle, layout: &QemuLayout) -> Result<VmState> {
    let limit = Instant::now() + ASK_LIMIT;
    let (_, state) = QmpClient::with_status(&monitor(layout), limit).await?;
    Ok(match state {
        // A guest whose memory is written to disk is paused meanwhile.
        RunState::Paused | RunState::Prelaunch | RunState::InMigrate | RunState::Migrating => {
            VmState::Suspended
        }
        RunState::GuestPanicked => match printed_panic(vm, layout) {
            Some(message) => panicked(&message),
            None => VmState::failed(FailureKind::GuestPanic, "the guest's kernel panicked"),
        },
        RunState::InternalError => VmState::failed(
            FailureKind::InternalError,
            format!("KVM could not run the guest any further; {}", start::last_words(layout)),
        ),
        RunState::IoError => VmState::failed(
            FailureKind::DiskError,
            "a disk of the guest failed, or its host is full: free some space, and a start resumes it",
        ),
        RunState::Shutdown => VmState::Stopped,
        RunState::Running
        | RunState::Suspended
        | RunState::Watchdog
        | RunState::Debug
        | RunState::Unknown(_) => match ended_in_panic(vm, layout) {
            Some(message) => panicked(&message),
            None => VmState::Running,
        },
    })
}

fn panicked(message: &str) -> VmState {
    VmState::failed(FailureKind::GuestPanic, format!("the guest's kernel panicked: {message}"))
}

/// Returns the message of the kernel's panic, if that is the last output on this run's console.
pub(super) fn ended_in_panic(vm: &VmHandle, layout: &QemuLayout) -> Option<String> {
    last_panic(&console(vm, layout)?)
}

/// Returns the message of a panic that QEMU has reported.
fn printed_panic(vm: &VmHandle, layout: &QemuLayout) -> Option<String> {
    const PANIC: &str = "Kernel panic - not syncing: ";
    let said = console(vm, layout)?;
    let said = String::from_utf8_lossy(&said);
    let message = said.lines().rev().find_map(|line| kernel_line(line)?.strip_prefix(PANIC))?;
    Some(shown(message))
}

fn console(vm: &VmHandle, layout: &QemuLayout) -> Option<Vec<u8>> {
    tail_of_log_since(&layout.console_log(), vm.console_since.as_ref()?, TAIL_BYTES).ok()
}

/// Returns the message of the panic that a console ended with.
///
/// Any program may print such words while the guest runs on. So they only count in the kernel's
/// format, with the time in front, and only if no program has printed since: after a panic none
/// can. A kernel that reboots after a panic does not print this line.
fn last_panic(said: &[u8]) -> Option<String> {
    let said = String::from_utf8_lossy(said);
    for line in said.lines().rev().filter(|line| !line.trim().is_empty()) {
        if let Some(rest) = kernel_line(line)?.strip_prefix(END_OF_PANIC) {
            return Some(shown(rest.strip_suffix(" ]---")?));
        }
    }
    None
}

/// Returns the text after the time of a line of the kernel, such as `[   12.345678] `.
fn kernel_line(line: &str) -> Option<&str> {
    let (time, text) = line.trim_end().strip_prefix('[')?.split_once("] ")?;
    let (seconds, micros) = time.trim_start().split_once('.')?;
    // With CONFIG_PRINTK_CALLER the thread or the CPU follows.
    let micros = micros.split_once("][").map_or(micros, |(micros, _)| micros);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(seconds) && digits(micros)).then_some(text)
}

fn shown(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANIC: &str = "\
[    1.702411] Run /init as init process\r
[    1.702500] Kernel panic - not syncing: Requested init /nonexistent failed (error -2).\r
[    1.702600] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.0-28-cloud-amd64 #1\r
[    1.703000] Call Trace:\r
[    1.703100]  <TASK>\r
[    1.704000] ---[ end Kernel panic - not syncing: Requested init /nonexistent failed (error -2). ]---\r
";

    #[test]
    fn a_console_that_ends_with_a_panic_belongs_to_a_panicked_guest() {
        let expected = Some("Requested init /nonexistent failed (error -2).".to_owned());
        assert_eq!(last_panic(PANIC.as_bytes()), expected);
        let hung = "[   27.100000] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!\r\n\r\n";
        assert_eq!(last_panic(format!("{PANIC}{hung}").as_bytes()), expected);
        assert_eq!(last_panic(PANIC.replace("] ---", "][    T1] ---").as_bytes()), expected);
    }

    #[test]
    fn a_guest_that_runs_on_has_not_panicked_whatever_it_prints() {
        for said in [
            String::new(),
            // The kernel reboots.
            PANIC.replace("---[ end Kernel panic - not syncing", "Rebooting in 5 seconds"),
            format!("{PANIC}\r\nDebian GNU/Linux 12 web ttyS0\r\n\r\nweb login: "),
            // Without the kernel's time, and within a line of another program.
            "---[ end Kernel panic - not syncing: x ]---\n".to_owned(),
            "log: [    1.704000] ---[ end Kernel panic - not syncing: x ]---\n".to_owned(),
            "[x] ---[ end Kernel panic - not syncing: x ]---\n".to_owned(),
            "[    1.704000] ---[ end Kernel panic - not sync".to_owned(),
            "[    1.704000] Kernel panic - not syncing: still printing\n".to_owned(),
        ] {
            assert_eq!(last_panic(said.as_bytes()), None, "{said:?}");
        }
    }
}
