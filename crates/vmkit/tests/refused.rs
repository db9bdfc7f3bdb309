//! What is refused leaves nothing behind, and says what would be right.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::{Duration, Instant};

use common::{FileHypervisor, spec, web};
use vmkit::store::Home;
use vmkit::{BackendTag, Condition, ErrorKind, NoopHypervisor, RunInfo, VmManager, VmState};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_start_that_is_refused_is_no_start_that_was_cut_off() {
    let temp = tempfile::tempdir().unwrap();
    let manager = VmManager::new(NoopHypervisor::new(), BackendTag::Noop, Home::at(temp.path()).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    manager.suspend(&web()).await.unwrap();
    let refused = manager.start(&web()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidState);
    let listed = manager.list().await.unwrap().remove(0);
    assert_eq!(listed.handle.as_ref().unwrap().state, VmState::Suspended);
    assert!(listed.intent.is_none(), "{listed:?}");
    assert_eq!(manager.resume(&web()).await.unwrap().state, VmState::Running);
}

#[tokio::test]
async fn without_a_port_that_leads_there_nobody_waits_for_ssh_at_this_hosts_own() {
    let temp = tempfile::tempdir().unwrap();
    let hypervisor = FileHypervisor::new(temp.path().join("fake")).with_run(RunInfo::default());
    let manager = VmManager::new(hypervisor, BackendTag::Noop, Home::at(temp.path().join("home")).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let begun = Instant::now();
    let error = manager.wait(&web(), Condition::Ssh, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(
        error
            .to_string()
            .contains("no port of this host that leads to its SSH server is known for the VM `web`"),
        "{error}"
    );
    assert!(begun.elapsed() < SOON, "it is told at once");
}
