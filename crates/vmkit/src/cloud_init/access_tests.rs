//! vmkit's own login beside a user's user-data, parsed as cloud-init parses it.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and says aloud what it skips"
)]

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use uuid::Uuid;

use super::render;
use crate::spec::free_login;
use crate::spec::{CloudConfig, CloudInitConfig, GuestAccess, GuestUser, SshKeyPair, UserData, VmName};

/// Prints a document as cloud-init understands it.
const READER: &str = include_str!("access_tests.py");

fn access() -> GuestAccess {
    let pair = |name: &str| SshKeyPair {
        private: format!(
            "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET{name}\n-----END OPENSSH PRIVATE KEY-----\n"
        ),
        public: format!("ssh-ed25519 AAAA{name}"),
    };
    GuestAccess { user: "vmkit".into(), login_key: pair("login"), host_key: pair("host") }
}

fn user_data(user_data: UserData) -> String {
    let config = CloudInitConfig { user_data, access: Some(access()), ..CloudInitConfig::default() };
    render(&config, &VmName::new("web").unwrap(), Uuid::nil(), None).unwrap().user_data
}

/// Returns a document as cloud-init understands it, or `None`, with a message, if this host has no
/// PyYAML.
fn read(document: &str) -> Option<Value> {
    let has = Command::new("/usr/bin/python3").args(["-c", "import yaml"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("SKIP: PyYAML is not installed");
        return None;
    }
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", READER])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(document.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "Python refused:\n{document}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

const KEYS: &str = "ssh_authorized_keys";

fn our_user() -> Value {
    json!({ "sudo": "ALL=(ALL) NOPASSWD:ALL", KEYS: ["ssh-ed25519 AAAAlogin"] })
}

/// Returns the user that vmkit logs in as beside raw user-data in an image with the user `debian`,
/// and both documents as cloud-init understands them.
fn joined(raw: &str) -> Option<(String, Value)> {
    let theirs = UserData::Raw(raw.into());
    let (user, _) = free_login(&theirs, Some("debian")).unwrap_or_else(|error| panic!("{raw}: {error}"));
    let access = GuestAccess { user: user.clone(), ..access() };
    let config = CloudInitConfig { user_data: theirs, access: Some(access), ..CloudInitConfig::default() };
    let text = render(&config, &VmName::new("web").unwrap(), Uuid::nil(), None).unwrap().user_data;
    Some((user, read(&text)?))
}

#[test]
fn typed_user_data_has_our_user_among_the_others_and_the_host_key() {
    let ada = GuestUser { name: "ada".into(), ssh_keys: Vec::new(), sudo: false, shell: None };
    let text = user_data(UserData::Typed(CloudConfig { users: vec![ada], ..CloudConfig::default() }));
    assert!(text.starts_with("#cloud-config\n"), "{text}");
    let Some(read) = read(&text) else { return };
    assert_eq!(read["order"], json!(["ada", "vmkit", "debian"]));
    assert_eq!((&read["users"]["vmkit"], &read["users"]["ada"]), (&our_user(), &json!({})));
    assert_eq!(read["config"]["ssh_keys"]["ed25519_public"], "ssh-ed25519 AAAAhost");
}

#[test]
fn a_typed_user_whom_vmkit_logs_in_as_keeps_its_own_keys_and_shell() {
    let shell = Some("/bin/zsh".to_owned());
    let ours =
        GuestUser { name: "vmkit".into(), ssh_keys: vec!["ssh-rsa AAAAB3".into()], sudo: false, shell };
    let text = user_data(UserData::Typed(CloudConfig { users: vec![ours], ..CloudConfig::default() }));
    let Some(read) = read(&text) else { return };
    let expected = json!({
        "shell": "/bin/zsh",
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        KEYS: ["ssh-rsa AAAAB3", "ssh-ed25519 AAAAlogin"],
    });
    assert_eq!(read["users"]["vmkit"], expected);
}

#[test]
fn raw_user_data_stays_as_it_is_and_ours_is_added_to_it() {
    let raw = "#cloud-config\nhostname: 12:30:45\nruncmd:\n- echo --==vmkit-0==-- \u{fc} \u{1f600}\n";
    let Some((user, read)) = joined(raw) else { return };
    assert_eq!(read["first"].as_str().unwrap().trim_end(), raw.trim_end());
    // The image's user keeps its groups and its shell, and gets our key.
    assert_eq!((user.as_str(), &read["order"]), ("debian", &json!(["debian"])));
    assert_eq!(read["users"]["debian"]["shell"], "/bin/bash");
    assert_eq!(read["users"]["debian"][KEYS], our_user()[KEYS]);
}

/// Forms of `users`, the user that vmkit logs in as beside each, one of the listed users, and that
/// user's expected settings.
fn forms_of_users() -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let their_key = || json!({ KEYS: ["ssh-rsa AAAAtheirs"] });
    vec![
        ("users:\n- name: ann\n  ssh_authorized_keys: [ssh-rsa AAAAtheirs]\n", "debian", "ann", their_key()),
        // A user with the name that vmkit would use.
        (
            "users:\n- name: debian\n  ssh_authorized_keys: [ssh-rsa AAAAtheirs]\n",
            "vmkit",
            "debian",
            their_key(),
        ),
        (
            "users:\n- {\"name\": 'debian', ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n",
            "vmkit",
            "debian",
            their_key(),
        ),
        (
            "x: &x {name: debian, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\nusers: [*x]\n",
            "vmkit",
            "debian",
            their_key(),
        ),
        (
            "x: &x {name: debian, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\nusers:\n- <<: *x\n",
            "vmkit",
            "debian",
            their_key(),
        ),
        ("users: [default, debian, vmkit]\n", "vmkit-access", "vmkit", json!({})),
        ("users:\n- debian\n- [vmkit, vmkit-access]\n", "vmkit-access-2", "vmkit-access", json!({})),
        ("users: []\n", "debian", "debian", our_user()),
        ("users:\n", "debian", "debian", our_user()),
        ("users: ~\nhostname: x\n", "debian", "debian", our_user()),
        ("users: ann, bob\n", "debian", "bob", json!({})),
        ("users: 'debian,ann'\n", "vmkit", "ann", json!({})),
        ("users:\n  ann: {ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n", "debian", "ann", their_key()),
        (
            "users:\n  debian: {ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n  eve: true\n",
            "vmkit",
            "debian",
            their_key(),
        ),
        // Groups and users share names: `useradd` creates no user with a group's name.
        ("groups: [debian, {vmkit: [root]}]\n", "vmkit-access", "vmkit-access", our_user()),
        (
            "users:\n- {name: ann, groups: 'sudo, debian'}\n",
            "vmkit",
            "ann",
            json!({ "groups": "sudo, debian" }),
        ),
        // Merged by the rules of the document itself.
        (
            "merge_how: list(append)+dict(no_replace,recurse_list)+str()\nusers:\n- ann\n",
            "debian",
            "ann",
            json!({}),
        ),
        ("merge_type: 'list(prepend)+dict()+str()'\nusers: [ann]\n", "debian", "ann", json!({})),
        ("users: [{name: root, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}]\n", "debian", "root", their_key()),
    ]
}

#[test]
fn no_form_of_users_locks_vmkit_out_or_loses_a_field() {
    for (theirs, expected, who, what) in &forms_of_users() {
        for line_end in ["\n", "\r\n"] {
            let raw = format!("#cloud-config\n{theirs}").replace('\n', line_end);
            let Some((user, read)) = joined(&raw) else { return };
            assert_eq!(user, *expected, "{raw}");
            assert_eq!(&read["users"][*who], what, "{raw}: {read}");
            let ours = &read["users"][&user];
            assert_eq!((&ours[KEYS], &ours["sudo"]), (&our_user()[KEYS], &our_user()["sudo"]), "{raw}");
            assert!(theirs.contains("default") || read["users"].get("default").is_none(), "{raw}");
        }
    }
}

#[test]
fn fields_of_the_images_own_user_stay_as_given() {
    for (theirs, own) in [
        ("users:\n- {name: default, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n", "debian"),
        ("users:\n- ssh_authorized_keys: [ssh-rsa AAAAtheirs]\n", "debian"),
        ("user: {name: ann, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n", "ann"),
        ("user: {ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\n", "debian"),
        ("user: {name: vmkit, ssh_authorized_keys: [ssh-rsa AAAAtheirs]}\nusers: [default]\n", "vmkit"),
    ] {
        let Some((user, read)) = joined(&format!("#cloud-config\n{theirs}")) else { return };
        assert_eq!(read["users"][own][KEYS], json!(["ssh-rsa AAAAtheirs"]), "{theirs}: {read}");
        assert_eq!(read["users"][&user], our_user(), "{theirs}: {read}");
        assert_ne!(user, own);
    }
    for theirs in ["user: vmkit\n", "system_info: {default_user: {name: vmkit}}\n"] {
        let Some((user, _)) = joined(&format!("#cloud-config\n{theirs}")) else { return };
        assert_eq!(user, "vmkit-access", "{theirs}");
    }
}

#[test]
fn parts_of_a_hand_made_document_are_read_too() {
    let raw = "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n\
               --x\nContent-Type: text/x-shellscript\n\n#!/bin/sh\necho hi\n\
               --x\nContent-Type: text/cloud-config\n\n#cloud-config\nusers: [{name: debian}]\n\
               --x\n\n#cloud-config\npackages: [nginx]\n--x--\n";
    for raw in [raw.to_owned(), raw.replace('\n', "\r\n")] {
        let Some((user, read)) = joined(&raw) else { return };
        let config = "#cloud-config";
        assert_eq!(read["heads"], json!(["#!/bin/sh", config, config, config]), "{raw}");
        assert_eq!((user.as_str(), &read["users"]["vmkit"]), ("vmkit", &our_user()), "{raw}");
        assert_eq!(read["users"]["debian"], json!({}), "{raw}");
    }
    let archive = "#cloud-config-archive\n- type: text/cloud-config\n  content: |\n    users: {debian: {}}\n";
    let Some((user, read)) = joined(archive) else { return };
    assert_eq!((user.as_str(), &read["users"]["vmkit"]), ("vmkit", &our_user()));
}

#[test]
fn beside_what_only_the_guest_can_read_vmkit_takes_a_name_of_its_own() {
    for (raw, expected) in [
        ("## template: jinja\n#cloud-config\nusers:\n- name: {{ v1.x }}\n", "vmkit"),
        ("## template: jinja\n#cloud-config\nusers:\n- name: vmkit\n", "vmkit-access"),
        ("#include\nhttp://127.0.0.1:1/x\n", "vmkit"),
        ("#cloud-config-jsonp\n[]\n", "vmkit"),
        ("#!/bin/sh\nuseradd ann\n", "debian"),
        ("#cloud-boothook\n#!/bin/sh\ntrue\n", "debian"),
    ] {
        let (user, _) = free_login(&UserData::Raw(raw.into()), Some("debian")).unwrap();
        assert_eq!(user, expected, "{raw}");
    }
}

#[test]
fn what_would_keep_everybody_out_is_refused_with_its_line() {
    for (theirs, line, what) in [
        ("users: 5\n", 2, "`users` is not a list"),
        ("users: yes\n", 2, "`users` is not a list"),
        ("users:\n- default\n-\n", 4, "an entry of `users` is not a user"),
        ("users:\n- 12\n", 3, "an entry of `users` is not a user"),
        ("users:\n  ann:\n", 3, "write `ann: {}`"),
        ("users:\n  ann: [x]\n", 3, "write `ann: {}`"),
        ("users:\n- {name: ann, 1: x}\n", 3, "a key of a user is not a string"),
        ("groups:\n", 2, "`groups` is not a list"),
        ("groups:\n- admins:\n", 3, "the members of a group are not a list"),
        ("ssh_keys: [x]\n", 2, "`ssh_keys` has no keys and values"),
        ("ssh_keys:\n  rsa_private:\n", 3, "`ssh_keys.rsa_private` is not a string"),
        ("ssh_keys:\n  ed25519_public: ssh-ed25519 AAAA\n", 3, "add `ed25519_private`"),
        ("ssh_keys:\n  ed25519_private: x\n", 3, "has no line end"),
        ("cloud_init_modules: [users-groups]\n", 2, "lacks `ssh`"),
    ] {
        let user_data = UserData::Raw(format!("#cloud-config\n{theirs}"));
        let config = CloudInitConfig { user_data, access: Some(access()), ..CloudInitConfig::default() };
        let error = config.check().unwrap_err().to_string();
        let place = format!(": line {line}, column ");
        assert!(
            error.starts_with("user_data: ") && error.contains(&place) && error.contains(what),
            "{error}"
        );
        // Without vmkit's own login the user-data may have all of it.
        CloudInitConfig { access: None, ..config }.check().unwrap();
    }
}

#[test]
fn a_copy_loses_the_key_of_its_source_before_it_gets_its_own() {
    let former = "ssh-ed25519 AAAAformer vmkit".to_owned();
    for theirs in
        [UserData::Typed(CloudConfig::default()), UserData::Raw("#cloud-config\nruncmd: [x]\n".into())]
    {
        let config = CloudInitConfig {
            user_data: theirs,
            access: Some(access()),
            revoked_keys: vec![former.clone()],
            ..CloudInitConfig::default()
        };
        let text = render(&config, &VmName::new("web").unwrap(), Uuid::nil(), None).unwrap().user_data;
        let Some(read) = read(&text) else { return };
        let commands = read["config"]["bootcmd"].as_array().unwrap();
        assert_eq!(commands.len(), 2, "{commands:?}");
        assert_eq!(commands[0].as_array().unwrap().last().unwrap(), "ssh-ed25519 AAAAformer");
        assert_eq!(commands[1][0], "cloud-init-per");
    }
}

/// The script runs on the host here, with another root for what it reads.
#[test]
fn a_key_is_removed_from_the_files_of_all_users_and_from_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("ada/.ssh/authorized_keys");
    std::fs::create_dir_all(keys.parent().unwrap()).unwrap();
    std::fs::write(&keys, "ssh-rsa AAAAown me\nssh-ed25519 AAAAformer vmkit\n# a comment\n").unwrap();
    let passwd = dir.path().join("passwd");
    std::fs::write(&passwd, format!("ada:x:1:1::{}:/bin/sh\n", dir.path().join("ada").display())).unwrap();
    let script = super::documents::REVOKE.replace("/etc/passwd", passwd.to_str().unwrap());
    let run = std::process::Command::new("sh").args(["-c", &script, "sh", "ssh-ed25519 AAAAformer"]).status();
    assert!(run.unwrap().success());
    assert_eq!(std::fs::read_to_string(&keys).unwrap(), "ssh-rsa AAAAown me\n# a comment\n");
}

#[test]
fn a_name_that_raw_user_data_has_is_refused_for_a_login_that_was_asked_for() {
    let raw = "#cloud-config\npackages: [x]\nusers:\n- default\n- name: vmkit\n";
    let config = CloudInitConfig {
        user_data: UserData::Raw(raw.into()),
        access: Some(access()),
        ..CloudInitConfig::default()
    };
    let error = config.check().unwrap_err().to_string();
    let expected =
        "cloud_init.access.user: \"vmkit\": line 5 of the user-data creates a user or a group of this name";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn another_host_key_that_is_given_beside_ours_is_refused() {
    let config = |typed| CloudInitConfig {
        user_data: UserData::Typed(typed),
        access: Some(access()),
        ..CloudInitConfig::default()
    };
    let same = config(CloudConfig { ssh_host_key: Some(access().host_key), ..CloudConfig::default() });
    same.check().unwrap();
    let twice = config(CloudConfig { ssh_host_key: Some(access().login_key), ..CloudConfig::default() });
    let error = twice.check().unwrap_err().to_string();
    assert!(error.starts_with("cloud_init.access.host_key") && !error.contains("SECRET"), "{error}");
}

#[test]
fn other_host_keys_of_theirs_stay_beside_ours() {
    let theirs = "#cloud-config\nssh_deletekeys: false\nssh_keys:\n  rsa_private: |\n    x\n  rsa_public: ssh-rsa AAAAB3\n";
    let Some((_, read)) = joined(theirs) else { return };
    let config = &read["config"];
    assert_eq!(
        (&config["ssh_deletekeys"], &config["ssh_keys"]["rsa_private"]),
        (&json!(false), &json!("x\n"))
    );
    assert_eq!(config["ssh_keys"]["ed25519_public"], "ssh-ed25519 AAAAhost");
    let Some((_, read)) = joined("#cloud-config\nssh_keys:\n") else { return };
    assert_eq!(read["config"]["ssh_keys"]["ed25519_public"], "ssh-ed25519 AAAAhost");
}

#[test]
fn no_private_key_is_in_what_an_access_shows_of_itself() {
    assert!(!format!("{:?}", access()).contains("SECRET"));
}
