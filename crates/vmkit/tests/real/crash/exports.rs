//! Exports and imports, interrupted at every step: a VM is there whole, or not at all, and so is
//! its file.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use vmkit::abilities::MemoryMode;
use vmkit::image::no_progress;
use vmkit::spec::SnapshotName;
use vmkit::{HostFilePolicy, Result, VmExportOptions, VmImportOptions};

use super::{CrashedLife, World, fail_at_every_step_of, kill_at_every_step_of, runtime, web};

/// The operations on exports, and `exported`, which puts the file of one in its place.
pub(super) const WORDS: [&str; 3] = ["export", "import", "exported"];

const LIVES: [CrashedLife; 2] =
    [("export", &["create"], &["prepared"]), ("import", &["exported"], &["", "failed", "prepared"])];

#[test]
fn a_kill_at_any_step_of_an_export_or_an_import_leaves_it_whole_or_nothing() {
    kill_at_every_step_of(&LIVES, false);
}

#[test]
fn a_fault_at_any_step_of_an_export_or_an_import_leaves_it_whole_or_nothing() {
    fail_at_every_step_of(&LIVES);
}

/// Returns the bytes of an export with a snapshot, which is made once.
fn exported() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let make = || {
            let temp = tempfile::tempdir().unwrap();
            let world = World::prepared(temp.path(), &["create"]);
            let snapshot = SnapshotName::new("one").unwrap();
            runtime().block_on(async {
                world.manager.create_snapshot(&web(), &snapshot, MemoryMode::Include).await.unwrap();
                world.operate_on_exports("export").await.unwrap();
            });
            let bytes = fs::read(world.export_file()).unwrap();
            world.assert_removable("after an export");
            bytes
        };
        // Its runtime can't be within another one, nor its steps counted.
        std::thread::spawn(make).join().unwrap()
    })
}

impl World {
    fn export_file(&self) -> PathBuf {
        self.dir.join("web.vmkit")
    }

    pub(super) async fn operate_on_exports(&self, word: &str) -> Result<()> {
        let (file, progress) = (self.export_file(), no_progress());
        match word {
            "export" => {
                let options = VmExportOptions::default();
                self.manager.export(&web(), &file, &options, &progress).await.map(drop)
            }
            "import" => {
                let options = VmImportOptions::default().with_host_files(HostFilePolicy::Accept);
                self.manager.import(&file, &options, &progress).await?;
                let all = self.manager.snapshots(&web()).await?;
                assert_eq!(all.len(), 1, "{all:?}");
                Ok(())
            }
            "exported" => {
                fs::write(&file, exported()).unwrap();
                Ok(())
            }
            _ => panic!("no operation `{word}`"),
        }
    }

    /// Checks what an export or an import, tried again, has left: no unfinished file, and no image
    /// that nothing needs.
    pub(super) fn assert_export_tidy(&self, place: &str) {
        let unfinished = self.export_file().with_added_extension("unfinished");
        assert!(!unfinished.exists(), "{place}");
        let downloads = self.home.join("images/downloads");
        let left: Vec<_> = fs::read_dir(&downloads).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{place}: {left:?}");
    }
}
