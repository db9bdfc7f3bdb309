//! The QEMU Machine Protocol: its lines, and a client.
