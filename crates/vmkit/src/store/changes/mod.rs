//! The event that a VM's record was replaced.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(any(not(target_os = "linux"), test))]
mod portable;

#[cfg(target_os = "linux")]
pub(crate) use linux::RecordChanges;
#[cfg(not(target_os = "linux"))]
pub(crate) use portable::RecordChanges;
