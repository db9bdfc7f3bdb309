//! vmkit's own way into a guest, beside what somebody wants of cloud-init, read as cloud-init reads it.
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
use crate::spec::{CloudConfig, CloudInitConfig, GuestAccess, SshKeyPair, User, UserData, VmName};

/// Prints what each part of a document begins with, and what the last one says, read by Python's own libraries.
const READER: &str = "
import email, json, sys, yaml
# As cloud-init does it: from text, and a part's bytes by its transfer encoding.
message = email.message_from_string(sys.stdin.buffer.read().decode())
parts = [part.get_payload(decode=True).decode() for part in message.walk() if not part.is_multipart()]
heads = [part.splitlines()[0] for part in parts]
json.dump({'heads': heads, 'first': parts[0], 'last': yaml.safe_load(parts[-1])}, sys.stdout)
";

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

/// Answers nothing, and says so, where this host has no PyYAML.
fn parts(document: &str) -> Option<Value> {
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

fn our_user() -> Value {
    json!({
        "name": "vmkit",
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "ssh_authorized_keys": ["ssh-ed25519 AAAAlogin"],
    })
}

#[test]
fn typed_user_data_has_our_user_among_the_others_and_the_host_key() {
    let ada = User { name: "ada".into(), ssh_keys: Vec::new(), sudo: false, shell: None };
    let text = user_data(UserData::Typed(CloudConfig { users: vec![ada], ..CloudConfig::default() }));
    assert!(text.starts_with("#cloud-config\n"), "{text}");
    let Some(read) = parts(&text) else { return };
    let ada = json!({ "name": "ada" });
    assert_eq!(read["last"]["users"], json!(["default", ada, our_user()]));
    assert_eq!(read["last"]["ssh_keys"]["ed25519_public"], "ssh-ed25519 AAAAhost");
}

#[test]
fn raw_user_data_stays_as_it_is_and_ours_is_added_to_it() {
    let raw = "#cloud-config\nhostname: 12:30:45\nruncmd:\n- echo --==vmkit-0==-- \u{fc} \u{1f600}\n";
    let Some(read) = parts(&user_data(UserData::Raw(raw.into()))) else { return };
    assert_eq!(read["first"].as_str().unwrap().trim_end(), raw.trim_end());
    assert_eq!(read["last"]["users"], json!(["default", our_user()]));
    assert_eq!(read["last"]["merge_how"][1]["settings"][0], "no_replace");
}

#[test]
fn a_raw_list_of_users_decides_itself_about_the_images_own_user() {
    let raw = "#cloud-config\nusers:\n- name: ada\n";
    let Some(read) = parts(&user_data(UserData::Raw(raw.into()))) else { return };
    assert_eq!(read["last"]["users"], json!([our_user()]));
}

#[test]
fn parts_that_somebody_made_themselves_are_walked_through() {
    let raw = "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n\
               --x\nContent-Type: text/x-shellscript\n\n#!/bin/sh\necho hi\n\
               --x\nContent-Type: text/cloud-config\n\n#cloud-config\npackages: [nginx]\n--x--\n";
    let Some(read) = parts(&user_data(UserData::Raw(raw.into()))) else { return };
    assert_eq!(read["heads"], json!(["#!/bin/sh", "#cloud-config", "#cloud-config"]));
}

#[test]
fn a_user_or_a_host_key_that_is_given_twice_is_refused() {
    let config = |typed| CloudInitConfig {
        user_data: UserData::Typed(typed),
        access: Some(access()),
        ..CloudInitConfig::default()
    };
    let ours = User { name: "vmkit".into(), ssh_keys: Vec::new(), sudo: false, shell: None };
    let twice = config(CloudConfig { users: vec![ours], ..CloudConfig::default() });
    let error = twice.check().unwrap_err().to_string();
    assert!(error.starts_with("cloud_init.access.user: \"vmkit\": the same user is named twice"), "{error}");
    let twice = config(CloudConfig { ssh_host_key: Some(access().host_key), ..CloudConfig::default() });
    let error = twice.check().unwrap_err().to_string();
    assert!(error.starts_with("cloud_init.access.host_key") && !error.contains("SECRET"), "{error}");
}

#[test]
fn no_private_key_is_in_what_an_access_shows_of_itself() {
    assert!(!format!("{:?}", access()).contains("SECRET"));
}
