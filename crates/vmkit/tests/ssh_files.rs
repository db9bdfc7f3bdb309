//! Files copied both ways, with OpenSSH's real server on loopback.
#![cfg(feature = "ssh")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and tells its figures")]

mod sshd;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant as Clock;

use rustix::process::Signal;
use vmkit::ssh::{Copied, Files, Progress, Session};
use vmkit::{Error, ErrorKind};

use sshd::{Sshd, soon};

struct Both {
    sshd: Sshd,
    _session: Session,
    files: Files,
    dir: tempfile::TempDir,
}

impl Both {
    async fn new() -> Self {
        let sshd = Sshd::new();
        let session = sshd.session().await;
        let files = session.files("web", soon()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        for end in ["here", "there"] {
            fs::create_dir(dir.path().join(end)).unwrap();
        }
        Self { sshd, _session: session, files, dir }
    }

    fn here(&self, name: &str) -> PathBuf {
        self.dir.path().join("here").join(name)
    }

    fn there(&self, name: &str) -> PathBuf {
        self.dir.path().join("there").join(name)
    }

    async fn upload(&self, from: &Path, to: &Path) -> vmkit::Result<Copied> {
        self.files.upload(from, to.to_str().unwrap(), true, &mut |_| {}).await
    }

    async fn download(&self, from: &Path, to: &Path) -> vmkit::Result<Copied> {
        self.files.download(from.to_str().unwrap(), to, true, &mut |_| {}).await
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_goes_both_ways_with_its_mode_and_replaces_what_is_there() {
    let both = Both::new().await;
    fs::write(both.here("a file"), "hello").unwrap();
    fs::set_permissions(both.here("a file"), fs::Permissions::from_mode(0o750)).unwrap();
    both.upload(&both.here("a file"), &both.there("copy")).await.unwrap();
    assert_eq!(fs::read(both.there("copy")).unwrap(), b"hello");
    assert_eq!(mode(&both.there("copy")), 0o750);

    fs::write(both.there("copy"), "hello again").unwrap();
    fs::set_permissions(both.there("copy"), fs::Permissions::from_mode(0o4755)).unwrap();
    let copied = both.download(&both.there("copy"), &both.here("a file")).await.unwrap();
    assert_eq!((copied.files, copied.bytes), (1, 11));
    assert_eq!(fs::read(both.here("a file")).unwrap(), b"hello again");
    assert_eq!(mode(&both.here("a file")), 0o755, "no set-user-ID comes from a guest");
    both.upload(&both.here("a file"), &both.dir.path().join("there")).await.unwrap();
    both.upload(&both.here("a file"), &both.there("copy")).await.unwrap();
    assert_eq!(names(&both.dir.path().join("there")), ["a file", "copy"], "nothing else is left");
}

#[tokio::test]
async fn a_hundred_megabytes_are_the_same_at_both_ends() {
    let both = Both::new().await;
    let data: Vec<u8> =
        (0..100 << 18).flat_map(|word: u32| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(both.here("big"), &data).unwrap();
    let mut seen = Vec::new();
    let mut report = |progress: &Progress| seen.push(progress.file_bytes);
    let began = Clock::now();
    let to = both.there("big");
    both.files.upload(&both.here("big"), to.to_str().unwrap(), false, &mut report).await.unwrap();
    let up = began.elapsed();
    assert!(seen.len() > 100 && seen.is_sorted() && seen.last() == Some(&(data.len() as u64)));
    assert!(fs::read(&to).unwrap() == data);
    let began = Clock::now();
    both.download(&to, &both.here("back")).await.unwrap();
    eprintln!("100 MiB: {up:?} into the guest, {:?} out of it", began.elapsed());
    assert!(fs::read(both.here("back")).unwrap() == data);
}

#[tokio::test]
async fn holes_stay_holes_both_ways() {
    let both = Both::new().await;
    let file = fs::File::create(both.here("sparse")).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"middle", 40 << 20).unwrap();
    file.set_len(100 << 20).unwrap();
    both.upload(&both.here("sparse"), &both.there("sparse")).await.unwrap();
    both.download(&both.there("sparse"), &both.here("back")).await.unwrap();
    let original = fs::read(both.here("sparse")).unwrap();
    for path in [both.there("sparse"), both.here("back")] {
        assert!(fs::read(&path).unwrap() == original);
        let on_disk = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(on_disk < 1 << 20, "{} has {on_disk} bytes on the disk", path.display());
    }
}

#[tokio::test]
async fn a_tree_goes_both_ways_with_links_and_empty_directories() {
    let both = Both::new().await;
    fs::create_dir_all(both.here("tree/sub/empty")).unwrap();
    fs::write(both.here("tree/one"), "1").unwrap();
    fs::write(both.here("tree/sub/two"), "").unwrap();
    symlink("../one", both.here("tree/sub/link")).unwrap();
    symlink("/no/such/file", both.here("tree/dangling")).unwrap();
    let fifo = both.here("tree/pipe");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());

    let copied = both.upload(&both.here("tree"), &both.there("tree")).await.unwrap();
    assert_eq!((copied.files, copied.skipped.len()), (4, 1), "{copied:?}");
    assert_eq!(names(&both.there("tree")), ["dangling", "one", "sub"]);
    assert_eq!(names(&both.there("tree/sub")), ["empty", "link", "two"]);
    assert_eq!(fs::read_link(both.there("tree/sub/link")).unwrap(), Path::new("../one"));

    // Into a directory that is there it goes under its own name, and twice is as good as once.
    for _ in 0..2 {
        both.download(&both.there("tree"), &both.here("")).await.unwrap();
        both.download(&both.there("tree"), &both.here("again"))
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        fs::rename(both.here("again"), both.here("again-before"))
            .or_else(|_| fs::remove_dir_all(both.here("again")))
            .unwrap();
    }
    assert_eq!(names(&both.here("again-before/sub")), ["empty", "link", "two"]);
    assert_eq!(fs::read_link(both.here("again-before/dangling")).unwrap(), Path::new("/no/such/file"));
    assert_eq!(fs::read(both.here("again-before/one")).unwrap(), b"1");
}

#[tokio::test]
async fn nothing_is_written_through_a_link_that_lies_in_the_way() {
    let both = Both::new().await;
    let outside = both.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "safe").unwrap();
    fs::create_dir_all(both.there("tree/sub")).unwrap();
    fs::write(both.there("tree/sub/new"), "x").unwrap();
    fs::write(both.there("tree/victim"), "overwritten").unwrap();
    // As an earlier copy of a hostile tree could have left it.
    fs::create_dir_all(both.here("tree")).unwrap();
    symlink(&outside, both.here("tree/sub")).unwrap();
    symlink(outside.join("victim"), both.here("tree/victim")).unwrap();
    let error = both.download(&both.there("tree"), &both.here("")).await.unwrap_err();
    assert!(error.to_string().contains("tree/sub"), "{error}");
    assert_eq!(names(&outside), ["victim"]);
    assert_eq!(fs::read(outside.join("victim")).unwrap(), b"safe");
}

#[tokio::test]
async fn every_refusal_names_both_ends_and_what_was_wrong() {
    let both = Both::new().await;
    fs::write(both.here("file"), "x").unwrap();
    fs::create_dir(both.here("dir")).unwrap();
    let refusal = |result: vmkit::Result<Copied>| match result.unwrap_err() {
        error @ Error::Copy { .. } => (error.kind(), error.to_string()),
        error => panic!("{error:?}"),
    };
    let missing = both.download(&both.there("nothing"), &both.here("to")).await;
    let (kind, text) = refusal(missing);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains(&format!("web:{}", both.there("nothing").display())), "{text}");
    let (kind, text) = refusal(both.upload(&both.here("nothing"), &both.there("to")).await);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("on this host"), "{text}");
    let (kind, text) = refusal(both.upload(&both.here("file"), Path::new("/no/such/dir/file")).await);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("/no/such/dir/file") && text.contains("in the guest"), "{text}");
    let to = both.there("");
    let flat = both.files.upload(&both.here("dir"), to.to_str().unwrap(), false, &mut |_| {}).await;
    assert!(refusal(flat).1.contains("copied only recursively"));
    let (_, text) = refusal(both.upload(&both.here("file"), Path::new("/dev/null")).await);
    assert!(text.contains("not a regular file"), "{text}");
    let (_, text) = refusal(both.download(Path::new("/dev/null"), &both.here("to")).await);
    assert!(text.contains("not a regular file"), "{text}");
    for no_dir in [both.here("new/"), both.here("new/.")] {
        let (kind, text) = refusal(both.download(Path::new("/etc/passwd"), &no_dir).await);
        assert_eq!(kind, ErrorKind::NotFound, "{text}");
        assert!(text.contains("no such directory on this host"), "{text}");
    }
    let (_, text) = refusal(both.upload(Path::new("/dev/null"), &both.there("to")).await);
    assert!(text.contains("not a regular file"), "{text}");
    let (kind, text) = refusal(both.download(Path::new("/etc/passwd"), Path::new("/no/such/dir/file")).await);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("/no/such/dir") && text.contains("on this host"), "{text}");
    assert_eq!(names(&both.here("")), ["dir", "file"]);
}

#[tokio::test]
async fn a_file_whose_length_is_not_known_beforehand_comes_whole() {
    let both = Both::new().await;
    both.download(Path::new("/proc/self/status"), &both.here("status")).await.unwrap();
    assert!(fs::read_to_string(both.here("status")).unwrap().contains("VmRSS"));
}

#[tokio::test]
async fn a_server_that_dies_midway_leaves_nothing_under_the_names() {
    let both = Both::new().await;
    fs::write(both.here("big"), vec![7; 64 << 20]).unwrap();
    fs::write(both.there("big"), vec![7; 64 << 20]).unwrap();
    let (from, to) = (both.there("big"), both.here("copy"));
    let mut kill = |progress: &Progress| {
        if progress.file_bytes > 1 << 20 {
            both.sshd.signal(Signal::KILL);
        }
    };
    let error = both.files.download(from.to_str().unwrap(), &to, false, &mut kill).await.unwrap_err();
    assert!(matches!(error, Error::Copy { .. }) && error.kind() == ErrorKind::Guest, "{error:?}");
    assert_eq!(names(&both.here("")), ["big"]);
}

#[tokio::test]
async fn what_a_dropped_upload_has_begun_can_be_tidied_up() {
    let both = Both::new().await;
    fs::write(both.here("big"), vec![7; 64 << 20]).unwrap();
    let to = both.there("copy");
    let (begun, mut told) = tokio::sync::mpsc::unbounded_channel();
    let mut report = move |progress: &Progress| {
        if progress.file_bytes > 0 {
            let _ = begun.send(());
        }
    };
    let (from, place) = (both.here("big"), to.to_str().unwrap().to_owned());
    tokio::select! {
        copied = both.files.upload(&from, &place, false, &mut report) => panic!("{copied:?}"),
        _ = told.recv() => {}
    }
    assert!(!to.exists() && names(&both.there("")).len() == 1);
    both.files.tidy_up().await;
    assert_eq!(names(&both.there("")), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_without_sftp_says_what_to_install() {
    let sshd = Sshd::with("Match all\n  ForceCommand /bin/false");
    let session = sshd.session().await;
    let error = session.files("web", soon()).await.unwrap_err();
    assert!(error.to_string().contains("SFTP"), "{error}");
}

#[tokio::test]
async fn a_name_that_is_not_utf_8_is_told_once_all_else_was_copied() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let both = Both::new().await;
    for dir in [both.there("d"), both.here("d")] {
        fs::create_dir_all(dir.join("sub")).unwrap();
        for name in [&b"caf\xe9"[..], b"caf\xc3\xa9", b"z\xef\xbf\xbd", b"sub/last"] {
            fs::write(dir.join(OsStr::from_bytes(name)), "x").unwrap();
        }
        symlink(OsStr::from_bytes(b"caf\xe9"), dir.join("link")).unwrap();
    }
    let (down, up) = (both.here("out"), both.there("in"));
    let refusals = [both.download(&both.there("d"), &down).await, both.upload(&both.here("d"), &up).await];
    for (refused, to) in refusals.into_iter().zip([down, up]) {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let said = error.to_string();
        // Whichever the directory has first.
        assert!(
            ["/d/caf\u{fffd} (and 1 more)", "/d/link leads to (and 1 more)"]
                .iter()
                .any(|it| said.contains(it)),
            "{said}"
        );
        assert!(
            said.ends_with("is not UTF-8, which a name needs to be copied over SFTP; all else was copied"),
            "{said}"
        );
        assert_eq!(names(&to), ["café", "sub", "z\u{fffd}"]);
        assert_eq!(names(&to.join("sub")), ["last"]);
    }
}

#[tokio::test]
async fn what_a_killed_copy_left_is_removed_by_the_next_one_into_its_directory() {
    let both = Both::new().await;
    fs::write(both.here("f"), "x").unwrap();
    let (old, young) = (both.there(".big.vmkit-0123abcd"), both.there(".other.vmkit-0123abcd"));
    let (dir, theirs) = (both.there(".d.vmkit-0123abcd"), both.there(".big.vmkit-theirs"));
    fs::create_dir(&dir).unwrap();
    for file in [&old, &young, &theirs] {
        fs::write(file, "half").unwrap();
    }
    let ago = std::time::SystemTime::now() - std::time::Duration::from_secs(600);
    for file in [&old, &theirs] {
        fs::File::options().write(true).open(file).unwrap().set_modified(ago).unwrap();
    }
    both.upload(&both.here("f"), &both.there("f")).await.unwrap();
    assert_eq!(
        names(&both.dir.path().join("there")),
        [".big.vmkit-theirs", ".d.vmkit-0123abcd", ".other.vmkit-0123abcd", "f"]
    );
}
