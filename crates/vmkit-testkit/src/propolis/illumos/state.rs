//! What the stand-ins remember between two calls.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use super::Illumos;

/// All that a host has of ZFS and of links.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IllumosState {
    /// Pools, file systems, volumes and snapshots, by their full names.
    pub datasets: BTreeMap<String, Dataset>,
    /// Links by their names.
    pub links: BTreeMap<String, Link>,
    /// How many calls there were.
    pub calls: u64,
}

/// One dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// What it is.
    pub kind: DatasetKind,
    /// How large a volume, or the volume of a snapshot, is, in bytes.
    pub volsize: Option<u64>,
    /// The snapshot that it is a clone of.
    pub origin: Option<String>,
    /// What was set on it, besides its size.
    pub properties: BTreeMap<String, String>,
    /// Whether the test put it there: it is no leftover.
    pub given: bool,
}

/// What a dataset is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatasetKind {
    /// A file system; a pool is one too.
    Filesystem,
    /// A block device.
    Volume,
    /// A dataset as it was.
    Snapshot,
}

/// One link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// What it is.
    pub class: LinkClass,
    /// The link under a VNIC.
    pub over: Option<String>,
    /// Its address, as `dladm` prints it: without leading zeros.
    pub mac: String,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// Its VLAN, 0 for none.
    pub vlan: u16,
    /// Whether it is gone after a reboot.
    pub temporary: bool,
    /// What else was set on it.
    pub properties: BTreeMap<String, String>,
    /// Whether the test put it there: it is no leftover.
    pub given: bool,
}

/// What a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkClass {
    /// A network card.
    Phys,
    /// A virtual one over another link.
    Vnic,
    /// A switch with nothing behind it.
    Etherstub,
}

impl IllumosState {
    /// Reads the state of a host; an unused one has none.
    ///
    /// # Errors
    /// Whatever the system says, and a state that is not one.
    pub fn load(illumos: &Illumos) -> io::Result<Self> {
        match std::fs::read(illumos.dir.join("state.json")) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Changes the state of a host atomically.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn change<T>(illumos: &Illumos, change: impl FnOnce(&mut Self) -> T) -> io::Result<T> {
        let lock = illumos.lock()?;
        let mut state = Self::load(illumos)?;
        let answer = change(&mut state);
        let new = illumos.dir.join("state.json.new");
        std::fs::write(&new, serde_json::to_vec_pretty(&state)?)?;
        std::fs::rename(&new, illumos.dir.join("state.json"))?;
        drop(lock);
        Ok(answer)
    }
}
