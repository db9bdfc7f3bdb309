//! Making a guest unique that continues as a copy of another: by one program in the guest, run by
//! its agent.
//!
//! A copy draws the same random numbers as its original for some tenths of a second (seen with
//! Linux 6.1), and for as long as it runs in a program that keeps its own. Linux mixes in what is
//! written to `/dev/urandom`, and uses that at once only if it is told to reseed: by an ioctl, for
//! which a guest may have neither Perl nor Python. So the script has a program of its own with it.
//!
//! Source: Linux, `drivers/char/random.c`; machine-id(5); sshd(8).

use std::time::Duration;

use uuid::Uuid;

use super::agent::GuestAgent;
use crate::error::Result;
use crate::spec::{GuestAccess, VmName};

const SCRIPT: &str = include_str!("identity.sh");
/// The maximum length of a problem that the guest reports, in characters.
const MOST_PROBLEM: usize = 500;

/// A program for x86-64 Linux that tells the kernel to reseed its random numbers. It exits with 0,
/// or with the number of the kernel's error.
const RESEED: [u8; 169] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\
    \x02\0\x3e\0\x01\0\0\0\x78\0\x40\0\0\0\0\0\x40\0\0\0\0\0\0\0\
    \0\0\0\0\0\0\0\0\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\
    \x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\
    \0\0\x40\0\0\0\0\0\xa9\0\0\0\0\0\0\0\xa9\0\0\0\0\0\0\0\
    \0\x10\0\0\0\0\0\0\
    \x6a\x02\x58\
    \xbf\x9c\0\x40\0\
    \x6a\x01\x5e\
    \x0f\x05\
    \x89\xc7\
    \xbe\x07\x52\0\0\
    \x31\xd2\
    \x6a\x10\x58\
    \x0f\x05\
    \x89\xc7\
    \xf7\xdf\
    \x6a\x3c\x58\
    \x0f\x05\
    /dev/urandom\0";

/// What a guest has in common with the guest that it is a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IdentityPart {
    /// The random numbers that its kernel draws from now on, and the seed for its next boot.
    RandomNumbers,
    /// systemd's machine ID.
    MachineId,
    /// The host name.
    HostName,
    /// The host keys of its SSH server.
    HostKeys,
    /// The key of vmkit's login.
    LoginKey,
}

impl IdentityPart {
    const ALL: [Self; 5] =
        [Self::RandomNumbers, Self::MachineId, Self::HostName, Self::HostKeys, Self::LoginKey];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            IdentityPart::RandomNumbers => "random-numbers",
            IdentityPart::MachineId => "machine-id",
            IdentityPart::HostName => "host-name",
            IdentityPart::HostKeys => "host-keys",
            IdentityPart::LoginKey => "login-key",
        }
    }
}

/// A part that the guest still has in common.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedPart {
    /// Which part.
    pub part: IdentityPart,
    /// Why, in the words of the guest, which is not trusted.
    pub problem: String,
}

/// What a guest is given that continues as a copy; what is not given here is random.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct NewIdentity<'a> {
    /// The host name; without one, that of before stays.
    pub host_name: Option<&'a VmName>,
    /// The login and the Ed25519 host key.
    pub access: Option<&'a GuestAccess>,
    /// The public key of the login of before, which the one of `access` replaces wherever it is
    /// accepted.
    pub former_login: Option<&'a str>,
}

/// What became of a guest's identity.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RenewedIdentity {
    /// What could not be renewed.
    pub shared: Vec<SharedPart>,
    /// The public host keys of its SSH server, as in `known_hosts` but without the host. None
    /// without a server.
    pub host_keys: Vec<String>,
}

impl GuestAgent {
    /// Gives a guest that continues as a copy another identity: random numbers from a seed of the
    /// host, before all else, then a machine ID, a host name, host keys of the kinds that it has,
    /// and a login key. What the guest has none of is left out.
    ///
    /// Programs that run in the guest keep what they have read: their own random numbers, and their
    /// own certificates and keys. The guest needs a shell, and this runs as the agent's user, root.
    ///
    /// # State
    /// Each call renews all of it again.
    ///
    /// # Errors
    /// As [`exec`](Self::exec): the guest may have done a part of it. What only failed in the guest
    /// is in [`shared`](RenewedIdentity::shared).
    pub async fn renew_identity(
        &mut self,
        identity: &NewIdentity<'_>,
        timeout: Duration,
    ) -> Result<RenewedIdentity> {
        // 244 random bits: six of a UUID are not random.
        let seed = [Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat();
        let former = identity.former_login.map_or("", |key| key_of(key));
        let (login, host_key, private) = match identity.access {
            Some(access) => {
                (access.login_key.public.trim(), access.host_key.public.trim(), &*access.host_key.private)
            }
            None => ("", "", ""),
        };
        let former = if login.is_empty() { "" } else { former };
        let input =
            [private.trim_end().as_bytes(), if private.is_empty() { b".\n" } else { b"\n.\n" }, &seed]
                .concat();
        let program: String = RESEED.iter().map(|byte| format!("\\{byte:03o}")).collect();
        let name = identity.host_name.map_or("", VmName::as_str);
        let args = ["-c", SCRIPT, "sh", &program, name, former, login, host_key];
        let output = self.exec("/bin/sh", &args, Some(&input), timeout).await?;
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }
}

/// Returns a public key without its comment.
fn key_of(line: &str) -> &str {
    let line = line.trim();
    let end = line.match_indices(' ').nth(1).map_or(line.len(), |(at, _)| at);
    &line[..end]
}

/// Parses what the script prints: a line for each part and each key.
fn parse(printed: &str) -> RenewedIdentity {
    let mut found = RenewedIdentity::default();
    for part in IdentityPart::ALL {
        let is_done = printed.lines().any(|line| line.strip_prefix("ok ") == Some(part.as_str()));
        if !is_done {
            let said = |line: &str| {
                let problem = line.strip_prefix("failed ")?.strip_prefix(part.as_str())?.trim();
                Some(problem.chars().take(MOST_PROBLEM).collect())
            };
            let problem = printed.lines().find_map(said);
            let problem = problem.unwrap_or_else(|| "the guest did not report it".to_owned());
            found.shared.push(SharedPart { part, problem });
        }
    }
    found.host_keys =
        printed.lines().filter_map(|line| Some(line.strip_prefix("key ")?.trim().to_owned())).collect();
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_program_reseeds_a_kernel_that_permits_it() {
        use std::os::unix::fs::PermissionsExt;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reseed");
        std::fs::write(&path, RESEED).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        let code = std::process::Command::new(&path).status().unwrap().code();
        const EPERM: i32 = 1;
        assert!(code == Some(0) || code == Some(EPERM), "{code:?}");
    }

    #[test]
    fn each_part_is_renewed_only_if_the_guest_says_so() {
        let all = "ok random-numbers\nok machine-id\nok host-name\nok host-keys\nok login-key\nkey ssh-ed25519 AAAA\n";
        let renewed = parse(all);
        assert_eq!(renewed.shared, []);
        assert_eq!(renewed.host_keys, ["ssh-ed25519 AAAA"]);
        let renewed = parse("failed random-numbers no perl\nok machine-id\nok host-names\n");
        let shared = |part, problem: &str| SharedPart { part, problem: problem.to_owned() };
        assert_eq!(
            renewed.shared,
            [
                shared(IdentityPart::RandomNumbers, "no perl"),
                shared(IdentityPart::HostName, "the guest did not report it"),
                shared(IdentityPart::HostKeys, "the guest did not report it"),
                shared(IdentityPart::LoginKey, "the guest did not report it"),
            ]
        );
    }

    proptest! {
        #[test]
        fn whatever_a_guest_prints_is_parsed(printed in any::<String>()) {
            prop_assert!(parse(&printed).shared.len() <= IdentityPart::ALL.len());
        }
    }
}
