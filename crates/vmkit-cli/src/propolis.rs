//! How Propolis is set up for this user: from the environment, which the library never reads.

use std::env;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use vmkit::host::doctor::PropolisHost;
use vmkit::ssh::SshPowerOff;
use vmkit::store::Home;
use vmkit::{Error, PropolisHypervisor};

/// Where the server's firmware is looked for, as the library does.
const BOOTROM: &str = "/var/ovmf/OVMF_CODE.fd";

/// What the environment says about Propolis; a VM's own `--backend-option` goes before.
#[derive(Debug, Default, PartialEq, Eq)]
struct PropolisEnv {
    program: Option<PathBuf>,
    bootrom: Option<PathBuf>,
    dataset: Option<String>,
    address: Option<SocketAddr>,
    pfexec: bool,
    dev: Option<PathBuf>,
}

/// Returns the backend as the environment has it. Touches nothing.
///
/// # Errors
/// `InvalidInput` with the variable whose value makes no sense.
pub(crate) fn hypervisor(home: &Home) -> Result<PropolisHypervisor, Error> {
    let settings = PropolisEnv::read(env::var_os)?;
    let mut propolis = PropolisHypervisor::builder(home.vms())
        .pfexec(settings.pfexec)
        .with_power_off(SshPowerOff::default());
    if let Some(path) = env::var_os("PATH") {
        propolis = propolis.search_path(&path);
    }
    if let Some(program) = settings.program {
        propolis = propolis.program(program);
    }
    if let Some(bootrom) = settings.bootrom {
        propolis = propolis.bootrom(bootrom);
    }
    if let Some(dataset) = settings.dataset {
        propolis = propolis.dataset(dataset);
    }
    if let Some(address) = settings.address {
        propolis = propolis.address(address);
    }
    if let Some(dev) = settings.dev {
        propolis = propolis.dev_vmm(dev.join("vmm")).zvol_dir(dev.join("zvol/rdsk"));
    }
    Ok(propolis.build())
}

/// Returns where the backend will look for what it needs.
///
/// # Errors
/// As [`hypervisor`].
pub(crate) fn host(search_path: Vec<PathBuf>) -> Result<PropolisHost, Error> {
    let settings = PropolisEnv::read(env::var_os)?;
    Ok(PropolisHost {
        search_path,
        program: settings.program,
        bootrom: settings.bootrom.unwrap_or_else(|| BOOTROM.into()),
        dev: settings.dev.unwrap_or_else(|| "/dev".into()),
        pfexec: settings.pfexec,
        address: settings.address,
    })
}

impl PropolisEnv {
    fn read(environment: impl Fn(&'static str) -> Option<OsString>) -> Result<Self, Error> {
        let text = |name: &'static str| match environment(name).filter(|value| !value.is_empty()) {
            Some(value) => match value.into_string() {
                Ok(text) => Ok(Some(text)),
                Err(value) => Err(Error::invalid(name, value.display(), "the value must be UTF-8")),
            },
            None => Ok(None),
        };
        let path = |name: &'static str| match text(name)? {
            Some(path) if !path.starts_with('/') => Err(Error::invalid(name, path, "pass an absolute path")),
            path => Ok(path.map(PathBuf::from)),
        };
        let address = match text("VMKIT_PROPOLIS_ADDRESS")? {
            Some(text) => Some(text.parse().map_err(|_| {
                Error::invalid("VMKIT_PROPOLIS_ADDRESS", text, "write IP:PORT, such as 127.0.0.1:12400")
            })?),
            None => None,
        };
        let pfexec = match text("VMKIT_PROPOLIS_PFEXEC")?.as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => return Err(Error::invalid("VMKIT_PROPOLIS_PFEXEC", other, "write 1 or 0")),
        };
        Ok(Self {
            program: path("VMKIT_PROPOLIS_SERVER")?,
            bootrom: path("VMKIT_PROPOLIS_BOOTROM")?,
            dataset: text("VMKIT_PROPOLIS_DATASET")?,
            address,
            pfexec,
            dev: path("VMKIT_PROPOLIS_DEV")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<PropolisEnv, Error> {
        PropolisEnv::read(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn what_is_not_set_or_empty_is_left_to_the_library() {
        assert_eq!(read(&[]).unwrap(), PropolisEnv::default());
        assert_eq!(read(&[("VMKIT_PROPOLIS_ADDRESS", "")]).unwrap(), PropolisEnv::default());
    }

    #[test]
    fn every_variable_is_read() {
        let found = read(&[
            ("VMKIT_PROPOLIS_SERVER", "/opt/propolis-server"),
            ("VMKIT_PROPOLIS_BOOTROM", "/opt/OVMF_CODE.fd"),
            ("VMKIT_PROPOLIS_DATASET", "tank/vm"),
            ("VMKIT_PROPOLIS_ADDRESS", "127.0.0.1:12400"),
            ("VMKIT_PROPOLIS_PFEXEC", "1"),
            ("VMKIT_PROPOLIS_DEV", "/dev"),
        ]);
        let expected = PropolisEnv {
            program: Some("/opt/propolis-server".into()),
            bootrom: Some("/opt/OVMF_CODE.fd".into()),
            dataset: Some("tank/vm".to_owned()),
            address: Some("127.0.0.1:12400".parse().unwrap()),
            pfexec: true,
            dev: Some("/dev".into()),
        };
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn a_senseless_value_is_reported_with_its_variable() {
        for (name, value) in [
            ("VMKIT_PROPOLIS_SERVER", "propolis-server"),
            ("VMKIT_PROPOLIS_BOOTROM", "./OVMF"),
            ("VMKIT_PROPOLIS_ADDRESS", "server"),
            ("VMKIT_PROPOLIS_PFEXEC", "yes"),
        ] {
            let error = read(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: ")), "{error}");
        }
    }
}
