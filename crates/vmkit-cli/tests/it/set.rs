//! `vmkit set`, as far as nothing has to run for it: what changes, what is refused, and what is
//! told.

use std::fs;

use crate::support::{Host, Transcript};
use serde_json::{Value, json};

fn host() -> Host {
    let host = Host::with_refusing_qemu();
    host.must(["create", "web", "--image", "base.img", "--accel", "tcg", "--forward", "28080:80"]);
    host
}

fn info(host: &Host, name: &str) -> Value {
    serde_json::from_str(&host.must(["info", name, "--json"])).unwrap()
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
    assert_eq!(again.stderr, "web: unchanged\n");
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
fn a_dry_run_prints_the_same_and_changes_nothing() {
    let host = host();
    let before = host.snapshot();
    assert_eq!(host.must(["set", "web", "--cpus", "2", "--dry-run"]), "cpus: 1 -> 2, at the next start\n");
    let told = host.must(["set", "web", "--cpus", "2", "--dry-run", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["vm"]["cpus"], &told["changes"][0]["to"]), (&json!(1), &json!("2")));
    let mut transcript = Transcript::of(&host);
    transcript.refused(&["set", "web", "--machine", "virt", "--firmware", "uefi", "--dry-run"]);
    assert!(transcript.text().contains("error: machine: "), "{}", transcript.text());
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
    host.create("bare");
    // Its disk is as large as its image, and nothing that would be found at the next start only is
    // written down.
    host.must(["create", "small", "--image", "base.img", "--accel", "tcg"]);
    let mut transcript = Transcript::of(&host);
    for line in [
        "set web --disk 32MiB",
        "set web --firmware uefi",
        "set web --machine virt --firmware uefi",
        "set web --machine microvm",
        "set web --initrd base.img",
        "set web --network none --restrict true",
        "set web --network tap:no-such-br",
        "set web --kernel base.img",
        "set web --cpus 0",
        "set web",
        "set bare --disk 1GiB",
        "set small --disk 1MiB",
    ] {
        transcript.refused(&line.split(' ').collect::<Vec<_>>());
    }
    transcript.run(&["set", "nobody", "--cpus", "2"]);
    insta::assert_snapshot!(transcript.text());
    // Whether root or another user is refused, and why, differs.
    Transcript::of(&host).refused(&["set", "web", "--run-as", "vmkit-no-such-user"]);
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
    let mut transcript = Transcript::of(&host);
    transcript.refused(&set);
    transcript.refused(&["set", "shop-db", "--cpus", "2"]);
    fs::write(host.file("vmkit.toml"), "no file of machines").unwrap();
    transcript.refused(&set);
    fs::write(host.file("vmkit.toml"), file.replace("machine.db", "machine.other")).unwrap();
    transcript.run(&set);
    fs::remove_file(host.file("vmkit.toml")).unwrap();
    transcript.run(&["set", "shop-db", "--memory", "2GiB"]);
    insta::assert_snapshot!(transcript.text());
}
