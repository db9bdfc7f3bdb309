//! A disk pulled from a real OCI registry, Debian's `docker-registry`: without a login, and with
//! one.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use vmkit::ErrorKind;
use vmkit::image::{Catalogue, ImageStore, RegistryCredentials, Verification, no_progress};
use vmkit::spec::Arch;
use vmkit::store::Home;

/// `me:secret`, as bcrypt writes it in a file of htpasswd's.
const LOGINS: &str = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
/// `me:secret` in Base64.
const BASIC: &str = "bWU6c2VjcmV0";

/// A registry of its own, ended with the test.
struct Registry {
    child: Child,
    host: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// Starts a registry; `None`, said aloud, where this host has none.
    fn start(dir: &Path, guarded: bool) -> Option<Self> {
        // Free a moment ago; no other process takes this port in between.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        fs::write(dir.join("logins"), LOGINS).unwrap();
        let auth = match guarded {
            true => format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", dir.join("logins").display()),
            false => String::new(),
        };
        let config = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{host}\"}}\n{auth}",
            dir.join("registry").display()
        );
        fs::write(dir.join("config.yml"), config).unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                println!("SKIP: docker-registry can't be run: {error}");
                return None;
            }
        };
        let registry = Self { child, host };
        let deadline = Instant::now() + Duration::from_secs(60);
        // It does not report when it listens.
        while TcpStream::connect(&registry.host).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            // It does not say that it listens.
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }

    /// Sends a request, and returns the status and the head.
    fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        let (host, length) = (&self.host, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Basic {BASIC}\r\n\
             Content-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
    }

    /// Puts a blob and returns its digest.
    fn put_blob(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let (status, head) = self.send("POST", "/v2/disks/web/blobs/uploads/", "text/plain", b"");
        assert_eq!(status, 202, "{head}");
        let location = head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
        let path = location.split_once(&self.host).map_or(location, |(_, path)| path);
        let path = format!("{path}&digest={digest}");
        let (status, head) = self.send("PUT", &path, "application/octet-stream", bytes);
        assert_eq!(status, 201, "{head}");
        digest
    }

    /// Puts an artifact `disks/web:1` whose only layer is this disk.
    fn put_disk(&self, disk: &[u8]) {
        let (config, layer) = (self.put_blob(b"{}"), self.put_blob(disk));
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = format!(
            r#"{{"schemaVersion": 2, "mediaType": "{kind}",
                "config": {{"mediaType": "application/vnd.oci.empty.v1+json", "digest": "{config}", "size": 2}},
                "layers": [{{"mediaType": "application/octet-stream", "digest": "{layer}", "size": {}}}]}}"#,
            disk.len()
        );
        let (status, head) = self.send("PUT", "/v2/disks/web/manifests/1", kind, manifest.as_bytes());
        assert_eq!(status, 201, "{head}");
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[tokio::test]
async fn a_disk_comes_from_a_real_registry() {
    let dir = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(dir.path(), false) else { return };
    let disk: Vec<u8> = (0..300_000_u32).map(|index| (index % 251) as u8).collect();
    registry.put_disk(&disk);
    let store = ImageStore::new(&Home::at(dir.path().join("home")).unwrap(), Catalogue::built_in());
    let image = format!("oci://{}/disks/web:1", registry.host).parse().unwrap();
    let kept = store.pull(&image, Arch::X86_64, &no_progress()).await.unwrap();
    assert_eq!(kept.id.to_string(), digest(&disk));
    assert_eq!(kept.names[0].verified, Verification::Digest);
    let missing = format!("oci://{}/disks/web:2", registry.host).parse().unwrap();
    let error = store.pull(&missing, Arch::X86_64, &no_progress()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn a_real_registry_that_wants_a_login_is_shown_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(dir.path(), true) else { return };
    let disk = vec![5; 100_000];
    registry.put_disk(&disk);
    let store = ImageStore::new(&Home::at(dir.path().join("home")).unwrap(), Catalogue::built_in());
    let image = format!("oci://{}/disks/web:1", registry.host).parse().unwrap();
    let error = store.pull(&image, Arch::X86_64, &no_progress()).await.unwrap_err();
    assert!(error.to_string().contains("refuses it without a login"), "{error}");
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "{BASIC}"}}}}}}"#, registry.host);
    let store = store.with_registry_credentials(RegistryCredentials::from_docker_config(&config).unwrap());
    let kept = store.pull(&image, Arch::X86_64, &no_progress()).await.unwrap();
    assert_eq!(kept.id.to_string(), digest(&disk));
}
