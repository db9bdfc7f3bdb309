//! How one becomes another user in a guest.
//!
//! Pure. Which means a guest has is asked once, so that what it lacks is said at once and by its
//! name, instead of as the failure of every single command.

use super::script::GuestScript;

/// By what a command is run as another user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrivilegeTool {
    /// `sudo`, which asks for no password.
    Sudo,
    /// `doas`, which asks for no password.
    Doas,
    /// `su`, which asks root for none.
    Su,
    /// There is none.
    None,
}

/// The script that prints the first means that works in the guest.
const WHICH: &str = "for means in sudo doas
do if \"$means\" -n true </dev/null >/dev/null 2>&1; then echo \"$means\"; exit; fi
done
if [ \"$(id -u)\" -eq 0 ]; then echo su; else echo none; fi";

impl PrivilegeTool {
    /// Returns how a guest is asked for its means.
    pub(super) fn question() -> GuestScript {
        let argv = ["/bin/sh", "-c", WHICH].map(str::to_owned).to_vec();
        GuestScript { user: None, argv, input: Vec::new(), token: None }
    }

    /// Returns the means that the guest has named.
    pub(super) fn named(answer: &str) -> Self {
        match answer.trim() {
            "sudo" => PrivilegeTool::Sudo,
            "doas" => PrivilegeTool::Doas,
            "su" => PrivilegeTool::Su,
            _ => PrivilegeTool::None,
        }
    }

    /// Returns the command line that runs a program as `user`; `None` without any means.
    pub(super) fn argv(self, user: &str, argv: &[String]) -> Option<Vec<String>> {
        let before: &[&str] = match self {
            PrivilegeTool::Sudo => &["sudo", "-n", "-H", "-u", user, "--"],
            PrivilegeTool::Doas => &["doas", "-n", "-u", user, "--"],
            // What stands behind the user's name is for the shell: its `$0`, then its arguments.
            PrivilegeTool::Su => &["su", "-s", "/bin/sh", "-c", "exec \"$@\"", "--", user, "vmkit"],
            PrivilegeTool::None => return None,
        };
        Some(before.iter().map(|&word| word.to_owned()).chain(argv.iter().cloned()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn this_hosts_own_means_is_found_and_works() {
        let question = PrivilegeTool::question();
        let answer = Command::new(&question.argv[0]).args(&question.argv[1..]).output().unwrap();
        let means = PrivilegeTool::named(&String::from_utf8(answer.stdout).unwrap());
        let is_root = rustix::process::geteuid().is_root();
        assert!(!is_root || means != PrivilegeTool::None, "root can become anybody");
        let argv = ["printf", "%s|", "a b", "", "$HOME", "-x"].map(str::to_owned);
        let Some(argv) = means.argv("nobody", &argv) else { return };
        let answer = Command::new(&argv[0]).args(&argv[1..]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer.stdout), "a b||$HOME|-x|", "{answer:?}");
        let argv = means.argv("nobody", &["id", "-un"].map(str::to_owned)).unwrap();
        let answer = Command::new(&argv[0]).args(&argv[1..]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer.stdout), "nobody\n", "{answer:?}");
    }

    #[test]
    fn each_means_is_typed_in_its_own_way() {
        let command = ["true".to_owned()];
        let typed = |means: PrivilegeTool| means.argv("ada", &command).map(|argv| argv.join(" "));
        assert_eq!(typed(PrivilegeTool::Sudo).unwrap(), "sudo -n -H -u ada -- true");
        assert_eq!(typed(PrivilegeTool::Doas).unwrap(), "doas -n -u ada -- true");
        assert_eq!(typed(PrivilegeTool::Su).unwrap(), "su -s /bin/sh -c exec \"$@\" -- ada vmkit true");
        assert_eq!(typed(PrivilegeTool::named("none\n")), None);
    }
}
