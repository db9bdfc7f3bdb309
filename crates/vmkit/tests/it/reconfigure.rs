//! What a VM that is there already shall be from now on: other values, forwards, and what of it
//! outlives a power cut.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::time::Duration;

use crate::common::{spec, web};
use vmkit::spec::{CloudInitConfig, Labels, NetworkConfig, PortForward, VmName, VmSpec, VmSpecBuilder, Vnc};
use vmkit::store::Home;
use vmkit::{
    Abilities, Backend, BackendTag, Error, ErrorKind, Hypervisor, NoopHypervisor, PortForwarding, Result,
    RouterHypervisor, VmHandle, VmManager, VmState,
};

fn noop(temp: &tempfile::TempDir) -> (NoopHypervisor, VmManager<NoopHypervisor>) {
    let hypervisor = NoopHypervisor::new();
    let home = Home::at(temp.path()).unwrap();
    (hypervisor.clone(), VmManager::new(hypervisor, home))
}

fn forwards(vm: &VmHandle) -> (Vec<String>, Vec<u16>) {
    let NetworkConfig::User(user) = vm.spec.network() else { panic!("a user network") };
    let active = vm.run.iter().flat_map(|run| &run.forwards).map(|forward| forward.host.port());
    (user.forwards.iter().map(ToString::to_string).collect(), active.collect())
}

#[tokio::test]
async fn a_forward_is_wanted_from_then_on_and_in_force_while_the_vm_lives() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    let (http, dns) = ("8080:80".parse().unwrap(), "53/udp".parse().unwrap());
    manager.create(spec()).await.unwrap();
    let vm = manager.add_forward(&web(), &http).await.unwrap();
    assert_eq!(forwards(&vm), (vec!["22".into(), "8080:80".into()], vec![]));
    manager.start(&web()).await.unwrap();
    for _ in 0..2 {
        let vm = manager.add_forward(&web(), &dns).await.unwrap();
        assert_eq!(forwards(&vm), (vec!["22".into(), "8080:80".into(), "53/udp".into()], vec![53]));
    }
    assert_eq!(forwards(&manager.info(&web()).await.unwrap()).1, [53]);

    let error = manager.add_forward(&web(), &"8080:81".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let chosen = "53:53/udp".parse().unwrap();
    let vm = manager.remove_forward(&web(), &chosen).await.unwrap();
    assert_eq!(forwards(&vm), (vec!["22".into(), "8080:80".into()], vec![]));
    let error = manager.remove_forward(&web(), &chosen).await.unwrap_err();
    assert_eq!(error.to_string(), "forward `53:53/udp` does not exist");
    manager.suspend(&web()).await.unwrap();
    let vm = manager.remove_forward(&web(), &http).await.unwrap();
    assert_eq!(forwards(&vm), (vec!["22".into()], vec![]));
}

#[tokio::test]
async fn a_forward_outlives_a_start_that_another_change_has_waited_for() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    let (http, dns): (PortForward, PortForward) =
        ("8080:80".parse().unwrap(), "5353:53/udp".parse().unwrap());
    manager.create(spec()).await.unwrap();
    manager.add_forward(&web(), &http).await.unwrap();
    manager.start(&web()).await.unwrap();
    let now = manager.info(&web()).await.unwrap().spec;
    let wanted = VmSpecBuilder::from(now.clone()).cpus(3).build().unwrap();
    manager.reconfigure(&web(), wanted).await.unwrap();
    manager.add_forward(&web(), &dns).await.unwrap();
    manager.remove_forward(&web(), &http).await.unwrap();
    let vm = manager.restart(&web(), Duration::ZERO).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.next_spec.is_none()), (3, true));
    assert_eq!(forwards(&vm).0, ["22", "5353:53/udp"]);

    // One that is refused is wanted by neither.
    let next = VmSpecBuilder::from(vm.spec).cpus(2).build().unwrap().with_forward(http.clone()).unwrap();
    manager.reconfigure(&web(), next).await.unwrap();
    let error = manager.add_forward(&web(), &"8080:81".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "the next start could not have both");
    // And one that only the next start would bring can be taken back.
    manager.remove_forward(&web(), &http).await.unwrap();
    let vm = manager.restart(&web(), Duration::ZERO).await.unwrap();
    assert_eq!((vm.spec.cpus(), forwards(&vm).0), (2, vec!["22".into(), "5353:53/udp".into()]));
    let other = VmSpecBuilder::from(vm.spec).network(NetworkConfig::None).build().unwrap();
    manager.reconfigure(&web(), other).await.unwrap();
    manager.add_forward(&web(), &http).await.unwrap();
    let vm = manager.restart(&web(), Duration::ZERO).await.unwrap();
    assert_eq!(*vm.spec.network(), NetworkConfig::None);
}

#[tokio::test]
async fn a_backend_without_live_forwards_reports_that_and_nothing_is_recorded() {
    let temp = tempfile::tempdir().unwrap();
    let router = RouterHypervisor::new(BackendTag::Noop).with(Fixed(NoopHypervisor::new()));
    let manager = VmManager::new(router, Home::at(temp.path()).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let error = manager.add_forward(&web(), &"80".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(forwards(&manager.info(&web()).await.unwrap()).0, ["22"]);
}

/// A backend whose VMs keep the forwards that they were started with.
struct Fixed(NoopHypervisor);

impl Hypervisor for Fixed {
    crate::common::all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.0.state(vm).await
    }
}

impl Backend for Fixed {
    fn tag(&self) -> BackendTag {
        self.0.tag()
    }
    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        Abilities::none().with_suspend()
    }
}

/// A backend that loses the replies about forwards.
struct Mute(NoopHypervisor);

impl Hypervisor for Mute {
    crate::common::all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.0.state(vm).await
    }
}

impl Backend for Mute {
    fn tag(&self) -> BackendTag {
        self.0.tag()
    }
    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        self.0.abilities(tag).with_port_forwarding(self)
    }
}

impl PortForwarding for Mute {
    async fn add_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.0.add_forward(vm, forward).await?;
        Err(Error::timed_out("its answer", Duration::ZERO))
    }
    async fn remove_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.0.remove_forward(vm, forward).await
    }
}

#[tokio::test]
async fn a_forward_that_may_be_in_force_stays_known_and_can_be_taken_back() {
    let temp = tempfile::tempdir().unwrap();
    let (home, http) = (Home::at(temp.path()).unwrap(), "8080:80".parse().unwrap());
    let manager = VmManager::new(Mute(NoopHypervisor::new()), home);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let error = manager.add_forward(&web(), &http).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(forwards(&manager.info(&web()).await.unwrap()).0, ["22", "8080:80"]);
    manager.remove_forward(&web(), &http).await.expect("it is not unknown");
    assert_eq!(forwards(&manager.info(&web()).await.unwrap()).0, ["22"]);
}

#[tokio::test]
async fn the_configuration_of_a_vm_outlives_a_power_cut() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    let config = CloudInitConfig::default();
    manager.create(VmSpecBuilder::from(spec()).cloud_init(config).build().unwrap()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let later = manager.home().vm(&web()).join("run.json");
    // What the file system has left of it, once the power is back.
    let cut = async |left: &str| {
        noop.stop(&manager.info(&web()).await.unwrap(), Duration::ZERO).await.unwrap();
        fs::write(&later, left).unwrap();
        manager.start(&web()).await.unwrap()
    };
    let now = manager.info(&web()).await.unwrap().spec;
    manager.reconfigure(&web(), VmSpecBuilder::from(now).cpus(3).build().unwrap()).await.unwrap();
    assert_eq!(cut("").await.spec.cpus(), 3);
    manager.add_forward(&web(), &"8080:80".parse().unwrap()).await.unwrap();
    assert_eq!(forwards(&cut("\0\0").await).0, ["22", "8080:80"]);
    manager.rerun_cloud_init(&web()).await.unwrap();
    let vm = cut("").await;
    assert_eq!((vm.spec.cpus(), vm.spec.cloud_init().unwrap().run), (3, 1));
    manager.remove_forward(&web(), &"8080:80".parse().unwrap()).await.unwrap();
    assert_eq!(forwards(&cut("{").await).0, ["22"]);
}

/// An older record that is whole would hide the newer one after a power cut, and nothing would
/// tell.
#[tokio::test]
async fn a_configuration_is_synced_in_both_records_before_it_takes_effect() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let steps = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&steps);
    vmkit::set_step_hook(Some(Box::new(move |step| {
        seen.borrow_mut().push(step);
        Ok(())
    })));
    manager.reconfigure(&web(), with_cpus(3)).await.unwrap();
    vmkit::set_step_hook(None);
    let written =
        ["write the record", "sync the record", "rename the record", "sync the VM's directory"].repeat(2);
    let steps: Vec<_> = steps.borrow().iter().copied().filter(|step| written.contains(step)).collect();
    assert_eq!(steps, written);
}

fn with_cpus(cpus: u32) -> VmSpec {
    VmSpecBuilder::from(spec()).cpus(cpus).build().unwrap()
}

#[tokio::test]
async fn what_a_running_vm_shall_be_waits_for_its_next_start() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    let made = manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let vm = manager.reconfigure(&web(), with_cpus(3)).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.next_spec.unwrap().cpus()), (1, 3));
    // Neither another operation nor a start of what runs already makes it so, or loses it.
    manager.suspend(&web()).await.unwrap();
    manager.resume(&web()).await.unwrap();
    assert_eq!(manager.start(&web()).await.unwrap().spec.cpus(), 1);
    let vm = manager.restart(&web(), Duration::ZERO).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.next_spec), (3, None));
    assert_eq!((vm.id, vm.spec.id()), (made.id, Some(made.id)));
    assert_eq!(manager.info(&web()).await.unwrap().spec.cpus(), 3);
}

#[tokio::test]
async fn what_a_stopped_vm_shall_be_it_is_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let vm = manager.reconfigure(&web(), with_cpus(3)).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.next_spec), (3, None));
    let record = fs::metadata(manager.home().vm(&web()).join("run.json")).unwrap();
    let again = manager.reconfigure(&web(), with_cpus(3)).await.unwrap();
    assert_eq!(again.spec.cpus(), 3);
    let unwritten = fs::metadata(manager.home().vm(&web()).join("run.json")).unwrap();
    assert_eq!(unwritten.ino(), record.ino(), "the record was written again");
}

#[tokio::test]
async fn labels_are_written_while_the_vm_runs_and_a_wish_can_be_taken_back() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let mut labels = Labels::default();
    labels.set("team", "web").unwrap();
    let labelled = VmSpecBuilder::from(with_cpus(3)).labels(labels.clone()).build().unwrap();
    let vm = manager.reconfigure(&web(), labelled).await.unwrap();
    assert_eq!(vm.spec.labels(), &labels);
    assert_eq!(vm.next_spec.unwrap().labels(), &labels);
    let vm = manager.reconfigure(&web(), spec()).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.next_spec), (1, None));
}

#[tokio::test]
async fn an_edit_begins_with_what_the_vm_was_to_be_and_a_plan_of_one_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let cpus = |cpus| move |spec| VmSpecBuilder::from(spec).cpus(cpus).build();
    let off = |spec| VmSpecBuilder::from(spec).vnc(Vnc::Off).build();
    manager.reconfigure_with(&web(), cpus(3)).await.unwrap();
    let (vm, wanted, changes) = manager.plan_reconfigure(&web(), off).await.unwrap();
    assert_eq!((wanted.cpus(), wanted.vnc(), changes.len(), changes[0].field), (3, Vnc::Off, 1, "vnc"));
    assert_eq!(manager.info(&web()).await.unwrap(), vm);
    let (vm, changes) = manager.reconfigure_with(&web(), off).await.unwrap();
    assert_eq!((vm.spec.cpus(), vm.spec.vnc(), changes.len()), (1, Vnc::Unix, 1));
    assert_eq!(vm.next_spec.map(|next| (next.cpus(), next.vnc())), Some((3, Vnc::Off)));
    let refused = |_| Err(vmkit::Error::invalid("cpus", 0, "no"));
    let error = manager.reconfigure_with(&web(), refused).await.unwrap_err();
    assert_eq!(error.to_string(), "cpus: \"0\": no");
    let (vm, _) = manager.reconfigure_with(&web(), |_| Ok(spec())).await.unwrap();
    assert_eq!(vm.next_spec, None, "it is taken back");
}

#[tokio::test]
async fn a_change_that_needs_a_new_vm_is_refused_and_nothing_is_changed() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let other = VmSpecBuilder::from(with_cpus(3)).cloud_init(CloudInitConfig::default()).build().unwrap();
    let error = manager.reconfigure(&web(), other).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().starts_with("cloud_init: \"given\": "), "{error}");
    assert_eq!(manager.info(&web()).await.unwrap().spec.cpus(), 1);
    let error = manager.reconfigure(&VmName::new("none").unwrap(), spec()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_change_of_a_saved_vm_waits_until_it_boots_again() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    assert_eq!(manager.save(&web()).await.unwrap_err().kind(), ErrorKind::InvalidState);
    manager.start(&web()).await.unwrap();
    assert_eq!(manager.save(&web()).await.unwrap().state, VmState::Saved);
    assert_eq!(manager.suspend(&web()).await.unwrap_err().kind(), ErrorKind::InvalidState);
    let before = manager.info(&web()).await.unwrap().spec;
    let (vm, changes) =
        manager.reconfigure_with(&web(), |spec| VmSpecBuilder::from(spec).cpus(3).build()).await.unwrap();
    assert_eq!((vm.spec.cpus(), changes.len()), (before.cpus(), 1));
    let continued = manager.start(&web()).await.unwrap();
    assert_eq!((continued.state, continued.spec.cpus()), (VmState::Running, before.cpus()));
    manager.save(&web()).await.unwrap();
    assert_eq!(manager.discard_saved(&web()).await.unwrap().state, VmState::Stopped);
    assert_eq!(manager.discard_saved(&web()).await.unwrap().state, VmState::Stopped, "nothing to discard");
    assert_eq!(manager.start(&web()).await.unwrap().spec.cpus(), 3);
}
