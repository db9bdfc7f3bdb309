//! `vmkit export` and `import`, over real disks.

use std::fs;

use crate::harness::Life;

#[test]
fn a_vm_is_exported_and_imported_with_its_exit_codes_and_hints() {
    let life = Life::new();
    life.make("web", "");
    let file = life.home().join("web.vmkit");
    let path = file.to_str().unwrap();
    life.must(["snapshot", "create", "web", "clean"]);
    let written = life.must(["export", "web", path, "--json"]);
    let written: serde_json::Value = serde_json::from_str(&written).unwrap();
    let bytes = fs::metadata(&file).unwrap().len();
    assert_eq!((&written["path"], &written["bytes"]), (&path.into(), &bytes.into()), "{written}");

    let again = life.vmkit(["export", "web", path]);
    assert!(again.code == Some(2) && again.stderr.contains("hint: --force replaces it"), "{again:?}");
    life.must(["export", "--force", "--disk-only", "web", path]);
    let unknown = life.vmkit(["export", "none", path, "--force"]);
    assert_eq!(unknown.code, Some(3), "{unknown:?}");
    let terminal = life.vmkit(["export", "web", "-", "--json"]);
    assert!(
        terminal.code == Some(2) && terminal.stderr.contains("both be on standard output"),
        "{terminal:?}"
    );

    let taken = life.vmkit(["import", path, "--host-files"]);
    assert!(taken.code == Some(2) && taken.stderr.contains("already exists"), "{taken:?}");
    life.must(["rm", "web"]);
    let refused = life.vmkit(["import", path]);
    let hint = "hint: --host-files accepts them";
    assert!(refused.code == Some(2) && refused.stderr.contains(hint), "{refused:?}");
    let imported = life.must(["import", path, "--host-files", "--name", "db", "--json"]);
    let imported: serde_json::Value = serde_json::from_str(&imported).unwrap();
    assert_eq!((&imported["name"], &imported["state"]), (&"db".into(), &"prepared".into()), "{imported}");
    assert!(life.must(["snapshot", "ls", "db"]).contains("clean"));
    life.must(["start", "db"]);
    let runs = life.vmkit(["export", "db", path, "--force"]);
    assert!(runs.code == Some(4) && runs.stderr.contains("stop it, or save it to disk"), "{runs:?}");
    life.must(["rm", "--force", "db"]);

    let whole = fs::read(&file).unwrap();
    for (bytes, why) in [
        (&whole[..whole.len() / 2], "it is truncated"),
        (b"\x1f\x8b\x08 a tarball that gzip made", "truncated"),
        (&[7; 4096][..], "this is not an export of a VM"),
    ] {
        fs::write(&file, bytes).unwrap();
        let bad = life.vmkit(["import", path, "--host-files"]);
        assert!(bad.code == Some(2) && bad.stderr.contains(why) && bad.stderr.contains(path), "{bad:?}");
        assert!(!life.home().join("vms/web").exists());
    }
    let missing = life.vmkit(["import", "/no/such.vmkit"]);
    assert!(missing.code == Some(2) && missing.stderr.contains("there is no such file"), "{missing:?}");
}
