//! The fake Propolis server keeps the rules of the real one, and every reply matches the published
//! description.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod client;
mod errors;
mod host;
mod lifecycle;
mod process;
mod serial;
