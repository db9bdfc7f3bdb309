//! What the host is like, probed once: `HostFacts`.
