//! Reads a command line as QEMU does, as far as it matters here.
//!
//! Pure.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The switches without a value.
const FLAGS: [&str; 9] = [
    "-S",
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-no-shutdown",
    "-nographic",
    "-enable-kvm",
    "-version",
    "--version",
];
/// The switches with a value.
const VALUED: [&str; 29] = [
    "-accel",
    "-action",
    "-add-fd",
    "-append",
    "-blockdev",
    "-boot",
    "-chardev",
    "-cpu",
    "-device",
    "-display",
    "-global",
    "-initrd",
    "-kernel",
    "-m",
    "-machine",
    "-M",
    "-mon",
    "-name",
    "-netdev",
    "-object",
    "-parallel",
    "-rtc",
    "-run-with",
    "-runas",
    "-sandbox",
    "-serial",
    "-smp",
    "-uuid",
    "-vnc",
];

/// What is kept of a command line.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct CommandLine {
    pub(crate) version: bool,
    /// `-S`: nothing runs until `cont`.
    pub(crate) paused: bool,
    /// `-action panic=pause`.
    pub(crate) panic_pauses: bool,
    pub(crate) name: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) chardevs: Vec<ChardevArg>,
    /// The channels that are QMP monitors.
    pub(crate) monitors: Vec<String>,
    /// The channel that is the serial console.
    pub(crate) console: Option<String>,
    /// The descriptor sets and their member.
    pub(crate) fd_sets: Vec<(String, i32)>,
    pub(crate) images: Vec<ImageArg>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) forwards: Vec<ForwardArg>,
    pub(crate) vnc: Option<VncArg>,
}

/// `-chardev socket,fd=N,server=on`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChardevArg {
    pub(crate) id: String,
    pub(crate) fd: i32,
    pub(crate) log_file: Option<String>,
}

/// A file of `-blockdev`.
#[derive(Debug, PartialEq)]
pub(crate) struct ImageArg {
    /// The switch and its value, for error texts.
    pub(crate) said: String,
    pub(crate) path: PathBuf,
    pub(crate) readonly: bool,
}

/// A `hostfwd` of `-netdev user`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ForwardArg {
    /// The switch and its value, for error texts.
    pub(crate) said: String,
    /// The rule, as it was written.
    pub(crate) rule: String,
    pub(crate) udp: bool,
    pub(crate) host: Ipv4Addr,
    pub(crate) host_port: u16,
    pub(crate) guest_port: u16,
}

/// `-vnc`.
#[derive(Debug, PartialEq)]
pub(crate) enum VncArg {
    Unix(PathBuf),
    /// The first and the last display to try.
    Tcp(u16, u16),
}

impl CommandLine {
    /// Reads the arguments, without the program.
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut line = Self::default();
        let mut args = args.into_iter();
        while let Some(switch) = args.next() {
            let switch = switch.to_string_lossy().into_owned();
            if FLAGS.contains(&switch.as_str()) {
                line.version |= switch.ends_with("-version");
                line.paused |= switch == "-S";
                continue;
            }
            if !VALUED.contains(&switch.as_str()) {
                return Err(format!("{switch}: invalid option"));
            }
            let value = args.next().ok_or_else(|| format!("{switch}: requires an argument"))?;
            let said = format!("{switch} {}", value.to_string_lossy());
            line.take(&switch, value, &said).map_err(|problem| format!("{said}: {problem}"))?;
        }
        Ok(line)
    }

    /// Returns the number of the descriptor that a channel's output is copied to.
    pub(crate) fn log_of(&self, chardev: &ChardevArg) -> Option<i32> {
        let set = chardev.log_file.as_deref()?.strip_prefix("/dev/fdset/")?;
        self.fd_sets.iter().find(|(number, _)| number == set).map(|(_, fd)| *fd)
    }

    fn take(&mut self, switch: &str, value: OsString, said: &str) -> Result<(), String> {
        let text = || value.to_string_lossy().into_owned();
        let props = PropertyArgs::of(&value);
        match switch {
            "-kernel" => self.kernel = Some(value.into()),
            "-initrd" => self.initrd = Some(value.into()),
            "-uuid" => self.uuid = Some(text()),
            "-name" => self.name = props.text("guest").or_else(|| props.first()),
            "-action" => self.panic_pauses = props.text("panic").as_deref() == Some("pause"),
            "-mon" if props.text("mode").as_deref() == Some("control") => {
                self.monitors.extend(props.text("chardev"));
            }
            "-serial" => self.console = text().strip_prefix("chardev:").map(str::to_owned),
            "-add-fd" => self.fd_sets.push((props.wanted("set")?, props.number("fd")?)),
            "-chardev" => self.chardevs.push(chardev(&props)?),
            "-blockdev" => {
                if let Some(path) = props.get("file.filename") {
                    let readonly = props.text("read-only").as_deref() == Some("on");
                    self.images.push(ImageArg { said: said.to_owned(), path: path.into(), readonly });
                }
            }
            "-netdev" => {
                for (key, rule) in &props.0 {
                    if key == "hostfwd" {
                        self.forwards.push(forward(&rule.to_string_lossy(), said)?);
                    }
                }
            }
            "-vnc" => self.vnc = Some(vnc(&props)?),
            _ => {}
        }
        Ok(())
    }
}

fn chardev(props: &PropertyArgs) -> Result<ChardevArg, String> {
    if props.first().as_deref() != Some("socket") || props.text("server").as_deref() != Some("on") {
        return Err("the fake only knows listening sockets".to_owned());
    }
    Ok(ChardevArg { id: props.wanted("id")?, fd: props.number("fd")?, log_file: props.text("logfile") })
}

/// Reads `tcp:127.0.0.1:8080-:80`.
fn forward(rule: &str, said: &str) -> Result<ForwardArg, String> {
    let invalid = || format!("Invalid host forwarding rule '{rule}'");
    let (protocol, rest) = rule.split_once(':').ok_or_else(invalid)?;
    let (host, guest) = rest.split_once('-').ok_or_else(invalid)?;
    let (host, host_port) = host.rsplit_once(':').ok_or_else(invalid)?;
    let (_, guest_port) = guest.rsplit_once(':').ok_or_else(invalid)?;
    let host = if host.is_empty() { Ipv4Addr::UNSPECIFIED } else { host.parse().map_err(|_| invalid())? };
    Ok(ForwardArg {
        said: said.to_owned(),
        rule: rule.to_owned(),
        udp: protocol == "udp",
        host,
        host_port: host_port.parse().map_err(|_| invalid())?,
        guest_port: guest_port.parse().map_err(|_| invalid())?,
    })
}

fn vnc(props: &PropertyArgs) -> Result<VncArg, String> {
    let (_, address) = props.0.first().ok_or("no address")?;
    if let Some(path) = address.as_bytes().strip_prefix(b"unix:") {
        return Ok(VncArg::Unix(PathBuf::from(OsStr::from_bytes(path))));
    }
    let display = address.to_string_lossy().strip_prefix("127.0.0.1:").and_then(|it| it.parse().ok());
    let first = display.ok_or("the fake only knows unix:PATH and 127.0.0.1:DISPLAY")?;
    let last = props.text("to").and_then(|it| it.parse().ok()).unwrap_or(first);
    Ok(VncArg::Tcp(first, last))
}

/// A property list, in order. A property without a key has the key ``.
struct PropertyArgs(Vec<(String, OsString)>);

impl PropertyArgs {
    fn of(value: &OsStr) -> Self {
        let mut parts = vec![Vec::new()];
        let mut bytes = value.as_bytes().iter().copied().peekable();
        while let Some(byte) = bytes.next() {
            // A comma that is doubled belongs to the value.
            match byte {
                b',' if bytes.peek() != Some(&b',') => parts.push(Vec::new()),
                byte => {
                    if byte == b',' {
                        bytes.next();
                    }
                    parts.last_mut().expect("there is always one").push(byte);
                }
            }
        }
        let keyed = |part: Vec<u8>| match part.iter().position(|byte| *byte == b'=') {
            Some(at) => (
                String::from_utf8_lossy(&part[..at]).into_owned(),
                OsString::from_vec(part[at + 1..].to_vec()),
            ),
            None => (String::new(), OsString::from_vec(part)),
        };
        Self(parts.into_iter().map(keyed).collect())
    }

    fn get(&self, key: &str) -> Option<&OsStr> {
        self.0.iter().find(|(it, _)| it == key).map(|(_, value)| value.as_os_str())
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(|value| value.to_string_lossy().into_owned())
    }

    fn first(&self) -> Option<String> {
        self.text("")
    }

    fn wanted(&self, key: &str) -> Result<String, String> {
        self.text(key).ok_or_else(|| format!("Parameter '{key}' is missing"))
    }

    fn number(&self, key: &str) -> Result<i32, String> {
        self.wanted(key)?.parse().map_err(|_| format!("Parameter '{key}' expects a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<CommandLine, String> {
        CommandLine::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn what_matters_is_found() {
        let line = parse(&[
            "-nodefaults",
            "-S",
            "-chardev",
            "socket,id=console,fd=204,server=on,wait=off,logappend=on,logfile=/dev/fdset/1",
            "-add-fd",
            "fd=205,set=1",
            "-serial",
            "chardev:console",
            "-blockdev",
            "driver=qcow2,node-name=a,file.driver=file,file.filename=/a,,b.qcow2",
            "-netdev",
            "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp::53-:53",
        ])
        .unwrap();
        assert!(line.paused && !line.version);
        assert_eq!(line.console.as_deref(), Some("console"));
        assert_eq!(line.log_of(&line.chardevs[0]), Some(205));
        assert_eq!(line.images[0].path, PathBuf::from("/a,b.qcow2"));
        assert_eq!(
            (line.forwards[0].udp, line.forwards[0].host_port, line.forwards[0].guest_port),
            (false, 0, 22)
        );
        assert_eq!((line.forwards[1].udp, line.forwards[1].host), (true, Ipv4Addr::UNSPECIFIED));
    }

    #[test]
    fn an_unknown_switch_is_refused_as_qemu_does() {
        assert_eq!(parse(&["-foo"]).unwrap_err(), "-foo: invalid option");
        assert_eq!(parse(&["-m"]).unwrap_err(), "-m: requires an argument");
        let error = parse(&["-netdev", "user,id=n,hostfwd=nonsense"]).unwrap_err();
        assert_eq!(error, "-netdev user,id=n,hostfwd=nonsense: Invalid host forwarding rule 'nonsense'");
    }
}
