//! From an image to a shell: what `launch` adds to making and starting a VM, and how soon a shell's
//! prompt is there.

use std::fs::File;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{self, Runtime};
use vmkit::ssh::{ProcessEvent, Session, SshTarget, TerminalSize, TerminalSpec};

use crate::Result;
use crate::figures::{self, Figure, Pair};
use crate::program::Program;
use crate::sshd::{Sshd, soon};

/// Measures `vmkit launch --no-wait` of an image that is kept beside `vmkit create --start` of the
/// same.
pub(crate) fn launch(program: &mut Program, dir: &Path, runs: u32) -> Result<Figure> {
    let home = dir.join("launch");
    let image = dir.join("kept.img");
    File::create(&image)?.set_len(1 << 20)?;
    let image = image.to_str().ok_or("a path that is not UTF-8")?.to_owned();
    program.run("image import", &home, &["image", "import", &image, "--name", "kept"])?;
    let mut pair = Launch { program, home };
    // The first time, the program asks QEMU for its version, and what a child needed would count as
    // its own.
    pair.timed("", &["create", "one", "--image", "kept"])?;
    pair.program.forget("");
    Figure::measure("launch", figures::Target::MsMore(50.0), runs, &mut pair)
}

struct Launch<'a> {
    program: &'a mut Program,
    home: PathBuf,
}

impl Launch<'_> {
    fn timed(&mut self, label: &str, arguments: &[&str]) -> Result<Duration> {
        // A firmware that finds nothing to boot leaves the machine to the next turn.
        let took = self.program.run(label, &self.home, &[arguments, &["--accel", "tcg"]].concat())?;
        self.program.run("rm --force", &self.home, &["rm", "--force", "one"])?;
        Ok(took)
    }
}

impl Pair for Launch<'_> {
    fn ours(&mut self) -> Result<Duration> {
        self.timed("launch", &["launch", "--no-wait", "kept", "one"])
    }

    fn bare(&mut self) -> Result<Duration> {
        self.timed("create --start", &["create", "--start", "one", "--image", "kept"])
    }
}

/// Measures how soon a login shell's prompt comes from OpenSSH's server on loopback, beside
/// OpenSSH's own client.
///
/// The shell's home is empty: what a user has in `.bashrc` would count as vmkit's own.
pub(crate) fn prompt(dir: &Path, runs: u32) -> Result<Figure> {
    let home = dir.join("guest-home");
    std::fs::create_dir(&home)?;
    let sshd = Sshd::with(&format!("SetEnv HOME={}", home.display()));
    let identity = sshd.dir.path().join("identity");
    crate::sshd::write_secret(&identity, &sshd.access.login_key.private);
    let known_hosts = sshd.dir.path().join("known_hosts");
    std::fs::write(&known_hosts, format!("bench {}\n", sshd.access.host_key.public.trim()))?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let mut pair = Prompt { sshd, runtime, identity, known_hosts };
    Figure::measure("prompt", figures::Target::Ms(150.0), runs, &mut pair)
}

struct Prompt {
    sshd: Sshd,
    runtime: Runtime,
    identity: PathBuf,
    known_hosts: PathBuf,
}

impl Pair for Prompt {
    /// From the server's first word to the prompt.
    fn ours(&mut self) -> Result<Duration> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let target = SshTarget { address: listener.local_addr()?, ..self.sshd.target() };
        let server = self.sshd.address;
        let (speaks, first_word) = channel();
        // It ends with the connection.
        thread::spawn(move || pass_on(&listener, server, &speaks));
        self.runtime.block_on(async {
            let session = Session::connect(&target, soon()).await?;
            let terminal = Some(TerminalSpec::new("dumb", TerminalSize { columns: 80, rows: 24 }));
            let shell = vmkit::ssh::GuestCommand { terminal, ..Default::default() };
            let (_input, mut output) = session.spawn(&shell, soon()).await?.split();
            let mut said = Vec::new();
            while !is_prompt(&said) {
                match output.next().await? {
                    ProcessEvent::Stdout(data) | ProcessEvent::Stderr(data) => said.extend(data),
                    ProcessEvent::Ended(exit) => return Err(format!("the shell ended with {exit}").into()),
                }
            }
            Ok(Instant::now() - first_word.try_recv()?)
        })
    }

    /// From exec of `ssh` to the prompt.
    fn bare(&mut self) -> Result<Duration> {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-tt", "-p", &self.sshd.address.port().to_string()]);
        ssh.arg("-i").arg(&self.identity);
        let known_hosts = format!("UserKnownHostsFile={}", self.known_hosts.display());
        for option in ["HostKeyAlias=bench", "IdentitiesOnly=yes", "BatchMode=yes", &known_hosts] {
            ssh.args(["-o", option]);
        }
        ssh.arg(format!("{}@127.0.0.1", self.sshd.access.user)).env("TERM", "dumb");
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let begin = Instant::now();
        let mut child = ssh.spawn()?;
        let mut stdout = child.stdout.take().ok_or("a child without its output")?;
        let (mut said, mut piece) = (Vec::new(), [0; 4096]);
        while !is_prompt(&said) {
            match stdout.read(&mut piece)? {
                0 => return Err("ssh ended without a prompt".into()),
                bytes => said.extend_from_slice(&piece[..bytes]),
            }
        }
        let took = begin.elapsed();
        child.kill()?;
        child.wait()?;
        Ok(took)
    }
}

/// Passes one connection on to a server until it ends, and tells when the server said its first
/// word.
fn pass_on(listener: &TcpListener, server: SocketAddr, speaks: &Sender<Instant>) -> io::Result<()> {
    let (client, _) = listener.accept()?;
    let server = TcpStream::connect(server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    server.peek(&mut [0])?;
    // The receiver is gone if the measurement has failed.
    let _ = speaks.send(Instant::now());
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let typed = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        // The client has gone.
        let _ = to.shutdown(Shutdown::Both);
    });
    // However the connection ends, it is over.
    let _ = io::copy(&mut &server, &mut &client);
    let _ = client.shutdown(Shutdown::Both);
    let _ = typed.join();
    Ok(())
}

/// Returns whether a shell waits to be typed to, by what it said last.
fn is_prompt(said: &[u8]) -> bool {
    said.ends_with(b"$ ") || said.ends_with(b"# ")
}
