//! A program that may create no more threads, and calls the library: each call ends soon, with an
//! error that names the limit.

use std::fs;
use std::pin::Pin;
use std::process::Command;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, Uid, geteuid, setrlimit};
use rustix::thread::set_thread_uid;
use tokio::time::timeout;
use vmkit::image::{
    Catalogue, ImageRef, ImageStore, ImportOptions, OverwritePolicy, convert, inspect, no_progress,
};
use vmkit::project::ProjectOptions;
use vmkit::spec::Arch;
use vmkit::{ErrorKind, Result};

use crate::common::{SOON, spec, web};
use crate::shop::{SHOP, Shop, runtime};

/// Set in the program of its own.
const INSIDE: &str = "VMKIT_TEST_FEW_THREADS";
/// The limit does not hold for root, who becomes this user.
const OTHER_USER: u32 = 65_432;

#[test]
fn a_program_without_a_thread_left_is_refused_by_the_name_of_the_limit() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let name =
        std::any::type_name_of_val(&a_program_without_a_thread_left_is_refused_by_the_name_of_the_limit);
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", name.split_once("::").unwrap().1, "--nocapture"]).env(INSIDE, "1");
    let output = program.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    assert!(!said.contains("panicked"), "{said}");
}

fn inside() {
    if geteuid().is_root() {
        set_thread_uid(Uid::from_raw(OTHER_USER)).unwrap();
    }
    let temp = tempfile::tempdir().unwrap();
    let shop = Shop::at(temp.path());
    let (runtime, dir, manager) = (runtime(), temp.path(), &shop.world.manager);
    let images = ImageStore::new(manager.home(), Catalogue::built_in());
    let file = dir.join("disk.raw");
    fs::write(&file, vec![7; 2 << 20]).unwrap();
    let import = |name: &str| ImportOptions {
        name: name.parse().unwrap(),
        arch: Arch::X86_64,
        user: None,
        firmware: None,
    };
    let kept = runtime.block_on(images.import(&file, import("kept"), &no_progress())).unwrap();
    runtime.block_on(manager.create(spec())).unwrap();
    runtime.block_on(manager.start(&web())).unwrap();
    let project = shop.project(SHOP);
    let image = inspect(&file).unwrap();
    let progress = no_progress();
    let url: ImageRef = "http://localhost:1/disk.raw".parse().unwrap();
    let lock = fs::File::open(manager.home().vm(&web()).join("lock")).unwrap();

    let one = Rlimit { current: Some(1), maximum: Some(1) };
    setrlimit(Resource::Nproc, one).unwrap();
    assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "the limit does not hold here");

    let to = dir.join("copy.raw");
    let calls: [(&str, Call<'_>); 6] = [
        ("import", Box::pin(async { images.import(&file, import("new"), &progress).await.map(drop) })),
        ("rehash", Box::pin(async { images.rehash(&kept.id, &progress).await.map(drop) })),
        (
            "convert",
            Box::pin(async { convert(&image, &to, OverwritePolicy::Stays, &progress).await.map(drop) }),
        ),
        ("pull", Box::pin(async { images.pull(&url, Arch::X86_64, &progress).await.map(drop) })),
        ("plan", Box::pin(async { shop.engine.plan(&project, &ProjectOptions::default()).await.map(drop) })),
        ("lock", Box::pin(async { manager.stop(&web(), SOON).await.map(drop) })),
    ];
    for (what, call) in calls {
        // Only the last one finds the lock held.
        if what == "lock" {
            flock(&lock, FlockOperation::LockExclusive).unwrap();
        }
        let ended =
            runtime.block_on(async { timeout(SOON, call).await }).unwrap_or_else(|_| panic!("{what} hangs"));
        let error = ended.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Host, "{what}: {error}");
        let said = error.to_string();
        assert!(said.contains("RLIMIT_NPROC, `ulimit -u`, allows this user 1 "), "{what}: {said}");
        assert!(!to.exists() && !dir.join("copy.raw.unfinished").exists(), "{what} leaves nothing");
    }
}

/// A call of the library.
type Call<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;
