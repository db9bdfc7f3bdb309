//! `cargo xtask setup`: installs what the machine lacks.
//!
//! What is missing is decided by looking for programs and firmware, not by asking the package
//! manager: a machine that has everything is told so in a millisecond, without privilege and
//! without network.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};
use crate::host::Distribution;
use crate::programs;

/// What is looked for.
enum Trace {
    Program(&'static str),
    /// A program that root does without.
    ProgramForUsers(&'static str),
    /// Any of these files, since releases differ in where they put it.
    AnyFile(&'static [&'static str]),
}

/// Something the workspace needs, and the package it comes in.
struct Need {
    trace: Trace,
    package: &'static str,
    reason: &'static str,
}

const fn program(name: &'static str, package: &'static str, reason: &'static str) -> Need {
    Need { trace: Trace::Program(name), package, reason }
}

const NEEDS: &[Need] = &[
    program("qemu-system-x86_64", "qemu-system-x86", "runs x86-64 guests"),
    program("qemu-system-aarch64", "qemu-system-arm", "checks that it accepts our command lines"),
    program("qemu-img", "qemu-utils", "converts, checks and commits images"),
    Need {
        trace: Trace::AnyFile(&["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"]),
        package: "ovmf",
        reason: "UEFI for x86-64 guests",
    },
    Need {
        trace: Trace::AnyFile(&["/usr/share/AAVMF/AAVMF_CODE.fd"]),
        package: "qemu-efi-aarch64",
        reason: "UEFI for aarch64 guests",
    },
    program("mmdebstrap", "mmdebstrap", "builds the debian guest"),
    Need {
        trace: Trace::ProgramForUsers("newuidmap"),
        package: "uidmap",
        reason: "builds the debian guest without being root",
    },
    Need {
        trace: Trace::ProgramForUsers("fakeroot"),
        package: "fakeroot",
        reason: "builds the debian guest without being root",
    },
    program("mke2fs", "e2fsprogs", "makes the file system of the debian guest"),
    program("xz", "xz-utils", "unpacks kernel modules"),
    program("zstd", "zstd", "unpacks kernel modules"),
    program("ip", "iproute2", "makes the network namespaces of the tap tests"),
    program("dnsmasq", "dnsmasq-base", "serves DHCP in the tap tests"),
    program("docker-registry", "docker-registry", "serves disks in the registry test"),
    program("ssh", "openssh-client", "checks guests from outside"),
    Need {
        trace: Trace::AnyFile(&["/usr/sbin/sshd"]),
        package: "openssh-server",
        reason: "is what our SSH sessions are tested against",
    },
    program("isoinfo", "genisoimage", "reads our cloud-init seeds back"),
    Need {
        trace: Trace::AnyFile(&["/usr/lib/python3/dist-packages/yaml/__init__.py"]),
        package: "python3-yaml",
        reason: "reads our cloud-config back",
    },
    program("ssh-keygen", "openssh-client", "makes the keys of the end-to-end tests"),
];

/// Installs what is missing, and says aloud what that is.
///
/// # Errors
///
/// Exit code 2 where it isn't for us to install: on a distribution without apt, and for a user who
/// can't become root. The text says what to type. Exit code 1 when apt fails.
pub(crate) fn run() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        eprintln!("setup: nothing is missing");
        return Ok(());
    }
    let distribution = Distribution::of_this_machine()?;
    if !distribution.has_apt() {
        return Err(Error::unready(format!(
            "on {} it is for you to install what is missing; then run this again:\n{}",
            distribution.pretty_name,
            inventory()
        )));
    }
    for need in &missing {
        eprintln!("setup: missing {}: {}", need.trace.text(), need.reason);
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    packages.dedup();
    refresh_package_lists()?;
    let install = install_arguments(&packages, &utils_versions()?);
    apt_get(&install)?;
    let still: Vec<String> =
        missing.iter().filter(|need| !need.is_met()).map(|need| need.trace.text()).collect();
    if still.is_empty() {
        return Ok(());
    }
    Err(Error::failed(format!(
        "apt-get installed {} without an error, but {} is still missing",
        packages.join(" "),
        still.join(", ")
    )))
}

/// Runs `apt-get update`.
pub(crate) fn refresh_package_lists() -> Result<()> {
    apt_get(&["update".to_owned()])
}

/// The versions that decide whether qemu-utils is in the way of the QEMU to be installed.
struct UtilsVersions {
    /// The version of qemu-utils that is installed.
    installed: Option<String>,
    /// The version of qemu-system-x86 that apt would install, or has installed.
    system: Option<String>,
}

fn utils_versions() -> Result<UtilsVersions> {
    let policy = programs::capture_text(programs::command("apt-cache")?.args(["policy", "qemu-utils"]))?;
    let installed = policy_field(&policy, "Installed");
    let policy = programs::capture_text(programs::command("apt-cache")?.args(["policy", "qemu-system-x86"]))?;
    let system = policy_field(&policy, "Installed").or_else(|| policy_field(&policy, "Candidate"));
    Ok(UtilsVersions { installed, system })
}

fn policy_field(policy: &str, field: &str) -> Option<String> {
    let value = policy.lines().find_map(|line| line.trim().strip_prefix(field)?.strip_prefix(": "))?;
    (value != "(none)").then(|| value.to_owned())
}

/// Returns what follows `apt-get` to install the packages.
///
/// Some images come with a qemu-utils that is newer than the release's QEMU. The packages of one
/// QEMU version conflict with those of another: then apt removes qemu-utils or gives up. So when
/// QEMU is installed and the versions differ, qemu-utils is asked for in QEMU's version, be that a
/// downgrade.
fn install_arguments(packages: &[&str], utils: &UtilsVersions) -> Vec<String> {
    let mut arguments = ["install", "--yes", "--no-install-recommends"].map(str::to_owned).to_vec();
    let mut packages: Vec<String> = packages.iter().map(ToString::to_string).collect();
    if let UtilsVersions { installed: Some(installed), system: Some(system) } = utils
        && installed != system
        && packages.iter().any(|package| package.starts_with("qemu-"))
    {
        arguments.push("--allow-downgrades".to_owned());
        packages.retain(|package| package != "qemu-utils");
        packages.push(format!("qemu-utils={system}"));
    }
    arguments.extend(packages);
    arguments
}

/// Runs apt-get as root, without a question: directly, or by sudo.
fn apt_get(arguments: &[String]) -> Result<()> {
    let mut words = ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=600", "-o", "Dpkg::Use-Pty=0"]
        .map(str::to_owned)
        .to_vec();
    words.extend_from_slice(arguments);
    let typed = format!("sudo apt-get {}", arguments.join(" "));
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("env")
    } else if may_sudo() {
        let mut sudo = Command::new("sudo");
        sudo.arg("env");
        sudo
    } else {
        return Err(Error::unready(format!(
            "this needs root, and sudo does not work here; type:\n    {typed}"
        )));
    };
    command.arg("DEBIAN_FRONTEND=noninteractive").args(&words);
    eprintln!("setup: {}", programs::show(&command));
    programs::run(&mut command)
}

/// Returns whether sudo can be used: without a password, or with a terminal to type it at.
fn may_sudo() -> bool {
    let Some(sudo) = programs::find("sudo") else { return false };
    let unasked = programs::capture(Command::new(sudo).args(["--non-interactive", "true"])).is_ok();
    unasked || std::io::stdin().is_terminal()
}

/// Lists everything that is needed, with what was found of it.
fn inventory() -> String {
    let line = |need: &Need| {
        let found = if need.is_met() { "found  " } else { "missing" };
        format!("    {found} {} ({})", need.trace.text(), need.reason)
    };
    NEEDS.iter().map(line).collect::<Vec<_>>().join("\n")
}

impl Need {
    fn is_met(&self) -> bool {
        match self.trace {
            Trace::Program(name) => programs::find(name).is_some(),
            Trace::ProgramForUsers(name) => {
                rustix::process::geteuid().is_root() || programs::find(name).is_some()
            }
            Trace::AnyFile(paths) => paths.iter().any(|path| Path::new(path).is_file()),
        }
    }
}

impl Trace {
    fn text(&self) -> String {
        match self {
            Self::Program(name) | Self::ProgramForUsers(name) => (*name).to_owned(),
            Self::AnyFile(paths) => paths.join(" or "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(packages: &[&str], installed: Option<&str>, system: Option<&str>) -> String {
        let utils =
            UtilsVersions { installed: installed.map(str::to_owned), system: system.map(str::to_owned) };
        install_arguments(packages, &utils).join(" ")
    }

    #[test]
    fn a_qemu_utils_of_another_version_is_brought_to_that_of_qemu() {
        assert_eq!(
            arguments(&["qemu-system-x86", "ovmf"], Some("1:10.0.2+ds-2~bpo12+1"), Some("1:7.2+dfsg-7")),
            "install --yes --no-install-recommends --allow-downgrades qemu-system-x86 ovmf qemu-utils=1:7.2+dfsg-7"
        );
    }

    #[test]
    fn a_machine_without_qemu_utils_gets_it_like_everything_else() {
        assert_eq!(
            arguments(&["qemu-system-x86", "qemu-utils"], None, Some("1:7.2+dfsg-7")),
            "install --yes --no-install-recommends qemu-system-x86 qemu-utils"
        );
    }

    #[test]
    fn qemu_utils_stays_if_its_version_fits_or_no_qemu_is_installed() {
        assert_eq!(
            arguments(&["qemu-system-arm"], Some("1:7.2+dfsg-7"), Some("1:7.2+dfsg-7")),
            "install --yes --no-install-recommends qemu-system-arm"
        );
        assert_eq!(
            arguments(&["mmdebstrap"], Some("1:10.0.2+ds-2~bpo12+1"), Some("1:7.2+dfsg-7")),
            "install --yes --no-install-recommends mmdebstrap"
        );
    }

    #[test]
    fn the_policy_of_a_package_that_is_not_installed_has_no_installed_version() {
        let policy = "qemu-utils:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n  Version table:\n";
        assert_eq!(policy_field(policy, "Installed"), None);
        assert_eq!(policy_field(policy, "Candidate").unwrap(), "1:7.2+dfsg-7");
    }
}
