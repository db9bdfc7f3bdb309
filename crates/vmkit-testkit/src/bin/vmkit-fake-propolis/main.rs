//! A Propolis server without a hypervisor, for tests: the real one's command line, API and log.
//!
//! What of it is real and what is fake stands in [`vmkit_testkit::propolis`]. It takes from its
//! environment how it behaves (`VMKIT_FAKE_PROPOLIS`, JSON; else the host's `propolis.json` says
//! it), the directory of the stand-ins for the host's tools (`VMKIT_FAKE_ILLUMOS`; else it is where
//! this program was found), and what stands for `/dev/vmm` (`VMKIT_FAKE_VMM`; else it is in that
//! directory, else in the working directory).

use std::env;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use slog::Level;
use vmkit_testkit::propolis::illumos::{self, Illumos};
use vmkit_testkit::propolis::server::{ServerOptions, serve};
use vmkit_testkit::propolis::{BEHAVIOUR, PropolisBehaviour};

const USAGE: &str = "\
Usage: propolis-server run [OPTIONS] <BOOTROM_PATH> <PROPOLIS_ADDR> [VNC_ADDR]

Options:
      --bootrom-version <BOOTROM_VERSION>
      --metric-addr <METRIC_ADDR>          [default: disable]
      --log-level <LOG_LEVEL>              [default: info]
";

fn main() -> ExitCode {
    let host = host();
    let result = behaviour(host.as_ref()).and_then(|behaviour| match &behaviour.refusal {
        Some(refusal) => Err((1, refusal.clone())),
        None => run(host, behaviour),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, problem)) => {
            // Without a receiver the message is not missed.
            let _ = writeln!(io::stderr(), "{problem}");
            ExitCode::from(code)
        }
    }
}

fn host() -> Option<Illumos> {
    let found = || {
        let program = PathBuf::from(env::args_os().next()?);
        Illumos::of_program(&program, env::var_os("PATH").as_deref())
    };
    env::var_os(illumos::DIR).map(|dir| Illumos::at(dir.into())).or_else(found)
}

fn behaviour(host: Option<&Illumos>) -> Result<PropolisBehaviour, (u8, String)> {
    let kept = || host.and_then(|host| std::fs::read_to_string(host.behaviour_file()).ok());
    match env::var(BEHAVIOUR).ok().or_else(kept) {
        Some(text) => serde_json::from_str(&text).map_err(|error| (1, format!("its behaviour: {error}"))),
        None => Ok(PropolisBehaviour::default()),
    }
}

fn run(host: Option<Illumos>, behaviour: PropolisBehaviour) -> Result<(), (u8, String)> {
    let line = TypedLine::parse(env::args().skip(1))
        .map_err(|problem| (2, format!("error: {problem}\n\n{USAGE}")))?;
    let failed = |error: String| (1, format!("Error: {error}"));
    let cwd = env::current_dir().map_err(|error| failed(error.to_string()))?;
    let vmm = env::var_os(illumos::VMM).map(PathBuf::from).or_else(|| Some(host.as_ref()?.vmm()));
    let options = ServerOptions {
        address: line.address,
        bootrom: line.bootrom,
        vmm: vmm.unwrap_or_else(|| cwd.join("vmm")),
        cwd,
        illumos: host.map(|host| host.dir().to_owned()),
        vnc: line.vnc,
        behaviour,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(error.to_string()))?;
    runtime.block_on(serve(options, line.level, io::stdout())).map_err(failed)
}

/// What was typed.
struct TypedLine {
    bootrom: PathBuf,
    address: SocketAddr,
    vnc: Option<SocketAddr>,
    level: Level,
}

impl TypedLine {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        match args.next().as_deref() {
            Some("run") => {}
            Some(other) => return Err(format!("unrecognized subcommand '{other}'")),
            None => return Err("'propolis-server' requires a subcommand but one was not provided".to_owned()),
        }
        let mut level = Level::Info;
        let mut rest = Vec::new();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("a value is required for '{arg}'"));
            match arg.as_str() {
                "--bootrom-version" => drop(value()?),
                "--metric-addr" => match value()?.as_str() {
                    "disable" | "dns" => {}
                    address => drop(parsed::<SocketAddr>("--metric-addr", address)?),
                },
                "--log-level" => level = parsed("--log-level", &value()?)?,
                option if option.starts_with("--") => {
                    return Err(format!("unexpected argument '{option}' found"));
                }
                _ => rest.push(arg),
            }
        }
        let vnc = |text: &String| parsed("[VNC_ADDR]", text);
        match rest.as_slice() {
            [bootrom, address, more @ ..] if more.len() < 2 => Ok(Self {
                bootrom: bootrom.into(),
                address: parsed("<PROPOLIS_ADDR>", address)?,
                vnc: more.first().map(vnc).transpose()?,
                level,
            }),
            [_, _, _, more, ..] => Err(format!("unexpected argument '{more}' found")),
            _ => Err("the following required arguments were not provided".to_owned()),
        }
    }
}

fn parsed<T: FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("invalid value '{text}' for '{name}'"))
}
