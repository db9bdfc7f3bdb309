//! The conformance suite that any backend can run.
