//! What is kept beside a machine's VM: how far its provisioning came, and what that said.
//!
//! ```text
//! <vm>/kept/provision.json    the steps that were begun and how they ended; replaced as a whole
//! <vm>/kept/provision.log     what they printed, within a bound, and provision.log.1
//! ```
//!
//! It goes with the VM: a machine that is recreated is provisioned again.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::provisioned::ProvisionRecord;
use crate::boundedlog::BoundedLog;
use crate::error::{Error, Result};
use crate::spec::VmName;
use crate::steps::step;
use crate::store::Home;

/// How much of what the steps print is kept at the most.
const LOG_BYTES: u64 = 1 << 20;

/// The kept files of one machine.
#[derive(Debug, Clone)]
pub(super) struct MachineFiles {
    dir: PathBuf,
}

impl MachineFiles {
    pub(super) fn of(home: &Home, vm: &VmName) -> Self {
        Self { dir: home.kept(vm) }
    }

    /// Returns the file that keeps what the steps printed.
    pub(super) fn log_path(&self) -> PathBuf {
        self.dir.join("provision.log")
    }

    /// Opens the log to append.
    pub(super) fn log(&self) -> Result<BoundedLog> {
        self.create()?;
        let path = self.log_path();
        step("open the provisioning log")
            .and_then(|()| BoundedLog::open(&path, LOG_BYTES))
            .map_err(Error::io("open", path))
    }

    /// Reads how far the provisioning came; nothing yet where there is no record.
    pub(super) fn provisioned(&self) -> Result<ProvisionRecord> {
        let path = self.record();
        match fs::read(&path) {
            Ok(bytes) => ProvisionRecord::decode(&path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ProvisionRecord::default()),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Writes how far the provisioning came, so that it outlives a power cut: the guest's disk does
    /// so, too.
    pub(super) fn write(&self, provisioned: &ProvisionRecord) -> Result<()> {
        self.replace(&self.record(), &provisioned.encode())
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.create()?;
        let unfinished = path.with_extension("json.new");
        let written = replace(path, &unfinished, bytes);
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written.map_err(Error::io("write", path))
    }

    fn record(&self) -> PathBuf {
        self.dir.join("provision.json")
    }

    fn create(&self) -> Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(Error::io("create", &self.dir)),
        }
    }
}

fn replace(path: &Path, unfinished: &Path, bytes: &[u8]) -> io::Result<()> {
    step("write a kept file")?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    step("rename a kept file")?;
    fs::rename(unfinished, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}
