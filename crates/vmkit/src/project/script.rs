//! How a task is told to a guest: a command for its shell, and what is sent to that command.
//!
//! Pure. A POSIX shell, `mktemp`, `dd` and, for copies, `tar` are all that it asks of a guest; nothing is left behind there.
//! What may be secret, the environment and the script itself, goes through the command's input, where no list of processes
//! shows it.

use crate::vmfile::{Copy, Step};

/// What is said to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    /// The guest's user that it runs as; whoever is logged in where none is named.
    pub(super) user: Option<String>,
    /// The program and its arguments.
    pub(super) argv: Vec<String>,
    /// What the program is sent; a copy is sent as an archive instead.
    pub(super) input: Vec<u8>,
}

/// Runs what is sent: first the environment, `$1` bytes of it, then a script, in the folder `$2`.
///
/// The script is a file of its own while it runs, so that its `#!` counts and its input is its own.
const RUN: &str = r#"
eval "$(dd bs=1 count="$1" 2>/dev/null)"
cd "${2:-$HOME}" || exit
vmkit_script=$(mktemp) || exit
trap 'rm -f "$vmkit_script"' EXIT
trap 'exit 129' HUP
trap 'exit 143' TERM
cat >"$vmkit_script" && chmod 700 "$vmkit_script" || exit
if [ "$(dd if="$vmkit_script" bs=2 count=1 2>/dev/null)" = '#!' ]
then "$vmkit_script" </dev/null
else /bin/sh -e "$vmkit_script" </dev/null
fi
"#;

/// Puts what is sent, an archive with the one entry `it`, where `$1` says, as `$2`'s.
///
/// It is unpacked beside its place first, so that a copy that is cut off changes nothing there.
const COPY: &str = r#"
to=$1 owner=$2
mkdir -p "$(dirname "$to")" || exit
new=$(mktemp -d "$(dirname "$to")/.vmkit-XXXXXX") || exit
trap 'rm -rf "$new"' EXIT
trap 'exit 129' HUP
trap 'exit 143' TERM
tar -x -p -o -f - -C "$new" || exit
chown -R "$owner" "$new/it" || exit
if [ -d "$new/it" ]
then
  if [ -e "$to" ] && [ ! -d "$to" ]; then echo "$to is there, and is no folder" >&2; exit 1; fi
  if [ -d "$to" ]; then cp -a "$new/it/." "$to/"; else mv "$new/it" "$to"; fi
else
  if [ -d "$to" ]; then echo "$to is a folder: name the file to write" >&2; exit 1; fi
  mv -f "$new/it" "$to"
fi
"#;

/// Answers how a step is told, with the script that it runs.
pub(super) fn of_step(step: &Step, script: Vec<u8>) -> Script {
    let mut input: Vec<u8> = step
        .env
        .iter()
        .flat_map(|(name, value)| format!("export {name}='{}'\n", value.replace('\'', r"'\''")).into_bytes())
        .collect();
    let environment_bytes = input.len().to_string();
    input.extend(script);
    let dir = step.dir.clone().unwrap_or_default();
    let argv = shell(RUN, [environment_bytes, dir]);
    Script { user: Some(step.user.clone()), argv, input }
}

/// Answers how a copy is told; the archive is what is sent.
pub(super) fn of_copy(copy: &Copy) -> Script {
    let owner = copy.owner.clone().unwrap_or_else(|| "root".to_owned());
    let argv = shell(COPY, [copy.to.clone(), owner]);
    Script { user: Some("root".to_owned()), argv, input: Vec::new() }
}

/// Answers how a command of the file, a text for the shell, is told.
pub(super) fn of_command(text: &str) -> Script {
    let argv = ["/bin/sh", "-c", text].map(str::to_owned).to_vec();
    Script { user: Some("root".to_owned()), argv, input: Vec::new() }
}

/// Answers how a guest is asked whether something listens on a TCP port: the kernel's own list is read, so that nothing has
/// to be connected to, nor installed.
///
/// Source: proc(5), `/proc/net/tcp`; the state 0A is `LISTEN`.
pub(super) fn listens(port: u16) -> Script {
    let text = format!(
        "if [ -r /proc/net/tcp ]
then cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':{port:04X} [0-9A-F]*:0000 0A '
else nc -z 127.0.0.1 {port}
fi"
    );
    Script { user: None, ..of_command(&text) }
}

fn shell(program: &str, arguments: [String; 2]) -> Vec<String> {
    let fixed = ["/bin/sh", "-c", program.trim(), "vmkit"].map(str::to_owned);
    fixed.into_iter().chain(arguments).collect()
}

impl Script {
    /// Answers the program and its arguments as somebody has to type them who is logged in as `user`.
    pub(super) fn argv_for(&self, user: &str) -> Vec<String> {
        let mut argv = Vec::new();
        if let Some(other) = self.user.as_deref().filter(|wanted| *wanted != user) {
            argv.extend(["sudo", "-n", "-H", "-u", other, "--"].map(str::to_owned));
        }
        argv.extend(self.argv.iter().cloned());
        argv
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::{Command, Output, Stdio};

    fn step(env: &[(&str, &str)], dir: Option<&str>) -> Step {
        let text = format!(
            "version = 1\n[machine.web]\nimage = 'a'\n[[machine.web.provision]]\nname = 's'\nshell = 'x'\n{}",
            dir.map(|dir| format!("dir = '{dir}'\n")).unwrap_or_default()
        );
        let project =
            crate::vmfile::parse(Path::new("/p/vmkit.toml"), &text, &|_| Err(String::new())).unwrap();
        let mut step = project.machines[0].steps[0].clone();
        step.env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect::<BTreeMap<_, _>>();
        step
    }

    /// Has this host's own shell run it, as the guest's would.
    fn run(script: &Script) -> Output {
        let mut child = Command::new(&script.argv[0])
            .args(&script.argv[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may end before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(&script.input);
        child.wait_with_output().unwrap()
    }

    fn says(script: &Script) -> (Option<i32>, String) {
        let output = run(script);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    #[test]
    fn a_text_is_run_by_the_shell_which_stops_at_a_failure() {
        let script = of_step(&step(&[], None), b"echo one\nfalse\necho two\n".to_vec());
        assert_eq!(says(&script), (Some(1), "one\n".to_owned()));
        let script = of_step(&step(&[], None), b"exit 7".to_vec());
        assert_eq!(says(&script).0, Some(7));
    }

    #[test]
    fn a_script_is_run_by_what_it_names() {
        let script = of_step(&step(&[], None), b"#!/bin/cat\nhello\n".to_vec());
        assert_eq!(says(&script), (Some(0), "#!/bin/cat\nhello\n".to_owned()));
    }

    #[test]
    fn a_hostile_environment_arrives_as_it_is() {
        let values = [("A", "it's $HOME `id` \"x\""), ("B", "two\nlines"), ("C", ""), ("D", "ü'; exit 9; '")];
        let script = of_step(&step(&values, None), b"printf '%s|' \"$A\" \"$B\" \"$C\" \"$D\"".to_vec());
        let expected = values.map(|(_, value)| format!("{value}|")).concat();
        assert_eq!(says(&script), (Some(0), expected));
        assert!(!script.argv.concat().contains("HOME `id`"), "no list of processes shows it");
    }

    #[test]
    fn a_script_has_no_input_and_leaves_no_file() {
        let script = of_step(&step(&[], Some("/")), b"cat; pwd; echo $0".to_vec());
        let (code, said) = says(&script);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!((code, lines[0]), (Some(0), "/"));
        assert!(!Path::new(lines[1]).exists(), "{said}");
    }

    #[test]
    fn a_missing_folder_fails_the_step() {
        let script = of_step(&step(&[], Some("/no/such/folder")), b"echo ran".to_vec());
        let (code, said) = says(&script);
        assert_ne!(code, Some(0));
        assert_eq!(said, "");
    }

    fn copied(from: &Path, to: &Path) -> Output {
        let archive = Command::new("tar")
            .args(["-c", "--transform", "s,^[^/]*,it,", "-C"])
            .args([from.parent().unwrap(), Path::new(from.file_name().unwrap())])
            .output()
            .unwrap();
        let user = rustix::process::geteuid().as_raw().to_string();
        let argv = shell(COPY, [to.to_str().unwrap().to_owned(), user]);
        run(&Script { user: None, argv, input: archive.stdout })
    }

    #[test]
    fn a_copy_replaces_a_file_and_joins_a_folder() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::create_dir_all(at("app/sub")).unwrap();
        fs::write(at("app/sub/a"), "new").unwrap();
        fs::set_permissions(at("app/sub/a"), fs::Permissions::from_mode(0o750)).unwrap();
        fs::create_dir_all(at("guest/app/sub")).unwrap();
        fs::write(at("guest/app/sub/a"), "old").unwrap();
        fs::write(at("guest/app/kept"), "kept").unwrap();
        assert!(copied(&at("app"), &at("guest/app")).status.success());
        assert_eq!(fs::read_to_string(at("guest/app/sub/a")).unwrap(), "new");
        assert_eq!(fs::metadata(at("guest/app/sub/a")).unwrap().permissions().mode() & 0o777, 0o750);
        assert!(at("guest/app/kept").exists());
        assert!(copied(&at("app/sub/a"), &at("guest/deep/er/b")).status.success());
        assert_eq!(fs::read_to_string(at("guest/deep/er/b")).unwrap(), "new");
        let refused = copied(&at("app/sub/a"), &at("guest/app"));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("is a folder"), "{refused:?}");
        let refused = copied(&at("app"), &at("guest/deep/er/b"));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("is no folder"), "{refused:?}");
        let left = fs::read_dir(at("guest"))
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".vmkit"));
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn an_archive_that_is_cut_off_changes_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let to = temp.path().join("file");
        fs::write(&to, "old").unwrap();
        let argv = shell(COPY, [to.to_str().unwrap().to_owned(), "0".to_owned()]);
        let output = run(&Script { user: None, argv, input: vec![b'x'; 700] });
        assert!(!output.status.success());
        assert_eq!(fs::read_to_string(&to).unwrap(), "old");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_port_is_found_while_somebody_listens_there() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let script = listens(listener.local_addr().unwrap().port());
        assert_eq!(run(&script).status.code(), Some(0));
        drop(listener);
        assert_eq!(run(&script).status.code(), Some(1));
    }

    #[test]
    fn only_who_is_somebody_else_already_needs_sudo() {
        let script = of_command("true");
        assert_eq!(script.argv_for("root"), ["/bin/sh", "-c", "true"]);
        let argv = script.argv_for("vmkit");
        assert_eq!(argv[..6], ["sudo", "-n", "-H", "-u", "root", "--"].map(str::to_owned));
    }
}
