//! What a VM asks of this backend in particular, and what stands in for what it does not say.
//!
//! Pure: text to checked values.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::spec::{LinkName, RootDisk, VmSpec};

/// The keys of a VM's `backend_options`.
pub(super) const KEYS: [&str; 7] =
    ["address", "bootrom", "dataset", "guest-ip", "program", "serial-number", "vnic"];

/// What a VM without options of its own gets.
#[derive(Debug, Clone, Default)]
pub(super) struct OptionDefaults {
    pub(super) dataset: Option<String>,
    pub(super) bootrom: Option<PathBuf>,
    pub(super) program: Option<PathBuf>,
    pub(super) address: Option<SocketAddr>,
}

/// What a VM asks for, read and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PropolisOptions {
    /// Below which dataset its volumes are made.
    pub(super) dataset: Option<String>,
    /// The firmware's file, where it was named.
    pub(super) bootrom: Option<PathBuf>,
    /// The server's program, where it was named.
    pub(super) program: Option<PathBuf>,
    /// Where a server runs already.
    pub(super) address: Option<SocketAddr>,
    /// Where the guest is reached.
    pub(super) guest_ip: Option<IpAddr>,
    /// A VNIC that is there already.
    pub(super) vnic: Option<LinkName>,
    /// What the guest sees as the machine's serial number.
    pub(super) serial_number: Option<String>,
}

impl PropolisOptions {
    /// Reads a spec's options over the backend's defaults.
    ///
    /// # Errors
    /// `InvalidInput` on `backend_options.KEY`.
    pub(super) fn of(spec: &VmSpec, defaults: &OptionDefaults) -> Result<Self> {
        let options = spec.backend_options();
        options.check_known(&KEYS)?;
        let path = |key: &'static str, default: &Option<PathBuf>| match options.get(key) {
            Some(text) if text.starts_with('/') => Ok(Some(PathBuf::from(text))),
            Some(text) => Err(refused(key, text, "pass an absolute path")),
            None => Ok(default.clone()),
        };
        let address = options.get("address").map(|text| {
            text.parse::<SocketAddr>()
                .map_err(|_| refused("address", text, "write IP:PORT, such as 127.0.0.1:12400"))
        });
        let guest_ip = options
            .get("guest-ip")
            .map(|text| text.parse::<IpAddr>().map_err(|_| refused("guest-ip", text, "write an IP address")));
        let dataset = options.get("dataset").or(defaults.dataset.as_deref());
        Ok(Self {
            dataset: dataset.map(|text| check_dataset("dataset", text)).transpose()?,
            bootrom: path("bootrom", &defaults.bootrom)?,
            program: path("program", &defaults.program)?,
            address: address.transpose()?.or(defaults.address),
            guest_ip: guest_ip.transpose()?,
            vnic: options.get("vnic").map(LinkName::new).transpose()?,
            serial_number: options.get("serial-number").map(str::to_owned),
        })
    }
}

fn refused(key: &'static str, value: &str, expected: &str) -> Error {
    Error::invalid(format!("backend_options.{key}"), value, expected)
}

/// The snapshot of a ZFS volume, such as `tank/img/debian@base`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ZfsSnapshot(String);

impl ZfsSnapshot {
    /// Reads an image's name; `None` for what is the path of a file.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for a name that is no snapshot's.
    pub(super) fn of(image: &std::path::Path) -> Result<Option<Self>> {
        let Some(name) = image.to_str().and_then(|text| text.strip_prefix(RootDisk::ZFS)) else {
            return Ok(None);
        };
        let expected = "an image on ZFS is written zfs:POOL/DATASET@SNAPSHOT";
        let wrong = || Error::invalid("image", image.display(), expected);
        let (dataset, snapshot) = name.split_once('@').ok_or_else(wrong)?;
        let sound = is_dataset(dataset) && dataset.contains('/') && is_component(snapshot);
        if sound { Ok(Some(Self(name.to_owned()))) } else { Err(wrong()) }
    }

    /// Returns its full name.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the pool that it is in, and that its clones can be in.
    pub(super) fn pool(&self) -> &str {
        pool_of(&self.0)
    }
}

/// Returns the pool of a dataset.
pub(super) fn pool_of(dataset: &str) -> &str {
    dataset.split('/').next().unwrap_or(dataset)
}

fn check_dataset(key: &'static str, text: &str) -> Result<String> {
    if is_dataset(text) {
        return Ok(text.to_owned());
    }
    Err(refused(key, text, "a dataset is POOL or POOL/NAME…, of letters, digits, _ - . and :"))
}

/// Returns whether this may be a dataset's name; 200 bytes leave room below the 255 that ZFS
/// allows.
///
/// Source: zfs(8), "ZFS File System Hierarchy".
fn is_dataset(text: &str) -> bool {
    text.len() <= 200
        && text.split('/').all(is_component)
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
}

fn is_component(text: &str) -> bool {
    let clean = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
    !text.is_empty() && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendOptions, Boot, Kernel, VmName};
    use std::path::Path;

    fn spec(options: &[(&str, &str)]) -> VmSpec {
        let kernel = Kernel { path: "/k".into(), initrd: None, cmdline: String::new() };
        let mut all = BackendOptions::default();
        for (key, value) in options {
            all.set(*key, *value).unwrap();
        }
        let spec = VmSpec::builder(VmName::new("web").unwrap()).boot(Boot::Kernel(kernel));
        spec.backend_options(all).build().unwrap()
    }

    #[test]
    fn an_option_of_a_vm_overrides_that_of_its_backend() {
        let defaults = OptionDefaults {
            dataset: Some("rpool/vm".into()),
            address: Some("127.0.0.1:1".parse().unwrap()),
            ..OptionDefaults::default()
        };
        let of = |spec| PropolisOptions::of(&spec, &defaults).unwrap();
        assert_eq!(of(spec(&[])).dataset.as_deref(), Some("rpool/vm"));
        let own = of(spec(&[("dataset", "tank"), ("address", "[::1]:12400"), ("guest-ip", "10.0.0.9")]));
        assert_eq!(own.dataset.as_deref(), Some("tank"));
        assert_eq!(own.address, Some("[::1]:12400".parse().unwrap()));
        assert_eq!(own.guest_ip, Some("10.0.0.9".parse().unwrap()));
    }

    #[test]
    fn each_senseless_option_is_refused_by_its_name() {
        for (key, value) in [
            ("address", "server:80"),
            ("bootrom", "OVMF.fd"),
            ("dataset", "../tank"),
            ("dataset", "tank//vm"),
            ("dataset", "-tank"),
            ("guest-ip", "ten"),
            ("program", "propolis-server"),
            ("pool", "tank"),
        ] {
            let error = PropolisOptions::of(&spec(&[(key, value)]), &OptionDefaults::default())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(&format!("backend_options.{key}: ")), "{error}");
        }
        let error = PropolisOptions::of(&spec(&[("vnic", "net")]), &OptionDefaults::default()).unwrap_err();
        assert!(error.to_string().contains("ends with a digit"), "{error}");
    }

    #[test]
    fn an_image_on_zfs_is_a_snapshot_or_an_error() {
        let of = |text: &str| ZfsSnapshot::of(Path::new(text));
        let found = of("zfs:tank/img/debian-12@base").unwrap().unwrap();
        assert_eq!((found.as_str(), found.pool()), ("tank/img/debian-12@base", "tank"));
        assert_eq!(of("/images/zfs:x.raw").unwrap(), None);
        for wrong in ["zfs:", "zfs:tank/img", "zfs:tank@base", "zfs:tank/a@", "zfs:tank/a@b@c", "zfs:/a@b"] {
            assert!(of(wrong).unwrap_err().to_string().contains("POOL/DATASET@SNAPSHOT"), "{wrong}");
        }
    }
}
