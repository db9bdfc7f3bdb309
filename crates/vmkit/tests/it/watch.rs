//! A watcher of a VM is notified of each change, whichever process made it.

use std::time::{Duration, Instant};

use crate::common::{Counting, SOON, spec, web};
use vmkit::store::Home;
use vmkit::{ErrorKind, VmManager, VmState};

#[tokio::test]
async fn a_watcher_notices_each_change_and_the_removal() {
    let temp = tempfile::tempdir().unwrap();
    let hypervisor = Counting::default();
    let manager = || VmManager::new(hypervisor.clone(), Home::at(temp.path()).unwrap());
    let (watcher, other) = (manager(), manager());
    let mut latencies = Vec::new();
    let mut seen = other.create(spec()).await.unwrap();
    assert_eq!(seen.state, VmState::Prepared);
    for wanted in [VmState::Running, VmState::Suspended, VmState::Running, VmState::Stopped] {
        let looks = hypervisor.looks();
        let changes = watcher.changed(&seen, SOON);
        let change = async {
            hypervisor.was_asked_since(looks).await;
            match &wanted {
                VmState::Running if seen.state == VmState::Suspended => other.resume(&web()).await,
                VmState::Running => other.start(&web()).await,
                VmState::Suspended => other.suspend(&web()).await,
                _ => other.stop(&web(), SOON).await,
            }
            .unwrap();
            Instant::now()
        };
        let (changed, made) = tokio::join!(changes, change);
        seen = changed.unwrap();
        assert_eq!(seen.state, wanted);
        latencies.push(made.elapsed());
    }
    // The next look comes after two seconds. The fastest tells: a busy host delays some.
    let fastest = latencies.iter().min().unwrap();
    assert!(*fastest < Duration::from_secs(1), "heard of at the next look: {latencies:?}");
    let error = watcher.changed(&seen, Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("a change of the VM `web`, which is stopped"), "{error}");

    let looks = hypervisor.looks();
    let (gone, removed) = tokio::join!(watcher.changed(&seen, SOON), async {
        hypervisor.was_asked_since(looks).await;
        other.remove(&web(), false).await
    });
    removed.unwrap();
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
    other.create(spec()).await.unwrap();
    let error = watcher.changed(&seen, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "another VM of that name is not the one that was seen");
}
