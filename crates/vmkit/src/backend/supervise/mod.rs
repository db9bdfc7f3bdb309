//! What backends have in common that run their hypervisor as a process of this host: starting it so
//! that it outlives vmkit, finding it again without doubt, ending it, and knowing how it ended.
//!
//! ```text
//!  alive     the lock that is free exactly when nothing runs, nor is about to
//!  spawn     starts a keeper, and tells it what to start
//!  keeper    the hypervisor's parent: a process of its own, one thread, no runtime
//!  runfile   the keeper's record of a run
//!  process   what really runs: run file → process that is certainly ours
//!  files     private directories; what is removed, gone already or not
//!  paths     where all of it lies
//! ```
//!
//! It knows files, locks and processes, and nothing of what the hypervisor is or says.

pub(crate) mod alive;
pub(crate) mod files;
pub(crate) mod keeper;
mod paths;
pub(crate) mod process;
pub(crate) mod runfile;
pub(crate) mod spawn;

#[cfg(feature = "qemu")]
pub(crate) use keeper::EventsRequest;
pub(crate) use paths::{ALIVE_DESCRIPTOR, SupervisionPaths, unfinished};
