//! `vmkit clone` and `vmkit fork`, over real guests.

use crate::harness::Life;

fn in_guest(life: &Life, vm: &str, script: &str) -> String {
    life.must(["exec", "-n", "--via", "agent", vm, "--", "/bin/sh", "-c", script])
}

#[test]
fn forks_go_on_where_their_source_is_and_clones_boot() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    in_guest(&life, "web", "echo here >/run/state");
    let refused = life.vmkit(["clone", "web", "copy"]);
    assert!(refused.stderr.contains("stop it first, or clone one of its snapshots"), "{refused:?}");

    let forked = life.must(["fork", "web", "--count", "2", "--json"]);
    let forked: serde_json::Value = serde_json::from_str(&forked).unwrap();
    let shown: Vec<_> = forked.as_array().unwrap().iter().map(|it| (&it["name"], &it["state"])).collect();
    let running = "running".into();
    assert_eq!(shown, [(&"web-1".into(), &running), (&"web-2".into(), &running)], "{forked}");
    for fork in ["web-1", "web-2"] {
        let found = in_guest(&life, fork, "cat /run/state /proc/sys/kernel/hostname");
        assert_eq!(found, format!("here\n{fork}\n"));
    }
    // A fork of a fork, of a snapshot that was taken for it.
    life.must(["snapshot", "create", "--for-forks", "web-2", "ready"]);
    in_guest(&life, "web-2", "echo later >/run/state");
    life.must(["fork", "web-2:ready", "third"]);
    assert_eq!(in_guest(&life, "third", "cat /run/state /proc/sys/kernel/hostname"), "here\nthird\n");
    assert_eq!(life.must(["snapshot", "ls", "--json", "web"]), "[]\n");

    life.must(["snapshot", "create", "web", "plain"]);
    for (args, code, why) in [
        (&["fork", "web:plain", "no"][..], 2, "it was not taken for copies that continue"),
        (&["fork", "web:other", "no"], 3, "snapshot `other` does not exist"),
        (&["fork", "web", "no", "third"], 2, "VM `third` already exists"),
        (&["fork", "web", "no", "nor", "--count", "2"], 2, "one name at most"),
        (&["fork", "web", "No"], 2, "a name has only a-z, 0-9 and -"),
        (&["fork", "gone", "no"], 3, "`gone` does not exist"),
        (&["clone", "web:plain:x", "no"], 2, "a name has only"),
        (&["launch", "--from", "web", "debian:12"], 2, "cannot be used with"),
        (&["launch", "--from", "web", "--memory", "1GiB"], 2, "cannot be used with"),
        (&["launch", "--from", "web:other", "--name", "no"], 3, "snapshot `other` does not exist"),
        (&["launch", "--name", "no"], 2, "IMAGE"),
        (&["clone", "web:plain", "third"], 2, "VM `third` already exists"),
    ] {
        let refused = life.vmkit(args.iter().copied());
        assert!(refused.code == Some(code) && refused.stderr.contains(why), "{args:?}: {refused:?}");
    }
    assert!(!life.home().join("vms/no").exists());
    life.must(["fork", "--allow-shared-identity", "web:plain", "shared"]);
    assert_eq!(in_guest(&life, "shared", "cat /proc/sys/kernel/hostname"), "shared\n");

    assert_eq!(life.must(["launch", "--from", "web-2:ready"]), "web-2-1\n");
    assert_eq!(in_guest(&life, "web-2-1", "cat /run/state /proc/sys/kernel/hostname"), "here\nweb-2-1\n");

    life.must(["stop", "--timeout", "0", "web"]);
    assert_eq!(life.must(["launch", "--from", "web", "--name", "booted", "--no-wait"]), "booted\n");
    assert_eq!(life.state("booted"), "running");
    let refused = life.vmkit(["fork", "web", "no"]);
    assert!(refused.stderr.contains("stopped"), "{refused:?}");
    life.must(["clone", "web", "copy"]);
    assert_eq!(life.state("copy"), "prepared");
    life.must(["clone", "web:plain", "started", "--full", "--start"]);
    assert_eq!(life.state("started"), "running");
    for vm in ["web", "web-1", "web-2", "web-2-1", "third", "shared", "copy", "started", "booted"] {
        life.must(["rm", "--force", vm]);
        assert!(!life.home().join("vms").join(vm).exists());
    }
}
