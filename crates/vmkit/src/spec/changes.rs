//! The differences between an existing VM and a wanted one: [`changes`].
//!
//! Pure. This module is the only place that decides when a change takes effect.
//!
//! | field | applies |
//! | --- | --- |
//! | `labels` | at once |
//! | `forwards` | at once where the backend can while the VM runs, else at the next start |
//! | `cpus`, `memory`, `machine` of the same instruction set, `accel`, `kernel`, `initrd`, `cmdline`, `network`, `restrict`, `vnc`, `console_log`, `run_as`, `cdrom`, whether a data disk is read only | at the next start |
//! | `disk`, to a larger size | at the next start |
//! | `firmware`, from UEFI to BIOS or from either to a kernel | at the next start |
//! | `image`, `disk` to a smaller size, `data_disks`, `cloud_init`, `backend`, `backend_options`, `machine` of another instruction set, `firmware` to UEFI, `network` from none where there is cloud-init | only when the VM is recreated |

use std::fmt::{self, Debug};

use serde::Serialize;

use super::{
    BackendOptions, Boot, CloudInitConfig, DataDisk, Firmware, Labels, MachineType, NetworkConfig,
    PortForward, RootDisk, VmSpec, VmSpecBuilder,
};

/// A field with a changed value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SpecChange {
    /// The field, as named in a file of machines.
    pub field: &'static str,
    /// The present value; empty if it is not set.
    pub from: String,
    /// The wanted value; empty if it is to be unset.
    pub to: String,
    /// When the change takes effect.
    pub applies: TakesEffect,
}

/// When a change takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TakesEffect {
    /// At once, whether the VM runs or not.
    Live,
    /// When the VM is started the next time.
    NextStart,
    /// Only when the VM is removed and created again: the contents of its disks are lost.
    Anew,
}

impl fmt::Display for TakesEffect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TakesEffect::Live => "at once",
            TakesEffect::NextStart => "at the next start",
            TakesEffect::Anew => "only when recreated",
        })
    }
}

/// Returns the changes from the VM of `recorded` to `wanted`, in the order of the fields; none if
/// it matches already.
///
/// `live` says whether the VM runs on a backend that can change forwards meanwhile. Names,
/// identities and the number of cloud-init runs are not compared. For VMs with the label
/// `vmkit.image`, the image's name is compared instead of its path.
pub fn changes(recorded: &VmSpec, wanted: &VmSpec, live: bool) -> Vec<SpecChange> {
    // Destructured in full, so that a new field is not forgotten here.
    let VmSpecBuilder {
        name: _,
        id: _,
        backend,
        cpus,
        memory,
        machine,
        boot: _,
        accel,
        disk,
        data_disks,
        cdrom,
        network,
        cloud_init,
        vnc,
        console_log,
        run_as,
        labels,
        backend_options,
    } = &recorded.0;
    let to = &wanted.0;
    let mut found = ChangeList(Vec::new());
    let text = |tag: &Option<crate::backend_tag::BackendTag>| shown(tag.as_ref());
    found.note("backend", text(backend), text(&to.backend), TakesEffect::Anew);
    if *backend_options != to.backend_options {
        let pairs = |options: &BackendOptions| options.iter().map(pair).collect::<Vec<_>>().join(", ");
        found.note("backend_options", pairs(backend_options), pairs(&to.backend_options), TakesEffect::Anew);
    }
    found.note("cpus", cpus.to_string(), to.cpus.to_string(), TakesEffect::NextStart);
    found.note("memory", memory.to_string(), to.memory.to_string(), TakesEffect::NextStart);
    found.machine(*machine, to.machine);
    found.boot(recorded.boot(), wanted.boot());
    found.note("accel", lower(accel), lower(&to.accel), TakesEffect::NextStart);
    found.image((disk, labels), (&to.disk, &to.labels));
    found.data_disks(data_disks, &to.data_disks);
    let disc = |path: &Option<std::path::PathBuf>| shown(path.as_ref().map(|path| path.display()).as_ref());
    found.note("cdrom", disc(cdrom), disc(&to.cdrom), TakesEffect::NextStart);
    found.network(network, &to.network, live, cloud_init.is_some());
    found.cloud_init(cloud_init.as_ref(), to.cloud_init.as_ref());
    found.note("vnc", lower(vnc), lower(&to.vnc), TakesEffect::NextStart);
    found.note("console_log", console_log.to_string(), to.console_log.to_string(), TakesEffect::NextStart);
    found.note("run_as", shown(run_as.as_ref()), shown(to.run_as.as_ref()), TakesEffect::NextStart);
    found.note("labels", labels_text(labels), labels_text(&to.labels), TakesEffect::Live);
    found.0
}

/// The label with the name of a VM's image.
const IMAGE_LABEL: &str = Labels::IMAGE;

struct ChangeList(Vec<SpecChange>);

impl ChangeList {
    /// Adds a change if the two texts differ.
    fn note(&mut self, field: &'static str, from: String, to: String, applies: TakesEffect) {
        if from != to {
            self.0.push(SpecChange { field, from, to, applies });
        }
    }

    fn machine(&mut self, from: MachineType, to: MachineType) {
        let applies = if from.arch() == to.arch() { TakesEffect::NextStart } else { TakesEffect::Anew };
        self.note("machine", from.as_str().to_owned(), to.as_str().to_owned(), applies);
    }

    fn boot(&mut self, from: &Boot, to: &Boot) {
        let firmware = |boot: &Boot| match boot {
            Boot::Firmware(firmware) => lower(firmware),
            Boot::Kernel(_) => String::new(),
        };
        // UEFI keeps its variables in a file that is created with the VM.
        let is_uefi = matches!(to, Boot::Firmware(Firmware::Uefi));
        let applies = if is_uefi { TakesEffect::Anew } else { TakesEffect::NextStart };
        self.note("firmware", firmware(from), firmware(to), applies);
        let kernel = |boot: &Boot| match boot {
            Boot::Firmware(_) => <[String; 3]>::default(),
            Boot::Kernel(kernel) => [
                kernel.path.display().to_string(),
                kernel.initrd.as_ref().map(|initrd| initrd.display().to_string()).unwrap_or_default(),
                kernel.cmdline.clone(),
            ],
        };
        for ((field, from), to) in
            ["kernel", "initrd", "cmdline"].into_iter().zip(kernel(from)).zip(kernel(to))
        {
            self.note(field, from, to, TakesEffect::NextStart);
        }
    }

    fn image(&mut self, from: (&Option<RootDisk>, &Labels), to: (&Option<RootDisk>, &Labels)) {
        let path = |disk: &Option<RootDisk>| {
            disk.as_ref().map(|disk| disk.image.display().to_string()).unwrap_or_default()
        };
        let (from_name, to_name) = match (from.1.get(IMAGE_LABEL), to.1.get(IMAGE_LABEL)) {
            (Some(from), Some(to)) => (from.to_owned(), to.to_owned()),
            _ => (path(from.0), path(to.0)),
        };
        self.note("image", from_name, to_name, TakesEffect::Anew);
        let size = |disk: &Option<RootDisk>| disk.as_ref().and_then(|disk| disk.size);
        // Without a size the disk has the image's, which is not larger.
        let grows = size(to.0).is_some() && size(from.0) < size(to.0);
        let applies = if grows { TakesEffect::NextStart } else { TakesEffect::Anew };
        self.note("disk", shown(size(from.0).as_ref()), shown(size(to.0).as_ref()), applies);
    }

    fn data_disks(&mut self, from: &[DataDisk], to: &[DataDisk]) {
        let what = |disk: &DataDisk| match disk {
            DataDisk::Fresh { size } => size.to_string(),
            DataDisk::Existing { path, .. } => path.display().to_string(),
        };
        let whole = |disk: &DataDisk| match disk {
            DataDisk::Existing { readonly: true, .. } => format!("{}:ro", what(disk)),
            _ => what(disk),
        };
        let list = |disks: &[DataDisk]| disks.iter().map(whole).collect::<Vec<_>>().join(", ");
        let same_disks = from.iter().map(what).eq(to.iter().map(what));
        let applies = if same_disks { TakesEffect::NextStart } else { TakesEffect::Anew };
        self.note("data_disks", list(from), list(to), applies);
    }

    fn network(&mut self, from: &NetworkConfig, to: &NetworkConfig, live: bool, cloud_init: bool) {
        let mode = |network: &NetworkConfig| match network {
            NetworkConfig::User(_) => "user".to_owned(),
            NetworkConfig::Tap { bridge } => format!("tap:{bridge}"),
            NetworkConfig::Vnic { link } => format!("vnic:{link}"),
            NetworkConfig::None => "none".to_owned(),
        };
        // The guest of a VM without a network got a network-config without a device at its first
        // boot.
        let untold = *from == NetworkConfig::None && cloud_init;
        let applies = if untold { TakesEffect::Anew } else { TakesEffect::NextStart };
        self.note("network", mode(from), mode(to), applies);
        let user = |network: &NetworkConfig| match network {
            NetworkConfig::User(user) => user.clone(),
            _ => super::UserNetwork::default(),
        };
        let both = matches!((from, to), (NetworkConfig::User(_), NetworkConfig::User(_)));
        let (from, to) = (user(from), user(to));
        let applies = if live && both { TakesEffect::Live } else { TakesEffect::NextStart };
        if !same_set(&from.forwards, &to.forwards) {
            let list = |forwards: &[PortForward]| {
                forwards.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            };
            self.note("forwards", list(&from.forwards), list(&to.forwards), applies);
        }
        if both {
            self.note("restrict", from.restrict.to_string(), to.restrict.to_string(), TakesEffect::NextStart);
        }
    }

    fn cloud_init(&mut self, from: Option<&CloudInitConfig>, to: Option<&CloudInitConfig>) {
        let (Some(from), Some(to)) = (from, to) else {
            let there = |config: Option<&CloudInitConfig>| config.map_or("", |_| "given").to_owned();
            return self.note("cloud_init", there(from), there(to), TakesEffect::Anew);
        };
        let hostname = |config: &CloudInitConfig| config.hostname.clone().unwrap_or_default();
        self.note("cloud_init.hostname", hostname(from), hostname(to), TakesEffect::Anew);
        // Documents are too long to show, and keys are secret.
        let differ = [
            ("cloud_init.user_data", from.user_data != to.user_data),
            ("cloud_init.network_config", from.network_config != to.network_config),
            ("cloud_init.access", from.access != to.access),
        ];
        for (field, _) in differ.into_iter().filter(|(_, differs)| *differs) {
            self.note(field, "as it was".to_owned(), "changed".to_owned(), TakesEffect::Anew);
        }
    }
}

/// Returns whether the two lists have the same forwards, in any order.
fn same_set(one: &[PortForward], other: &[PortForward]) -> bool {
    one.len() == other.len() && one.iter().all(|forward| other.contains(forward))
}

fn shown(value: Option<&impl fmt::Display>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

/// Returns the name of a unit variant as files have it.
fn lower(variant: &impl Debug) -> String {
    format!("{variant:?}").to_lowercase()
}

/// Returns the labels as text, without the one that is reported as `image`.
fn labels_text(labels: &Labels) -> String {
    labels.iter().filter(|(key, _)| *key != IMAGE_LABEL).map(pair).collect::<Vec<_>>().join(", ")
}

fn pair((key, value): (&str, &str)) -> String {
    format!("{key}={value}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend_tag::BackendTag;
    use crate::spec::{Accel, GuestAccess, Kernel, Mib, SshKeyPair, UserData, UserNetwork, VmName, Vnc};

    fn mib(mib: u64) -> Mib {
        Mib::new(mib).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let mut labels = Labels::default();
        pairs.iter().for_each(|(key, value)| labels.set(*key, *value).unwrap());
        labels
    }

    fn user(forwards: &[&str]) -> NetworkConfig {
        NetworkConfig::User(UserNetwork::with_ssh(forwards.iter().map(|f| f.parse().unwrap()).collect()))
    }

    fn base() -> VmSpecBuilder {
        VmSpec::builder(VmName::new("shop-web").unwrap())
            .disk(RootDisk { image: "/images/a".into(), size: Some(mib(2048)) })
            .data_disks(vec![DataDisk::Existing { path: "/d".into(), readonly: false }])
            .network(user(&["8080:80"]))
            .cloud_init(CloudInitConfig::default())
    }

    fn found(recorded: VmSpecBuilder, wanted: VmSpecBuilder, live: bool) -> Vec<(&'static str, TakesEffect)> {
        let changes = changes(&recorded.build().unwrap(), &wanted.build().unwrap(), live);
        changes.into_iter().map(|change| (change.field, change.applies)).collect()
    }

    #[test]
    fn a_vm_that_is_right_has_no_changes() {
        assert_eq!(found(base(), base(), true), []);
        let other_name = VmSpecBuilder { name: VmName::new("other").unwrap(), ..base() };
        assert_eq!(found(base(), other_name.id(uuid::Uuid::from_u128(7)), true), []);
    }

    #[test]
    fn every_field_takes_effect_when_the_table_says() {
        use TakesEffect::{Anew, Live, NextStart};
        let kernel =
            |path: &str| Boot::Kernel(Kernel { path: path.into(), initrd: None, cmdline: String::new() });
        let raw = |text: &str| CloudInitConfig {
            user_data: UserData::Raw(text.to_owned()),
            ..CloudInitConfig::default()
        };
        let mut options = BackendOptions::default();
        options.set("dataset", "tank").unwrap();
        let disk = |image: &str, mib: Option<Mib>| RootDisk { image: image.into(), size: mib };
        type Row = (VmSpecBuilder, VmSpecBuilder, &'static str, TakesEffect);
        let table: Vec<Row> = vec![
            (base(), base().cpus(2), "cpus", NextStart),
            (base(), base().memory(mib(1024)), "memory", NextStart),
            (base(), base().accel(Accel::Tcg), "accel", NextStart),
            (base(), base().vnc(Vnc::Off), "vnc", NextStart),
            (base(), base().console_log(mib(8)), "console_log", NextStart),
            (base(), base().run_as("nobody".parse::<crate::spec::UserName>().unwrap()), "run_as", NextStart),
            (base(), base().labels(labels(&[("team", "web")])), "labels", Live),
            (base(), base().backend(BackendTag::Noop), "backend", Anew),
            (base(), base().backend_options(options), "backend_options", Anew),
            (base(), base().disk(disk("/images/b", Some(mib(2048)))), "image", Anew),
            (base(), base().disk(disk("/images/a", Some(mib(4096)))), "disk", NextStart),
            (base(), base().disk(disk("/images/a", Some(mib(1024)))), "disk", Anew),
            (base(), base().disk(disk("/images/a", None)), "disk", Anew),
            (base().disk(disk("/images/a", None)), base(), "disk", NextStart),
            (base(), base().data_disks(vec![]), "data_disks", Anew),
            (
                base(),
                base().data_disks(vec![DataDisk::Existing { path: "/d".into(), readonly: true }]),
                "data_disks",
                NextStart,
            ),
            (base(), base().cdrom("/x.iso".into()), "cdrom", NextStart),
            (base().cdrom("/x.iso".into()), base(), "cdrom", NextStart),
            (base(), base().boot(Boot::Firmware(Firmware::Uefi)), "firmware", Anew),
            (base().boot(Boot::Firmware(Firmware::Uefi)), base(), "firmware", NextStart),
            (base().boot(kernel("/a")), base().boot(kernel("/b")), "kernel", NextStart),
            (
                base().boot(kernel("/a")),
                base().boot(kernel("/a")).machine(MachineType::Microvm),
                "machine",
                NextStart,
            ),
            (
                base().boot(kernel("/a")),
                base().boot(kernel("/a")).machine(MachineType::Virt),
                "machine",
                Anew,
            ),
            (base(), base().network(user(&[])), "forwards", Live),
            (base(), base().cloud_init(raw("#!/bin/sh\n")), "cloud_init.user_data", Anew),
        ];
        for (recorded, wanted, field, applies) in table {
            assert_eq!(found(recorded, wanted, true), [(field, applies)]);
        }
    }

    #[test]
    fn forwards_wait_for_the_next_start_where_they_can_not_be_live() {
        assert_eq!(found(base(), base().network(user(&[])), false), [("forwards", TakesEffect::NextStart)]);
        let changed = found(base(), base().network(NetworkConfig::None), true);
        assert_eq!(changed, [("network", TakesEffect::NextStart), ("forwards", TakesEffect::NextStart)]);
        let reordered = user(&["9090:90", "8080:80"]);
        assert_eq!(found(base().network(user(&["8080:80", "9090:90"])), base().network(reordered), true), []);
    }

    #[test]
    fn a_guest_prepared_without_a_network_needs_another_run_of_cloud_init() {
        let changed = found(base().network(NetworkConfig::None), base().network(user(&[])), true);
        assert_eq!(changed, [("network", TakesEffect::Anew), ("forwards", TakesEffect::NextStart)]);
    }

    #[test]
    fn an_image_is_its_name_where_both_keep_it() {
        let moved = RootDisk { image: "/images/new".into(), size: Some(mib(2048)) };
        let named = |name| labels(&[("vmkit.image", name)]);
        let pulled_again = base().disk(moved.clone()).labels(named("debian:12"));
        assert_eq!(found(base().labels(named("debian:12")), pulled_again, true), []);
        let another = base().disk(moved).labels(named("debian:13"));
        assert_eq!(found(base().labels(named("debian:12")), another, true), [("image", TakesEffect::Anew)]);
    }

    #[test]
    fn no_secret_is_shown() {
        let key = |text: &str| SshKeyPair {
            private: format!(
                "-----BEGIN OPENSSH PRIVATE KEY-----\n{text}\n-----END OPENSSH PRIVATE KEY-----\n"
            ),
            public: format!("ssh-ed25519 AAAA{text}"),
        };
        let with = |text: &str| CloudInitConfig {
            access: Some(GuestAccess { user: "vmkit".into(), login_key: key(text), host_key: key(text) }),
            ..CloudInitConfig::default()
        };
        let (from, to) = (base().cloud_init(with("one")), base().cloud_init(with("two")));
        let changes = changes(&from.build().unwrap(), &to.build().unwrap(), true);
        assert_eq!(changes.len(), 1);
        assert!(!format!("{changes:?}").contains("AAAA"), "{changes:?}");
    }
}
