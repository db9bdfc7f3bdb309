//! A log that is followed while it is written, turned, and removed.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::support::Host;
use crate::support::stream::{Heard, ended};

struct Followed {
    host: Host,
    log: PathBuf,
    child: Child,
    said: Heard<ChildStdout>,
}

impl Followed {
    fn new(options: &[&str]) -> Self {
        let host = Host::with_refusing_qemu();
        host.create("web");
        let log = host.home().join("vms/web/console.log");
        fs::write(&log, "one\ntwo\n").unwrap();
        let arguments = [&["logs", "web", "--follow"], options].concat();
        let mut child = host.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let said = Heard::new(child.stdout.take().unwrap());
        Self { host, log, child, said }
    }

    fn append(&self, text: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(&self.log).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn turn(&self) {
        fs::rename(&self.log, self.log.with_extension("log.1")).unwrap();
    }
}

#[test]
fn every_line_is_printed_once_across_a_turn_and_the_removal_ends_it() {
    let mut followed = Followed::new(&[]);
    followed.said.until("two\n");
    followed.append("three\n");
    followed.said.until("three\n");
    followed.append("four\n");
    followed.turn();
    followed.append("five\n");
    followed.said.until("five\n");
    followed.append("six\n");
    followed.said.until("six\n");
    followed.host.must(["rm", "web"]);
    assert_eq!(ended(&mut followed.child).code(), Some(0));
    assert_eq!(followed.said.rest(), "one\ntwo\nthree\nfour\nfive\nsix\n");
}

#[test]
fn what_was_written_over_two_rotations_between_reads_is_printed() {
    let mut followed = Followed::new(&["--tail", "1"]);
    followed.said.until("two\n");
    let pid = Pid::from_child(&followed.child);
    kill_process(pid, Signal::STOP).unwrap();
    waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    followed.append("three\n");
    followed.turn();
    followed.append("four\n");
    followed.turn();
    followed.append("five\n");
    kill_process(pid, Signal::CONT).unwrap();
    followed.said.until("five\n");
    assert_eq!(followed.said.text, "two\nthree\nfour\nfive\n");
    followed.host.must(["rm", "web"]);
    assert_eq!(ended(&mut followed.child).code(), Some(0));
}

#[test]
fn a_reader_who_leaves_ends_it_though_nothing_is_written() {
    let mut followed = Followed::new(&[]);
    followed.said.until("two\n");
    drop(followed.said);
    assert_eq!(ended(&mut followed.child).code(), Some(0));
}

#[test]
fn a_log_that_is_not_there_yet_is_waited_for() {
    let host = Host::with_refusing_qemu();
    host.create("web");
    let mut child = host.command(["logs", "web", "-f"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = Heard::new(child.stdout.take().unwrap());
    fs::write(host.home().join("vms/web/console.log"), "first words\n").unwrap();
    said.until("first words\n");
    host.must(["rm", "web"]);
    assert_eq!(ended(&mut child).code(), Some(0));
}
