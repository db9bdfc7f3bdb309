//! The client of QEMU's guest agent.
