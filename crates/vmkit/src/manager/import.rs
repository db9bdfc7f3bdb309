//! Imports of VMs from files.
//!
//! An import is a creation: its record says so until every byte is compared, so what a killed one
//! has left is removed by the next operation. The file is not trusted. What it says of the VM may
//! lead to no file of this host, unless the caller accepts that.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tracing::warn;

use super::{VmManager, give_up, intent};
use crate::abilities::ImportedVm;
use crate::archive::{ArchiveReader, ExportHeader, FILES, KEPT, ListedFile, MOST_RECORD_BYTES};
use crate::blocking::blocking;
use crate::error::{Error, Result, ValueProblem};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::{Digest, ImportedBase, PullProgress, PullStage};
use crate::input_file::InputStream;
use crate::lifecycle::{Operation, VmState};
use crate::room::check_room;
use crate::span::{about, operation, within};
use crate::spec::{RootDisk, SnapshotName, VmName, VmSpec};
use crate::steps::step;
use crate::store::{LockedVm, VmRecord};

/// Whether an imported VM may use files of this host that its export only names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostFilePolicy {
    /// Such a VM is refused: who made the export chose the paths, and the guest could read them.
    #[default]
    Refuse,
    /// The VM has its kernel, its disc and its read-only disks by the paths that it had.
    Accept,
}

/// How a VM is imported.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct VmImportOptions {
    /// The name that it gets, instead of the one that it had.
    pub name: Option<VmName>,
    /// Whether it may use files of this host.
    pub host_files: HostFilePolicy,
}

impl VmImportOptions {
    /// Sets the name that the VM gets.
    #[must_use]
    pub fn with_name(mut self, name: VmName) -> Self {
        self.name = Some(name);
        self
    }

    /// Sets whether the VM may use files of this host.
    #[must_use]
    pub fn with_host_files(mut self, host_files: HostFilePolicy) -> Self {
        self.host_files = host_files;
        self
    }
}

/// What was imported.
#[derive(Debug)]
#[non_exhaustive]
pub struct VmImportSummary {
    /// The VM.
    pub vm: VmHandle,
    /// Why it can't be started, or its memory not be continued, on this host as it is now.
    pub problems: Vec<Error>,
}

/// The bytes of an export, read in order.
type ExportReader = ArchiveReader<File>;

/// An export whose first entries were read, and the VM that is made of it.
struct OfferedVm {
    shown: PathBuf,
    header: ExportHeader,
    vm: VmHandle,
    base: Option<ImportedBase>,
    host_files: HostFilePolicy,
}

/// Where the bytes of a file go.
enum ReceivedFile {
    /// A new file.
    New(PathBuf),
    /// A file that is open.
    Open(File, PathBuf),
    /// Nowhere: only their checksum is needed.
    Nowhere,
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates a VM of a file that [`export`](Self::export) has written, or of a pipe with its
    /// content: the same VM, with the same identity, MAC address, snapshots and saved memory.
    ///
    /// The VM is in `Preparing` until everything is read, compared with its checksums, and synced.
    ///
    /// # Cancel safety
    /// A dropped future, like a killed process, leaves a record of the operation, and the next
    /// operation on the name removes what was received.
    ///
    /// # Errors
    /// `InvalidInput` on `file`, with what is wrong, for what is truncated, damaged, foreign or of
    /// a newer vmkit, and for a VM that uses files of this host; `AlreadyExists` for a name in use,
    /// or for the same VM under another name; `Unsupported` by its backend; `Host` for too little
    /// space, which is estimated beforehand; `Io`. Nothing is left behind.
    pub async fn import(
        &self,
        from: &Path,
        options: &VmImportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<VmImportSummary> {
        let import = async {
            let (reader, offered) = self.offered(from, options).await?;
            self.import_offered(reader, offered, progress).await
        };
        within(operation!("import"), import).await
    }

    /// Opens an export, and reads what it says of its VM.
    async fn offered(&self, from: &Path, options: &VmImportOptions) -> Result<(ExportReader, OfferedVm)> {
        let input = InputStream::open("file", from)?;
        let shown = from.to_owned();
        let opened = blocking(move || {
            let (mut reader, header) = ArchiveReader::open(input.file, &shown)?;
            let record = reader.bytes(&header.files[0], MOST_RECORD_BYTES)?;
            Ok::<_, Error>((reader, header, record))
        });
        let (reader, header, record) = opened.await??;
        let refused = |why: &str| Error::invalid("file", from.display(), why);
        let unread = |error: Error| refused("its record of the VM can't be read").with_source(error);
        let VmRecord { handle: vm, intent } = self.store.decode(from, &record).map_err(unread)?;
        if (vm.name(), vm.id, &vm.backend) != (&header.name, header.id, &header.backend) || intent.is_some() {
            return Err(refused("its record is not that of the VM that it announces"));
        }
        if !matches!(vm.state, VmState::Prepared | VmState::Stopped | VmState::Saved) {
            return Err(refused("its VM is in a state in which none is exported"));
        }
        about(vm.id);
        let base = header.image.as_ref();
        let base =
            base.map(|image| ImportedBase::new(self.home(), vm.id, image.digest.clone(), image.format));
        let mut offered = OfferedVm {
            shown: from.to_owned(),
            header,
            vm: vm.clone(),
            base,
            host_files: options.host_files,
        };
        let name = options.name.as_ref().unwrap_or(vm.name()).clone();
        offered.vm = offered.adapted(vm, &name)?;
        Ok((reader, offered))
    }

    async fn import_offered(
        &self,
        reader: ExportReader,
        mut offered: OfferedVm,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<VmImportSummary> {
        let spec = offered.vm.spec.clone();
        let new = VmHandle::preparing(offered.vm.id, offered.vm.backend.clone(), spec.clone());
        self.export_of(&new)?;
        self.check_id(&spec)?;
        let locked = self.lock_free(&spec).await?;
        let intending = VmRecord::intending(new.clone(), intent(Operation::Prepare));
        // Checked again after the intent is written, as by a creation.
        let checked = locked.write_made(&intending).and_then(|()| {
            self.check_id(&spec)?;
            self.check_disks(&spec)
        });
        if let Err(error) = checked {
            give_up(locked);
            return Err(error);
        }
        match self.receive(&locked, &new, reader, &mut offered, progress).await {
            Ok(summary) => Ok(summary),
            Err(error) => {
                match self.hypervisor.destroy(new.clone()).await {
                    Ok(()) => give_up(locked),
                    // The record stays, with its intent: a removal of the VM tries again.
                    Err(left) => {
                        warn!(vm = %new.name(), error = %left, "cannot remove what was imported before the failure");
                    }
                }
                if let Some(base) = &mut offered.base {
                    base.undo().await;
                }
                Err(error)
            }
        }
    }

    /// Receives the files of a VM, and makes it one.
    async fn receive(
        &self,
        locked: &LockedVm,
        new: &VmHandle,
        mut reader: ExportReader,
        offered: &mut OfferedVm,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<VmImportSummary> {
        let total_bytes = offered.header.stored_bytes().unwrap_or(u64::MAX);
        let name = new.name();
        check_room(self.home().vms(), total_bytes, |mib| format!("the VM `{name}` needs {mib} MiB"))?;
        let listed: Vec<ListedFile> = offered.header.files[1..].to_vec();
        let below = |listed: &ListedFile| listed.name.strip_prefix(FILES).map(str::to_owned);
        let names: Vec<String> = listed.iter().filter_map(below).collect();
        let backend = self.export_of(new)?;
        let dir = backend.prepare_import(new, &names).await.map_err(|error| offered.about_file(error))?;
        let wanted = Arc::new(());
        let mut work = FileWork {
            progress: progress.clone(),
            done_bytes: 0,
            total_bytes,
            asker: Arc::downgrade(&wanted),
        };
        let mut dirs = vec![dir.clone(), locked.dir().to_owned()];
        for listed in listed {
            if let Some(snapshot) = snapshot_of(&listed.name) {
                let read = listed.clone();
                let (back, bytes) = blocking(move || {
                    let bytes = reader.bytes(&read, MOST_RECORD_BYTES);
                    (reader, bytes)
                })
                .await?;
                reader = back;
                offered.keep_snapshot(self, locked, &snapshot, &bytes?)?;
                continue;
            }
            let to = match (&mut offered.base, below(&listed), listed.name.strip_prefix(KEPT)) {
                (_, Some(name), _) => ReceivedFile::New(dir.join(name)),
                (_, _, Some(name)) => ReceivedFile::New(locked.kept().join(name)),
                (Some(base), _, _) => match base.begin().await? {
                    Some((file, path)) => ReceivedFile::Open(file, path),
                    None => ReceivedFile::Nowhere,
                },
                (None, _, _) => ReceivedFile::Nowhere,
            };
            let to = to.created(&mut dirs)?;
            let is_image = listed.name.starts_with("image/");
            let (back, done, digest) = blocking(move || work.receive(reader, &listed, to)).await?;
            (reader, work) = (back, done);
            offered.check_image(is_image, &digest?)?;
        }
        blocking(move || reader.finish()).await??;
        drop(wanted);
        progress.send_modify(|progress| progress.stage = PullStage::Finishing);
        self.finish_import(locked, offered, &dirs).await
    }

    /// Creates a VM of what was received and compared, and records it.
    async fn finish_import(
        &self,
        locked: &LockedVm,
        offered: &mut OfferedVm,
        dirs: &[PathBuf],
    ) -> Result<VmImportSummary> {
        let backend = self.export_of(&offered.vm)?;
        if let Some(base) = &mut offered.base {
            base.keep(&offered.shown).await?;
        }
        let finished = backend.finish_import(&offered.vm).await.map_err(|error| offered.about_file(error))?;
        let ImportedVm { vm, mut problems } = finished;
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            step("import: sync a directory")
                .and_then(|()| File::open(dir)?.sync_all())
                .map_err(Error::io("sync", dir))?;
        }
        if let Err(problem) = self.check_host(&vm.spec).await {
            problems.push(problem);
        }
        locked.write_made(&VmRecord::settled(vm.clone()))?;
        Ok(VmImportSummary { vm, problems })
    }
}

impl OfferedVm {
    /// Returns a VM of the export, the present one or one of a snapshot, as it is in this home.
    fn adapted(&self, vm: VmHandle, name: &VmName) -> Result<VmHandle> {
        let next_spec = vm.next_spec.map(|spec| self.adapted_spec(*spec, name)).transpose()?;
        Ok(VmHandle {
            id: self.header.id,
            backend: self.header.backend.clone(),
            spec: self.adapted_spec(vm.spec, name)?,
            next_spec: next_spec.map(Box::new),
            run: None,
            console_log: None,
            console_since: None,
            hypervisor_log: None,
            ..vm
        })
    }

    fn adapted_spec(&self, spec: VmSpec, name: &VmName) -> Result<VmSpec> {
        let has_base = spec.disk().is_some_and(|disk| RootDisk::base(disk).is_some());
        if has_base != self.base.is_some() {
            return Err(self.refused("its VM and its base image do not fit together"));
        }
        let files = spec.host_files();
        if self.host_files == HostFilePolicy::Refuse && !files.is_empty() {
            let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
            let why = format!(
                "its VM uses files of the host, which are not in it: {}; its author chose these paths, and the \
                 guest could read what is there (expected to be accepted explicitly)",
                names.join(", ")
            );
            return Err(self.refused(&why).with_problem(ValueProblem::HostFiles));
        }
        let spec = spec.with_name(name.clone()).with_id(self.header.id);
        Ok(match &self.base {
            Some(base) => spec.with_base_image(&base.path()),
            None => spec,
        })
    }

    /// Writes the record of a snapshot.
    fn keep_snapshot<H: Backend + 'static>(
        &self,
        manager: &VmManager<H>,
        locked: &LockedVm,
        snapshot: &SnapshotName,
        bytes: &[u8],
    ) -> Result<()> {
        let unread = |error: Error| {
            self.refused(&format!("its record of the snapshot `{snapshot}` can't be read")).with_source(error)
        };
        let record = manager.store.decode(&self.shown, bytes).map_err(unread)?;
        let (found, of) = (record.handle.id, &record.handle.backend);
        if (found, of) != (self.header.id, &self.header.backend) {
            return Err(self.refused(&format!("its record of the snapshot `{snapshot}` is of another VM")));
        }
        let handle = self.adapted(record.handle, self.vm.name())?;
        locked.write_snapshot(snapshot, &VmRecord::settled(handle))
    }

    fn check_image(&self, is_image: bool, found: &Digest) -> Result<()> {
        match &self.header.image {
            Some(image) if is_image && image.digest != *found => {
                Err(self.refused("its base image has another checksum than it announces: it is damaged"))
            }
            _ => Ok(()),
        }
    }

    /// Returns an error about content of the file with the file's name.
    fn about_file(&self, error: Error) -> Error {
        match error {
            Error::Invalid { field, value, expected, problem, source } if field == "file" => Error::Invalid {
                field,
                value: self.shown.display().to_string(),
                expected: format!("its file {value}: {expected}"),
                problem,
                source,
            },
            error => error,
        }
    }

    fn refused(&self, why: &str) -> Error {
        Error::invalid("file", self.shown.display(), why)
    }
}

impl ReceivedFile {
    /// Opens a file for what is received, of this user alone, and adds its directory to `dirs`.
    fn created(self, dirs: &mut Vec<PathBuf>) -> Result<Option<(File, PathBuf)>> {
        let path = match self {
            ReceivedFile::Nowhere => return Ok(None),
            ReceivedFile::Open(file, path) => return Ok(Some((file, path))),
            ReceivedFile::New(path) => path,
        };
        let dir = path.parent().unwrap_or(&path);
        if !dirs.iter().any(|known| known == dir) {
            step("import: create a directory")
                .and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(dir))
                .map_err(Error::io("create", dir))?;
            dirs.push(dir.to_owned());
        }
        let open = || {
            step("import: create a file")?;
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)
        };
        let file = open().map_err(Error::io("create", &path))?;
        Ok(Some((file, path)))
    }
}

/// The files of an import, on their way to the disk.
struct FileWork {
    progress: watch::Sender<PullProgress>,
    done_bytes: u64,
    total_bytes: u64,
    /// Dropped when the caller no longer waits for the result.
    asker: Weak<()>,
}

impl FileWork {
    /// Receives a file, syncs it, and returns its checksum. Blocks.
    fn receive(
        mut self,
        mut reader: ExportReader,
        listed: &ListedFile,
        to: Option<(File, PathBuf)>,
    ) -> (ExportReader, Self, Result<Digest>) {
        let path = to.as_ref().map(|(_, path)| path.clone()).unwrap_or_default();
        let to = to.map(|(file, _)| (file, path.as_path()));
        let received = reader.file(listed, to, |bytes| {
            self.done_bytes += bytes;
            let (stage, done_bytes) = (PullStage::Importing, self.done_bytes);
            let total_bytes = Some(self.total_bytes);
            self.progress.send_replace(PullProgress { stage, done_bytes, total_bytes });
            match self.asker.strong_count() {
                0 => Err(Error::io("write", &path)(io::ErrorKind::Interrupted.into())),
                _ => Ok(()),
            }
        });
        let synced = received.and_then(|(digest, file)| {
            file.map_or(Ok(()), |file| file.sync_all()).map_err(Error::io("write", &path))?;
            Ok(digest)
        });
        (reader, self, synced)
    }
}

/// Returns the snapshot whose record a file is.
fn snapshot_of(name: &str) -> Option<SnapshotName> {
    let name = name.strip_prefix(KEPT)?.strip_prefix("snapshot-")?.strip_suffix(".json")?;
    SnapshotName::new(name).ok()
}
