//! A watcher of a VM is notified of each change, whichever process made it.

use std::time::{Duration, Instant};

use crate::common::{spec, web};
use tokio::time::sleep;
use vmkit::store::Home;
use vmkit::{BackendTag, ErrorKind, NoopHypervisor, VmManager, VmState};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_watcher_hears_of_each_change_and_of_the_removal() {
    let temp = tempfile::tempdir().unwrap();
    let noop = NoopHypervisor::new();
    let manager = |noop: &NoopHypervisor| {
        VmManager::new(noop.clone(), BackendTag::Noop, Home::at(temp.path()).unwrap())
    };
    let (watcher, other) = (manager(&noop), manager(&noop));
    let mut seen = other.create(spec()).await.unwrap();
    assert_eq!(seen.state, VmState::Prepared);
    for wanted in [VmState::Running, VmState::Suspended, VmState::Running, VmState::Stopped] {
        let changes = watcher.changed(&seen, SOON);
        let change = async {
            sleep(Duration::from_millis(50)).await;
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
        assert!(made.elapsed() < Duration::from_secs(1), "heard of by the event, not at the next look");
    }
    let error = watcher.changed(&seen, Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("a change of the VM `web`, which is stopped"), "{error}");

    let (gone, removed) = tokio::join!(watcher.changed(&seen, SOON), async {
        sleep(Duration::from_millis(50)).await;
        other.remove(&web(), false).await
    });
    removed.unwrap();
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
    other.create(spec()).await.unwrap();
    let error = watcher.changed(&seen, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "another VM of that name is not the one that was seen");
}
