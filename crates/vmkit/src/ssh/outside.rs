//! What OpenSSH's own programs need to get into a guest: a block of configuration, a key file, a
//! list of known hosts.

use std::fmt::{self, Write as _};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::spec::{GuestAccess, VmName};
use crate::steps::step;
use crate::store::{create_private, denied, refuse_other_user};

/// A host of OpenSSH's configuration; its text is the block, as it goes into `~/.ssh/config`.
///
/// The host key goes by a name of the VM's own, so that another VM at the same port is never taken
/// for a changed one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SshConfig {
    /// What `ssh` is called with: the VM's name.
    pub host: VmName,
    /// Where the guest's SSH server is reached now.
    pub address: SocketAddr,
    /// The user to log in as.
    pub user: String,
    /// The file with the key that logs in.
    pub identity_file: PathBuf,
    /// The file with the host key.
    pub known_hosts: PathBuf,
    /// The name that the host key goes by there.
    pub host_key_alias: String,
}

impl SshConfig {
    /// Writes the files of a VM's access below `kept`, and returns the block that names them.
    ///
    /// # Errors
    /// `InvalidInput` for a path that OpenSSH's configuration can't hold; `Host` and `Io` where it
    /// can't be written.
    pub(crate) fn write(
        host: &VmName,
        id: Uuid,
        address: SocketAddr,
        access: &GuestAccess,
        kept: &Path,
    ) -> Result<Self> {
        let config = Self {
            host: host.clone(),
            address,
            user: access.user.clone(),
            identity_file: kept.join("id_ed25519"),
            known_hosts: kept.join("known_hosts"),
            host_key_alias: format!("vmkit-{id}"),
        };
        if let Some(path) =
            kept.to_str().filter(|path| path.contains(['"', '$']) || path.contains(char::is_control))
        {
            let expected =
                "OpenSSH's configuration has no way to write a path with a quote, `$` or a control character";
            return Err(Error::invalid("home", path, expected));
        }
        kept.parent().map_or(Ok(()), refuse_other_user)?;
        create_private(kept)?;
        keep(&config.identity_file, &access.login_key.private)?;
        keep(&config.known_hosts, &format!("{} {}\n", config.host_key_alias, access.host_key.public.trim()))?;
        Ok(config)
    }
}

impl fmt::Display for SshConfig {
    /// Source: ssh_config(5).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A percent sign begins a token.
        let path = |path: &Path| path.display().to_string().replace('%', "%%");
        writeln!(f, "Host {}", self.host)?;
        let mut block = String::new();
        writeln!(block, "HostName {}", self.address.ip())?;
        writeln!(block, "Port {}", self.address.port())?;
        writeln!(block, "User {}", self.user)?;
        writeln!(block, "IdentityFile \"{}\"", path(&self.identity_file))?;
        writeln!(block, "IdentitiesOnly yes")?;
        writeln!(block, "HostKeyAlias {}", self.host_key_alias)?;
        writeln!(block, "UserKnownHostsFile \"{}\"", path(&self.known_hosts))?;
        writeln!(block, "GlobalKnownHostsFile none")?;
        writeln!(block, "StrictHostKeyChecking yes")?;
        writeln!(block, "UpdateHostKeys no")?;
        writeln!(block, "BatchMode yes")?;
        block.lines().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// Writes a file for this user alone, unless it has this content already; a reader finds the old
/// one or the new one.
pub(crate) fn keep(path: &Path, content: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    let unfinished = path.with_extension("new");
    let write = || {
        step("write a file of the VM's access")?;
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        file.write_all(content.as_bytes())?;
        step("rename a file of the VM's access")?;
        fs::rename(&unfinished, path)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written.map_err(denied("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn openssh_understands_the_block_and_takes_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("a %h b");
        let access = GuestAccess::generate("vmkit").unwrap();
        let name = VmName::new("web").unwrap();
        let address = "127.0.0.1:2222".parse().unwrap();
        let config = SshConfig::write(&name, Uuid::nil(), address, &access, &kept).unwrap();
        // What is there already stays as it is.
        assert_eq!(SshConfig::write(&name, Uuid::nil(), address, &access, &kept).unwrap(), config);
        for path in [&config.identity_file, &config.known_hosts] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let file = dir.path().join("config");
        fs::write(&file, config.to_string()).unwrap();
        let output = Command::new("ssh").arg("-F").arg(&file).args(["-G", "web"]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for expected in ["hostname 127.0.0.1", "port 2222", "user vmkit", "stricthostkeychecking true"] {
            assert!(said.lines().any(|line| line == expected), "{expected}: {said}");
        }
        let mut keygen = Command::new("ssh-keygen");
        let found =
            keygen.args(["-F", &config.host_key_alias, "-f"]).arg(&config.known_hosts).output().unwrap();
        assert!(found.status.success(), "{found:?}");
    }

    #[test]
    fn a_path_that_the_configuration_can_not_hold_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let access = GuestAccess::generate("vmkit").unwrap();
        let name = VmName::new("web").unwrap();
        let kept = dir.path().join("a\"b");
        let address = "127.0.0.1:2222".parse().unwrap();
        let error = SshConfig::write(&name, Uuid::nil(), address, &access, &kept).unwrap_err().to_string();
        assert!(error.starts_with("home: ") && !kept.exists(), "{error}");
    }
}
