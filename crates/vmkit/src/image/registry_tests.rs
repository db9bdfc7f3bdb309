//! Pulls from a registry that wants tokens and logins, forgets them, and gives other things than it
//! said.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::pull_tests::{ARCH, PullScene, disk, sha256};
use super::test_server::{ServedFile, TestServer};
use super::*;
use crate::error::{Error, ErrorKind};

/// Puts an artifact `disks/web:1` with this disk behind a token for everybody who asks with the
/// right login.
fn put_artifact(server: &TestServer, disk: &[u8], login: Option<&str>) -> String {
    let realm = server.url("/token");
    let challenge = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:disks/web:pull\"");
    let guarded = Some(("Bearer let-me-in".to_owned(), challenge));
    let digest = format!("sha256:{}", sha256(disk));
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "layers": [{"mediaType": "application/octet-stream", "digest": digest, "size": disk.len()}],
    })
    .to_string();
    let manifest_digest = format!("sha256:{}", sha256(manifest.as_bytes()));
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "x", "digest": format!("sha256:{}", "0".repeat(64)), "platform": {"architecture": "arm64"}},
        {"mediaType": "x", "digest": manifest_digest, "platform": {"architecture": "amd64"}},
    ]})
    .to_string();
    let page = |body: &[u8]| ServedFile { guarded: guarded.clone(), ..ServedFile::new(body) };
    server.put("/v2/disks/web/manifests/1", page(manifest.as_bytes()));
    server.put("/v2/disks/web/manifests/index", page(index.as_bytes()));
    server.put(&format!("/v2/disks/web/manifests/{manifest_digest}"), page(manifest.as_bytes()));
    server.put(&format!("/v2/disks/web/blobs/{digest}"), ServedFile { cuts: vec![1000], ..page(disk) });
    let token = ServedFile::new(r#"{"token": "let-me-in"}"#);
    let guarded = login.map(|login| (login.to_owned(), "Basic realm=\"test\"".to_owned()));
    server.put("/token", ServedFile { guarded, ..token });
    format!("oci://{}/disks/web", server.host())
}

#[tokio::test]
async fn a_disk_is_pulled_from_a_registry_that_wants_a_token() {
    let scene = PullScene::new().await;
    let disk = disk(50_000);
    let image = put_artifact(&scene.server, &disk, None);
    for tag in [":1", ":index", ""] {
        let pulled = scene.pull(&format!("{image}{tag}")).await;
        if tag.is_empty() {
            assert_eq!(pulled.unwrap_err().kind(), ErrorKind::NotFound, "there is no latest");
            continue;
        }
        let kept = pulled.unwrap();
        assert_eq!(kept.id.hex(), sha256(&disk));
        assert_eq!(kept.names.last().unwrap().verified, Verification::Digest);
    }
    let asked = scene.server.asked("/token");
    assert_eq!(asked[0].query, "scope=repository:disks/web:pull&service=test");
    assert!(!asked[0].headers.contains_key("authorization"));
    let blob = scene.server.asked(&format!("/v2/disks/web/blobs/sha256:{}", sha256(&disk)));
    assert_eq!(blob.len(), 2, "cut once, and not fetched again under another name");
    assert_eq!(blob[1].headers["range"], "bytes=1000-");
}

#[tokio::test]
async fn a_registry_that_wants_a_login_is_shown_it() {
    let mut scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = put_artifact(&scene.server, &disk, Some("Basic dTpw"));
    let error = scene.pull(&format!("{image}:1")).await.unwrap_err();
    assert!(error.to_string().contains("refuses it without a login"), "{error}");
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#, scene.server.host());
    scene.store = scene
        .store
        .clone()
        .with_registry_credentials(RegistryCredentials::from_docker_config(&config).unwrap());
    assert_eq!(scene.pull(&format!("{image}:1")).await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn of_several_challenges_the_token_is_preferred_to_the_password() {
    let mut scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = format!("{}:1", put_artifact(&scene.server, &disk, Some("Basic dTpw")));
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#, scene.server.host());
    let credentials = RegistryCredentials::from_docker_config(&config).unwrap();
    scene.store = scene.store.clone().with_registry_credentials(credentials);
    let bearer = format!("Bearer realm=\"{}\",service=\"test\"", scene.server.url("/token"));
    let basic = "Basic realm=\"a, b\"";
    let digest = format!("sha256:{}", sha256(&disk));
    let manifest = serde_json::json!({"layers": [{"mediaType": "x", "digest": digest}]}).to_string();
    let put = |token: &str, challenge: String| {
        let guarded = Some((token.to_owned(), challenge));
        let page = |body: &[u8]| ServedFile { guarded: guarded.clone(), ..ServedFile::new(body) };
        scene.server.put("/v2/disks/web/manifests/1", page(manifest.as_bytes()));
        scene.server.put(&format!("/v2/disks/web/blobs/{digest}"), page(&disk));
    };
    // In one header and in two, in either order.
    for challenge in [
        format!("{basic}, {bearer}"),
        format!("{bearer}, {basic}"),
        format!("{basic}\r\nWWW-Authenticate: {bearer}"),
        format!("{bearer}\r\nWWW-Authenticate: {basic}"),
        format!("Negotiate\r\nWWW-Authenticate: {bearer}"),
    ] {
        put("Bearer let-me-in", challenge.clone());
        let kept = scene.pull(&image).await.unwrap_or_else(|error| panic!("{challenge}: {error}"));
        assert_eq!(kept.id.hex(), sha256(&disk));
        scene.store.remove(&image, None).await.unwrap();
    }
    // Who gives tokens is out of order; the password will do.
    scene.server.put("/token", ServedFile::status("404 Not Found"));
    put("Basic dTpw", format!("{bearer}\r\nWWW-Authenticate: {basic}"));
    assert_eq!(scene.pull(&image).await.unwrap().id.hex(), sha256(&disk));
    scene.store.remove(&image, None).await.unwrap();
    put("Basic dTpw", format!("Negotiate, {basic}"));
    assert_eq!(scene.pull(&image).await.unwrap().id.hex(), sha256(&disk));
}

/// Creates a helper `docker-credential-test` that returns this, and a store that runs it.
fn with_helper(scene: &PullScene, script: &str) -> ImageStore {
    let path = scene.dir.path().join("docker-credential-test");
    vmkit_testkit::write_program(&path, &format!("#!/bin/sh\n{script}\n")).unwrap();
    let credentials = RegistryCredentials::from_docker_config(r#"{"credsStore": "test"}"#).unwrap();
    let store = scene.store.clone().with_registry_credentials(credentials);
    store.with_credential_helpers(scene.dir.path().as_os_str())
}

#[tokio::test]
async fn a_login_that_a_helper_keeps_is_shown() {
    let mut scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = put_artifact(&scene.server, &disk, Some("Basic dTpw"));
    scene.store = with_helper(&scene, r#"echo '{"ServerURL":"","Username":"u","Secret":"p"}'"#);
    assert_eq!(scene.pull(&format!("{image}:1")).await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn a_helper_without_a_login_is_ignored_and_one_that_fails_is_reported() {
    let mut scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = format!("{}:1", put_artifact(&scene.server, &disk, None));
    scene.store = with_helper(&scene, "echo 'the keychain is locked'; exit 1");
    let error = scene.pull(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Host);
    let text = error.to_string();
    assert!(text.contains("the keychain is locked") && text.contains(scene.server.host()), "{text}");
    assert!(scene.server.asked("/token").is_empty());
    scene.store = with_helper(&scene, "echo 'credentials not found in native keychain'; exit 1");
    assert_eq!(scene.pull(&image).await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn a_missing_helper_does_not_prevent_what_needs_no_login() {
    let mut scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = format!("{}:1", put_artifact(&scene.server, &disk, None));
    scene.store = with_helper(&scene, "exit 1");
    std::fs::remove_file(scene.dir.path().join("docker-credential-test")).unwrap();
    assert_eq!(scene.pull(&image).await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn an_identity_token_is_sent_only_to_the_token_server() {
    let mut scene = PullScene::new().await;
    let other = TestServer::new().await;
    let disk = disk(20_000);
    let image = format!("{}:1", put_artifact(&scene.server, &disk, None));
    scene.server.put("/token", ServedFile::new(r#"{"access_token": "let-me-in"}"#));
    scene.store = with_helper(&scene, r#"echo '{"ServerURL":"","Username":"<token>","Secret":"a b&c"}'"#);
    assert_eq!(scene.pull(&image).await.unwrap().id.hex(), sha256(&disk));
    let asked = &scene.server.asked("/token")[0];
    assert_eq!(
        asked.body,
        "grant_type=refresh_token&client_id=vmkit&scope=repository:disks/web:pull&service=test\
        &refresh_token=a%20b%26c"
    );
    assert!(asked.query.is_empty() && !asked.headers.contains_key("authorization"), "{asked:?}");
    scene.store.remove(&image, None).await.unwrap();
    let led = vec![("Location".to_owned(), other.url("/token"))];
    scene.server.put("/token", ServedFile { headers: led, ..ServedFile::status("307 Temporary Redirect") });
    scene.pull(&image).await.unwrap_err();
    assert!(other.asked("/token").is_empty());
}

#[tokio::test]
async fn a_registry_that_gives_another_manifest_or_blob_is_not_believed() {
    let scene = PullScene::new().await;
    let disk = disk(20_000);
    let image = put_artifact(&scene.server, &disk, None);
    let error = scene.pull(&format!("{image}@sha256:{}", "1".repeat(64))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let path = format!("/v2/disks/web/manifests/sha256:{}", "1".repeat(64));
    scene.server.put(&path, ServedFile::new(r#"{"layers": []}"#));
    let error = scene.pull(&format!("{image}@sha256:{}", "1".repeat(64))).await.unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
    scene
        .server
        .put(&format!("/v2/disks/web/blobs/sha256:{}", sha256(&disk)), ServedFile::new(vec![3; 20_000]));
    let error = scene.pull(&format!("{image}:1")).await.unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
    scene.assert_nothing_kept();
}

#[tokio::test]
async fn a_token_that_runs_out_in_the_middle_is_renewed() {
    let scene = PullScene::new().await;
    let disk = disk(50_000);
    let image = put_artifact(&scene.server, &disk, None);
    let blob = format!("/v2/disks/web/blobs/sha256:{}", sha256(&disk));
    let realm = scene.server.url("/token");
    let challenge = format!("Bearer realm=\"{realm}\",service=\"test\"");
    // The blob is guarded by another token than the manifest: what was shown first is worth nothing
    // here.
    scene.server.put("/token", ServedFile::new(r#"{"token": "let-me-in"}"#));
    let page = ServedFile {
        guarded: Some(("Bearer second".to_owned(), challenge)),
        ..ServedFile::new(disk.clone())
    };
    let (server, progress) = (scene.server.clone(), no_progress());
    // The first half comes with the first token, which has run out when the connection breaks.
    let first = ServedFile { guarded: None, cuts: vec![20_000], stalls: true, ..page.clone() };
    server.put(&blob, first);
    let mut seen = progress.subscribe();
    let image = format!("{image}:1").parse().unwrap();
    let mut store = scene.store.clone();
    store.fetcher.remote.patience.idle = std::time::Duration::from_millis(500);
    let (pulled, ()) = tokio::join!(store.pull(&image, ARCH, &progress), async {
        seen.wait_for(|progress| progress.done_bytes == 20_000).await.unwrap();
        server.put("/token", ServedFile::new(r#"{"token": "second"}"#));
        server.put(&blob, page);
    });
    assert_eq!(pulled.unwrap().id.hex(), sha256(&disk));
    let asked = scene.server.asked(&blob);
    let shown: Vec<&str> = asked.iter().map(|asked| asked.headers["authorization"].as_str()).collect();
    assert_eq!(shown, ["Bearer let-me-in", "Bearer let-me-in", "Bearer second"]);
    assert_eq!(asked[2].headers["range"], "bytes=20000-", "what came stays");
}

#[tokio::test]
async fn a_registry_that_refuses_every_token_is_not_asked_for_ever() {
    let scene = PullScene::new().await;
    let disk = disk(50_000);
    let image = put_artifact(&scene.server, &disk, None);
    let blob = format!("/v2/disks/web/blobs/sha256:{}", sha256(&disk));
    let challenge = format!("Bearer realm=\"{}\"", scene.server.url("/token"));
    scene.server.put(
        &blob,
        ServedFile { guarded: Some(("Bearer never".to_owned(), challenge)), ..ServedFile::new(disk) },
    );
    let error = scene.pull(&format!("{image}:1")).await.unwrap_err();
    assert!(error.to_string().contains("refuses it without a login"), "{error}");
    assert_eq!(scene.server.asked(&blob).len(), 2);
}

#[tokio::test]
async fn a_login_is_not_shown_to_a_server_that_the_registry_leads_to() {
    let mut scene = PullScene::new().await;
    let other = TestServer::new().await;
    let disk = disk(20_000);
    let image = put_artifact(&scene.server, &disk, Some("Basic dTpw"));
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "dTpw"}}}}}}"#, scene.server.host());
    let credentials = RegistryCredentials::from_docker_config(&config).unwrap();
    scene.store = scene.store.clone().with_registry_credentials(credentials);
    let challenge = format!("Bearer realm=\"{}\"", other.url("/token"));
    other.put(
        "/blob",
        ServedFile { guarded: Some(("Bearer x".to_owned(), challenge)), ..ServedFile::new("x") },
    );
    let led = vec![("Location".to_owned(), other.url("/blob"))];
    let blob = format!("/v2/disks/web/blobs/sha256:{}", sha256(&disk));
    scene.server.put(&blob, ServedFile { headers: led, ..ServedFile::status("302 Found") });
    scene.pull(&format!("{image}:1")).await.unwrap_err();
    assert!(other.asked("/token").is_empty());
    assert!(!other.asked("/blob")[0].headers.contains_key("authorization"));
}
