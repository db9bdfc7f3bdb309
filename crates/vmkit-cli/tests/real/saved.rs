//! A guest that is saved to disk, by the command.

use crate::harness::Life;

#[test]
fn a_saved_guest_continues_unless_its_memory_is_discarded() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    life.must(["suspend", "--to-disk", "web"]);
    assert_eq!(life.state("web"), "saved");
    let refused = life.vmkit(["suspend", "web"]);
    let expected = "error: web: cannot suspend a VM that is saved: its memory is on disk already\n\
                    hint: `vmkit start web` continues it\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (Some(4), expected), "{refused:?}");
    let refused = life.vmkit(["ip", "web"]);
    assert!(refused.stderr.contains("hint: `vmkit start web` continues it"), "{refused:?}");
    let changed = life.vmkit(["set", "web", "--cpus", "2"]);
    assert!(changed.stderr.contains("the change waits until the saved guest boots again"), "{changed:?}");
    let plan = life.must(["start", "--dry-run", "web"]);
    assert!(plan.contains("continue the guest saved in") && plan.contains("1,sockets=1"), "{plan}");

    life.must(["start", "--all"]);
    assert_eq!(life.state("web"), "running");
    let printed = life.must(["logs", "web"]);
    assert_eq!(printed.matches("vmkit-guest: ready").count(), 1, "it did not boot again: {printed}");

    life.must(["suspend", "--to-disk", "web"]);
    let info: serde_json::Value = serde_json::from_str(&life.must(["info", "--json", "web"])).unwrap();
    let mib = info["saved_mib"].as_u64().unwrap();
    assert!((1..=512).contains(&mib), "{info}");
    let shown = life.must(["info", "web"]);
    assert!(shown.lines().any(|line| line.ends_with(&format!(" {mib} MiB on disk"))), "{shown}");
    let memory = life.home().join("vms/web/memory");
    std::fs::File::options().write(true).open(&memory).unwrap().set_len(4096).unwrap();
    let refused = life.vmkit(["start", "web"]);
    let (start, end) = (
        "error: web: cannot continue the saved guest (expected its memory, disks and host as they were)\n  \
         caused by: ",
        "\nhint: `vmkit start --discard-saved web` boots it without its memory\n",
    );
    assert!(refused.code == Some(2) && refused.stderr.starts_with(start), "{refused:?}");
    assert!(refused.stderr.ends_with(end), "{refused:?}");
    life.must(["start", "--discard-saved", "web"]);
    life.says("web", "vmkit-guest: ready");
    let plan = life.must(["info", "--json", "web"]);
    assert!(plan.contains("\"cpus\": 2") || plan.contains("\"cpus\":2"), "the change applies: {plan}");
    life.must(["suspend", "--to-disk", "web"]);
    life.must(["rm", "web"]);
    assert_eq!(life.must(["ls", "--json"]), "[]\n");
}
