//! `vmkit snapshot`, over a real guest.

use crate::harness::Life;

#[test]
fn a_vm_goes_back_to_a_snapshot_and_a_schedule_keeps_the_newest() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    life.must(["exec", "-n", "--via", "agent", "web", "--", "/bin/sh", "-c", "echo before >/run/state"]);
    let taken = life.must(["snapshot", "create", "--json", "web", "before"]);
    let taken: serde_json::Value = serde_json::from_str(&taken).unwrap();
    assert_eq!((&taken["name"], &taken["kind"]), (&"before".into(), &"memory".into()), "{taken}");
    life.must(["exec", "-n", "--via", "agent", "web", "--", "/bin/sh", "-c", "echo after >/run/state"]);

    let asks = life.vmkit(["snapshot", "restore", "web", "before"]);
    assert!(asks.code == Some(2) && asks.stderr.contains("pass --yes"), "{asks:?}");
    let unknown = life.vmkit(["snapshot", "restore", "--yes", "web", "other"]);
    let hint =
        "error: web: snapshot `other` does not exist\nhint: `vmkit snapshot ls web` lists its snapshots\n";
    assert_eq!((unknown.code, unknown.stderr.as_str()), (Some(3), hint), "{unknown:?}");
    let again = life.vmkit(["snapshot", "create", "web", "before"]);
    assert!(again.code == Some(2) && again.stderr.contains("snapshot `before`"), "{again:?}");
    let bad = life.vmkit(["snapshot", "create", "web", "Not_a_name"]);
    assert!(bad.code == Some(2) && bad.stderr.contains("a name has only a-z, 0-9 and -"), "{bad:?}");

    life.must(["snapshot", "restore", "web", "before", "--snapshot-first", "after"]);
    assert_eq!(life.state("web"), "running");
    assert_eq!(life.must(["exec", "-n", "--via", "agent", "web", "--", "cat", "/run/state"]), "before\n");
    life.must(["snapshot", "restore", "--yes", "--no-start", "web", "after"]);
    assert_eq!(life.state("web"), "saved");
    life.must(["start", "web"]);
    assert_eq!(life.must(["exec", "-n", "--via", "agent", "web", "--", "cat", "/run/state"]), "after\n");

    life.must(["stop", "--timeout", "0", "web"]);
    for _ in 0..3 {
        life.must(["snapshot", "create", "web", "--keep", "2"]);
    }
    let none = life.must(["snapshot", "create", "web", "--if-older-than", "1h", "--json"]);
    assert_eq!(none.trim(), "null");
    let all: serde_json::Value =
        serde_json::from_str(&life.must(["snapshot", "ls", "--json", "web"])).unwrap();
    let names: Vec<_> = all.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["before", "after", "auto-2", "auto-3"]);
    let info = life.must(["snapshot", "info", "web", "after"]);
    assert!(info.contains("the disks and the memory of a running guest"), "{info}");
    life.must(["snapshot", "rm", "web", "before", "after", "auto-2", "auto-3"]);
    assert_eq!(life.must(["snapshot", "ls", "--json", "web"]), "[]\n");
    life.must(["rm", "web"]);
    assert!(!life.home().join("vms/web").exists());
}
