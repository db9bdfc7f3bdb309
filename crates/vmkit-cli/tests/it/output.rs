//! What the command prints and its exit codes, where no VM has to run.

use std::fs::OpenOptions;
use std::io::Read;
use std::process::Stdio;

use crate::support::{Host, Transcript, answer, assert_golden};

/// Replaces what differs from run to run.
fn steady(host: &Host, text: &str) -> String {
    let mut text = text.replace(host.dir.path().to_str().unwrap(), "/DIR");
    let info: serde_json::Value = serde_json::from_str(&host.must(["info", "web", "--json"])).unwrap();
    let id = info["id"].as_str().unwrap();
    let mac = vmkit::network::MacAddr::of_vm(id.parse().unwrap()).to_string().replace(':', "");
    for (found, steady) in [(id, "ID"), (&mac[2..], "SHORT-ID")] {
        text = text.replace(found, steady);
    }
    text
}

fn host() -> Host {
    let host = Host::with_refusing_qemu();
    let options =
        ["--image", "base.img", "--disk", "1GiB", "--data-disk", "64MiB", "--data-disk", "./base.img:ro"];
    let create =
        ["create", "web", "--accel", "tcg", "--cpus", "2", "--forward", "28080:80", "--hostname", "web1"];
    host.must([&create[..], &options].concat());
    host
}

#[test]
fn json_has_the_promised_shape() {
    let host = host();
    for (arguments, golden) in [
        (&["info", "web", "--json"][..], "vm-prepared.json"),
        (&["ls", "--json"], "ls.json"),
        (&["console", "web", "--json"], "console.json"),
    ] {
        assert_golden(&format!("tests/golden/{golden}"), &steady(&host, &host.must(arguments)));
    }
}

#[test]
fn the_list_shows_what_each_vm_was_created_from_and_its_owner() {
    let host = host();
    let head = |arguments: &[&str]| {
        let table = host.must(arguments);
        table.lines().next().unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(head(&["ls"]), "NAME STATE IMAGE CPUS MEMORY PORTS NOTE");
    assert_eq!(head(&["ls", "-w"]), "NAME STATE IMAGE PROJECT CPUS MEMORY BACKEND PORTS NOTE");

    host.must(["image", "import", "base.img", "--name", "ours:1"]);
    host.must(["create", "kept", "--image", "ours:1"]);
    let launch = ["launch", "ours:1", "launched", "--accel", "tcg"];
    assert_eq!(host.vmkit(launch).code, Some(2), "this host's QEMU refuses to start it");
    host.create("kernel");
    let file = "version = 1\n[project]\nname = 'shop'\n[machine.db]\nimage = 'ours:1'\naccel = 'tcg'\n";
    std::fs::write(host.file("vmkit.toml"), file).unwrap();
    assert_eq!(host.vmkit(["up"]).code, Some(2), "as above");
    assert_eq!(head(&["ls"]), "NAME STATE IMAGE PROJECT CPUS MEMORY PORTS NOTE");
    let table = host.must(["ls"]);
    let rows: Vec<Vec<&str>> =
        table.lines().skip(1).map(|line| line.split_whitespace().take(4).collect()).collect();
    assert_eq!(
        rows,
        [
            ["kept", "prepared", "ours:1", "-"],
            ["kernel", "prepared", "-", "-"],
            ["launched", "failed", "ours:1", "-"],
            ["shop-db", "failed", "ours:1", "shop"],
            ["web", "prepared", "base.img", "-"],
        ]
    );
    let whole = host.file("base.img");
    assert!(host.must(["ls", "--wide"]).contains(&whole));
    assert!(host.must(["info", "web"]).contains(&format!("image:          {whole}\n")));
    let listed: serde_json::Value = serde_json::from_str(&host.must(["ls", "--json"])).unwrap();
    assert_eq!(listed[1]["image"], serde_json::Value::Null);
    let db = &listed[3];
    assert_eq!(
        (&db["image"], &db["project"], &db["machine"]),
        (&"ours:1".into(), &"shop".into(), &"db".into())
    );
    let file = std::fs::canonicalize(host.file("vmkit.toml")).unwrap();
    assert_eq!(db["project_file"].as_str(), file.to_str());
}

#[test]
fn a_record_that_can_not_be_read_is_a_row_of_the_list() {
    let host = host();
    std::fs::write(host.home().join("vms/web/vm.json"), "{").unwrap();
    std::fs::write(host.home().join("vms/web/run.json"), "{").unwrap();
    let listed = host.must(["ls", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let row = &listed[0];
    assert_eq!(row["state"], "unknown");
    assert_eq!(row["error"]["kind"], "record");
    assert!(row["error"]["message"].as_str().unwrap().contains("vm.json"), "{row}");
    assert!(row["cpus"].is_null(), "{row}");
}

#[test]
fn several_vms_print_a_line_each_and_the_first_failure_sets_the_exit_code() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    transcript.run(&["stop", "nobody", "web", "nothing"]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn every_exit_code_is_used_where_it_is_promised() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for command in [
        &["--version"][..],
        &["create", "web", "--kernel", "vmlinuz"],
        &["frobnicate"],
        &["info", "nobody"],
        &["suspend", "web"],
        &["ip", "web"],
        &["console", "web"],
        &["wait", "web", "running", "--timeout", "0"],
        &["run"],
        &["kill"],
        &["scp"],
        &["ssh", "web"],
        &["rm", "--all"],
        &["rm", "--all", "web", "--force"],
        &["stop"],
        &["console", "web", "--escape", "^A"],
    ] {
        transcript.run(command);
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn help_lists_the_exit_codes_and_version_is_a_word_and_a_number() {
    let host = Host::without_qemu();
    let help = host.must(["--help"]);
    assert!(help.contains("Exit codes:") && help.contains("  5  a timeout passed"), "{help}");
    assert_eq!(host.must(["--version"]), format!("vmkit {}\n", env!("CARGO_PKG_VERSION")));
    assert!(!host.home().exists(), "help needs no home");
}

#[test]
fn a_list_of_nothing_is_a_head_and_in_json_an_empty_array() {
    let host = Host::without_qemu();
    assert_eq!(host.must(["ls", "--json"]), "[]\n");
    assert_eq!(host.must(["ls"]).lines().count(), 1);
    assert!(!host.home().exists(), "reading makes no home");
}

#[test]
fn a_reader_who_leaves_early_is_no_failure() {
    let host = host();
    let mut child = host.command(["completions", "bash"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 10]).unwrap();
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_fact_that_cannot_be_cached_is_a_failure() {
    let host = host();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [&["ls"][..], &["--help"], &["help", "ls"], &["--version"], &["completions", "bash"]] {
        let full = full.try_clone().unwrap();
        let answer = answer(host.command(arguments).stdout(full).output().unwrap());
        assert_eq!(answer.code, Some(1), "{arguments:?}: {answer:?}");
        assert!(
            answer.stderr.starts_with("error: cannot write to standard output\n  caused by: No space"),
            "{arguments:?}: {answer:?}"
        );
    }
}

#[test]
fn every_shell_gets_a_script_that_knows_the_commands() {
    let host = Host::without_qemu();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = host.must(["completions", shell]);
        assert!(script.contains("console") && script.contains("doctor"), "{shell}");
    }
}

#[test]
fn doctor_fails_without_qemu_and_prints_what_to_do() {
    let host = Host::without_qemu();
    let answer = host.vmkit(["doctor"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stdout.lines().any(|line| line.starts_with("qemu-system") && line.contains("FAIL")));
    assert!(answer.stdout.contains("advice: "), "{answer:?}");
    let checks: serde_json::Value = serde_json::from_str(&host.vmkit(["doctor", "--json"]).stdout).unwrap();
    let failed = checks.as_array().unwrap().iter().find(|check| check["status"] == "fail").unwrap();
    assert!(failed["advice"].is_string() && failed["found"].is_string() && failed["name"].is_string());
}

#[test]
fn the_log_is_printed_whole_and_by_its_last_lines() {
    let host = host();
    let log = host.home().join("vms/web/console.log");
    std::fs::write(log.with_extension("log.1"), "one\ntwo\n").unwrap();
    std::fs::write(&log, "three\nfour").unwrap();
    assert_eq!(host.must(["logs", "web"]), "one\ntwo\nthree\nfour");
    for (lines, tail) in [("0", ""), ("1", "four"), ("3", "two\nthree\nfour"), ("9", "one\ntwo\nthree\nfour")]
    {
        assert_eq!(host.must(["logs", "web", "--tail", lines]), tail);
    }
    assert_eq!(host.must(["logs", "web", "--hypervisor"]), "");
}

#[test]
fn the_commands_of_other_programs_are_understood() {
    let host = Host::with_refusing_qemu();
    for arguments in
        [["ps"].as_slice(), &["list"], &["stop", "--all"], &["rm", "--all", "--force"], &["version"]]
    {
        host.must(arguments.iter().copied());
    }
}

#[test]
fn all_applies_to_the_vms_with_something_to_do() {
    let host = Host::with_refusing_qemu();
    for name in ["web", "db"] {
        host.create(name);
    }
    host.must(["stop", "--all"]);
    host.must(["suspend", "--all"]);
    host.must(["delete", "web"]);
    host.must(["rm", "--all", "--force"]);
    assert_eq!(host.must(["ls"]).lines().count(), 1);
}

#[test]
fn the_key_that_leaves_the_console_is_parsed_before_the_vm_is_found() {
    let host = host();
    let mut command = host.command(["console", "web"]);
    let answer = crate::support::answer(command.env("VMKIT_ESCAPE", "F1").output().unwrap());
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.starts_with("error: VMKIT_ESCAPE: \"F1\": write ^ or ctrl-"), "{answer:?}");
}
