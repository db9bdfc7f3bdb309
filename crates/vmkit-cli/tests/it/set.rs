//! `vmkit set`, as far as nothing has to run for it: what changes, what is refused, and what is
//! told.

use std::fs;

use crate::support::{Answer, Host};
use serde_json::{Value, json};

fn host() -> Host {
    let host = Host::with_refusing_qemu();
    host.must(["create", "web", "--image", "base.img", "--accel", "tcg", "--forward", "28080:80"]);
    host
}

fn info(host: &Host, name: &str) -> Value {
    serde_json::from_str(&host.must(["info", name, "--json"])).unwrap()
}

/// Checks that the refusal says all this and that nothing has changed.
fn refused(host: &Host, arguments: &[&str], said: &[&str]) -> Answer {
    let before = host.snapshot();
    let answer = host.vmkit(arguments);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{arguments:?}: {answer:?}");
    for said in said {
        assert!(answer.stderr.contains(said), "{arguments:?} does not say {said:?}: {}", answer.stderr);
    }
    assert!(host.snapshot() == before, "{arguments:?} changed something");
    answer
}

#[test]
fn what_is_named_changes_and_all_else_stays() {
    let host = host();
    let was = info(&host, "web");
    let changes = "cpus: 1 -> 3, at the next start\nmemory: 512MiB -> 1GiB, at the next start\n\
        disk: none -> 64MiB, at the next start\n";
    let options = ["--cpus", "3", "--memory", "1GiB", "--disk", "64MiB"];
    assert_eq!(host.must([&["set", "web"], &options[..]].concat()), changes);
    let mut expected = was;
    expected["cpus"] = json!(3);
    expected["memory_mib"] = json!(1024);
    expected["disk"]["size_mib"] = json!(64);
    assert_eq!(info(&host, "web"), expected);

    let again = host.vmkit([&["set", "web"], &options[..]].concat());
    assert_eq!((again.code, again.stdout.as_str()), (Some(0), ""));
    assert_eq!(again.stderr, "web: it is so already\n");
}

#[test]
fn json_has_the_vm_and_each_change() {
    let host = host();
    let told: Value = serde_json::from_str(&host.must(["set", "web", "--vnc", "off", "--json"])).unwrap();
    assert_eq!((&told["vm"]["name"], &told["vm"]["vnc"]), (&json!("web"), &json!("off")));
    let change = json!({"field": "vnc", "from": "unix", "to": "off", "applies": "next-start"});
    assert_eq!(told["changes"], json!([change]));
    let told: Value = serde_json::from_str(&host.must(["set", "web", "--vnc", "off", "--json"])).unwrap();
    assert_eq!(told["changes"], json!([]));
}

#[test]
fn a_dry_run_tells_the_same_and_changes_nothing() {
    let host = host();
    let before = host.snapshot();
    assert_eq!(host.must(["set", "web", "--cpus", "2", "--dry-run"]), "cpus: 1 -> 2, at the next start\n");
    let told = host.must(["set", "web", "--cpus", "2", "--dry-run", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["vm"]["cpus"], &told["changes"][0]["to"]), (&json!(1), &json!("2")));
    refused(&host, &["set", "web", "--machine", "virt", "--firmware", "uefi", "--dry-run"], &["machine: "]);
    assert!(host.snapshot() == before);
}

#[test]
fn forwards_stay_with_a_user_network_and_a_kernel_s_parts_are_set_one_by_one() {
    let host = host();
    host.must(["set", "web", "--network", "user", "--restrict", "true"]);
    let network = &info(&host, "web")["network"];
    assert_eq!((&network["restrict"], &network["forwards"]), (&json!(true), &json!(["28080:80", "22"])));
    host.must(["set", "web", "--kernel", "vmlinuz", "--cmdline", "quiet"]);
    host.must(["set", "web", "--initrd", "base.img"]);
    host.must(["set", "web", "--cmdline", ""]);
    let boot = &info(&host, "web")["boot"];
    let files =
        [&boot["kernel"], &boot["initrd"]].map(|path| path.as_str().unwrap().rsplit('/').next().unwrap());
    assert_eq!((files, &boot["cmdline"]), (["vmlinuz", "base.img"], &json!("")));
    host.must(["set", "web", "--firmware", "bios"]);
    assert_eq!(info(&host, "web")["boot"]["firmware"], "bios");
}

#[test]
fn what_can_not_be_is_refused_with_what_would_be_right() {
    let host = host();
    host.must(["set", "web", "--disk", "64MiB"]);
    let anew =
        ["and only a VM that is made anew can be otherwise", "hint: `vmkit rm` and then `vmkit create`"];
    for (options, said) in [
        (&["--disk", "32MiB"][..], &["disk: \"32MiB\": it is \"64MiB\"", anew[0], anew[1]][..]),
        (&["--firmware", "uefi"], &["firmware: \"uefi\": it is \"bios\"", anew[0], anew[1]]),
        (&["--machine", "virt", "--firmware", "uefi"], &["machine: \"virt\": it is \"q35\"", anew[1]]),
        (&["--machine", "microvm"], &["machine: \"microvm\": this machine boots a kernel directly"]),
        (&["--initrd", "base.img"], &["initrd: ", "this VM boots no kernel"]),
        (&["--network", "none", "--restrict", "true"], &["restrict: ", "only user networking"]),
        (&["--network", "tap:no-such-br"], &["network.bridge: \"no-such-br\": "]),
        (&["--kernel", "base.img"], &["kernel: ", "this is no kernel"]),
        (&["--cpus", "0"], &["cpus: \"0\": a VM has 1 to 255 CPUs"]),
        (&["--run-as", "vmkit-no-such-user"], &["run_as: "]),
        (&[], &["set: \"web\": say what shall change"]),
    ] {
        refused(&host, &[&["set", "web"], options].concat(), said);
    }
    host.create("bare");
    refused(&host, &["set", "bare", "--disk", "1GiB"], &["disk: \"1GiB\": this VM has no root disk"]);
    // Its disk is as large as its image, and nothing that would be found at the next start only is
    // written down.
    host.must(["create", "small", "--image", "base.img", "--accel", "tcg"]);
    refused(&host, &["set", "small", "--disk", "1MiB"], &["disk: \"1MiB\": ", "name at least 4MiB"]);
    let missing = host.vmkit(["set", "nobody", "--cpus", "2"]);
    assert_eq!(missing.code, Some(3), "{missing:?}");
}

#[test]
fn the_vm_of_a_machine_is_left_to_its_file_as_long_as_that_has_it() {
    let host = host();
    let file = "version = 1\n[project]\nname = 'shop'\n[machine.db]\naccel = 'tcg'\nkernel = 'vmlinuz'\n\
        memory = '256MiB'\nready = { ssh = false, cloud_init = false }\n";
    fs::write(host.file("vmkit.toml"), file).unwrap();
    // Its QEMU does not run, but the VM is made.
    assert_eq!(host.vmkit(["up"]).code, Some(2));
    let set = ["set", "shop-db", "--memory", "1GiB"];
    let said = ["`memory`: ", "vmkit.toml:7:10", "write `memory = …` here, then `vmkit up db`"];
    refused(&host, &set, &said);
    refused(&host, &["set", "shop-db", "--cpus", "2"], &["`cpus`: ", "vmkit.toml:4:10"]);
    fs::write(host.file("vmkit.toml"), "no file of machines").unwrap();
    refused(&host, &set, &["memory: ", "this VM is the machine `db` of ", "change it there"]);
    fs::write(host.file("vmkit.toml"), file.replace("machine.db", "machine.other")).unwrap();
    assert_eq!(host.must(set), "memory: 256MiB -> 1GiB, at the next start\n");
    fs::remove_file(host.file("vmkit.toml")).unwrap();
    assert_eq!(
        host.must(["set", "shop-db", "--memory", "2GiB"]),
        "memory: 1GiB -> 2GiB, at the next start\n"
    );
}
