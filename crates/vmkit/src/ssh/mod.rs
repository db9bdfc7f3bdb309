//! Sessions in a guest over SSH: programs, terminals, files.
//!
//! It knows SSH and nothing of VMs but a [`SshTarget`], which
//! [`VmManager::ssh_target`](crate::VmManager::ssh_target) makes from a VM's record: where its
//! server listens, which key logs in, and which host key the server has to prove itself with. Both
//! keys are made by [`GuestAccess::generate`](crate::spec::GuestAccess::generate) before the guest
//! is, so nobody is ever trusted on first use.
//!
//! ```text
//! Target ──connect──▶ Session ──spawn──▶ Process: Input, Output
//!                        └─────files───▶ Files: upload, download
//! ```
//!
//! Every call that waits for the guest has a deadline, with two exceptions. How long a program runs
//! is its own affair, so those of a [`GuestProcess`] have none; there a guest that died is noticed by
//! keep-alive messages. How long a copy takes depends on what is copied, so those of [`GuestFiles`]
//! bound each request that the guest has to answer, by 60 s.

mod auth;
mod clock;
mod cloud_init;
mod command_line;
mod files;
mod forward;
mod host_terminal;
mod keys;
mod line;
mod noise;
mod outside;
#[cfg(feature = "propolis")]
mod power_off;
mod process;
mod session;
mod target;
mod terminal;

#[cfg(feature = "images")]
pub(crate) use cloud_init::cloud_init_status;
pub use cloud_init::{CloudInitProgress, CloudInitStatus};
pub use command_line::GuestCommand;
pub use files::{CopyObserver, CopyProgress, CopySummary, GuestFiles, check_download, check_upload};
pub use keys::{HostKey, SshIdentity};
pub(crate) use line::Lifeline;
pub use outside::SshConfig;
pub(crate) use outside::keep;
#[cfg(feature = "propolis")]
pub use power_off::SshPowerOff;
pub use process::{GuestProcess, ProcessEvent, ProcessInput, ProcessOutput};
pub use session::Session;
pub(crate) use session::may_pass;
pub use target::{LoginOptions, SshTarget};
pub use terminal::{TerminalSize, TerminalSpec};
