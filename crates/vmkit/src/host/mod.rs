//! What this host is like, and what runs on it.

mod cache;
mod kvm;
pub(crate) mod process;

pub use kvm::KvmVerdict;
