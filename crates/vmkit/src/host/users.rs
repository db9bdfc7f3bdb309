//! Whether the host knows a user.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::spec::UserName;

/// The program that asks all places where a host may keep its users, a directory service among
/// them.
const GETENT: [&str; 2] = ["/usr/bin/getent", "/bin/getent"];
/// What it ends with where none of them knows the user. Source: getent(1).
const NOT_FOUND: i32 = 2;
/// How long a directory service may take before it counts as one that can't tell.
const LIMIT: Duration = Duration::from_secs(5);

/// Returns whether the host certainly has no user of this name; false if that can't be found out.
///
/// # Cancel safety
/// A program that is not waited for any more is killed.
pub(crate) async fn is_unknown(user: &UserName) -> bool {
    let users = fs::read("/etc/passwd").unwrap_or_default();
    if has_user(&users, user.as_str()) {
        return false;
    }
    let Some(program) = GETENT.iter().find(|program| Path::new(program).is_file()) else { return false };
    let mut command = Command::new(program);
    command.args(["passwd", user.as_str()]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match timeout(LIMIT, command.kill_on_drop(true).status()).await {
        Ok(Ok(status)) => status.code() == Some(NOT_FOUND),
        _ => false,
    }
}

/// Returns whether a file like `/etc/passwd` names the user. Source: passwd(5).
fn has_user(file: &[u8], user: &str) -> bool {
    let mut names = file.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':').next());
    names.any(|name| name == Some(user.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn root_is_known_and_an_invented_user_is_not() {
        let user = |name: &str| UserName::new(name).unwrap();
        assert!(!is_unknown(&user("root")).await);
        if GETENT.iter().all(|program| !Path::new(program).is_file()) {
            eprintln!("SKIP: this host has no getent");
            return;
        }
        assert!(is_unknown(&user("vmkit-no-such-user")).await);
    }

    #[test]
    fn a_user_is_known_by_the_whole_name() {
        let file = b"root:x:0:0::/root:/bin/sh\nbackup-daily:x:34:34::/:/bin/sh\n";
        assert!(has_user(file, "root") && has_user(file, "backup-daily"));
        assert!(!has_user(file, "backup") && !has_user(file, "x") && !has_user(b"", "root"));
    }
}
