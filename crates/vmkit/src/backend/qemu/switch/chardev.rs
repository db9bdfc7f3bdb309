//! Channels to the outside: `-chardev`, `-mon`, `-vnc`.
//!
//! Pure.

use std::ffi::OsString;
use std::path::Path;

use super::{PropertyList, QemuArgs};

/// `-chardev socket`: a listening socket handed down by number, so that nothing races for a path.
pub(crate) struct Chardev {
    pub(crate) id: &'static str,
    pub(crate) descriptor: i32,
    /// The descriptor set whose member gets a copy of all output.
    pub(crate) log_set: Option<i32>,
}

impl Chardev {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let log = self.log_set.map(|set| format!("/dev/fdset/{set}"));
        let props = PropertyList::new("socket")
            .with("id", self.id)
            .with("fd", self.descriptor.to_string())
            .with("server", "on")
            .with("wait", "off")
            .with_some("logappend", log.as_ref().map(|_| "on"))
            .with_some("logfile", log);
        args.props("-chardev", props);
    }
}

/// `-chardev socket`: one end of a connected pair, handed down by number.
pub(crate) struct EventChannel {
    pub(crate) id: &'static str,
    pub(crate) descriptor: i32,
}

impl EventChannel {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let props = PropertyList::new("socket").with("id", self.id).with("fd", self.descriptor.to_string());
        args.props("-chardev", props);
    }
}

/// `-mon`: a QMP monitor on a channel.
pub(crate) struct Monitor {
    pub(crate) chardev: &'static str,
}

impl Monitor {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        args.props("-mon", PropertyList::first("chardev", self.chardev).with("mode", "control"));
    }
}

/// `-vnc`: where the screen is shown.
pub(crate) enum VncServer<'a> {
    Unix(&'a Path),
    /// Loopback, the first free display of 100, shut until a password is set.
    Loopback,
}

impl VncServer<'_> {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let props = match self {
            VncServer::Unix(path) => {
                let mut address = OsString::from("unix:");
                address.push(path);
                PropertyList::new(address)
            }
            VncServer::Loopback => PropertyList::new("127.0.0.1:0").with("to", "99").with("password", "on"),
        };
        args.props("-vnc", props);
    }
}
