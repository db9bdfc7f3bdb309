//! The clock of a guest that is resumed, where its backend sets it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{SOON, all_but_state, spec, web};
use vmkit::abilities::{ClockState, ClockedVm, GuestClock};
use vmkit::store::Home;
use vmkit::{
    Abilities, Backend, BackendTag, Hypervisor, NoopHypervisor, Result, VmHandle, VmManager, VmState,
};

/// A backend that sets guests' clocks, and keeps what it was told of their suspensions.
#[derive(Clone, Default)]
struct Clocked(NoopHypervisor, Arc<Mutex<Vec<Option<Duration>>>>);

impl Hypervisor for Clocked {
    all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.0.state(vm).await
    }
}

impl GuestClock for Clocked {
    async fn resume_and_set_clock(&self, vm: &VmHandle, paused: Option<Duration>) -> Result<ClockedVm> {
        self.1.lock().unwrap().push(paused);
        Ok(ClockedVm { vm: self.0.resume(vm).await?, clock: ClockState::Right })
    }
}

impl Backend for Clocked {
    fn tag(&self) -> BackendTag {
        self.0.tag()
    }

    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        self.0.abilities(tag).with_guest_clock(self)
    }
}

#[tokio::test]
async fn a_backend_that_sets_clocks_resumes_and_gets_the_length_of_the_pause() {
    let temp = tempfile::tempdir().unwrap();
    let hypervisor = Clocked::default();
    let manager = VmManager::new(hypervisor.clone(), Home::at(temp.path()).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    manager.suspend(&web()).await.unwrap();
    let vm = manager.resume(&web()).await.unwrap();
    assert_eq!(vm.state, VmState::Running);
    assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Running);
    let told = hypervisor.1.lock().unwrap().clone();
    assert!(matches!(told[..], [Some(paused)] if paused < SOON), "{told:?}");
}
