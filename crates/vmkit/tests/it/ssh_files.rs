//! File copies in both directions, with OpenSSH's real server on loopback.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant as Clock;

use rustix::process::Signal;
use vmkit::ssh::{CopyProgress, CopySummary, GuestFiles, Session};
use vmkit::{Error, ErrorKind};

use crate::sshd::{Sshd, soon};

struct Both {
    sshd: Sshd,
    _session: Session,
    files: GuestFiles,
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

    async fn upload(&self, from: &Path, to: &Path) -> vmkit::Result<CopySummary> {
        self.files.upload(from, to.to_str().unwrap(), true, &mut |_| {}).await
    }

    async fn download(&self, from: &Path, to: &Path) -> vmkit::Result<CopySummary> {
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
    let mut report = |progress: &CopyProgress| seen.push(progress.file_bytes);
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

    // An existing directory gets it under its own name, also the second time.
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
async fn nothing_is_written_through_a_link_in_the_way() {
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
    let refusal = |result: vmkit::Result<CopySummary>| match result.unwrap_err() {
        error @ (Error::Copy { .. } | Error::NotRecursive { .. }) => (error.kind(), error.to_string()),
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
    assert!(text.contains("expected a regular file"), "{text}");
    let (_, text) = refusal(both.download(Path::new("/dev/null"), &both.here("to")).await);
    assert!(text.contains("expected a regular file"), "{text}");
    for no_dir in [both.here("new/"), both.here("new/.")] {
        let (kind, text) = refusal(both.download(Path::new("/etc/passwd"), &no_dir).await);
        assert_eq!(kind, ErrorKind::NotFound, "{text}");
        assert!(text.contains("no such directory on this host"), "{text}");
    }
    let (_, text) = refusal(both.upload(Path::new("/dev/null"), &both.there("to")).await);
    assert!(text.contains("expected a regular file"), "{text}");
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
    let mut kill = |progress: &CopyProgress| {
        if progress.file_bytes > 1 << 20 {
            both.sshd.signal(Signal::KILL);
        }
    };
    let error = both.files.download(from.to_str().unwrap(), &to, false, &mut kill).await.unwrap_err();
    assert!(matches!(error, Error::Copy { .. }) && error.kind() == ErrorKind::Guest, "{error:?}");
    assert_eq!(names(&both.here("")), ["big"]);
}

#[tokio::test]
async fn the_remains_of_a_dropped_upload_can_be_removed() {
    let both = Both::new().await;
    fs::write(both.here("big"), vec![7; 64 << 20]).unwrap();
    let to = both.there("copy");
    let (begun, mut told) = tokio::sync::mpsc::unbounded_channel();
    let mut report = move |progress: &CopyProgress| {
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
async fn a_server_without_sftp_is_reported_with_what_to_install() {
    let sshd = Sshd::with("Match all\n  ForceCommand /bin/false");
    let session = sshd.session().await;
    let error = session.files("web", soon()).await.unwrap_err();
    assert!(error.to_string().contains("SFTP"), "{error}");
}

#[tokio::test]
async fn a_name_that_is_not_utf_8_is_reported_once_all_else_was_copied() {
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
        // Whichever entry the directory has first.
        assert!(
            ["/d/caf\u{fffd} (and 1 more)", "/d/link leads to (and 1 more)"]
                .iter()
                .any(|it| said.contains(it)),
            "{said}"
        );
        assert!(said.ends_with("is not UTF-8, which SFTP requires; all else was copied"), "{said}");
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

/// Copies a log of one letter while it is written to.
async fn while_it_grows(path: &Path, copy: impl Future<Output = vmkit::Result<CopySummary>>) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&vec![b'x'; 4 << 20]).unwrap();
    let ends = std::sync::Arc::new(AtomicBool::new(false));
    let told = std::sync::Arc::clone(&ends);
    let writer = std::thread::spawn(move || {
        while !told.load(Ordering::Relaxed) {
            file.write_all(&[b'x'; 5000]).unwrap();
            // Slowly enough for the reader to reach the end.
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
    });
    let copied = copy.await;
    ends.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    copied.unwrap();
}

#[tokio::test]
async fn a_file_that_grows_is_copied_up_to_an_end_without_a_byte_that_it_never_had() {
    let both = Both::new().await;
    for round in 0..4 {
        let (from, to) = (both.here("log"), both.there("log"));
        while_it_grows(&from, both.upload(&from, &to)).await;
        let (from, back) = (both.there("other"), both.here("back"));
        while_it_grows(&from, both.download(&from, &back)).await;
        for copy in [to, back] {
            let copy = fs::read(copy).unwrap();
            assert!(copy.len() >= 4 << 20 && copy.iter().all(|&byte| byte == b'x'), "round {round}");
        }
    }
}

#[tokio::test]
async fn a_file_that_shrinks_while_it_is_copied_is_as_long_as_what_was_read() {
    let both = Both::new().await;
    fs::write(both.here("log"), vec![b'x'; 32 << 20]).unwrap();
    let path = both.here("log");
    let mut shrink = |progress: &CopyProgress| {
        if progress.file_bytes > 1 << 20 {
            fs::File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
        }
    };
    let to = both.there("log");
    both.files.upload(&both.here("log"), to.to_str().unwrap(), false, &mut shrink).await.unwrap();
    let copy = fs::read(to).unwrap();
    assert!(copy.len() < 32 << 20 && copy.iter().all(|&byte| byte == b'x'), "{}", copy.len());
}

#[tokio::test]
async fn the_reported_length_of_system_files_is_not_believed() {
    let both = Both::new().await;
    for name in ["/proc/version", "/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        let Ok(content) = fs::read(name) else {
            eprintln!("SKIP: no {name} here");
            continue;
        };
        both.upload(Path::new(name), &both.there("copy")).await.unwrap();
        let copy = fs::read(both.there("copy")).unwrap();
        // The clock rates in this file change.
        let is_same = if name.ends_with("cpuinfo") { copy.len() > 100 } else { copy == content };
        assert!(is_same && !copy.contains(&0), "{name}: {} bytes", copy.len());
        both.download(Path::new(name), &both.here("back")).await.unwrap();
        let copy = fs::read(both.here("back")).unwrap();
        assert!(copy.len().abs_diff(content.len()) < 100 && !copy.contains(&0), "{name}: {}", copy.len());
    }
}

#[tokio::test]
async fn a_hole_stays_one_at_the_beginning_at_the_end_and_all_over() {
    let both = Both::new().await;
    let cases: [(&str, &[u64], u64); 4] =
        [("begin", &[9 << 20], 9 << 20), ("end", &[0], 40 << 20), ("all", &[], 40 << 20), ("none", &[], 0)];
    for (name, data, size) in cases {
        let file = fs::File::create(both.here(name)).unwrap();
        file.set_len(size).unwrap();
        for offset in data {
            file.write_all_at(b"data", *offset).unwrap();
        }
        both.upload(&both.here(name), &both.there(name)).await.unwrap();
        let copied = both.download(&both.there(name), &both.here("back")).await.unwrap();
        let original = fs::read(both.here(name)).unwrap();
        assert_eq!(copied.bytes, original.len() as u64, "{name}");
        for path in [both.there(name), both.here("back")] {
            assert!(fs::read(&path).unwrap() == original, "{name}");
            assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "{name}");
        }
    }
}

#[tokio::test]
async fn what_is_a_hole_in_the_guest_is_not_sent() {
    let both = Both::new().await;
    // So many zeros would take too long.
    let size = 64 << 30;
    let file = fs::File::create(both.there("disk")).unwrap();
    for offset in [0, 5 << 30, (5 << 30) + (1 << 20)] {
        file.write_all_at(&[7; 10_000], offset).unwrap();
    }
    file.set_len(size).unwrap();
    let (mut reports, to) = (0, both.here("disk"));
    let mut report = |_: &CopyProgress| reports += 1;
    let from = both.there("disk");
    let copied = both.files.download(from.to_str().unwrap(), &to, false, &mut report).await.unwrap();
    assert!(reports < 100, "{reports} pieces");
    assert_eq!((copied.bytes, fs::metadata(&to).unwrap().len()), (size, size));
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    let copy = fs::File::open(&to).unwrap();
    for offset in [0, 5 << 30, (5 << 30) + (1 << 20)] {
        let mut read = vec![0; 10_001];
        copy.read_exact_at(&mut read, offset).unwrap();
        assert!(read[..10_000].iter().all(|&byte| byte == 7) && read[10_000] == 0, "{offset}");
    }
}

#[tokio::test]
async fn a_guest_that_runs_no_program_gives_its_files_whole() {
    let sshd = Sshd::with("ForceCommand internal-sftp");
    let session = sshd.session().await;
    let files = session.files("web", soon()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("disk"), dir.path().join("copy"));
    let file = fs::File::create(&from).unwrap();
    file.write_all_at(b"middle", 20 << 20).unwrap();
    file.set_len(30 << 20).unwrap();
    files.download(from.to_str().unwrap(), &to, false, &mut |_| {}).await.unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
}

#[tokio::test]
async fn a_link_that_was_named_keeps_its_own_name_and_what_it_leads_to_is_copied() {
    let both = Both::new().await;
    for end in [both.here(""), both.there("")] {
        fs::create_dir_all(end.join("rel/42")).unwrap();
        fs::write(end.join("rel/42/file"), "42").unwrap();
        fs::write(end.join("app-42.log"), "log").unwrap();
        symlink("rel/42", end.join("current")).unwrap();
        symlink("app-42.log", end.join("latest.log")).unwrap();
        fs::create_dir(end.join("to")).unwrap();
    }
    for name in ["current", "latest.log"] {
        both.upload(&both.here(name), &both.there("to")).await.unwrap();
        both.download(&both.there(name), &both.here("to")).await.unwrap();
    }
    for to in [both.there("to"), both.here("to")] {
        assert_eq!(names(&to), ["current", "latest.log"]);
        assert!(to.join("current").symlink_metadata().unwrap().is_dir());
        assert_eq!(fs::read(to.join("current/file")).unwrap(), b"42");
        assert!(to.join("latest.log").symlink_metadata().unwrap().is_file());
    }
}

#[tokio::test]
async fn a_directory_named_by_a_dot_gives_what_is_in_it() {
    let both = Both::new().await;
    for end in [both.here(""), both.there("")] {
        fs::create_dir_all(end.join("site/sub")).unwrap();
        fs::write(end.join("site/.hidden"), "x").unwrap();
        fs::write(end.join("site/sub/file"), "x").unwrap();
        symlink("site", end.join("link")).unwrap();
    }
    let content = [".hidden", "sub"];
    for (index, (from, expected)) in [
        ("site/.", &content[..]),
        ("site/./", &content),
        ("site//.", &content),
        ("site/sub/..", &content),
        ("link/.", &content),
        ("site", &["site"]),
        ("site//", &["site"]),
        ("link/", &["link"]),
        ("site/./sub", &["sub"]),
    ]
    .into_iter()
    .enumerate()
    {
        for (is_there, expected) in [(true, expected), (false, &content[..])] {
            if !is_there && from.ends_with("sub") {
                continue;
            }
            for into in [true, false] {
                let (end, name) =
                    (if into { both.there("") } else { both.here("") }, format!("to{index}{is_there}"));
                let to = end.join(&name);
                if is_there {
                    fs::create_dir(&to).unwrap();
                }
                let copied = match into {
                    true => both.upload(&both.here(from), &to).await,
                    false => both.download(&both.there(from), &to).await,
                };
                copied.unwrap_or_else(|error| panic!("{from}: {error}"));
                assert_eq!(names(&to), expected, "{from} to {}", to.display());
            }
        }
    }
    // Existing files stay in the merged directory.
    fs::write(both.there("to0true/kept"), "x").unwrap();
    both.upload(&both.here("site/."), &both.there("to0true/")).await.unwrap();
    assert_eq!(names(&both.there("to0true")), [".hidden", "kept", "sub"]);
}

#[tokio::test]
async fn one_file_that_may_not_be_read_keeps_no_other_from_being_copied() {
    let both = Both::new().await;
    for end in [both.here(""), both.there("")] {
        fs::create_dir_all(end.join("m/b-dir")).unwrap();
        for name in ["m/a", "m/b-dir/in", "m/z"] {
            fs::write(end.join(name), "x").unwrap();
        }
        fs::write(end.join("m/c-file"), "x").unwrap();
        fs::create_dir(end.join("m/d-dir")).unwrap();
    }
    for (to, into) in [(both.there("to"), true), (both.here("to"), false)] {
        fs::create_dir_all(to.join("m/c-file/full")).unwrap();
        fs::write(to.join("m/d-dir"), "in the way").unwrap();
        let copied = match into {
            true => both.upload(&both.here("m"), &to).await,
            false => both.download(&both.there("m"), &to).await,
        };
        let error = copied.unwrap_err();
        let Error::CopyPart { failures, more: 0, problem, .. } = &error else { panic!("{error:?}") };
        assert_eq!(failures.len(), 2, "{failures:?}");
        assert!(problem.contains("m/c-file") && problem.contains("m/d-dir"), "{problem}");
        assert!(problem.ends_with("could not be copied; all else was copied"), "{problem}");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(failures[0].to_string().contains("m/c-file"), "{}", failures[0]);
        assert_eq!(names(&to.join("m")), ["a", "b-dir", "c-file", "d-dir", "z"]);
        assert_eq!(names(&to.join("m/b-dir")), ["in"]);
        assert_eq!(fs::read(to.join("m/d-dir")).unwrap(), b"in the way");
    }
}

/// A directory with files that not even root can read.
const UNREADABLE: &str = "/proc/sys/net/ipv4/route";

#[tokio::test]
async fn what_may_not_be_read_is_named_and_all_else_is_copied() {
    let flush = Path::new(UNREADABLE).join("flush");
    if !flush.exists() || fs::File::open(&flush).is_ok() {
        eprintln!("SKIP: {UNREADABLE} has no file that may not be read");
        return;
    }
    let both = Both::new().await;
    let all = names(Path::new(UNREADABLE));
    for into in [true, false] {
        let (to, copied) = match into {
            true => (both.there("to"), both.upload(Path::new(UNREADABLE), &both.there("to")).await),
            false => (both.here("to"), both.download(Path::new(UNREADABLE), &both.here("to")).await),
        };
        let error = copied.unwrap_err();
        let Error::CopyPart { failures, .. } = &error else { panic!("{error:?}") };
        assert_eq!(failures.len(), 1, "{failures:?}");
        assert!(failures[0].to_string().contains("route/flush"), "{}", failures[0]);
        assert!(failures[0].to_string().contains("permission denied"), "{}", failures[0]);
        let expected: Vec<_> = all.iter().filter(|name| *name != "flush").cloned().collect();
        assert_eq!(names(&to), expected);
    }
}

#[tokio::test]
async fn what_could_not_be_copied_is_reported_with_what_was_left_out() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let both = Both::new().await;
    for end in [both.here("d"), both.there("d")] {
        fs::create_dir(&end).unwrap();
        fs::write(end.join(OsStr::from_bytes(b"caf\xe9")), "x").unwrap();
        fs::write(end.join("file"), "x").unwrap();
        drop(std::os::unix::net::UnixListener::bind(end.join("socket")).unwrap());
    }
    for copied in [
        both.upload(&both.here("d"), &both.there("in")).await,
        both.download(&both.there("d"), &both.here("out")).await,
    ] {
        let error = copied.unwrap_err();
        let Error::CopyPart { skipped, failures, problem, .. } = &error else { panic!("{error:?}") };
        assert!(failures.is_empty() && skipped.len() == 1 && skipped[0].ends_with("d/socket"), "{skipped:?}");
        assert!(problem.contains("is not UTF-8") && problem.contains("d/socket was skipped"), "{problem}");
    }
}

#[tokio::test]
async fn what_comes_from_a_pipe_is_a_file_of_the_name_that_was_given() {
    let both = Both::new().await;
    let data: Vec<u8> = (0..1 << 18).flat_map(|word: u32| word.to_le_bytes()).collect();
    let mut stream = &data[..];
    let to = both.there("stream");
    both.files.upload_stream(&mut stream, "standard input", to.to_str().unwrap(), &mut |_| {}).await.unwrap();
    assert!(fs::read(&to).unwrap() == data);
    assert_eq!(mode(&to) & 0o600, 0o600);
    fs::set_permissions(&to, fs::Permissions::from_mode(0o4711)).unwrap();
    let mut stream = &b"new"[..];
    both.files.upload_stream(&mut stream, "standard input", to.to_str().unwrap(), &mut |_| {}).await.unwrap();
    assert_eq!((fs::read(&to).unwrap().as_slice(), mode(&to)), (&b"new"[..], 0o711));

    // Like a shell's `<(…)`.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let fd = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
    let bytes = data.clone();
    let feed = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    both.upload(Path::new(&fd), &both.there("pipe")).await.unwrap();
    feed.join().unwrap();
    assert!(fs::read(both.there("pipe")).unwrap() == data);

    let error = both.upload(Path::new(&fd), &both.there("")).await.unwrap_err();
    assert!(error.to_string().contains("there/NAME)"), "{error}");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(names(&both.there("")), ["pipe", "stream"]);

    let mut out = Vec::new();
    let from = both.there("pipe");
    both.files
        .download_stream(from.to_str().unwrap(), &mut out, "standard output", &mut |_| {})
        .await
        .unwrap();
    assert!(out == data);
    let dir = both.there("");
    let refused =
        both.files.download_stream(dir.to_str().unwrap(), &mut out, "standard output", &mut |_| {}).await;
    assert!(refused.unwrap_err().to_string().contains("a directory"));
}

#[tokio::test]
async fn a_special_file_is_refused_with_its_kind() {
    let both = Both::new().await;
    for end in [both.here(""), both.there("")] {
        assert!(std::process::Command::new("mkfifo").arg(end.join("fifo")).status().unwrap().success());
        drop(std::os::unix::net::UnixListener::bind(end.join("socket")).unwrap());
        symlink("nowhere", end.join("dangling")).unwrap();
    }
    fs::write(both.here("file"), "x").unwrap();
    fs::write(both.there("file"), "x").unwrap();
    for (from, what) in [("fifo", "a named pipe"), ("socket", "a socket"), ("/dev/null", "a device")] {
        let up = both.upload(&both.here(from), &both.there("to")).await.unwrap_err().to_string();
        assert!(up.ends_with(&format!("the file on this host is {what} (expected a regular file)")), "{up}");
        let down = both.download(&both.there(from), &both.here("to")).await.unwrap_err().to_string();
        assert!(
            down.ends_with(&format!("the file in the guest is {what} (expected a regular file)")),
            "{down}"
        );
        let up = both.upload(&both.here("file"), &both.there(from)).await.unwrap_err().to_string();
        assert!(up.ends_with(&format!("the file in the guest is {what} (expected a regular file)")), "{up}");
        let down = both.download(&both.there("file"), &both.here(from)).await.unwrap_err().to_string();
        assert!(
            down.ends_with(&format!("the file on this host is {what} (expected a regular file)")),
            "{down}"
        );
    }
    let up = both.upload(&both.here("file"), &both.there("dangling")).await.unwrap_err().to_string();
    assert!(up.contains("in the guest is a symbolic link without a target"), "{up}");
    let down = both.download(&both.there("file"), &both.here("dangling")).await.unwrap_err().to_string();
    assert!(down.contains("on this host is a symbolic link without a target"), "{down}");
    assert!(both.here("dangling").is_symlink() && both.there("dangling").is_symlink());
    let left = names(&both.there(""));
    assert_eq!(left, ["dangling", "fifo", "file", "socket"]);
}

#[tokio::test]
async fn all_mode_bits_go_into_a_guest_and_none_but_permissions_come_out() {
    let both = Both::new().await;
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    fs::create_dir_all(both.here("tree/shared")).unwrap();
    for name in ["tree/setuid", "tree/readonly"] {
        fs::write(both.here(name), "x").unwrap();
    }
    set(&both.here("tree/setuid"), 0o4755);
    set(&both.here("tree/readonly"), 0o444);
    set(&both.here("tree/shared"), 0o3777);
    set(&both.here("tree"), 0o555);
    both.upload(&both.here("tree"), &both.there("tree")).await.unwrap();
    assert_eq!(mode(&both.there("tree/setuid")), 0o4755);
    assert_eq!(mode(&both.there("tree/readonly")), 0o444);
    assert_eq!(mode(&both.there("tree/shared")), 0o3777);
    assert_eq!(mode(&both.there("tree")), 0o755, "its owner can use it");
    both.download(&both.there("tree"), &both.here("back")).await.unwrap();
    assert_eq!(mode(&both.here("back/setuid")), 0o755);
    assert_eq!(mode(&both.here("back/readonly")), 0o444);
    assert_eq!(mode(&both.here("back/shared")) & 0o7000, 0);
}
