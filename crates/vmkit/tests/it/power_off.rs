//! A guest on Propolis, which has no power button, is asked over SSH: the Propolis server is a
//! fake, the SSH server is OpenSSH.

use std::fs;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use crate::sshd::Sshd;
use vmkit::spec::{BackendOptions, CloudInitConfig, DataDisk, GuestAccess, NetworkConfig, VmName, VmSpec};
use vmkit::ssh::SshPowerOff;
use vmkit::{Hypervisor, PropolisHypervisor, VmState};
use vmkit_testkit::propolis::{FakePropolis, PropolisBehaviour};

/// Far more than a guest that hears needs, even on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// A fake server, and the spec of a VM at it whose guest is reached on this host.
struct World {
    dir: tempfile::TempDir,
    server: FakePropolis,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk.raw"), vec![7; 1 << 20]).unwrap();
        Self { dir, server: FakePropolis::spawn(PropolisBehaviour::default()).unwrap() }
    }

    fn spec(&self, access: Option<GuestAccess>) -> VmSpec {
        let mut options = BackendOptions::default();
        options.set("address", self.server.address().to_string()).unwrap();
        options.set("guest-ip", "127.0.0.1").unwrap();
        let disk = DataDisk::Existing { path: self.dir.path().join("disk.raw"), readonly: false };
        VmSpec::builder(VmName::new("web").unwrap())
            .data_disks(vec![disk])
            .network(NetworkConfig::None)
            .cloud_init(CloudInitConfig { access, ..CloudInitConfig::default() })
            .backend_options(options)
            .build()
            .unwrap()
    }

    fn hypervisor(&self, port: u16) -> PropolisHypervisor {
        PropolisHypervisor::builder(self.dir.path().join("vms"))
            .search_path("/nonexistent".as_ref())
            .with_power_off(SshPowerOff::at(NonZeroU16::new(port).unwrap()))
            .build()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_receives_the_request_powers_itself_off() {
    let world = World::new();
    let asked = world.dir.path().join("asked");
    // In the place of a guest's `poweroff`: it writes down what it was asked for.
    let sshd = Sshd::with(&format!(
        "ForceCommand /bin/sh -c 'echo \"$SSH_ORIGINAL_COMMAND\" > {}'",
        asked.display()
    ));
    let propolis = world.hypervisor(sshd.address.port());
    let vm = propolis.prepare(&world.spec(Some(sshd.access.clone()))).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();

    let began = Instant::now();
    let heard = async {
        while fs::read_to_string(&asked).unwrap_or_default().is_empty() {
            // The program in the guest tells by a file.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        world.server.power_off();
    };
    let (stopped, ()) = tokio::join!(propolis.stop(&vm, PATIENCE), heard);
    assert_eq!(stopped.unwrap().state, VmState::Stopped);
    assert!(began.elapsed() < PATIENCE, "it was ended by force");
    assert_eq!(fs::read_to_string(&asked).unwrap(), "exec sudo -n poweroff\n");
    propolis.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_ignores_the_request_is_ended_at_the_deadline() {
    let world = World::new();
    let sshd = Sshd::with("ForceCommand /bin/false");
    let propolis = world.hypervisor(sshd.address.port());
    let vm = propolis.prepare(&world.spec(Some(sshd.access.clone()))).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let began = Instant::now();
    let stopped = propolis.stop(&vm, Duration::from_secs(2)).await.unwrap();
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(began.elapsed() >= Duration::from_secs(2), "it was not given its time");
    propolis.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_without_any_channel_is_ended_at_once() {
    let world = World::new();
    let propolis = world.hypervisor(9);
    let vm = propolis.prepare(&world.spec(None)).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let began = Instant::now();
    propolis.stop(&vm, PATIENCE).await.unwrap();
    assert!(began.elapsed() < PATIENCE / 2, "it waited for a guest that can't be asked");
    propolis.destroy(vm).await.unwrap();
}
