//! A fake host that a test controls.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::call::PlannedFault;
use super::{CallFault, Dataset, DatasetKind, Illumos, IllumosState, Link, LinkClass, names_in};
use crate::propolis::PropolisBehaviour;

/// The names under which the stand-ins are run.
const TOOLS: [&str; 4] = ["bhyvectl", "dladm", "pfexec", "zfs"];

/// A host whose tools are stand-ins, in a directory.
///
/// ```no_run
/// use vmkit_testkit::propolis::illumos::FakeIllumos;
/// # fn main() -> std::io::Result<()> {
/// # let dir = std::path::Path::new("/tmp/host");
/// // In an integration test of this crate, the binaries are `env!("CARGO_BIN_EXE_vmkit-fake-illumos")` and so on.
/// let host = FakeIllumos::new(dir, "target/debug/vmkit-fake-illumos".as_ref(), "target/debug/vmkit-fake-propolis".as_ref())?;
/// host.add_pool("rpool")?;
/// host.add_link("igb0")?;
/// host.add_volume("rpool/img", b"a raw image")?;
/// host.add_snapshot("rpool/img@base")?;
/// // Run the programs in `host.path()`; afterwards:
/// assert_eq!(host.leftovers()?, [""; 0]);
/// # Ok(()) }
/// ```
///
/// Dropping the value that created it kills the servers that still run on it.
#[derive(Debug)]
pub struct FakeIllumos {
    illumos: Illumos,
    ends_servers: bool,
}

impl FakeIllumos {
    /// Creates a host in `dir`, with links to the two programs under the names of the host's tools.
    ///
    /// # Errors
    /// Fails if a file in `dir` can't be created.
    pub fn new(dir: &Path, tools: &Path, propolis: &Path) -> io::Result<Self> {
        let illumos = Illumos::at(dir.to_owned());
        let fake = Self { illumos, ends_servers: true };
        for made in [fake.path(), fake.illumos.vmm(), fake.illumos.dev().join("zvol/rdsk")] {
            std::fs::create_dir_all(made)?;
        }
        symlink("rdsk", fake.illumos.dev().join("zvol/dsk"))?;
        for tool in TOOLS {
            symlink(tools, fake.path().join(tool))?;
        }
        symlink(propolis, fake.path().join("propolis-server"))?;
        std::fs::write(fake.bootrom(), super::BOOTROM)?;
        IllumosState::change(&fake.illumos, |_| ())?;
        Ok(fake)
    }

    /// Opens the host that another process created in `dir`, such as the parent of a process that
    /// is to be killed.
    pub fn open(dir: &Path) -> Self {
        Self { illumos: Illumos::at(dir.to_owned()), ends_servers: false }
    }

    /// Returns the directory to have in `PATH`: it has `zfs`, `dladm`, `bhyvectl`, `pfexec` and
    /// `propolis-server`.
    ///
    /// Each finds its host by the variable [`DIR`](super::DIR), else by the directory it was
    /// started from.
    pub fn path(&self) -> PathBuf {
        self.illumos.dir.join("bin")
    }

    /// Returns the directory of the host's state.
    pub fn dir(&self) -> &Path {
        &self.illumos.dir
    }

    /// Returns the directory that stands for `/dev`; it has `vmm` and `zvol/rdsk`.
    pub fn dev(&self) -> PathBuf {
        self.illumos.dev()
    }

    /// Returns a file that a server accepts as its firmware.
    pub fn bootrom(&self) -> PathBuf {
        self.illumos.dir.join("OVMF_CODE.fd")
    }

    /// Sets the behaviour of every server that is started from now on.
    ///
    /// # Errors
    /// Fails if the file in the host's directory can't be written.
    pub fn behave(&self, behaviour: &PropolisBehaviour) -> io::Result<()> {
        std::fs::write(self.illumos.behaviour_file(), serde_json::to_vec_pretty(behaviour)?)
    }

    fn give(&self, name: &str, dataset: Dataset) -> io::Result<()> {
        let dataset = Dataset { given: true, ..dataset };
        IllumosState::change(&self.illumos, |state| drop(state.datasets.insert(name.to_owned(), dataset)))
    }

    /// Adds a pool, or a file system in one.
    ///
    /// # Errors
    /// Fails if the host's files can't be read or written; so do the following.
    pub fn add_pool(&self, name: &str) -> io::Result<()> {
        self.give(name, Dataset::new(DatasetKind::Filesystem))
    }

    /// Adds a volume with these contents, a multiple of 1 MiB.
    ///
    /// # Errors
    /// Fails if the host's files can't be read or written.
    pub fn add_volume(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let mut file = self.illumos.make_volume(name)?;
        io::Write::write_all(&mut file, contents)?;
        let size = (contents.len() as u64).next_multiple_of(1024 * 1024).max(1024 * 1024);
        file.set_len(size)?;
        self.give(name, Dataset { volsize: Some(size), ..Dataset::new(DatasetKind::Volume) })
    }

    /// Adds a snapshot, `VOLUME@NAME`, of an existing volume.
    ///
    /// # Errors
    /// Fails if the host's files can't be read or written, and with [`io::ErrorKind::InvalidInput`]
    /// for what `zfs` refuses.
    pub fn add_snapshot(&self, name: &str) -> io::Result<()> {
        let calls = self.calls()?.len();
        let said = self.illumos.run_zfs(&["snapshot", name])?;
        if said.code != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, said.stderr));
        }
        debug_assert_eq!(calls, self.calls()?.len(), "a test's own doing is no call");
        IllumosState::change(&self.illumos, |state| {
            state.datasets.entry(name.to_owned()).and_modify(|dataset| dataset.given = true);
        })
    }

    /// Adds a network card.
    ///
    /// # Errors
    /// Fails if the host's files can't be read or written.
    pub fn add_link(&self, name: &str) -> io::Result<()> {
        let link = Link { given: true, ..Link::bare(LinkClass::Phys, "0:1b:21:0:0:1".to_owned(), false) };
        IllumosState::change(&self.illumos, |state| drop(state.links.insert(name.to_owned(), link)))
    }

    /// Returns the host's state.
    ///
    /// # Errors
    /// Fails if the host's files can't be read.
    pub fn state(&self) -> io::Result<IllumosState> {
        IllumosState::load(&self.illumos)
    }

    /// Returns every call so far, in order: the tool's name, then its arguments.
    ///
    /// # Errors
    /// Fails if the host's files can't be read.
    pub fn calls(&self) -> io::Result<Vec<Vec<String>>> {
        match File::open(self.illumos.dir.join("calls.log")) {
            Ok(file) => BufReader::new(file).lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Plans a fault for the `nth` call from now; the next call is the first.
    ///
    /// # Errors
    /// Fails if the host's files can't be written.
    pub fn plan_fault(&self, nth: u64, fault: CallFault) -> io::Result<()> {
        let mut planned = self.illumos.planned()?;
        planned.push(PlannedFault { call: self.state()?.calls + nth, fault });
        std::fs::write(self.illumos.dir.join("faults.json"), serde_json::to_vec_pretty(&planned)?)
    }

    /// Removes all faults that have not happened yet.
    ///
    /// # Errors
    /// Fails if the host's files can't be written.
    pub fn forget_faults(&self) -> io::Result<()> {
        std::fs::write(self.illumos.dir.join("faults.json"), b"[]")
    }

    /// Returns what exists on the host and was not added by the test: datasets, links, VMs of the
    /// kernel, running servers.
    ///
    /// # Errors
    /// Fails if the host's files can't be read.
    pub fn leftovers(&self) -> io::Result<Vec<String>> {
        let state = self.state()?;
        let mut left = Vec::new();
        let datasets = state.datasets.iter().filter(|(_, dataset)| !dataset.given);
        left.extend(datasets.map(|(name, _)| format!("dataset {name}")));
        let links = state.links.iter().filter(|(_, link)| !link.given);
        left.extend(links.map(|(name, _)| format!("link {name}")));
        left.extend(names_in(&self.illumos.vmm()).into_iter().map(|name| format!("kernel VM {name}")));
        left.extend(self.illumos.servers().into_iter().map(|pid| format!("server {pid}")));
        Ok(left)
    }
}

impl Drop for FakeIllumos {
    fn drop(&mut self) {
        let this = std::process::id().to_string();
        for pid in self.illumos.servers().into_iter().filter(|pid| self.ends_servers && *pid != this) {
            self.illumos.end_server(&pid);
        }
    }
}

impl Illumos {
    /// Kills a server, if it still runs.
    fn end_server(&self, pid: &str) {
        let process = pid.parse().ok().and_then(Pid::from_raw);
        let opened = process.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Looked up again after the pidfd was opened, which refers to one process for good.
        if let (Some(process), true) = (opened, self.servers().iter().any(|other| other == pid)) {
            // It may have ended by itself.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }

    /// Returns the file from which a server on this host reads its behaviour.
    pub fn behaviour_file(&self) -> PathBuf {
        self.dir.join("propolis.json")
    }

    /// Registers a running server on this host for as long as the file is open.
    pub(crate) fn register_server(&self) -> io::Result<File> {
        let dir = self.dir.join("servers");
        std::fs::create_dir_all(&dir)?;
        let file = File::create(dir.join(std::process::id().to_string()))?;
        flock(&file, FlockOperation::LockShared)?;
        Ok(file)
    }

    /// Returns the process ids of the servers that run.
    fn servers(&self) -> Vec<String> {
        let dir = self.dir.join("servers");
        let runs = |pid: &String| {
            let Ok(file) = File::open(dir.join(pid)) else { return false };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Closing is not enough: a child that another thread is just spawning has the file,
                // too.
                Ok(()) => flock(&file, FlockOperation::Unlock).is_err(),
                Err(_) => true,
            }
        };
        names_in(&dir).into_iter().filter(runs).collect()
    }

    /// Runs `zfs` without recording the call.
    fn run_zfs(&self, args: &[&str]) -> io::Result<super::ToolOutput> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        IllumosState::change(self, |state| super::zfs::run(self, state, &args))?
    }
}
