//! A guest that is to be another than the one it is a copy of.

use std::time::Duration;

use vmkit::Hypervisor;
use vmkit::qemu::{GuestAgent, IdentityPart, NewIdentity};
use vmkit::spec::{MachineType, VmName};
use vmkit_testkit::guest;

use crate::harness::{Place, agent, booted, run, sh, started};

/// An emulated Debian on a busy host, until its agent runs.
const BOOT: Duration = Duration::from_secs(900);

#[tokio::test(flavor = "current_thread")]
async fn debian_gets_another_machine_id_name_and_host_keys_and_fresh_random_numbers() {
    const LOOK: &str =
        "cat /etc/machine-id /proc/sys/kernel/hostname /etc/hostname /etc/ssh/*.pub /etc/hosts";
    let place = Place::new();
    let qemu = place.hypervisor();
    let debian = guest::debian();
    let vm = started(&qemu, &debian.spec("twin", MachineType::Q35, "").build().unwrap()).await;
    let mut agent = GuestAgent::connect(run(&vm).agent.as_ref().unwrap(), BOOT).await.unwrap();
    let prepare = "rm -f /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; \
                   hostname twin; echo 127.0.1.1 twin twin.example >/etc/hosts; touch /var/lib/systemd/random-seed; sync";
    agent.exec("/bin/sh", &["-c", prepare], None, BOOT).await.unwrap();
    drop(agent);
    let before = sh(&qemu, &vm, LOOK).await;

    let name = VmName::new("other").unwrap();
    let mut agent = GuestAgent::connect(run(&vm).agent.as_ref().unwrap(), BOOT).await.unwrap();
    let mut identity = NewIdentity::default();
    identity.host_name = Some(&name);
    let renewed = agent.renew_identity(&identity, BOOT).await.unwrap();
    drop(agent);
    assert_eq!(renewed.shared, []);
    let after = sh(&qemu, &vm, LOOK).await;
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    assert_eq!(after.len(), before.len(), "{before:?} {after:?}");
    assert_ne!(after[0], before[0]);
    assert!(after[0].len() == 32 && after[0].bytes().all(|byte| byte.is_ascii_hexdigit()), "{after:?}");
    assert_eq!(&after[1..3], ["other", "other"]);
    assert_ne!(after[3], before[3]);
    assert_eq!(renewed.host_keys, [after[3].trim()]);
    assert_eq!(after[4], "127.0.1.1 other twin.example");
    let seed = sh(&qemu, &vm, "stat -c '%a %s' /var/lib/systemd/random-seed; ls /dev/shm; id -u").await;
    assert_eq!(seed, "600 512\n0");
    qemu.destroy(vm).await.unwrap();
}

/// It has no Perl, no Python, no SSH server and no systemd.
#[tokio::test(flavor = "current_thread")]
async fn a_guest_of_busybox_reseeds_by_a_program_that_comes_along_and_reports_what_fails() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &guest::tiny().spec("bare", MachineType::Q35, "").build().unwrap()).await;
    let renewed = agent(&vm).await.renew_identity(&NewIdentity::default(), BOOT).await.unwrap();
    assert_eq!((renewed.shared, renewed.host_keys), (vec![], vec![]));
    sh(&qemu, &vm, "rm /dev/urandom && mkdir /dev/urandom").await;
    let renewed = agent(&vm).await.renew_identity(&NewIdentity::default(), BOOT).await.unwrap();
    let [failed] = &renewed.shared[..] else { panic!("{renewed:?}") };
    assert_eq!(failed.part, IdentityPart::RandomNumbers);
    assert!(failed.problem.contains("/dev/urandom"), "{failed:?}");
    qemu.destroy(vm).await.unwrap();
}
