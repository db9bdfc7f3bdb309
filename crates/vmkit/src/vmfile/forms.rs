//! The texts that have a form of their own: durations, modes, paths, commands.
//!
//! Pure. What the command line has too is written as it is there.

use std::str::FromStr;
use std::time::Duration;

use schemars::{Schema, SchemaGenerator, json_schema};
use toml::de::DeValue;

use super::project::RunPolicy;
use super::read::{BoundedInt, FromValue, ValueNode, number, quantities, texts, unknown_word, words};
use crate::error::Error;
use crate::error::VmfileProblem;
use crate::handle::BackendTag;
use crate::spec::{Accel, DataDisk, Firmware, MachineType, Mib, NetworkConfig, PortForward, UserName, Vnc};

/// How long something may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimeLimit(pub(super) Duration);

impl TimeLimit {
    const MOST: Duration = Duration::from_secs(7 * 86_400);
}

impl FromStr for TimeLimit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |why: &str| {
            let value: String = text.chars().take(40).collect();
            Error::invalid(
                "timeout",
                value,
                format!("{why}; write \"30s\", \"5m\", \"2h\" or a number of seconds"),
            )
        };
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (amount, unit) = text.split_at(digits);
        let factor = match unit {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(refused("this is not a duration")),
        };
        let seconds = amount.parse::<f64>().map_err(|_| refused("this is not a duration"))?;
        match Duration::try_from_secs_f64(seconds * factor) {
            Ok(limit) if limit.is_zero() => Err(refused("a duration is longer than zero")),
            Ok(limit) if limit <= Self::MOST => Ok(Self(limit)),
            _ => Err(refused("a duration is at most 7 days")),
        }
    }
}

/// The permission bits of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileMode(pub(super) u32);

impl FromStr for FileMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
        let bits = octal.then(|| u32::from_str_radix(text, 8).ok()).flatten();
        bits.map(Self).ok_or_else(|| {
            Error::invalid("mode", "", "permission bits are written in octal, such as \"0644\"")
        })
    }
}

/// A path on the host that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostPath(pub(super) String);

impl FromStr for HostPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let expected = match text {
            "" => "a path has at least one character",
            _ if text.contains('\0') => "a path has no zero byte",
            _ if text == "~" || text.starts_with("~/") => {
                "`~` is not expanded here: write the whole path, or one relative to this file"
            }
            _ => return Ok(Self(text.to_owned())),
        };
        Err(Error::invalid("path", text, expected))
    }
}

/// An absolute path in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuestPath(pub(super) String);

impl FromStr for GuestPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.starts_with('/') && text.len() < 4096 && !text.contains(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        let expected = "a path in the guest begins with / and has no control characters";
        Err(Error::invalid("path", text, expected))
    }
}

/// A text of one line with something in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LineText(pub(super) String);

impl FromStr for LineText {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let most = 1000;
        if !text.trim().is_empty() && text.len() <= most && !text.contains(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::invalid("name", "", format!("it is one line of 1 to {most} bytes")))
    }
}

/// Where the image of a root disk comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageForm(pub(super) String);

impl FromStr for ImageForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let expected =
            "an image is a name such as debian:12, a path, or an address, in one line of at most 1000 bytes";
        let line = text.parse().map_err(|_| Error::invalid("image", "", expected));
        line.map(|LineText(text)| Self(text))
    }
}

/// What a shell is given: any text but an empty one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShellText(pub(super) String);

impl FromStr for ShellText {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let expected = match text {
            _ if text.trim().is_empty() => "there is nothing to run",
            _ if text.contains('\0') => "a command has no zero byte",
            _ if text.len() > 128 << 10 => "a command has at most 128 KiB: make it a `script`",
            _ => return Ok(Self(text.to_owned())),
        };
        Err(Error::invalid("shell", "", expected))
    }
}

/// What a [`LineText`] is: no control characters, and not only blanks.
const LINE: &str =
    r"^[^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$";
/// What a [`Mib`] is: a number with a unit, or one of at least [`Mib::LEAST_BARE`].
const SIZE: &str = "^0*([1-9][0-9]*(MiB|M|GiB|G|TiB|T)|6[4-9]|[7-9][0-9]|[1-9][0-9]{2,})$";
/// What a [`TimeLimit`] is: longer than nothing.
const LIMIT: &str = r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)(ms|s|m|h)?$";
macro_rules! port {
    () => {
        "0*(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
    };
}
/// What a [`PortForward`] is; a port is 1 to 65535.
const FORWARD: &str = concat!("^(([0-9.]+:)?", port!(), ":)?", port!(), "(/tcp|/udp)?$");

texts! {
    DataDisk: "a size such as \"10GiB\", or the path of an image, with :ro after it if it is read-only",
        { "type": "string", "minLength": 1 };
    NetworkConfig: "\"user\", \"tap:BRIDGE\", \"vnic:LINK\" or \"none\"",
        { "type": "string", "pattern": "^(user|none|tap:[A-Za-z0-9._-]{1,15}|vnic:[A-Za-z]([A-Za-z0-9._-]{0,29}[0-9]))$" };
    PortForward: "a forward such as \"8080:80\"",
        { "type": "string", "pattern": FORWARD };
    HostPath: "a path, relative to this file or absolute",
        { "type": "string", "pattern": "^([^~\\u0000]|~[^/\\u0000])[^\\u0000]*$" };
    GuestPath: "an absolute path in the guest",
        { "type": "string", "pattern": "^/[^\\u0000-\\u001f\\u007f-\\u009f]*$", "maxLength": 4095 };
    FileMode: "permission bits in quotes, such as \"0644\"",
        { "type": "string", "pattern": "^[0-7]{3,4}$" };
    LineText: "a string of one line, in quotes",
        { "type": "string", "pattern": LINE, "maxLength": 1000 };
    ImageForm: "a name such as \"debian:12\", a path, or an address, in quotes",
        { "type": "string", "pattern": LINE, "maxLength": 1000 };
    ShellText: "a string in quotes, for /bin/sh in the guest",
        { "type": "string", "pattern": "\\S", "maxLength": 131_072 };
    UserName: "the name of a user",
        { "type": "string", "pattern": "^[a-z_][a-z0-9_-]{0,31}$" };
    BackendTag: "the name of a backend: \"qemu\", \"propolis\", \"noop\" or your own",
        { "type": "string", "pattern": "^[a-z][a-z0-9-]{0,31}$" };
}

quantities! {
    Mib: "a size such as \"2GiB\", or a number of MiB", number, {
        "anyOf": [
            { "type": "string", "pattern": SIZE },
            { "type": "integer", "minimum": Mib::LEAST_BARE, "maximum": Mib::MAX.mib() },
        ]
    };
    TimeLimit: "a duration, such as \"30s\", \"5m\" or a number of seconds", number, {
        "anyOf": [
            { "type": "string", "pattern": LIMIT },
            { "type": "number", "exclusiveMinimum": 0, "maximum": 604_800 },
        ]
    };
}

words! {
    MachineType: "\"q35\", \"microvm\" or \"virt\"" {
        "q35" => MachineType::Q35, "microvm" => MachineType::Microvm, "virt" => MachineType::Virt,
    }
    Firmware: "\"bios\" or \"uefi\"" { "bios" => Firmware::Bios, "uefi" => Firmware::Uefi }
    Accel: "\"auto\", \"kvm\" or \"tcg\"" {
        "auto" => Accel::Auto, "kvm" => Accel::Kvm, "tcg" => Accel::Tcg,
    }
    Vnc: "\"unix\", \"loopback\" or \"off\"" {
        "unix" => Vnc::Unix, "loopback" => Vnc::Loopback, "off" => Vnc::Off,
    }
    RunPolicy: "\"once\", \"always\" or \"changed\"" {
        "once" => RunPolicy::Once, "always" => RunPolicy::Always, "changed" => RunPolicy::Changed,
    }
}

/// The version of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FormatVersion;

impl FormatVersion {
    /// The one that there is.
    pub(super) const NUMBER: u32 = 1;
}

impl FromValue for FormatVersion {
    const WHAT: &'static str = "the number 1";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        BoundedInt::<{ Self::NUMBER }, { Self::NUMBER }>::read(node, problems).map(|_| Self)
    }

    fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "const": Self::NUMBER })
    }
}

/// A command for cloud-init: a text for the shell, or a program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CommandForm(pub(super) Vec<String>);

impl FromValue for CommandForm {
    const WHAT: &'static str = "a string for the shell, or a list of a program and its arguments";

    fn read(node: &ValueNode<'_>, problems: &mut Vec<VmfileProblem>) -> Option<Self> {
        match node.value.get_ref() {
            DeValue::String(_) => {
                let ShellText(text) = ShellText::read(node, problems)?;
                Some(Self(vec!["/bin/sh".to_owned(), "-c".to_owned(), text]))
            }
            DeValue::Array(_) => Vec::<String>::read(node, problems).map(Self),
            _ => {
                node.wrong_type(Self::WHAT, problems);
                None
            }
        }
    }

    fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string", "minLength": 1 },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_with_their_units() {
        for (text, millis) in
            [("30s", 30_000), ("0.5", 500), ("250ms", 250), ("5m", 300_000), ("2h", 7_200_000)]
        {
            assert_eq!(text.parse::<TimeLimit>().unwrap().0, Duration::from_millis(millis), "{text}");
        }
    }

    #[test]
    fn rubbish_limits_are_refused_with_what_would_be_right() {
        for text in ["", "s", "0", "0s", "-1", "1d", "8000000", "1e3", "nan", "inf", "1.2.3s", "٣s"] {
            let error = text.parse::<TimeLimit>().unwrap_err().to_string();
            assert!(error.contains("write \"30s\""), "{text}: {error}");
        }
    }

    #[test]
    fn a_mode_is_octal() {
        assert_eq!("0644".parse::<FileMode>().unwrap().0, 0o644);
        assert_eq!("755".parse::<FileMode>().unwrap().0, 0o755);
        for text in ["", "0o644", "888", "64", "01777777", "rw-"] {
            assert!(text.parse::<FileMode>().is_err(), "{text}");
        }
    }
}
