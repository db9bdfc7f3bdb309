//! The NoCloud seed: its documents, and the ISO that carries them.
//!
//! [`render`] turns what the spec says into three documents, [`write_seed`] puts them where cloud-init finds them by their
//! volume's label, and [`read_user_data`] takes a document that the user wrote. What a spec may say is checked in
//! [`spec`](crate::spec).
//!
//! Source: cloud-init's documentation, "NoCloud".

#[cfg(test)]
mod access_tests;
mod documents;
#[cfg(feature = "propolis")]
mod fat;
mod from_file;
mod iso;
mod mime;

pub use documents::{Seed, render};
#[cfg(feature = "propolis")]
pub(crate) use fat::volume as fat_volume;
pub use from_file::read_user_data;
pub use iso::write_seed;
