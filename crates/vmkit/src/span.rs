//! Spans of `tracing` around operations, for programs that embed vmkit; the crate's docs describe
//! them.
//!
//! Their fields have names, ids and kinds of errors. The text of an error is not among them: it may
//! quote a guest or an address.

use std::fmt::Display;

use tracing::field::{debug, display};
use tracing::{Instrument, Span};

use crate::error::Result;

/// The target of every operation's span.
pub(crate) const TARGET: &str = "vmkit::operation";

/// Creates the span of an operation, with the fields that are known when it begins.
macro_rules! operation {
    ($name:literal $(, $field:ident = $value:expr)*) => {
        tracing::info_span!(
            target: $crate::span::TARGET,
            $name,
            $($field = tracing::field::display($value),)*
            id = tracing::field::Empty,
            outcome = tracing::field::Empty,
        )
    };
}

pub(crate) use operation;

/// Runs an operation in its span, and records there how it ended: `done`, or the kind of its error.
/// For an operation that is dropped nothing is recorded.
pub(crate) async fn within<T>(span: Span, operation: impl Future<Output = Result<T>>) -> Result<T> {
    let done = operation.instrument(span.clone()).await;
    match &done {
        Ok(_) => span.record("outcome", "done"),
        Err(error) => span.record("outcome", debug(error.kind())),
    };
    done
}

/// Records in the span of the current operation which VM, or which image, it is about.
pub(crate) fn about(id: impl Display) {
    let span = Span::current();
    // Without a subscriber for ours, this is a span of the caller.
    if span.metadata().is_some_and(|metadata| metadata.target() == TARGET) {
        span.record("id", display(id));
    }
}
