//! Sessions and programs, with OpenSSH's real server on loopback.

use std::ffi::OsString;
use std::net::TcpListener;
use std::time::{Duration, Instant as Clock};

use rustix::process::Signal;
use tokio::time::timeout;
use vmkit::spec::GuestAccess;
use vmkit::ssh::{GuestCommand, HostKey, ProcessEvent, Session, SshIdentity, TerminalSize, TerminalSpec};
use vmkit::{Error, ErrorKind};
use vmkit::{GuestExitStatus, ProgramOutput};

use crate::sshd::{Sshd, soon};

fn in_ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

async fn run(session: &Session, argv: &[&str]) -> ProgramOutput {
    session.output(&GuestCommand::new(argv.iter().copied()), b"", soon()).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn the_end_of_a_program_is_reported() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    assert_eq!(run(&session, &["true"]).await.exit, GuestExitStatus::Code(0));
    assert_eq!(run(&session, &["sh", "-c", "exit 37"]).await.exit, GuestExitStatus::Code(37));
    assert_eq!(run(&session, &["/no/such/program"]).await.exit, GuestExitStatus::Code(127));
    let killed = run(&session, &["sh", "-c", "kill -KILL $$"]).await;
    assert_eq!((killed.exit.shell_code(), killed.exit), (137, GuestExitStatus::Signal("KILL".into())));
    let output = run(&session, &["sh", "-c", "echo out; echo err >&2"]).await;
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("out\n", "err\n"));
    session.close().await;
}

#[tokio::test]
async fn arguments_variables_and_directory_arrive_as_they_were_given() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let mut command = GuestCommand::new(["printf", "%s|", "a  b", "", "it's", "$(id)", "*", "-n", "\n", "ü"]);
    let output = session.output(&command, b"", soon()).await.unwrap();
    assert_eq!(text(&output.stdout), "a  b||it's|$(id)|*|-n|\n|ü|");
    command = GuestCommand::new(["sh", "-c", "printf '%s,%s' \"$PWD\" \"$COLOUR\""]);
    command.dir = Some("/usr/bin".into());
    command.env = vec![("COLOUR".into(), OsString::from("it's $blue"))];
    let output = session.output(&command, b"", soon()).await.unwrap();
    assert_eq!(text(&output.stdout), "/usr/bin,it's $blue");
    command.dir = Some("/no/such/dir".into());
    let output = session.output(&command, b"", soon()).await.unwrap();
    assert_ne!(output.exit, GuestExitStatus::Code(0));
    assert!(text(&output.stderr).contains("/no/such/dir"), "{output:?}");
}

#[tokio::test]
async fn standard_input_is_handed_over_to_its_end() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let sent = "line\n".repeat(1000);
    let output = session.output(&GuestCommand::new(["cat"]), sent.as_bytes(), soon()).await.unwrap();
    assert_eq!(text(&output.stdout), sent);
    assert_eq!(text(&run(&session, &["wc", "-c"]).await.stdout), "0\n");
}

#[tokio::test]
async fn a_program_that_reads_nothing_ends_all_the_same() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    // More than the window, so that the rest waits for a reader that never comes.
    let sent = vec![0; 16 << 20];
    let output = session.output(&GuestCommand::new(["sh", "-c", "exit 3"]), &sent, soon()).await.unwrap();
    assert_eq!(output.exit, GuestExitStatus::Code(3));
}

#[tokio::test]
async fn a_hundred_megabytes_pass_each_way_unharmed() {
    const BYTES: usize = 100 << 20;
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let began = Clock::now();
    let count = GuestCommand::new(["head", "-c", &BYTES.to_string(), "/dev/zero"]);
    let (_input, mut output) = session.spawn(&count, soon()).await.unwrap().split();
    let mut received = 0;
    loop {
        match timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap() {
            ProcessEvent::Stdout(data) => received += data.len(),
            ProcessEvent::Stderr(data) => panic!("{:?}", text(&data)),
            ProcessEvent::Ended(exit) => break assert_eq!(exit, GuestExitStatus::Code(0)),
        }
    }
    assert_eq!(received, BYTES);
    let down = began.elapsed();
    let began = Clock::now();
    let counted = session.output(&GuestCommand::new(["wc", "-c"]), &vec![7; BYTES], soon()).await.unwrap();
    assert_eq!(text(&counted.stdout), format!("{BYTES}\n"));
    eprintln!("100 MiB: {down:?} out of the guest, {:?} into it", began.elapsed());
}

#[tokio::test]
async fn a_program_waits_while_its_output_is_not_read() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let progress = sshd.dir.path().join("progress");
    let script = format!(
        "i=0; while dd if=/dev/zero bs=1M count=1 2>/dev/null; do i=$((i+1)); echo $i > {}; done",
        progress.display()
    );
    let (_input, output) =
        session.spawn(&GuestCommand::new(["sh", "-c", &script]), soon()).await.unwrap().split();
    let written = || std::fs::read_to_string(&progress).ok()?.trim().parse::<u32>().ok();
    let mut before = None;
    loop {
        let now = written();
        assert!(now.is_none_or(|mib| mib < 64), "{now:?} MiB lie about between the two");
        if now.is_some() && now == before {
            break;
        }
        before = now;
        // There is no event for a program that has stopped writing. Without flow control it writes
        // hundreds of MiB meanwhile, which the next check finds.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    drop(output);
}

#[tokio::test]
async fn a_terminal_has_the_size_it_was_given_and_takes_another() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let mut command = GuestCommand::new([
        "sh",
        "-c",
        "trap 'stty size; exit 5' WINCH; tty; stty size; while :; do sleep 0.1; done",
    ]);
    command.terminal = Some(TerminalSpec::new("xterm", TerminalSize { columns: 91, rows: 33 }));
    let (input, mut output) = session.spawn(&command, soon()).await.unwrap().split();
    let mut said = String::new();
    let exit = loop {
        match timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap() {
            ProcessEvent::Stdout(data) => said.push_str(text(&data)),
            ProcessEvent::Stderr(data) => panic!("{:?}", text(&data)),
            ProcessEvent::Ended(exit) => break exit,
        }
        if said.ends_with("33 91\r\n") {
            input.resize(TerminalSize { columns: 100, rows: 40 }).await.unwrap();
        }
    };
    assert_eq!(exit, GuestExitStatus::Code(5));
    assert!(said.starts_with("/dev/pts/") && said.ends_with("40 100\r\n"), "{said:?}");
}

#[tokio::test]
async fn a_login_shell_at_a_terminal_replies_to_what_is_typed() {
    let sshd = Sshd::new();
    let began = Clock::now();
    let session = sshd.session().await;
    let terminal = Some(TerminalSpec::new("dumb", TerminalSize { columns: 80, rows: 24 }));
    let command = GuestCommand { terminal, ..GuestCommand::default() };
    let (mut input, mut output) = session.spawn(&command, soon()).await.unwrap().split();
    let ProcessEvent::Stdout(_) = timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap()
    else {
        panic!("a shell begins with its prompt")
    };
    eprintln!("a prompt after {:?}", began.elapsed());
    input.write(b"exit 9\n").await.unwrap();
    loop {
        if let ProcessEvent::Ended(exit) =
            timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap()
        {
            break assert_eq!(exit, GuestExitStatus::Code(9));
        }
    }
}

#[tokio::test]
async fn a_signal_reaches_the_program() {
    if rustix::process::geteuid().is_root() {
        return eprintln!("SKIP: OpenSSH passes no signals on to the programs of root");
    }
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let (input, mut output) =
        session.spawn(&GuestCommand::new(["sleep", "600"]), soon()).await.unwrap().split();
    input.signal("TERM").await.unwrap();
    let ended = timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap();
    assert_eq!(ended, ProcessEvent::Ended(GuestExitStatus::Signal("TERM".into())));
}

#[tokio::test]
async fn a_program_ends_by_a_signal_that_the_server_does_not_pass_on() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    assert_eq!(session.user(), sshd.access.user);
    let script = GuestCommand::new(["sh", "-c", "sleep 1000 & echo $! $$; wait"]);
    let (_input, mut output) = session.spawn(&script, soon()).await.unwrap().split();
    let ProcessEvent::Stdout(pids) = timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap()
    else {
        panic!("it tells its processes")
    };
    session.signal_all("TERM", soon()).await.unwrap();
    let ended = timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap();
    assert_eq!(ended, ProcessEvent::Ended(GuestExitStatus::Signal("TERM".into())));
    for pid in text(&pids).split_ascii_whitespace() {
        let began = Clock::now();
        while std::path::Path::new("/proc").join(pid).exists() {
            assert!(began.elapsed() < Duration::from_secs(60), "{pid} still runs");
            // Its parent reaps it without reporting it.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(run(&session, &["true"]).await.exit, GuestExitStatus::Code(0), "the session goes on");
}

#[tokio::test]
async fn a_connection_that_is_slow_to_be_led_keeps_no_other_waiting() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    // A server that accepts no connection: once its backlog is full, the kernel lets new ones wait.
    let full =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&full, &"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap()).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let server = TcpListener::from(full);
    let address = server.local_addr().unwrap();
    let mut filling = Vec::new();
    while let Ok(filled) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        filling.push(filled);
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let door = listener.local_addr().unwrap();
    let test = async {
        let _waiting = tokio::net::TcpStream::connect(door).await.unwrap();
        // Afterwards the kernel retries only every few seconds, without an event.
        tokio::time::sleep(Duration::from_millis(3500)).await;
        std::thread::spawn(move || {
            for mut stream in server.incoming().flatten() {
                let _ = std::io::Write::write_all(&mut stream, b"hello");
                filling.push(stream);
            }
        });
        let began = Clock::now();
        let mut second = tokio::net::TcpStream::connect(door).await.unwrap();
        let mut hello = [0; 5];
        tokio::io::AsyncReadExt::read_exact(&mut second, &mut hello).await.unwrap();
        began.elapsed()
    };
    let port = std::num::NonZeroU16::new(address.port()).unwrap();
    tokio::select! {
        ended = session.forward(&listener, port) => panic!("{ended:?}"),
        took = test => assert!(took < Duration::from_secs(2), "it waited for another one: {took:?}"),
    }
}

#[tokio::test]
async fn keys_are_exchanged_again_amid_much_output_and_input() {
    const BYTES: usize = 40 << 20;
    let sshd = Sshd::with("RekeyLimit 4M");
    let session = sshd.session().await;
    let sent: Vec<u8> = (0..BYTES / 4).flat_map(|word| (word as u32).to_le_bytes()).collect();
    let (mut input, mut output) = session.spawn(&GuestCommand::new(["cat"]), soon()).await.unwrap().split();
    let feed = async {
        input.write(&sent).await.unwrap();
        input.end().await.unwrap();
    };
    let listen = async {
        let mut received = Vec::with_capacity(BYTES);
        loop {
            match timeout(Duration::from_secs(60), output.next()).await.unwrap().unwrap() {
                ProcessEvent::Stdout(data) => received.extend(data),
                ProcessEvent::Stderr(data) => panic!("{:?}", text(&data)),
                ProcessEvent::Ended(exit) => break assert_eq!(exit, GuestExitStatus::Code(0)),
            }
        }
        assert!(received == sent);
    };
    tokio::join!(feed, listen);
}

#[tokio::test]
async fn a_server_with_another_host_key_is_refused_with_both_fingerprints() {
    let sshd = Sshd::new();
    let other = GuestAccess::generate("other").unwrap();
    let mut target = sshd.target();
    let found = target.host_key.fingerprint().unwrap();
    target.host_key = HostKey::known(&other.host_key.public).unwrap();
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(matches!(error, Error::HostKey { .. }) && error.kind() == ErrorKind::Guest, "{error:?}");
    let (error, expected) = (error.to_string(), target.host_key.fingerprint().unwrap());
    assert!(error.contains(&found) && error.contains(&expected), "{error}");
    target.host_key = HostKey::any();
    Session::connect(&target, soon()).await.unwrap();
}

#[tokio::test]
async fn a_server_whose_key_is_of_another_kind_is_refused_with_both_fingerprints() {
    let sshd = Sshd::new();
    let path = sshd.dir.path().join("ecdsa");
    let mut keygen = std::process::Command::new("ssh-keygen");
    assert!(keygen.args(["-q", "-t", "ecdsa", "-N", "", "-f"]).arg(&path).status().unwrap().success());
    let mut target = sshd.target();
    let public = std::fs::read_to_string(path.with_extension("pub")).unwrap();
    target.host_key = HostKey::known(&public).unwrap();
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(matches!(error, Error::HostKey { .. }), "{error:?}");
}

#[tokio::test]
async fn a_refused_key_is_named_with_what_the_server_accepts() {
    let sshd = Sshd::new();
    let mut target = sshd.target();
    target.identity = SshIdentity::of(&GuestAccess::generate("other").unwrap().login_key).unwrap();
    let error = Session::connect(&target, soon()).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&target.identity.fingerprint().unwrap()) && text.contains("it accepts: publickey"),
        "{text}"
    );
    assert_eq!(error.kind(), ErrorKind::Guest);
}

/// Creates another key of this kind that the server accepts, and returns its file.
fn another_key(sshd: &Sshd, arguments: &[&str]) -> std::path::PathBuf {
    use std::io::Write;
    let path = sshd.dir.path().join(format!("another{}", arguments.concat()));
    let mut keygen = std::process::Command::new("ssh-keygen");
    assert!(keygen.args(["-q", "-N", ""]).args(arguments).arg("-f").arg(&path).status().unwrap().success());
    let mut public = path.clone().into_os_string();
    public.push(".pub");
    let authorized = sshd.dir.path().join("authorized_keys");
    let mut authorized = std::fs::OpenOptions::new().append(true).open(authorized).unwrap();
    writeln!(authorized, "\n{}", std::fs::read_to_string(public).unwrap()).unwrap();
    path
}

#[tokio::test]
async fn keys_of_every_usual_kind_log_in() {
    let sshd = Sshd::new();
    for kind in [&["-t", "rsa", "-b", "3072"][..], &["-t", "rsa", "-m", "PEM"], &["-t", "ecdsa"]] {
        let mut target = sshd.target();
        target.identity = SshIdentity::read(&another_key(&sshd, kind)).unwrap();
        Session::connect(&target, soon()).await.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
    }
}

#[tokio::test]
async fn a_server_with_an_rsa_key_alone_proves_itself_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host");
    let mut keygen = std::process::Command::new("ssh-keygen");
    assert!(keygen.args(["-q", "-t", "rsa", "-N", "", "-f"]).arg(&path).status().unwrap().success());
    let sshd = Sshd::with(&format!("HostKey {}\nHostKeyAlgorithms rsa-sha2-256", path.display()));
    let mut target = sshd.target();
    let public = std::fs::read_to_string(path.with_extension("pub")).unwrap();
    target.host_key = HostKey::known(&public).unwrap();
    Session::connect(&target, soon()).await.unwrap();
}

/// An SSH agent without keys, which ends with the test.
struct Agent(std::process::Child, std::path::PathBuf);

impl Agent {
    fn new(dir: &std::path::Path) -> Self {
        let socket = dir.join("agent.sock");
        let mut agent = std::process::Command::new("ssh-agent");
        let agent =
            agent.arg("-D").arg("-a").arg(&socket).stdout(std::process::Stdio::null()).spawn().unwrap();
        while !socket.exists() {
            // The agent does not report that it listens.
            std::thread::sleep(Duration::from_millis(10));
        }
        Self(agent, socket)
    }

    fn add(&self, key: &std::path::Path) {
        let mut add = std::process::Command::new("ssh-add");
        assert!(add.arg("-q").arg(key).env("SSH_AUTH_SOCK", &self.1).status().unwrap().success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_keys_of_an_ssh_agent_log_in_without_leaving_it() {
    let sshd = Sshd::new();
    let agent = Agent::new(sshd.dir.path());
    let mut target = sshd.target();
    target.identity = SshIdentity::agent(&agent.1);
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(error.to_string().contains("it has no keys"), "{error}");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    // A key that the server refuses, and then one that it accepts.
    let elsewhere = Sshd::new();
    agent.add(&another_key(&elsewhere, &["-t", "ed25519"]));
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(error.to_string().contains("does not accept any key of the SSH agent"), "{error}");
    agent.add(&another_key(&sshd, &["-t", "rsa"]));
    let session = Session::connect(&target, soon()).await.unwrap();
    assert_eq!(run(&session, &["true"]).await.exit, GuestExitStatus::Code(0));
    target.identity = SshIdentity::agent("/no/such/socket");
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/socket"), "{error}");
}

#[tokio::test]
async fn a_server_that_dies_midway_is_noticed_at_once() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    let (_input, mut output) =
        session.spawn(&GuestCommand::new(["sleep", "600"]), soon()).await.unwrap().split();
    sshd.signal(Signal::KILL);
    let error = timeout(Duration::from_secs(30), output.next()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("the program's end is unknown"), "{error}");
    let error = session.output(&GuestCommand::new(["true"]), b"", soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Guest, "{error}");
}

#[tokio::test]
async fn a_server_that_stalls_delays_no_caller_beyond_the_deadline() {
    let sshd = Sshd::new();
    let session = sshd.session().await;
    sshd.signal(Signal::STOP);
    let error = session.output(&GuestCommand::new(["true"]), b"", in_ms(300)).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    sshd.signal(Signal::CONT);
    assert_eq!(
        run(&session, &["true"]).await.exit,
        GuestExitStatus::Code(0),
        "and when it goes on, so does the session"
    );

    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut target = sshd.target();
    target.address = mute.local_addr().unwrap();
    let error = Session::connect(&target, in_ms(300)).await.unwrap_err();
    assert!(error.to_string().contains("greeting of SSH to"), "{error}");
}

#[tokio::test]
async fn a_port_without_a_listener_is_distinguished_from_one_with_another_server() {
    let sshd = Sshd::new();
    let mut target = sshd.target();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    target.address = listener.local_addr().unwrap();
    drop(listener);
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(error.to_string().ends_with("cannot connect"), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    target.address = listener.local_addr().unwrap();
    std::thread::spawn(move || drop(listener.accept()));
    let error = Session::connect(&target, soon()).await.unwrap_err();
    assert!(error.to_string().contains("closed the connection"), "{error}");
}

/// A server whose users' login shell first runs this script: it precedes every command, including
/// SFTP.
fn with_shell(text: &str) -> (Sshd, tempfile::TempDir) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let shell = dir.path().join("shell");
    std::fs::write(&shell, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&shell, std::fs::Permissions::from_mode(0o755)).unwrap();
    (Sshd::with(&format!("ForceCommand {}", shell.display())), dir)
}

const RUN_IT: &str = "case $SSH_ORIGINAL_COMMAND in internal-sftp) exec /usr/lib/openssh/sftp-server;; esac
exec /bin/bash -c \"$SSH_ORIGINAL_COMMAND\"";

#[tokio::test]
async fn what_a_login_shell_prints_first_is_no_part_of_a_copy_or_a_reply() {
    for noise in
        ["echo WELCOME", "echo WELCOME >&2", "printf 'no end of line'", "seq 20000", "printf '\\0\\0'"]
    {
        let (sshd, dir) = with_shell(&format!("{noise}\n{RUN_IT}"));
        let session = sshd.session().await;
        let files = session.files("web", soon()).await.unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "content").unwrap();
        files.upload(&from, to.to_str().unwrap(), false, &mut |_| ()).await.unwrap();
        assert_eq!(std::fs::read_to_string(to).unwrap(), "content", "{noise}");
        // Any cloud-init status of this host must be parsed without the shell's output.
        let asked = session.cloud_init_done(in_ms(2000), |_| ()).await;
        let error = asked.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(!error.contains("is invalid") && !error.contains("ran no command"), "{noise}: {error}");
    }
}

#[tokio::test]
async fn a_login_shell_that_runs_nothing_is_reported_with_its_message() {
    for (shell, said) in [
        (
            "echo 'This account is currently not available.'; exit 1",
            "This account is currently not available.",
        ),
        ("exit 1", "nothing"),
    ] {
        let (sshd, _dir) = with_shell(shell);
        let session = sshd.session().await;
        let error = session.cloud_init_done(soon(), |_| ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Guest);
        let error = error.to_string();
        assert!(
            error.contains("login shell") && error.contains(said) && error.contains("/bin/sh"),
            "{error}"
        );
        let error = session.files("web", soon()).await.unwrap_err().to_string();
        assert!(error.contains("login shell") && error.contains(said), "{error}");
    }
}
