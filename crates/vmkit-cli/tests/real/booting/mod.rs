//! Tests in which a real Debian boots, a minute each under emulation.
//!
//! Tests start in the order of their names. These take longest, and stand together here so that
//! they start early: a long one that starts last leaves all but one core idle.

mod debian;
mod guest_ssh;
mod launch;
mod up;
