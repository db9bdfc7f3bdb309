//! What this host is like, and what runs on it.

pub(crate) mod process;
