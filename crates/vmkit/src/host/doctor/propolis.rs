//! What the Propolis backend needs of a host.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};

use super::{CheckStatus, HostCheck, bad, ok};
use crate::host::bootrom;

/// How long a server that runs already may take to accept.
const ACCEPT_LIMIT: Duration = Duration::from_secs(2);

/// Where the Propolis backend will look for what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PropolisHost {
    /// Where programs are looked for.
    pub search_path: Vec<PathBuf>,
    /// The server's program; looked for by its name where there is none.
    pub program: Option<PathBuf>,
    /// The firmware's file.
    pub bootrom: PathBuf,
    /// Where the devices of bhyve are; `/dev` but in tests.
    pub dev: PathBuf,
    /// Whether programs are run by `pfexec`.
    pub pfexec: bool,
    /// A server that runs already: then nothing else is needed.
    pub address: Option<SocketAddr>,
}

/// Judges whether VMs can run in Propolis here.
///
/// Looks for files and, where a server runs already, whether it accepts; runs no program.
pub fn diagnose_propolis(host: &PropolisHost) -> Vec<HostCheck> {
    if let Some(address) = host.address {
        return vec![server(address)];
    }
    let mut checks = vec![
        match &host.program {
            Some(path) => named(path),
            None => {
                program(host, "propolis-server", CheckStatus::Fail, "build it from its source, or name it")
            }
        },
        program(host, "zfs", CheckStatus::Fail, "images that are ZFS snapshots need it"),
        program(host, "dladm", CheckStatus::Fail, "VNICs are created with it"),
        program(host, "bhyvectl", CheckStatus::Warn, "VMs that a killed server leaves in the kernel need it"),
    ];
    if host.pfexec {
        checks.push(program(
            host,
            "pfexec",
            CheckStatus::Fail,
            "the other programs get their privileges from it",
        ));
    }
    checks.push(bootrom(&host.bootrom));
    checks.push(device(&host.dev, "vmmctl", "bhyve's driver: install system/bhyve"));
    checks.push(device(&host.dev, "viona", "bhyve's network driver: install system/bhyve"));
    checks
}

fn program(host: &PropolisHost, name: &str, missing: CheckStatus, why: &str) -> HostCheck {
    let mut dirs = host.search_path.iter().filter(|dir| dir.is_absolute());
    match dirs.find_map(|dir| Some(dir.join(name)).filter(|path| is_executable(path))) {
        Some(path) => ok(name, path.display().to_string()),
        None => bad(name, missing, "not found in the search path", why),
    }
}

fn named(path: &Path) -> HostCheck {
    match is_executable(path) {
        true => ok("propolis-server", path.display().to_string()),
        false => bad(
            "propolis-server",
            CheckStatus::Fail,
            format!("{} is not a program that this user can run", path.display()),
            "name the server's program",
        ),
    }
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

fn bootrom(path: &Path) -> HostCheck {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            bad("bootrom", CheckStatus::Fail, format!("{shown} is not a file"), "name the file OVMF_CODE.fd")
        }
        Ok(found) => match bootrom::problem(found.len()) {
            None => ok("bootrom", shown.to_string()),
            Some(problem) => bad(
                "bootrom",
                CheckStatus::Fail,
                format!("{shown}: {problem}"),
                "use an OVMF_CODE.fd without variables, of at most 2 MiB",
            ),
        },
        Err(error) => bad(
            "bootrom",
            CheckStatus::Fail,
            format!("{shown}: {error}"),
            "put the OVMF_CODE.fd of Oxide's edk2 there, or name it",
        ),
    }
}

fn device(dev: &Path, name: &str, what: &str) -> HostCheck {
    let path = dev.join(name);
    match path.exists() {
        true => ok(name, path.display().to_string()),
        false => bad(name, CheckStatus::Fail, format!("there is no {}", path.display()), what),
    }
}

fn server(address: SocketAddr) -> HostCheck {
    match TcpStream::connect_timeout(&address, ACCEPT_LIMIT) {
        Ok(_) => ok("server", format!("something accepts at {address}")),
        Err(error) => bad(
            "server",
            CheckStatus::Fail,
            format!("{address}: {error}"),
            "start propolis-server there first",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::fs::PermissionsExt;

    fn host(dir: &Path) -> PropolisHost {
        for name in ["propolis-server", "zfs", "dladm", "bhyvectl", "pfexec"] {
            fs::write(dir.join(name), "").unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        for name in ["vmmctl", "viona", "OVMF_CODE.fd"] {
            fs::write(dir.join(name), [0; 4096]).unwrap();
        }
        PropolisHost {
            search_path: vec![dir.to_owned()],
            program: None,
            bootrom: dir.join("OVMF_CODE.fd"),
            dev: dir.to_owned(),
            pfexec: true,
            address: None,
        }
    }

    #[test]
    fn a_host_that_has_everything_needs_no_advice() {
        let dir = tempfile::tempdir().unwrap();
        for check in diagnose_propolis(&host(dir.path())) {
            assert_eq!((check.status, &check.advice), (CheckStatus::Ok, &None), "{check:?}");
        }
    }

    #[test]
    fn whatever_is_missing_is_named_with_what_it_is_for() {
        let dir = tempfile::tempdir().unwrap();
        let good = host(dir.path());
        for (name, status, advice) in [
            ("propolis-server", CheckStatus::Fail, "source"),
            ("zfs", CheckStatus::Fail, "snapshots"),
            ("dladm", CheckStatus::Fail, "VNICs"),
            ("bhyvectl", CheckStatus::Warn, "killed server"),
            ("pfexec", CheckStatus::Fail, "privileges"),
            ("vmmctl", CheckStatus::Fail, "bhyve"),
            ("viona", CheckStatus::Fail, "network"),
        ] {
            fs::rename(dir.path().join(name), dir.path().join("away")).unwrap();
            let checks = diagnose_propolis(&good);
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.advice.as_deref().unwrap().contains(advice), "{check:?}");
            fs::rename(dir.path().join("away"), dir.path().join(name)).unwrap();
        }
        for (bytes, found) in [(3 << 20, "3145728 bytes"), (5000, "5000 bytes"), (0, "empty")] {
            fs::write(&good.bootrom, vec![0; bytes]).unwrap();
            let checks = diagnose_propolis(&good);
            let check = checks.iter().find(|check| check.name == "bootrom").unwrap();
            assert!(check.status == CheckStatus::Fail && check.found.contains(found), "{check:?}");
        }
    }

    #[test]
    fn of_a_server_that_runs_already_nothing_else_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let there = PropolisHost { address: Some(address), ..host(dir.path()) };
        assert_eq!(diagnose_propolis(&there).len(), 1);
        assert_eq!(diagnose_propolis(&there)[0].status, CheckStatus::Ok);
        drop(listener);
        assert_eq!(diagnose_propolis(&there)[0].status, CheckStatus::Fail);
    }
}
