//! What the library warns of, printed as warnings of the command.
//!
//! It says so through `tracing`. All that is needed here is to print an event, so there is no
//! framework for it.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::output;

/// Prints the warnings and errors of this process from now on.
pub(crate) fn print_from_now_on() {
    // A program that runs this as a library may have a subscriber already; then that one prints.
    let _ = tracing::subscriber::set_global_default(WarningLayer);
}

struct WarningLayer;

impl Subscriber for WarningLayer {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = WarningLine::default();
        event.record(&mut line);
        output::warning(line);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// An event as a line: the VM that it is about, its message, then its other fields.
#[derive(Default)]
struct WarningLine {
    vm: String,
    message: String,
    fields: String,
}

impl Visit for WarningLine {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "vm" => write!(self.vm, "{value:?}: "),
            "error" => write!(self.fields, ": {value:?}"),
            name => write!(self.fields, ", {name} {value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

impl fmt::Display for WarningLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.vm, self.message, self.fields)
    }
}
