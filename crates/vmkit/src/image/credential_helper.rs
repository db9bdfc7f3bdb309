//! Credential helpers, the programs with logins at registries: `docker-credential-NAME`.
//!
//! Edge: processes. A helper is run as `docker-credential-NAME get`, with the registry on its
//! standard input, and prints JSON. Its output is secret: after a success only the login is passed
//! on.
//!
//! Source: the README of docker-credential-helpers, "Development".

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Access, access};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::credentials::{RegistryLogin, login_name};
use crate::error::{Error, Result};
use crate::host::inherited::child_problem;
use crate::steps::step;

/// The beginning of every helper's name.
const PREFIX: &str = "docker-credential-";
/// How long a helper may take: a user may have to type a passphrase.
const LIMIT: Duration = Duration::from_secs(30);
/// The largest output of a helper, in bytes.
const MOST_BYTES: u64 = 64 << 10;
/// How many bytes of a helper's output an error has at most; a longer output is no message.
const MOST_SAID: usize = 300;
const MOST_MESSAGE_BYTES: usize = 4096;
/// The message of a helper without a login at the registry.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The user name of an identity token.
const TOKEN: &str = "<token>";

/// A credential helper.
#[derive(Debug)]
pub(super) struct CredentialProgram {
    name: String,
    program: PathBuf,
    limit: Duration,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperReply {
    username: String,
    secret: String,
}

impl CredentialProgram {
    /// Finds a helper by the last part of its name; relative directories are ignored.
    ///
    /// # Errors
    /// `InvalidInput` on `registry credentials` for an impossible name; `Host` if no directory has
    /// the program.
    pub(super) fn find(end: &str, search_path: &[PathBuf], registry: &str) -> Result<Self> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if end.is_empty() || !end.bytes().all(is_plain) {
            let expected = "a helper is named by letters, digits, -, _ and ., as in docker-credential-NAME";
            return Err(Error::invalid("registry credentials", end, expected));
        }
        let name = format!("{PREFIX}{end}");
        let paths = search_path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(&name));
        let found = paths.into_iter().find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok());
        match found {
            Some(program) => Ok(Self { name, program, limit: LIMIT }),
            None => {
                let dirs: Vec<_> = search_path.iter().map(|dir| dir.display().to_string()).collect();
                let problem =
                    format!("it stores the login for {registry}, and was not found in {}", dirs.join(":"));
                Err(Error::host(name, problem))
            }
        }
    }

    /// Asks for the login at a registry; `None` if the helper has none.
    ///
    /// # Cancel safety
    /// A helper that is no longer waited for is killed; on Linux also if this process is killed.
    ///
    /// # Errors
    /// `Host` with the helper's message if it fails; `TimedOut` if it does not end.
    pub(super) async fn login(&self, registry: &str) -> Result<Option<RegistryLogin>> {
        let failed = |problem: String| {
            Error::host(self.name.clone(), format!("it stores the login for {registry}, and {problem}"))
        };
        step("image: run a credential helper").map_err(Error::io("run", &self.program))?;
        let (said, complained, status) = match timeout(self.limit, self.run(login_name(registry))).await {
            Ok(ended) => ended.map_err(|error| failed(format!("can't be run: {}", child_problem(&error))))?,
            Err(_) => {
                let awaited = format!("{} to return the login for {registry}", self.name);
                return Err(Error::timed_out(awaited, self.limit));
            }
        };
        let said = said.trim_ascii();
        if !status.success() {
            if said == NOT_FOUND.as_bytes() {
                return Ok(None);
            }
            // If the helper has a login after all, the output contains it.
            let is_no_message = said.is_empty() || said.starts_with(b"{") || said.len() > MOST_MESSAGE_BYTES;
            let told = if is_no_message { complained.trim_ascii() } else { said };
            let told: String = String::from_utf8_lossy(told).chars().take(MOST_SAID).collect();
            return Err(failed(format!("failed ({status}): {told:?}")));
        }
        // Not even the position of the error: it would come with a part of the secret.
        let answer: HelperReply = serde_json::from_slice(said)
            .map_err(|_| failed("returned something other than a login".to_owned()))?;
        Ok(match (answer.username.as_str(), answer.secret) {
            (_, secret) if secret.is_empty() => None,
            (TOKEN, secret) => Some(RegistryLogin::IdentityToken(secret)),
            (user, secret) => Some(RegistryLogin::password(user, &secret)),
        })
    }

    /// Runs the helper to its end, with this process's environment: without that, it finds no
    /// keychain.
    async fn run(&self, server: &str) -> io::Result<(Vec<u8>, Vec<u8>, std::process::ExitStatus)> {
        let mut command = Command::new(&self.program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        let HelperProcess { mut child, _thread } = HelperProcess::spawn(command).await?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let ask = async {
            if let Some(mut stdin) = stdin {
                // A helper that does not read its input says why when it ends.
                let _ = stdin.write_all(server.as_bytes()).await;
            }
        };
        let ((), said, complained, status) = tokio::join!(ask, all_of(stdout), all_of(stderr), child.wait());
        Ok((said?, complained?, status?))
    }
}

/// A helper that is killed when this is dropped, and when this process ends in any way.
struct HelperProcess {
    child: Child,
    /// Keeps the spawning thread alive: on Linux the helper dies with that thread.
    _thread: mpsc::Sender<Infallible>,
}

impl HelperProcess {
    /// Spawns the helper on a thread of its own, which lives as long as the returned value. A
    /// thread of tokio's could end while the helper runs.
    async fn spawn(mut command: Command) -> io::Result<Self> {
        let (answer, answered) = oneshot::channel();
        let (_thread, dropped) = mpsc::channel::<Infallible>();
        let runtime = Handle::current();
        thread::Builder::new().name("vmkit-helper".to_owned()).spawn(move || {
            #[cfg(target_os = "linux")]
            crate::sys::end_with_this_thread(command.as_std_mut());
            let spawned = {
                let _context = runtime.enter();
                command.spawn()
            };
            // When it is no longer waited for, it is killed.
            drop(answer.send(spawned));
            // Nothing is ever sent.
            let _ = dropped.recv();
        })?;
        let child = answered.await.map_err(|_| io::Error::other("the thread that runs it has ended"))??;
        Ok(Self { child, _thread })
    }
}

/// Reads to the end or to the limit, and closes the pipe.
async fn all_of(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(MOST_BYTES).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::fs;

    /// Creates a helper `docker-credential-test` from a shell script.
    fn helper(dir: &tempfile::TempDir, script: &str) -> CredentialProgram {
        let path = dir.path().join("docker-credential-test");
        vmkit_testkit::write_program(&path, &format!("#!/bin/sh\n{script}\n")).unwrap();
        CredentialProgram::find("test", &[dir.path().to_owned()], "r.example").unwrap()
    }

    #[tokio::test]
    async fn a_helper_is_asked_as_docker_asks_it() {
        let dir = tempfile::tempdir().unwrap();
        let asked = dir.path().join("asked");
        let script = format!(
            "{{ echo \"$*\"; cat; }} > {}; echo '{{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"p\"}}'",
            asked.display()
        );
        let one = helper(&dir, &script);
        let login = one.login("r.example:5000").await.unwrap();
        assert_eq!(login, Some(RegistryLogin::Password("dTpw".to_owned())));
        assert_eq!(fs::read_to_string(&asked).unwrap(), "get\nr.example:5000");
        one.login("docker.io").await.unwrap();
        assert_eq!(fs::read_to_string(&asked).unwrap(), "get\nhttps://index.docker.io/v1/");
    }

    #[tokio::test]
    async fn a_token_is_distinguished_from_a_password_and_no_login_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let token = helper(&dir, r#"echo '{"ServerURL":"x","Username":"<token>","Secret":"t"}'"#);
        assert_eq!(token.login("r").await.unwrap(), Some(RegistryLogin::IdentityToken("t".to_owned())));
        let none = helper(&dir, "echo 'credentials not found in native keychain'; exit 1");
        assert_eq!(none.login("r").await.unwrap(), None);
        let empty = helper(&dir, r#"echo '{"ServerURL":"x","Username":"","Secret":""}'"#);
        assert_eq!(empty.login("r").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_failure_names_the_helper_and_its_message_and_never_a_secret() {
        let dir = tempfile::tempdir().unwrap();
        for (script, expected) in [
            ("echo 'pass not initialized'; exit 1", "failed (exit status: 1): \"pass not initialized\""),
            ("echo 'no keychain' >&2; exit 3", "failed (exit status: 3): \"no keychain\""),
            (r#"echo '{"Secret": "geheim"}'; exit 1"#, "failed (exit status: 1): \"\""),
            (r#"echo '{"Secret": "geheim"}'"#, "returned something other than a login"),
            // The pipe is closed before all of it is read.
            ("exec yes geheim", "failed (signal: 13"),
        ] {
            let error = helper(&dir, script).login("r.example").await.unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), ErrorKind::Host, "{text}");
            assert!(text.starts_with("docker-credential-test: it stores the login for r.example"), "{text}");
            assert!(text.contains(expected) && !text.contains("geheim"), "{text}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_does_not_end_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let endless =
            CredentialProgram { limit: Duration::from_millis(200), ..helper(&dir, "exec sleep 1000") };
        let error = endless.login("r.example").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(
            error.to_string().contains("docker-credential-test to return the login for r.example"),
            "{error}"
        );
    }

    #[test]
    fn no_name_leads_out_of_the_directories() {
        let dir = tempfile::tempdir().unwrap();
        helper(&dir, "exit 0");
        for end in ["", "../test", "a/b", "a b", "t\0"] {
            let error = CredentialProgram::find(end, &[dir.path().to_owned()], "r").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{end:?}");
        }
        let error = CredentialProgram::find("none", &[dir.path().to_owned()], "r.example").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Host);
        assert!(
            error.to_string().contains("docker-credential-none: it stores the login for r.example"),
            "{error}"
        );
    }
}
