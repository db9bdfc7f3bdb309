//! What a server says to what it does not like.

use serde_json::{Value, json};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup, PropolisBehaviour, description};

use super::client::*;

fn fake() -> FakePropolis {
    FakePropolis::spawn(PropolisBehaviour::default()).unwrap()
}

fn get_instance(fake: &FakePropolis, version: &str) -> (u16, String) {
    let answer = ask_raw(fake, &format!("GET /instance HTTP/1.1{version}"), b"");
    (answer.status, answer.message().to_owned())
}

#[test]
fn a_version_that_is_missing_too_new_or_none_is_400_with_that_reason() {
    let fake = fake();
    for (header, message) in [
        ("", "missing expected header \"api-version\""),
        ("\r\napi-version: 6.0.0", "server does not support this API version: 6.0.0"),
        (
            "\r\napi-version: 5",
            "bad value for header \"api-version\": unexpected end of input while parsing major version number: 5",
        ),
    ] {
        assert_eq!(get_instance(&fake, header), (400, message.to_owned()));
    }
    for version in ["1.0.0", "2.0.0", "3.0.0", "4.0.0", "5.0.0"] {
        assert_eq!(get_instance(&fake, &format!("\r\napi-version: {version}")).0, 424, "{version}");
    }
}

#[test]
fn an_upgrade_needs_its_version_too() {
    let fake = fake();
    let upgrade = "GET /instance/serial HTTP/1.1\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==";
    assert_eq!(ask_raw(&fake, upgrade, b"").message(), "missing expected header \"api-version\"");
}

#[test]
fn an_older_server_takes_no_newer_version_for_anything_upgrades_included() {
    let fake = FakeSetup::default().latest_version("1.0.0").spawn().unwrap();
    assert_eq!(get_instance(&fake, "\r\napi-version: 1.0.0").0, 424);
    let refusal = "server does not support this API version: 2.0.0";
    assert_eq!(get_instance(&fake, "\r\napi-version: 2.0.0"), (400, refusal.to_owned()));
    let upgrade = "GET /instance/serial HTTP/1.1\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\napi-version: 2.0.0";
    let answer = ask_raw(&fake, upgrade, b"");
    assert_eq!((answer.status, answer.message()), (400, refusal));
}

#[test]
fn unknown_paths_are_404_and_wrong_methods_405() {
    let fake = fake();
    let ask = |request: &str| ask_raw(&fake, &format!("{request} HTTP/1.1\r\napi-version: 5.0.0"), b"");
    let (nowhere, wrong) = (ask("GET /machine"), ask("DELETE /instance"));
    assert_eq!((nowhere.status, nowhere.message()), (404, "Not Found"));
    assert_eq!((wrong.status, wrong.message()), (405, "Method Not Allowed"));
}

#[test]
fn a_body_over_a_mebibyte_is_refused() {
    let fake = fake();
    let head = "PUT /instance HTTP/1.1\r\napi-version: 5.0.0\r\ncontent-type: application/json";
    let mut body = ensure_body(&spec());
    body["properties"]["description"] = json!("");
    let room = 1024 * 1024 - body.to_string().len();
    body["properties"]["description"] = json!("x".repeat(room + 1));
    let answer = ask_raw(&fake, head, body.to_string().as_bytes());
    assert_eq!(answer.status, 400);
    assert_eq!(answer.message(), "request body exceeded maximum size of 1048576 bytes");
    body["properties"]["description"] = json!("x".repeat(room));
    assert_eq!(ask_raw(&fake, head, body.to_string().as_bytes()).status, 201);
}

#[test]
fn another_content_type_is_refused() {
    let fake = fake();
    let head = "PUT /instance/state HTTP/1.1\r\napi-version: 5.0.0\r\ncontent-type: application/x-www-form-urlencoded";
    let answer = ask_raw(&fake, head, b"state=Run");
    let message = "expected content type \"application/json\", got \"application/x-www-form-urlencoded\"";
    assert_eq!((answer.status, answer.message()), (400, message));
}

#[test]
fn the_monitor_needs_a_body() {
    let fake = fake();
    ensure_well(&fake);
    assert_eq!(ask(&fake, "GET", "/instance/state-monitor", None).status, 400);
}

#[test]
fn an_unknown_field_is_named_with_its_path() {
    let fake = fake();
    let mut spec = spec();
    spec["board"]["sockets"] = json!(1);
    let answer = ask(&fake, "PUT", "/instance", Some(&ensure_body(&spec)));
    assert_eq!(answer.status, 400);
    assert!(
        answer.message().contains("init.value.spec.board")
            || answer.message().contains("unknown field `sockets`"),
        "{}",
        answer.message()
    );
}

#[test]
fn version_1_takes_no_smbios_and_later_ones_ignore_unknown_keys() {
    let fake = fake();
    let mut spec = spec();
    spec["smbios"] = json!(null);
    spec["colour"] = json!("blue");
    let ask = |version: &str, spec: &Value| {
        let head =
            format!("PUT /instance HTTP/1.1\r\napi-version: {version}\r\ncontent-type: application/json");
        ask_raw(&fake, &head, ensure_body(spec).to_string().as_bytes())
    };
    assert_eq!(ask("1.0.0", &spec).status, 400);
    assert_eq!(ask("5.0.0", &spec).status, 201);
}

/// A spec with these components besides the port that every VM needs.
fn with(components: Value) -> Value {
    let mut spec = spec();
    for (key, component) in components.as_object().unwrap() {
        spec["components"][key] = component.clone();
    }
    spec
}

fn disk(backend: &str, device: u8) -> Value {
    let pci_path = json!({ "bus": 0, "device": device, "function": 0 });
    json!({ "type": "virtio_disk", "component": { "backend_id": backend, "pci_path": pci_path } })
}

fn nic(backend: &str, device: u8) -> Value {
    let pci_path = json!({ "bus": 0, "device": device, "function": 0 });
    let interface_id = "00000000-0000-0000-0000-000000000000";
    json!({
        "type": "virtio_nic",
        "component": { "backend_id": backend, "interface_id": interface_id, "pci_path": pci_path },
    })
}

fn blob() -> Value {
    blob_of(0)
}

fn blob_of(bytes: usize) -> Value {
    let base64 = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, vec![0; bytes]);
    json!({ "type": "blob_storage_backend", "component": { "base64": base64, "readonly": true } })
}

fn pvpanic() -> Value {
    json!({ "type": "qemu_pvpanic", "component": { "enable_isa": true } })
}

fn boot(id: &str) -> Value {
    json!({ "type": "boot_settings", "component": { "order": [{ "id": id }] } })
}

#[test]
fn a_spec_without_sense_is_400_with_the_message_of_the_real_server() {
    let fake = fake();
    let port = json!({ "type": "serial_port", "component": { "num": "com1" } });
    let dlpi = json!({ "type": "dlpi_network_backend", "component": { "vnic_name": "vm0" } });
    let p9 = json!({ "type": "soft_npu_p9", "component": { "pci_path": { "bus": 0, "device": 5, "function": 0 } } });
    let leaves = |leaf: u32| json!({ "leaf": leaf, "subleaf": null, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0 });
    let mut cpuid = spec();
    cpuid["board"]["cpuid"] = json!({ "vendor": "amd", "entries": [leaves(0x4000_0000)] });
    let mut twice = spec();
    twice["board"]["cpuid"] = json!({ "vendor": "amd", "entries": [leaves(0), leaves(0)] });
    for (spec, problem) in [
        (with(json!({ "a": disk("b", 4) })), "storage backend b not found for device a"),
        (with(json!({ "a": nic("b", 4) })), "network backend b not found for device a"),
        (with(json!({ "a": nic("b", 4), "b": dlpi })), "network backend b not found for device a"),
        (with(json!({ "b": blob() })), "backend b not used by any device"),
        (with(json!({ "a": disk("a", 4) })), "device a has the same name as its backend"),
        (
            with(json!({ "a": disk("x", 4), "b": disk("y", 4), "x": blob(), "y": blob() })),
            "a PCI device is already attached at PciPath { bus: 0, device: 4, function: 0 }",
        ),
        (with(json!({ "again": port })), "serial port Com1 is already specified"),
        (with(json!({ "a": pvpanic(), "b": pvpanic() })), "pvpanic device already specified"),
        (with(json!({ "a": boot("c"), "b": boot("d") })), "boot option d is not an attached device"),
        (with(json!({ "a": boot("c") })), "boot option c is not an attached device"),
        (with(json!({ "a": p9 })), "support for component a compiled out via falcon"),
        (twice, "instance spec's CPUID entries are invalid: duplicate leaf and subleaf (0, None)"),
        (
            cpuid,
            "instance spec's CPUID entries are invalid: leaf 0x40000000 not in standard or extended range",
        ),
    ] {
        let answer = ensure(&fake, &spec);
        assert_eq!(answer.status, 400, "{problem}: {answer:?}");
        assert_eq!(answer.message(), format!("failed to generate internal instance spec: {problem}"));
        assert_eq!(ask(&fake, "GET", "/instance", None).status, 424, "nothing was made");
    }
}

#[test]
fn a_pci_path_that_does_not_exist_is_refused() {
    let fake = fake();
    let answer = ensure(&fake, &with(json!({ "a": disk("b", 32), "b": blob() })));
    assert_eq!(answer.status, 400);
    assert!(answer.message().contains("PCI device 32 outside range of 0-31"), "{}", answer.message());
}

#[test]
fn a_missing_host_resource_fails_and_only_the_log_names_it() {
    let nowhere = std::path::Path::new("/nowhere/disk.raw");
    let mut many = spec();
    many["board"]["cpus"] = json!(33);
    let mut some = spec();
    some["board"]["cpus"] = json!(8);
    let crooked =
        json!({ "type": "blob_storage_backend", "component": { "base64": "AAAA", "readonly": true } });
    for (spec, told) in [
        (spec_with_disk(nowhere), "/nowhere/disk.raw: No such file or directory"),
        (many, "failed to set up 33 vCPUs"),
        (some, "spec requested more CPUs than are online!"),
        (with(json!({ "a": disk("b", 4), "b": crooked })), "3 bytes are not whole blocks of 512"),
        (with(json!({ "a": disk("b", 4), "b": blob() })), "0 bytes are not whole blocks of 512"),
    ] {
        let fake =
            FakePropolis::spawn(PropolisBehaviour { host_cpus: Some(7), ..PropolisBehaviour::default() })
                .unwrap();
        let answer = ensure(&fake, &spec);
        assert_eq!((answer.status, answer.message()), (500, "Internal Server Error"));
        assert!(fake.log().contains(told), "{told} is not in the log:\n{}", fake.log());
        assert_eq!(fake.kernel_vms(), [""; 0], "a VM that could not be made is not left in the kernel");
    }
}

#[test]
fn a_file_of_any_length_is_a_disk_of_any_blocks_but_of_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    for (bytes, block_size) in [(0, 512), (1, 512), (1000, 512), (4096, 500), (4096, 4096)] {
        std::fs::write(&path, vec![0; bytes]).unwrap();
        let mut spec = spec_with_disk(&path);
        spec["components"]["root-backend"]["component"]["block_size"] = json!(block_size);
        let fake = fake();
        assert_eq!(ensure(&fake, &spec).status, 201, "{bytes} bytes in blocks of {block_size}");
    }
    let mut spec = spec_with_disk(&path);
    spec["components"]["root-backend"]["component"]["block_size"] = json!(0);
    dies_of(&spec);
}

#[test]
fn of_several_boot_settings_the_last_applies() {
    let fake = fake();
    let spec = with(json!({ "a": boot("c"), "b": boot("d"), "d": disk("e", 4), "e": blob_of(512) }));
    assert_eq!(ensure(&fake, &spec).status, 201);
}

#[test]
fn a_picture_is_served_that_no_description_has() {
    let fake = fake();
    let answer = ask_raw(&fake, "GET /instance/vnc HTTP/1.1\r\napi-version: 5.0.0", b"");
    assert_eq!(answer.status, 400, "it is there, for who asks for an upgrade: {answer:?}");
    let upgrade = "GET /instance/vnc HTTP/1.1\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\napi-version: 5.0.0";
    assert!(description()["paths"].get("/instance/vnc").is_none());
    assert_ne!(ask_raw(&fake, upgrade, b"").status, 404);
}

#[test]
fn a_spec_without_com1_kills_the_server() {
    let mut spec = spec();
    spec["components"] = json!({});
    dies_of(&spec);
}

/// Checks that a server does not survive being asked for this.
fn dies_of(spec: &Value) {
    let mut fake = fake();
    let body = ensure_body(spec).to_string();
    let head = format!(
        "PUT /instance HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = std::net::TcpStream::connect(fake.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    // A connection that breaks off is closed or reset.
    let _ = std::io::Read::read_to_end(&mut stream, &mut answer);
    assert_eq!(answer, b"");
    fake.wait().unwrap();
    assert_eq!(fake.kernel_vms(), [ID], "and leaks the VM");
}

#[test]
fn a_disk_that_is_not_of_crucible_is_404_with_its_name_where_the_code_should_be() {
    let fake = fake();
    ensure_well(&fake);
    let snapshot = format!("/instance/disk/boot-backend/snapshot/{ID}");
    let replacement = json!({ "vcr_json": "{}" }).to_string();
    for (method, path, body, code) in [
        ("GET", "/instance/disk/boot-backend/status", "", "No crucible backend for id boot-backend"),
        (
            "PUT",
            "/instance/disk/boot-backend/vcr",
            replacement.as_str(),
            "No crucible backend for id boot-backend",
        ),
        ("POST", snapshot.as_str(), "", "no disk with id boot-backend!"),
    ] {
        let head =
            format!("{method} {path} HTTP/1.1\r\napi-version: 5.0.0\r\ncontent-type: application/json");
        let answer = ask_raw(&fake, &head, body.as_bytes());
        assert_eq!(
            (answer.status, answer.code(), answer.message()),
            (404, Some(code), "Not Found"),
            "{path}"
        );
    }
}

#[test]
fn an_nmi_is_taken_and_answered_with_null() {
    let fake = fake();
    run(&fake);
    let answer = ask(&fake, "POST", "/instance/nmi", None);
    assert_eq!((answer.status, answer.text.as_str()), (200, "null"));
}

#[test]
fn the_description_is_the_published_one() {
    assert_eq!(description()["info"]["version"], "5.0.0");
    assert_eq!(description()["components"]["schemas"].as_object().unwrap().len(), 62);
}
