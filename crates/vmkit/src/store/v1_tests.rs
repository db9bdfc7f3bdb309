//! The stored form, byte by byte: against records that are committed in `tests/records`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use uuid::Uuid;

use super::record::{Intent, VmRecord};
use crate::handle::{
    ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, RunInfo, VmHandle, VncAddress,
};
use crate::lifecycle::{FailureKind, Operation, VmState};
use crate::spec::{
    Accel, BackendOptions, Boot, BridgeName, CloudConfig, CloudInitConfig, DataDisk, Firmware, GuestAccess,
    GuestFile, GuestUser, Kernel, Labels, MachineType, Mib, NetworkConfig, PortForward, Protocol, RootDisk,
    SshKeyPair, UserData, UserName, UserNetwork, VmName, VmSpec, Vnc,
};

fn fixture(name: &str) -> (PathBuf, Vec<u8>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records").join(name);
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

fn mib(mib: u64) -> Mib {
    Mib::new(mib).unwrap()
}

fn key(name: &str) -> SshKeyPair {
    SshKeyPair {
        private: "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n".to_owned(),
        public: format!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA {name}"),
    }
}

fn cloud_init() -> CloudInitConfig {
    let user = GuestUser {
        name: "ada".to_owned(),
        ssh_keys: vec![key("ada").public],
        sudo: true,
        shell: Some("/bin/sh".to_owned()),
    };
    let file = GuestFile {
        path: "/etc/motd".into(),
        content: "hello\n".to_owned(),
        mode: 0o600,
        owner: Some("ada".to_owned()),
    };
    let typed = CloudConfig {
        users: vec![user],
        packages: vec!["curl".to_owned()],
        files: vec![file],
        commands: vec![vec!["touch".to_owned(), "/done".to_owned()]],
        ssh_host_key: Some(key("host")),
    };
    let access = GuestAccess { user: "vmkit".to_owned(), login_key: key("login"), host_key: key("host") };
    CloudInitConfig {
        revoked_keys: vec!["ssh-ed25519 AAAAformer".to_owned()],
        hostname: Some("web-1".to_owned()),
        user_data: UserData::Typed(typed),
        network_config: Some("version: 2\n".to_owned()),
        run: 3,
        access: Some(access),
    }
}

fn spec() -> VmSpec {
    let user = UserNetwork {
        forwards: vec!["0.0.0.0:8080:80".parse().unwrap(), "53/udp".parse::<PortForward>().unwrap()],
        restrict: true,
    };
    let kernel =
        Kernel { path: "/boot/vmlinuz".into(), initrd: Some("/boot/initrd".into()), cmdline: "quiet".into() };
    let mut labels = Labels::default();
    labels.set("team", "web").unwrap();
    let mut options = BackendOptions::default();
    options.set("dataset", "tank/vm").unwrap();
    let existing = DataDisk::Existing { path: "/data/d.raw".into(), readonly: true };
    VmSpec::builder(VmName::new("web").unwrap())
        .id(Uuid::from_u128(7))
        .backend(BackendTag::Qemu)
        .cpus(2)
        .memory(mib(1024))
        .machine(MachineType::Microvm)
        .boot(Boot::Kernel(kernel))
        .accel(Accel::Kvm)
        .disk(RootDisk { image: "{home}/images/base.raw".into(), size: Some(mib(2048)) })
        .data_disks(vec![DataDisk::Fresh { size: mib(64) }, existing])
        .network(NetworkConfig::User(user))
        .cloud_init(cloud_init())
        .vnc(Vnc::Loopback)
        .console_log(mib(8))
        .run_as("vmkit".parse::<UserName>().unwrap())
        .labels(labels)
        .backend_options(options)
        .build()
        .unwrap()
}

fn next_spec() -> VmSpec {
    let raw = UserData::Raw("#!/bin/sh\n".to_owned());
    VmSpec::builder(VmName::new("web").unwrap())
        .machine(MachineType::Virt)
        .boot(Boot::Firmware(Firmware::Uefi))
        .accel(Accel::Tcg)
        .disk(RootDisk::empty(mib(512)))
        .cdrom(PathBuf::from("/isos/install.iso"))
        .network(NetworkConfig::Tap { bridge: BridgeName::new("br0").unwrap() })
        .cloud_init(CloudInitConfig { user_data: raw, ..CloudInitConfig::default() })
        .vnc(Vnc::Off)
        .build()
        .unwrap()
}

/// Returns a record in which every field has a value, though no VM is in all these ways at once.
fn every_field() -> VmRecord {
    let forward = ActiveForward {
        protocol: Protocol::Tcp,
        host: "127.0.0.1:40022".parse().unwrap(),
        guest_port: 22.try_into().unwrap(),
    };
    let run = RunInfo {
        pid: Some(42),
        accel: Some(Accel::Kvm),
        console: ConsoleEndpoint::UnixSocket("{home}/run/x/console.sock".into()),
        agent: Some("{home}/run/x/agent.sock".into()),
        monitor: Some("{home}/run/x/monitor.sock".into()),
        vnc: Some(VncAddress::Tcp {
            addr: "127.0.0.1:5901".parse().unwrap(),
            password_file: "{home}/run/x/vnc.password".into(),
        }),
        forwards: vec![forward],
    };
    let handle = VmHandle {
        next_spec: Some(Box::new(next_spec())),
        state: VmState::failed(FailureKind::GuestPanic, "the guest's kernel panicked"),
        run: Some(run),
        console_log: Some("{home}/vms/web/console.log".into()),
        console_since: serde_json::from_value(json!({"inode": 5, "born_ns": 6, "at_bytes": 7})).unwrap(),
        hypervisor_log: Some("{home}/vms/web/qemu.log".into()),
        details: BackendDetails { version: 2, data: json!({"seed_run": 3}) },
        ..VmHandle::preparing(Uuid::from_u128(7), BackendTag::Qemu, spec())
    };
    VmRecord::intending(
        handle,
        Intent { operation: Operation::Start, since: 1_700_000_000, pid: 41, snapshot: None },
    )
}

#[test]
fn a_record_with_every_field_has_the_bytes_that_are_committed() {
    let (path, bytes) = fixture("v1/every-field.json");
    assert_eq!(text(every_field().encode().unwrap()), text(bytes.clone()));
    assert_eq!(VmRecord::decode(&path, &bytes).unwrap(), every_field());
}

#[test]
fn a_recorded_spec_is_checked_again() {
    let broken = text(every_field().encode().unwrap()).replace("\"cpus\": 2", "\"cpus\": 0");
    let error = VmRecord::decode(Path::new("x"), broken.as_bytes()).unwrap_err().chain().to_string();
    assert!(error.contains("not a record of a VM: cpus: \"0\": a VM has 1 to 255"), "{error}");
}

#[test]
fn records_of_the_first_release_are_read_and_keep_their_bytes() {
    for (name, state) in [("vm.json", VmState::Prepared), ("run.json", VmState::Stopped)] {
        let (path, bytes) = fixture(&format!("c2c6b0a/{name}"));
        let record = VmRecord::decode(&path, &bytes).unwrap();
        assert_eq!((record.handle.name().as_str(), &record.handle.state), ("a", &state));
        assert_eq!(record.handle.spec.image_name(), Some("base"));
        assert_eq!(text(record.encode().unwrap()), text(bytes));
    }
}

/// Every word of the form that the record with every field has no room for.
#[test]
fn each_word_is_the_one_that_is_committed() {
    let vm = || every_field().handle;
    let has = |vm: VmHandle, words: &str| {
        let bytes = VmRecord::settled(vm.clone()).encode().unwrap();
        let packed: String = text(bytes.clone()).split_whitespace().collect();
        assert!(packed.contains(words), "{words}: {packed}");
        assert_eq!(VmRecord::decode(Path::new("x"), &bytes).unwrap().handle, vm);
    };
    for (state, word) in [
        (VmState::Preparing, "preparing"),
        (VmState::Prepared, "prepared"),
        (VmState::Running, "running"),
        (VmState::Suspended, "suspended"),
        (VmState::Stopped, "stopped"),
        (VmState::Destroyed, "destroyed"),
    ] {
        has(VmHandle { state, ..vm() }, &format!("\"state\":\"{word}\""));
    }
    for (kind, word) in [
        (FailureKind::HypervisorExited, "hypervisor-exited"),
        (FailureKind::HypervisorKilled, "hypervisor-killed"),
        (FailureKind::InternalError, "internal-error"),
        (FailureKind::DiskError, "disk-error"),
        (FailureKind::Vanished, "vanished"),
        (FailureKind::Interrupted, "interrupted"),
        (FailureKind::Other, "other"),
    ] {
        has(VmHandle { state: VmState::failed(kind, ""), ..vm() }, &format!("\"kind\":\"{word}\""));
    }
    for (operation, word) in [
        (Operation::Prepare, "prepare"),
        (Operation::Stop, "stop"),
        (Operation::Suspend, "suspend"),
        (Operation::Resume, "resume"),
        (Operation::Save, "save"),
        (Operation::Destroy, "destroy"),
    ] {
        let intent = Intent { operation, since: 1, pid: 2, snapshot: None };
        let bytes = text(VmRecord::intending(vm(), intent).encode().unwrap());
        assert!(bytes.contains(&format!("\"operation\": \"{word}\"")), "{bytes}");
    }
    let runs = |run: RunInfo, words: &str| has(VmHandle { run: Some(run), ..vm() }, words);
    let web = ConsoleEndpoint::WebSocket("ws://h/".to_owned());
    runs(RunInfo { console: web, ..RunInfo::default() }, "\"console\":{\"web-socket\":\"ws://h/\"}");
    runs(RunInfo::default(), "\"console\":\"none\"");
    let unix = RunInfo { vnc: Some(VncAddress::Unix("/s".into())), ..RunInfo::default() };
    runs(unix, "\"vnc\":{\"unix\":\"/s\"}");
    let wants = |spec: crate::spec::VmSpecBuilder, words: &str| {
        has(VmHandle { spec: spec.build().unwrap(), ..vm() }, words);
    };
    let builder = || VmSpec::builder(VmName::new("web").unwrap()).cdrom(PathBuf::from("/i"));
    wants(builder(), "\"machine\":\"q35\",\"boot\":{\"firmware\":\"bios\"},\"accel\":\"auto\"");
    wants(builder(), "\"vnc\":\"unix\"");
    wants(builder().network(NetworkConfig::None), "\"network\":\"none\"");
    let vnic = NetworkConfig::Vnic { link: "net0".parse().unwrap() };
    wants(builder().network(vnic), "\"network\":{\"vnic\":{\"link\":\"net0\"}}");
}
