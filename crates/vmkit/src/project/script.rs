//! The commands of tasks in a guest, and their input.
//!
//! Pure. A guest needs a POSIX shell, `dd`, `wc` and, for copies, `find`, `mktemp` and `tar`.
//! Possible secrets, the environment and the script itself, are sent as input, since lists of
//! processes show arguments.
//!
//! A guest does not notice that the `up` that started a task has died, so a task can outlive it.
//! Therefore each task is a process group that the next `up` finds and ends:
//!
//! ```text
//! /tmp/vmkit-step-TOKEN/lead     the shell text that leads the group; its path is in the list of processes
//! /tmp/vmkit-step-TOKEN/group    the group's number
//! /tmp/vmkit-step-TOKEN/script   what a step runs; env, its environment; new, where a copy is unpacked
//! ```
//!
//! And since a broken connection looks to a guest like the end of the input, no task starts before
//! its input is complete: a script is sent with its length, an archive has a last entry.

use super::script_text::ScriptText;
use crate::vmfile::{CopySpec, ProvisionStep};

/// A command for a guest, and its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuestScript {
    /// The guest's user that runs it; the login user if none is given.
    pub(super) user: Option<String>,
    /// The program and its arguments.
    pub(super) argv: Vec<String>,
    /// The input; a copy has an archive instead.
    pub(super) input: Vec<u8>,
    /// The token of a step, which marks its end.
    pub(super) token: Option<String>,
}

/// The unique name of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TaskToken(String);

impl TaskToken {
    /// Creates the token of this number.
    pub(super) fn new(number: u128) -> Self {
        Self(format!("vmkit-step-{number:032x}"))
    }
}

/// Starts the script `$2` in a process group of its own, in the folder `$1` below `/tmp`; the other
/// arguments are for that script.
///
/// Without `setsid`, the group is the one that the SSH server has created for this command.
const BEGIN: &str = r#"
at=/tmp/$1 lead=$2
shift 2
mkdir -m 700 "$at" || { echo "the guest needs a /tmp that can be written to, to run a step" >&2; exit 1; }
trap 'rm -rf "$at"' EXIT
printf '%s\n' "$lead" >"$at/lead" || exit
if command -v setsid >/dev/null 2>&1
then setsid /bin/sh "$at/lead" "$at" "" "$@"
else /bin/sh "$at/lead" "$at" "$(ps -o pgid= -p $$)" "$@"
fi
exit $?
"#;

/// The leader of a group: it runs until its child has ended, so that the group can be found by it.
const LEAD: &str = r#"
at=$1 group=${2:-$$}
shift 2
echo "$group" >"$at/group.new" && mv "$at/group.new" "$at/group" || exit
trap : HUP INT TERM
"#;

/// Runs the input: first the environment, `$1` bytes of it, then a script of `$2` bytes, in the
/// folder `$3`.
///
/// The arguments after these are the script's name on the host, the interpreter of its `#!`, its
/// argument, and the program that `env` has to start; each may be empty. The interpreter is run
/// with the script, as the kernel does, so that a `/tmp` mounted `noexec` works. At its end it
/// prints [`EndMark`]: background processes of a step may keep its output open for longer.
///
/// The script is a file while it runs, so that it has its own input. The environment may set any
/// variable, so only positional parameters are used after it.
const RUN: &str = r#"
dd bs=1 count="$1" 2>/dev/null >"$at/env" && cat >"$at/script" || {
  echo "the script can't be written to $at: the guest needs room in /tmp to run a step" >&2; exit 1
}
if [ "$(($(wc -c <"$at/script")))" -ne "$2" ]
then echo 'the script arrived in the guest incomplete, and was not run' >&2; exit 1
fi
chmod 700 "$at/script" || exit
shift 2
set -- "$at" "$@"
if [ -n "$4" ] && [ ! -x "$4" ]
then echo "$3: line 1: the guest has no interpreter $4" >&2; exit 127
fi
exec </dev/null 2>&1
. "$1/env"
if [ -n "$6" ] && ! command -v "$6" >/dev/null 2>&1
then echo "$3: line 1: the guest has no program $6 for $4 to start"; exit 127
fi
if [ -n "$2" ]; then cd "$2" || exit
else cd "${HOME:-/}" 2>/dev/null || cd /
fi
if [ -z "$4" ]; then /bin/sh -e "$1/script"
elif [ -n "$5" ]; then "$4" "$5" "$1/script"
else "$4" "$1/script"
fi
set -- "$1" "$?"
printf '\000%s:%s\000' "${1##*/}" "$2"
exit "$2"
"#;

/// Stores the input, an archive with the entry `it` and after it `end`, at `$1`, owned by `$2`.
///
/// The archive is first unpacked beside its target, so that an interrupted copy changes nothing
/// there. An existing folder keeps its mode and its owner, at every depth: the new entries are
/// moved into it.
const COPY: &str = r#"
to=$1 owner=$2
mkdir -p "$(dirname "$to")" || exit
new=$(mktemp -d "$(dirname "$to")/.vmkit-XXXXXX") || exit
trap 'rm -rf "$new"' EXIT
printf '%s\n' "$new" >"$at/new" || exit
tar -x -p -o -f - -C "$new" || exit
if [ ! -e "$new/end" ]
then echo 'the copy arrived in the guest incomplete, and was discarded' >&2; exit 1
fi
chown -R "$owner" "$new/it" || exit
join() (
  cd "$1" || exit
  for it in * .[!.]* ..?*
  do
    [ -d "$it" ] && [ ! -h "$it" ] || continue
    if [ -d "$2/$it" ]; then join "./$it" "$2/$it" || exit
    elif [ -e "$2/$it" ]; then echo "$2/$it exists, and is not a directory" >&2; exit 1
    else mv -f "./$it" "$2/" || exit
    fi
  done
  find . ! -name . -prune ! -type d -exec /bin/sh -c 'mv -f "$@" "$0"' "$2/" {} +
)
if [ -d "$new/it" ]
then
  if [ -d "$to" ]; then join "$new/it" "$to"
  elif [ -e "$to" ]; then echo "$to exists, and is not a directory" >&2; exit 1
  else mv -f "$new/it" "$to"
  fi
else
  if [ -d "$to" ]; then echo "$to is a directory: name the file to write" >&2; exit 1; fi
  mv -f "$new/it" "$to"
fi
"#;

/// Ends every task that was started and whose end was not recorded, and waits for that: with
/// SIGKILL after ten seconds.
///
/// A group is found by its leader, whose command line has the token. The folder is renamed first: a
/// task that has not yet written its group there fails instead of starting later. Other leftovers
/// are removed only as recorded in a folder of the same user.
const END: &str = r#"
for at in /tmp/vmkit-step-*
do
  [ -d "$at" ] && [ ! -h "$at" ] || continue
  token=${at#/tmp/} token=${token%.ended}
  [ ${#token} -eq 43 ] || continue
  if [ "${at%.ended}" = "$at" ]; then mv "$at" "$at.ended" || continue; at=$at.ended; fi
  group=
  if [ -f "$at/group" ]; then read -r group <"$at/group"; fi
  case $group in '' | *[!0-9]*) group=1 ;; esac
  if [ -r "/proc/$group/cmdline" ]; then leads=$(tr '\0' ' ' <"/proc/$group/cmdline")
  else leads=$(ps -o args= -p "$group" 2>/dev/null)
  fi
  case $group/$leads in
  1/*) ;;
  *"$token"*)
    kill -TERM "-$group"
    left=100
    while kill -0 "-$group" 2>/dev/null
    do
      if [ "$left" -eq 0 ]; then kill -KILL "-$group"; fi
      if [ "$left" -lt -50 ]; then echo "an interrupted step does not end: process group $group" >&2; exit 1; fi
      left=$((left - 1))
      sleep 0.1 2>/dev/null || sleep 1
    done ;;
  esac
  if [ -O "$at" ] && [ -f "$at/new" ]
  then read -r new <"$at/new"; case $new in */.vmkit-*) rm -rf "$new" ;; esac
  fi
  rm -rf "$at"
done
"#;

/// Returns the command of a step, with the script that it runs; `name` is the script's name in
/// messages.
pub(super) fn of_step(
    step: &ProvisionStep,
    script: &ScriptText,
    name: &str,
    token: &TaskToken,
) -> GuestScript {
    let mut input: Vec<u8> = step
        .env
        .iter()
        .flat_map(|(name, value)| format!("export {name}='{}'\n", value.replace('\'', r"'\''")).into_bytes())
        .collect();
    let lengths = [input.len(), script.bytes.len()].map(|bytes| bytes.to_string());
    input.extend(&script.bytes);
    let dir = step.dir.clone().unwrap_or_default();
    let (path, argument, started) = match &script.interpreter {
        Some(interpreter) => (
            interpreter.path.clone(),
            interpreter.argument.clone().unwrap_or_default(),
            interpreter.started_by_env().unwrap_or_default().to_owned(),
        ),
        None => Default::default(),
    };
    let arguments = [dir, name.to_owned(), path, argument, started];
    let argv = led(RUN, token, lengths.into_iter().chain(arguments));
    GuestScript { user: Some(step.user.clone()), argv, input, token: Some(token.0.clone()) }
}

/// Returns the command of a copy; the archive is its input.
pub(super) fn of_copy(copy: &CopySpec, token: &TaskToken) -> GuestScript {
    let owner = copy.owner.clone().unwrap_or_else(|| ROOT.to_owned());
    let argv = led(COPY, token, [copy.to.clone(), owner]);
    GuestScript { user: Some(ROOT.to_owned()), argv, input: Vec::new(), token: None }
}

/// Returns the command for a script given in the file.
pub(super) fn of_command(text: &str) -> GuestScript {
    let argv = ["/bin/sh", "-c", text].map(str::to_owned).to_vec();
    GuestScript { user: Some(ROOT.to_owned()), argv, input: Vec::new(), token: None }
}

/// Returns the script that ends the interrupted tasks in a guest.
pub(super) fn of_end(user: Option<&str>) -> GuestScript {
    GuestScript { user: user.map(str::to_owned), argv: shell(END, []), input: Vec::new(), token: None }
}

/// Returns the command that checks whether a process in the guest listens on a TCP port: it reads
/// the kernel's own table, so that no connection is needed, and no tool.
///
/// Source: proc(5), `/proc/net/tcp`; the state 0A is `LISTEN`.
pub(super) fn listens(port: u16) -> GuestScript {
    let text = format!(
        "if [ -r /proc/net/tcp ]
then cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':{port:04X} [0-9A-F]*:0000 0A '
else nc -z 127.0.0.1 {port}
fi"
    );
    GuestScript { user: None, ..of_command(&text) }
}

/// The user of tasks without a user.
pub(super) const ROOT: &str = "root";

/// Returns the command line that runs a script as a process group.
fn led(text: &str, token: &TaskToken, arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let lead = format!("{}\n{}", LEAD.trim(), text.trim());
    shell(BEGIN, [token.0.clone(), lead].into_iter().chain(arguments))
}

fn shell(program: &str, arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let fixed = ["/bin/sh", "-c", program.trim(), "vmkit"].map(str::to_owned);
    fixed.into_iter().chain(arguments).collect()
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
