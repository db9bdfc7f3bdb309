//! What a script of the host is, seen before a guest runs it: [`ScriptText`].
//!
//! Pure. Editors of other systems leave marks that an interpreter trips over and no message of a
//! guest names: CR LF line ends, a byte order mark, UTF-16. What has one meaning is converted, the
//! rest refused with its line.

/// A script in the form in which a guest gets it, and what runs it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScriptText {
    pub(super) bytes: Vec<u8>,
    /// What its `#!` names; `/bin/sh -e` runs it without one.
    pub(super) interpreter: Option<ScriptInterpreter>,
}

/// What stands behind `#!`, as Linux reads it: a path, and all the rest as one argument.
///
/// Source: execve(2), "Interpreter scripts".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScriptInterpreter {
    pub(super) path: String,
    pub(super) argument: Option<String>,
}

/// UTF-8's byte order mark.
const MARK: &[u8] = b"\xef\xbb\xbf";

impl ScriptText {
    /// Parses a script.
    ///
    /// # Errors
    /// Why no guest could run it, with the line.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if let [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'#', 0, ..] | [0, b'#', ..] = bytes {
            return Err("the script is UTF-16 text (expected UTF-8)".to_owned());
        }
        let text = bytes.strip_prefix(MARK).unwrap_or(bytes);
        if text.trim_ascii().is_empty() {
            return Err("the script is empty (expected commands)".to_owned());
        }
        let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
        if first.contains(&0) {
            return Err("the script is a binary file (expected text): copy a program by `files`, and run it in a step".to_owned());
        }
        let bytes = match text.contains(&0) {
            // Something is packed behind the text, which may count its bytes.
            true if first.ends_with(b"\r") => {
                return Err(
                    "line 1: the line ends in CR LF, and there is binary data further on (expected LF)"
                        .to_owned(),
                );
            }
            true => text.to_vec(),
            false => with_unix_ends(text),
        };
        let interpreter = match bytes.strip_prefix(b"#!") {
            Some(rest) => {
                Some(ScriptInterpreter::parse(rest.split(|byte| *byte == b'\n').next().unwrap_or_default())?)
            }
            None => None,
        };
        Ok(Self { bytes, interpreter })
    }

    /// Takes the text of a step as it is; a `#!` counts where it can be read.
    pub(super) fn of_step(text: &str) -> Self {
        let plain = || Self { bytes: text.as_bytes().to_vec(), interpreter: None };
        if text.starts_with("#!") {
            Self::parse(text.as_bytes()).unwrap_or_else(|_| plain())
        } else {
            plain()
        }
    }

    /// Returns the program that runs it, for messages.
    pub(super) fn runner(&self) -> String {
        match &self.interpreter {
            Some(ScriptInterpreter { path, argument: Some(argument) }) => format!("{path} {argument}"),
            Some(ScriptInterpreter { path, argument: None }) => path.clone(),
            None => "/bin/sh -e".to_owned(),
        }
    }
}

impl ScriptInterpreter {
    fn parse(line: &[u8]) -> Result<Self, String> {
        let wrong = |why: String| Err(format!("line 1: {why}"));
        let Ok(line) = str::from_utf8(line) else { return wrong("`#!` names no UTF-8 path".to_owned()) };
        let line = line.trim_matches([' ', '\t']);
        let (path, argument) = match line.split_once([' ', '\t']) {
            Some((path, argument)) => (path, Some(argument.trim_start_matches([' ', '\t']))),
            None => (line, None),
        };
        if !path.starts_with('/') {
            return wrong(format!(
                "`#!` names `{path}` (expected an absolute path, such as /bin/sh or /usr/bin/env {})",
                if path.is_empty() { "python3" } else { path }
            ));
        }
        if let Some(argument) = argument
            && path.ends_with("/env")
            && !argument.starts_with('-')
            && argument.contains([' ', '\t'])
        {
            return wrong(format!("env gets `{argument}` as one word (expected `#!{path} -S {argument}`)"));
        }
        Ok(Self { path: path.to_owned(), argument: argument.map(str::to_owned) })
    }

    /// Returns the program that `env` is to start, where that is plain to see.
    pub(super) fn started_by_env(&self) -> Option<&str> {
        let argument = self.argument.as_deref().filter(|_| self.path.ends_with("/env"))?;
        let words = argument.strip_prefix("-S ").unwrap_or(argument).split_whitespace();
        words.into_iter().find(|word| !word.contains('=')).filter(|word| !word.starts_with('-'))
    }
}

fn with_unix_ends(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for (index, byte) in text.iter().enumerate() {
        if *byte != b'\r' || text.get(index + 1) != Some(&b'\n') {
            bytes.push(*byte);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_editor_of_another_system_leaves_is_taken_away() {
        for text in
            [&b"#!/bin/sh\necho hi\n"[..], b"#!/bin/sh\r\necho hi\r\n", b"\xef\xbb\xbf#!/bin/sh\necho hi\n"]
        {
            let script = ScriptText::parse(text).unwrap();
            assert_eq!(script.bytes, b"#!/bin/sh\necho hi\n");
            assert_eq!(script.runner(), "/bin/sh");
        }
        let plain = ScriptText::parse(b"printf 'a\\r'\r\necho \r here\n").unwrap();
        assert_eq!(plain.bytes, b"printf 'a\\r'\necho \r here\n");
        assert_eq!((plain.runner().as_str(), plain.interpreter), ("/bin/sh -e", None));
        let packed = b"#!/bin/sh\ntail -n +3 $0\n\0\r\n";
        assert_eq!(ScriptText::parse(packed).unwrap().bytes, packed);
    }

    #[test]
    fn a_script_that_nothing_could_run_is_refused_with_the_cause() {
        for (text, why) in [
            (&b""[..], "empty"),
            (b" \r\n", "empty"),
            (b"\xff\xfe#\0!\0", "UTF-16"),
            (b"#\0!\0/\0", "UTF-16"),
            (b"\x7fELF\x02\x01\x01\0\0", "binary file"),
            (b"#!/bin/sh\r\nexit\r\n\0", "line 1: the line ends in CR LF"),
            (
                b"#!python3\n",
                "line 1: `#!` names `python3` (expected an absolute path, such as /bin/sh or /usr/bin/env python3)",
            ),
            (b"#!\necho", "line 1: `#!` names ``"),
            (b"#!/usr/bin/env python3 -u\n", "(expected `#!/usr/bin/env -S python3 -u`)"),
        ] {
            let found = ScriptText::parse(text).unwrap_err();
            assert!(found.contains(why), "{found}");
        }
    }

    #[test]
    fn an_interpreter_has_one_argument_as_linux_gives_it() {
        let of = |line: &str| ScriptText::parse(line.as_bytes()).unwrap().interpreter.unwrap();
        let awk = of("#! /usr/bin/awk -f  \nBEGIN {}");
        assert_eq!((awk.path.as_str(), awk.argument.as_deref()), ("/usr/bin/awk", Some("-f")));
        assert_eq!(awk.started_by_env(), None);
        assert_eq!(of("#!/usr/bin/env python3\n").started_by_env(), Some("python3"));
        let split = of("#!/usr/bin/env -S A=1 python3 -u\n");
        assert_eq!(split.argument.as_deref(), Some("-S A=1 python3 -u"));
        assert_eq!(split.started_by_env(), Some("python3"));
        assert_eq!(of("#!/usr/bin/env -i sh\n").started_by_env(), None);
    }
}
