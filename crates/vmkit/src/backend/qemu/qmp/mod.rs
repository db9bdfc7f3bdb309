//! The QEMU Machine Protocol: its lines, what HMP says in prose, and a client.
//!
//! [`codec`] and [`usernet`] are pure. [`wire`] moves lines over a socket, for the guest agent too;
//! [`client`] holds the conversation.

pub(crate) mod blocks;
pub(crate) mod client;
pub(crate) mod codec;
pub(crate) mod migration;
pub(crate) mod usernet;
pub(crate) mod wire;
