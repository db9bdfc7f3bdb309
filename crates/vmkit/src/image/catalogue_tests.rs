//! What the catalogue has, and what is said of a bad one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use super::*;
use crate::error::{ErrorKind, Result};
use crate::spec::{Arch, Firmware};
use proptest::prelude::*;

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

fn refusal(text: &str) -> String {
    let catalogue = Catalogue::built_in();
    let error = catalogue.find(&name(text), Arch::X86_64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    error.to_string()
}

fn extended(text: &str) -> Result<Catalogue> {
    Catalogue::built_in().extended(text, Path::new("/c/images.toml"))
}

#[test]
fn everything_in_the_catalogue_can_be_found_and_is_checked() {
    let catalogue = Catalogue::built_in();
    let entries = catalogue.entries();
    for distribution in [
        "debian",
        "ubuntu",
        "fedora",
        "rocky",
        "alma",
        "centos-stream",
        "opensuse",
        "arch",
        "alpine",
        "freebsd",
        "omnios",
    ] {
        let newest = entries.iter().filter(|entry| entry.name.name() == distribution && entry.newest);
        assert_eq!(newest.count(), 1, "{distribution}");
    }
    for entry in &entries {
        for arch in &entry.arches {
            let found = catalogue.find(&entry.name, *arch).unwrap();
            assert!(found.url.starts_with("https://"), "{}", found.url);
            let checksums = found.checksums.unwrap();
            assert!(checksums.starts_with("https://") && !checksums.contains('{'), "{checksums}");
            assert!(found.user.is_some(), "{}", entry.name);
            let word = match arch {
                Arch::X86_64 => ["x86_64", "amd64", "omnios"],
                Arch::Aarch64 => ["aarch64", "arm64", "arm64"],
            };
            assert!(word.iter().any(|word| found.url.contains(word)), "{}", found.url);
        }
    }
}

#[test]
fn a_name_without_a_version_is_the_newest_and_code_names_are_names() {
    let catalogue = Catalogue::built_in();
    for (asked, whole) in
        [("debian", "debian:13"), ("debian:bookworm", "debian:12"), ("ubuntu:noble", "ubuntu:24.04")]
    {
        assert_eq!(catalogue.whole_name(&name(asked)), Some(name(whole)));
    }
    assert_eq!(catalogue.whole_name(&name("mine")), None);
    let found = catalogue.find(&name("debian:12"), Arch::Aarch64).unwrap();
    assert_eq!(found.checksums.unwrap(), "https://cloud.debian.org/images/cloud/bookworm/latest/SHA512SUMS");
    assert_eq!((found.user.unwrap().as_str(), found.firmware), ("debian", Firmware::Uefi));
}

#[test]
fn an_unknown_name_or_version_is_refused_with_what_there_is() {
    assert!(refusal("debain").contains("did you mean debian (12, 13)?"), "{}", refusal("debain"));
    assert!(refusal("ubunut:24.04").contains("did you mean ubuntu"));
    assert!(refusal("debian:7").contains("no such version; there are 12, 13"));
    assert!(refusal("windows").contains("there are alma, alpine, arch"));
    let error = Catalogue::built_in().find(&name("arch"), Arch::Aarch64).unwrap_err().to_string();
    assert!(error.contains("does not exist for aarch64, only for x86_64"), "{error}");
}

#[test]
fn a_users_own_catalogue_adds_and_replaces() {
    let catalogue = extended(
        "version = 1\n[image.debian]\nuser = \"me\"\n[image.debian.release.12]\n\
         x86_64 = { url = \"http://here/d.img\", firmware = \"uefi\" }\n\
         [image.mine.release.9]\naarch64 = { url = \"http://here/9\" }\n\
         [image.mine.release.10]\naarch64 = { url = \"http://here/10\" }\n",
    )
    .unwrap();
    let found = catalogue.find(&name("debian:12"), Arch::X86_64).unwrap();
    assert_eq!(
        (found.url.as_str(), found.checksums, found.firmware),
        ("http://here/d.img", None, Firmware::Uefi)
    );
    assert_eq!(found.user.unwrap().as_str(), "me");
    assert!(catalogue.find(&name("debian:13"), Arch::X86_64).is_ok(), "what it does not name stays");
    assert_eq!(catalogue.whole_name(&name("mine")), Some(name("mine:10")), "10 is newer than 9");
}

#[test]
fn a_signature_is_verified_only_with_a_key() {
    let signature = |of| Catalogue::built_in().find(&name(of), Arch::X86_64).unwrap().signature;
    assert_eq!(signature("rocky:9"), None, "nobody here has seen a signature of it");
    let url = "https://cloud-images.ubuntu.com/releases/noble/release/SHA256SUMS.gpg";
    assert_eq!(signature("ubuntu:24.04").unwrap().url, url);
    let fingerprint = "A".repeat(40);
    let text = format!(
        "version = 1\n[key.k]\nfingerprint = \"{fingerprint}\"\npublic = \"…\"\n[image.test.release.1]\n\
         checksums = \"SUMS\"\nsigned = \"SIGNED\"\nsignature = \"SUMS.gpg\"\nkeys = [\"k\"]\n\
         x86_64 = {{ url = \"http://here/d.img\" }}\n"
    );
    for signed in ["checksums", "image", "inline"] {
        let catalogue = extended(&text.replace("SIGNED", signed)).unwrap();
        let signature = catalogue.find(&name("test"), Arch::X86_64).unwrap().signature.unwrap();
        assert_eq!((signature.url.as_str(), signature.keys.len()), ("http://here/SUMS.gpg", 1));
    }
}

#[test]
fn a_bad_catalogue_is_refused_with_the_place() {
    let of_key = |rest: &str| format!("version = 1\n[key.k]\nfingerprint = \"{}\"\n{rest}", "A".repeat(40));
    for (text, why) in [
        ("version = 2", "version 2, and this vmkit reads version 1"),
        ("", "missing field `version`"),
        ("version = 1\n[image.a]\nusr = \"x\"\n", "line 3, column 1: unknown field `usr`"),
        ("version = 1\n[image.a.release.1]\nx86_64 = 1\n", "line 3"),
        ("version = 1\n[image.a.release.1]\n", "it has no URL"),
        ("version = 1\n[image.A.release.1]\nx86_64 = { url = \"http://h/x\" }", "a-z"),
        ("version = 1\n[image.a.release.1]\nx86_64 = { url = \"ftp://h/x\" }", "https:// or http://"),
        ("version = 1\n[image.a.release.1]\nkeys = [\"k\"]\nx86_64 = { url = \"http://h/x\" }", "no key `k`"),
        ("version = 1\n[key.k]\nfingerprint = \"12\"\npublic = \"\"", "40 or 64 digits"),
        (&of_key(""), "key `k`: set `public` to the key, or `url`"),
        (&of_key("public = \"\"\nurl = \"https://h/k\""), "key `k`: set `public` to the key, or `url`"),
        (&of_key("url = \"k.asc\""), "key `k`: \"k.asc\" is not a URL"),
        (
            "version = 1\n[image.a]\nnewest = \"2\"\n[image.a.release.1]\nx86_64 = { url = \"http://h/x\" }",
            "newest is \"2\"",
        ),
        (
            "version = 1\n[image.a.release.1]\nsignature = \"s\"\nx86_64 = { url = \"http://h/x\" }",
            "it has a `signature`: set `signed`",
        ),
    ] {
        let error = extended(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Record);
        let error = error.to_string();
        assert!(error.starts_with("/c/images.toml: ") && error.contains(why), "{text}: {error}");
    }
}

#[test]
fn a_required_signature_that_cannot_be_verified_is_refused() {
    let (sums, signature, keys) =
        ("checksums = \"SUMS\"\n", "signature = \"SUMS.gpg\"\n", "keys = [\"ubuntu\"]\n");
    let release = |signed: &str, fields: &[&str], file: &str| {
        let fields = fields.concat();
        format!(
            "version = 1\n[image.a.release.1]\nsigned = \"{signed}\"\n{fields}\
             x86_64 = {{ url = \"http://h/x\" }}\naarch64 = {{ url = \"http://h/y\"{file} }}\n"
        )
    };
    for (signed, fields, missing) in [
        ("checksums", &[sums, signature][..], "keys"),
        ("checksums", &[sums, keys], "signature"),
        ("checksums", &[signature, keys], "checksums"),
        ("inline", &[sums], "keys"),
        ("inline", &[keys], "checksums"),
        ("inline", &[keys, signature], "checksums"),
        ("image", &[sums, keys], "signature"),
        ("image", &[signature], "keys"),
        ("image", &[], "keys"),
    ] {
        let error = extended(&release(signed, fields, "")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Record);
        let begin = format!(
            "/c/images.toml: image.a.release.1.x86_64: it is `signed = \"{signed}\"`, and `{missing}` is missing: "
        );
        assert!(error.to_string().starts_with(&begin), "{error}");
    }
    // What one file has for itself, the other lacks.
    let of_one = release("image", &[keys], ", signature = \"y.asc\"");
    assert!(extended(&of_one).unwrap_err().to_string().contains("release.1.x86_64: "));
    for (signed, fields) in [
        ("checksums", &[sums, signature, keys][..]),
        ("inline", &[sums, keys]),
        ("image", &[signature, keys]),
    ] {
        extended(&release(signed, fields, "")).unwrap();
    }
}

#[test]
fn what_stands_behind_a_question_mark_is_no_part_of_a_files_name() {
    let catalogue = extended(
        "version = 1\n[image.a.release.1]\nchecksums = \"{file}.sha256\"\n\
         x86_64 = { url = \"http://h/dir/d.img?sig=a/b\" }\n",
    )
    .unwrap();
    let found = catalogue.find(&name("a"), Arch::X86_64).unwrap();
    assert_eq!(found.url, "http://h/dir/d.img?sig=a/b");
    assert_eq!(found.checksums.unwrap(), "http://h/dir/d.img.sha256");
}

#[test]
fn a_mirror_serves_keys_as_well() {
    let catalogue = Catalogue::built_in().with_mirrors("http://m.lan").unwrap();
    let signature = catalogue.find(&name("alpine"), Arch::X86_64).unwrap().signature.unwrap();
    let at = PublicKey::At("http://m.lan/alpinelinux.org/keys/tomalok.asc".to_owned());
    assert_eq!(signature.keys[0].public, at);
}

#[test]
fn mirrors_replace_the_beginning_of_addresses() {
    let url = |mirrors: &str| {
        let catalogue = Catalogue::built_in().with_mirrors(mirrors).unwrap();
        catalogue.find(&name("debian:12"), Arch::X86_64).unwrap().checksums.unwrap()
    };
    let all = "http://m.lan/vm";
    assert_eq!(url(all), "http://m.lan/vm/cloud.debian.org/images/cloud/bookworm/latest/SHA512SUMS");
    for one in [
        "https://cloud.debian.org/images=http://d.lan/deb",
        "https://cloud.debian.org/images/=http://d.lan/deb",
        "https://cloud.debian.org/images=http://d.lan/deb/",
        "https://cloud.debian.org/images/=http://d.lan/deb/",
        // A beginning may end in the middle of a name.
        "https://cloud.debian.org/images/cl=http://d.lan/deb/cl",
    ] {
        assert_eq!(url(one), "http://d.lan/deb/cloud/bookworm/latest/SHA512SUMS", "{one}");
    }
    let some = "https://cloud.debian.org/images/=http://d.lan/ https://x.invalid/=http://x.lan/";
    assert_eq!(url(some), "http://d.lan/cloud/bookworm/latest/SHA512SUMS");
    assert!(url(&format!("{some} {all}")).starts_with("http://d.lan/"), "the first that fits counts");
    for bad in ["m.lan", "ftp://x", "=http://x y"] {
        assert!(Catalogue::built_in().with_mirrors(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn reading_any_catalogue_never_panics(text in "(?s)(version = 1\n)?.{0,200}", mirrors in ".{0,60}") {
        let _ = extended(&text);
        let _ = Catalogue::built_in().with_mirrors(&mirrors);
    }

    #[test]
    fn any_name_is_resolved_without_panic(text in "[a-z0-9][a-z0-9-]{0,20}(:[a-z0-9.]{1,8})?") {
        if let Ok(name) = ImageName::new(&text) {
            let _ = Catalogue::built_in().find(&name, Arch::X86_64);
        }
    }
}
