//! The fake Propolis server keeps the rules of the real one, and every reply matches the published
//! description.

mod client;
mod errors;
mod host;
mod lifecycle;
mod process;
mod serial;
