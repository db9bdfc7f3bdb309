//! What goes over the wire: the server's own types, written from its published description.
//!
//! They are not vmkit's types, so that a mistake in one is not repeated in the other. The names and
//! the shapes are those of the description; a test compares what the framework generates from these
//! types with it.
//!
//! Pure: data.

mod component;
mod instance;
mod versions;

pub(super) use component::*;
pub(super) use instance::*;
pub(super) use versions::*;
