//! What is to run in the guest, and how that is written for its login shell.
//!
//! Pure. SSH has no way to hand over arguments: a server gives one line to the user's login shell.
//! So each argument is quoted for a POSIX shell, and arrives as it was given. Source: RFC 4254,
//! section 6.5; POSIX, "Shell Command Language".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use super::TerminalSpec;
use crate::error::{Error, Result};

/// Says why the directory can't be entered, and returns what a shell does for a program that can't
/// be run. It runs instead of the program, in a shell of its own: what the user's is need not know
/// more than `||` and `;`.
const NO_DIR: &str = "if [ -d \"$1\" ]; then why=\"the directory $1 may not be entered\"; \
    else why=\"there is no directory $1\"; fi; printf \"error: %s in the guest\\n\" \"$why\" >&2; exit 126";

/// A program to run in a guest, or its user's login shell.
#[derive(Debug, Clone, Default)]
pub struct GuestCommand {
    /// The program and its arguments, no shell between; none of them is the user's login shell.
    pub argv: Vec<OsString>,
    /// Variables that it has beside those that a login has.
    pub env: Vec<(String, OsString)>,
    /// The directory that it runs in; the user's home where none is given. One that can't be
    /// entered is told on the program's standard error, with the code 126.
    pub dir: Option<OsString>,
    /// The terminal that it runs at; pipes where none is given.
    pub terminal: Option<TerminalSpec>,
}

impl GuestCommand {
    /// Creates a command of a program and its arguments.
    pub fn new<S: Into<OsString>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Returns the line for a POSIX shell; nothing where the login shell itself is all that is
    /// wanted.
    ///
    /// # Errors
    /// `InvalidInput` for a zero byte, which no argument can hold, and for a variable that no shell
    /// could name.
    pub fn line(&self) -> Result<Option<Vec<u8>>> {
        if self.argv.is_empty() && self.env.is_empty() && self.dir.is_none() {
            return Ok(None);
        }
        let mut line = Vec::new();
        if let Some(dir) = &self.dir {
            line.extend_from_slice(b"cd -- ");
            quote("workdir", dir, &mut line)?;
            line.extend_from_slice(b" || exec sh -c ");
            quote("workdir", OsStr::new(NO_DIR), &mut line)?;
            line.extend_from_slice(b" sh ");
            quote("workdir", dir, &mut line)?;
            line.extend_from_slice(b"; ");
        }
        for (name, value) in &self.env {
            check_name(name)?;
            line.extend_from_slice(format!("export {name}=").as_bytes());
            quote("env", value, &mut line)?;
            line.extend_from_slice(b" && ");
        }
        // Nothing stays between the server and the program: a signal that ends it is reported as
        // one.
        line.extend_from_slice(b"exec");
        if self.argv.is_empty() {
            line.extend_from_slice(b" \"${SHELL:-/bin/sh}\" -l");
        }
        for argument in &self.argv {
            line.push(b' ');
            quote("command", argument, &mut line)?;
        }
        Ok(Some(line))
    }
}

/// Returns the line that runs a program of vmkit's own, by whatever shell the user has: `mark` is
/// printed on a line of its own to both streams right before the program begins.
///
/// A login shell may print what its start-up files say before it runs anything, and need not be a
/// POSIX one. So all that it reads is one word in single quotes without a quote, a line break or an
/// exclamation mark, which sh, csh and fish read alike; a POSIX shell turns that back into the
/// line.
///
/// # Errors
/// `InvalidInput` for a zero byte, which no argument can hold.
pub(super) fn own_line(argv: &[impl AsRef<OsStr>], mark: &str) -> Result<Vec<u8>> {
    let mut line = format!("printf '%s\\n' {mark}; printf '%s\\n' {mark} >&2; exec").into_bytes();
    for argument in argv {
        line.push(b' ');
        quote("command", argument.as_ref(), &mut line)?;
    }
    let mut own = b"exec /bin/sh -c 'eval \"$(printf %b \"$1\")\"' sh '".to_vec();
    for byte in line {
        match byte {
            plain if plain.is_ascii_alphanumeric() || b" -_./:,+@%=".contains(&plain) => own.push(plain),
            other => own.extend_from_slice(format!("\\0{other:03o}").as_bytes()),
        }
    }
    own.push(b'\'');
    Ok(own)
}

/// Appends a word as a POSIX shell reads it back.
fn quote(field: &'static str, word: &OsStr, line: &mut Vec<u8>) -> Result<()> {
    let bytes = word.as_bytes();
    if bytes.contains(&0) {
        return Err(Error::invalid(field, word.display(), "an argument has no zero byte"));
    }
    // `=` is not among them: zsh expands a word that begins with it.
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:,+@%".contains(byte);
    if !bytes.is_empty() && bytes.iter().all(plain) {
        line.extend_from_slice(bytes);
        return Ok(());
    }
    line.push(b'\'');
    for &byte in bytes {
        match byte {
            b'\'' => line.extend_from_slice(b"'\\''"),
            byte => line.push(byte),
        }
    }
    line.push(b'\'');
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    let head = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if head && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    let expected = "a variable's name has letters, digits and _, no digit first, and NAME=VALUE sets it";
    Err(Error::invalid("env", shown, expected))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(command: &GuestCommand) -> String {
        String::from_utf8(command.line().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn plain_words_stay_plain_and_all_others_are_quoted() {
        let command = GuestCommand::new(["echo", "a b", "", "it's", "$HOME;", "=x", "-n"]);
        assert_eq!(line(&command), r"exec echo 'a b' '' 'it'\''s' '$HOME;' '=x' -n");
    }

    #[test]
    fn directory_and_variables_come_before_the_program() {
        let mut command = GuestCommand::new(["env"]);
        command.dir = Some("-odd dir".into());
        command.env = vec![("A".into(), "1 2".into())];
        let no_dir = format!("exec sh -c '{NO_DIR}' sh");
        assert_eq!(
            line(&command),
            format!("cd -- '-odd dir' || {no_dir} '-odd dir'; export A='1 2' && exec env")
        );
    }

    #[test]
    fn a_login_shell_needs_a_line_only_for_what_is_set_before_it() {
        let mut command = GuestCommand::default();
        assert_eq!(command.line().unwrap(), None);
        command.dir = Some("/srv".into());
        let no_dir = format!("exec sh -c '{NO_DIR}' sh");
        assert_eq!(line(&command), format!("cd -- /srv || {no_dir} /srv; exec \"${{SHELL:-/bin/sh}}\" -l"));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named_and_the_program_does_not_run() {
        let dir = tempfile::tempdir().unwrap();
        for (name, code, stdout, said) in [
            ("none", 126, "", "error: there is no directory it's none in the guest\n"),
            ("there", 0, "ran\n", ""),
        ] {
            std::fs::create_dir_all(dir.path().join("it's there")).unwrap();
            let command = GuestCommand {
                dir: Some(format!("it's {name}").into()),
                ..GuestCommand::new(["echo", "ran"])
            };
            let mut shell = std::process::Command::new("sh");
            let output = shell.args(["-c", &line(&command)]).current_dir(dir.path()).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{output:?}");
            assert_eq!(String::from_utf8_lossy(&output.stdout), stdout);
            assert!(String::from_utf8_lossy(&output.stderr).ends_with(said), "{output:?}");
        }
    }

    #[test]
    fn what_no_shell_could_take_is_refused() {
        let error = GuestCommand::new(["a\0b"]).line().unwrap_err().to_string();
        assert!(error.starts_with("command: ") && error.contains("zero byte"), "{error}");
        for name in ["", "1A", "A-B", "A B", "A;rm"] {
            let mut command = GuestCommand::new(["true"]);
            command.env = vec![(name.to_owned(), "x".into())];
            assert!(command.line().is_err(), "{name:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_real_shell_reads_every_argument_back(words in prop::collection::vec("[^\0]{0,12}", 1..6)) {
            let mut argv = vec!["printf".to_owned(), "%s\\0".to_owned()];
            argv.extend(words.iter().cloned());
            let line = line(&GuestCommand::new(argv));
            let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            let expected: String = words.iter().flat_map(|word| [word.as_str(), "\0"]).collect();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        }
    }

    #[test]
    fn the_line_of_a_program_of_ours_is_one_plain_word_and_runs_the_program_behind_its_mark() {
        let argv =
            ["sh", "-c", "printf '%s|' \"$@\"\nexit 7", "sh", "a b", "it's!", "", "\\n %s\n", "ü$HOME`x`"];
        let line = own_line(&argv, "MARK").unwrap();
        let word = line.strip_prefix(b"exec /bin/sh -c 'eval \"$(printf %b \"$1\")\"' sh '").unwrap();
        let word = word.strip_suffix(b"'").unwrap();
        assert!(!word.iter().any(|byte| b"'!\n\"$`".contains(byte)), "{}", String::from_utf8_lossy(word));
        for shell in ["sh", "bash", "fish", "tcsh", "csh", "zsh"] {
            let line = OsStr::from_bytes(&line);
            let Ok(done) = std::process::Command::new(shell).arg("-c").arg(line).output() else { continue };
            let said = String::from_utf8_lossy(&done.stdout);
            assert_eq!(said, "MARK\na b|it's!||\\n %s\n|ü$HOME`x`|", "{shell}: {done:?}");
            assert_eq!((done.status.code(), &*done.stderr), (Some(7), &b"MARK\n"[..]), "{shell}");
        }
    }
}
