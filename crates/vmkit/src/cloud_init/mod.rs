//! The NoCloud seed: its documents, and the ISO that carries them.
//!
//! [`render`] turns what the spec says into three documents, [`write_seed`] puts them where
//! cloud-init finds them by their volume's label, both with the cargo feature `cloud-init`; and
//! [`read_user_data`] takes a document that the user wrote. What a spec may say is checked in
//! [`spec`](crate::spec).
//!
//! Source: cloud-init's documentation, "NoCloud".

#[cfg(all(test, feature = "cloud-init"))]
mod access_tests;
mod contents;
#[cfg(feature = "cloud-init")]
mod documents;
#[cfg(all(feature = "cloud-init", feature = "propolis"))]
mod fat;
mod from_file;
#[cfg(feature = "cloud-init")]
mod iso;
#[cfg(feature = "cloud-init")]
mod mime;
#[cfg(any(feature = "propolis", all(target_os = "linux", feature = "qemu")))]
mod seed;

pub use contents::Seed;
#[cfg(feature = "cloud-init")]
pub use documents::render;
pub use from_file::read_user_data;
#[cfg(feature = "cloud-init")]
pub use iso::write_seed;
#[cfg(any(feature = "propolis", all(target_os = "linux", feature = "qemu")))]
pub(crate) use seed::SeedOf;
#[cfg(all(target_os = "linux", feature = "qemu", not(feature = "cloud-init")))]
pub(crate) use seed::write_seed;
