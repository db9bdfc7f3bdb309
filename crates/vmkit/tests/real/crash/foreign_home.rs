//! A kill at a step in the home of another user, and root comes next: everything that writes is
//! refused by name, nothing is changed, and the owner goes on.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_gid, set_thread_uid};
use vmkit::{Error, ErrorKind};
use vmkit_testkit::crash::{self, StepSample};

use super::{LIVES, World, runtime};

/// Before how many steps each operation is killed: all would take half a minute more.
const KILLS: usize = 6;
/// The owner of the homes.
const OWNER: u32 = 65_431;
/// What the owner needs and may not reach elsewhere: the keeper.
const TOOLS: &str = "tools";

/// Returns the keeper for the homes in a directory.
pub(super) fn keeper(dir: &Path) -> PathBuf {
    let own = dir.join(TOOLS).join("vmkit-keeper");
    if own.exists() { own } else { env!("CARGO_BIN_EXE_vmkit-keeper").into() }
}

/// Changes this thread, and those that it creates, to the user who owns the directory.
pub(super) fn become_owner(dir: &Path) {
    let owner = dir.metadata().unwrap();
    if owner.uid() != geteuid().as_raw() {
        set_thread_gid(Gid::from_raw(owner.gid())).unwrap();
        set_thread_uid(Uid::from_raw(owner.uid())).unwrap();
    }
}

/// Does something as the owner of the directory.
fn as_owner<T: Send>(dir: &Path, work: impl FnOnce() -> T + Send) -> T {
    let run = || {
        become_owner(dir);
        work()
    };
    let done = thread::scope(|scope| scope.spawn(run).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn root_who_comes_after_a_kill_in_a_users_home_is_refused_and_the_owner_goes_on() {
    if !geteuid().is_root() {
        return eprintln!("SKIP: only root can enter another user's home");
    }
    let tools = tools();
    let mut sample = StepSample::new();
    for (word, before, allowed) in LIVES {
        let prepare = |dir: &Path| {
            chown(dir, Some(OWNER), Some(OWNER)).unwrap();
            symlink(tools.path(), dir.join(TOOLS)).unwrap();
            as_owner(dir, || drop(World::prepared(dir, before)));
        };
        let check = |dir: &Path, place: &str| {
            refuses_root(&World::at(dir), word, allowed, place);
            as_owner(dir, || {
                let world = World::at(dir);
                let state = world.listed();
                assert!(allowed.contains(&state), "{place}: {state}");
                world.go_on(word, state, place);
                world.assert_removable(place);
            });
        };
        let test = "crash::a_whole_life_leaves_nothing";
        crash::kill_at_some_steps(&mut sample, KILLS, test, word, prepare, check);
    }
}

/// Lists the VM as root, and tries the operation.
fn refuses_root(world: &World, word: &str, allowed: &[&str], place: &str) {
    if !world.home.join("vms").exists() {
        // It was killed before there was a home to refuse.
        return;
    }
    world.settles();
    let (files, qemus) = (world.files(), world.qemus());
    let state = world.listed();
    assert!(allowed.contains(&state), "{place}: {state}, as root sees it");
    match runtime().block_on(world.operate(word)) {
        Err(Error::OtherUser { path, .. }) => assert!(path.starts_with(&world.home), "{place}: {path:?}"),
        Err(error) => {
            let is_there = world.home.join("vms/web").exists();
            assert!(error.kind() == ErrorKind::NotFound && !is_there, "{place}: root's {word}: {error:?}");
        }
        Ok(()) => panic!("{place}: root's {word} in another user's home"),
    }
    world.assert_untouched(&files, qemus, place);
    let strangers: Vec<_> = world.files().into_iter().filter(|(_, file)| file.0 != OWNER).collect();
    assert!(strangers.is_empty(), "{place}: {strangers:?}");
}

/// Copies what the owner needs to where any user can read it.
fn tools() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let keeper = dir.path().join("vmkit-keeper");
    fs::copy(env!("CARGO_BIN_EXE_vmkit-keeper"), &keeper).unwrap();
    for path in [dir.path(), &keeper] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}
