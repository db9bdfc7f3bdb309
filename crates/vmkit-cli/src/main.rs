//! The command `vmkit`.
fn main() {}
