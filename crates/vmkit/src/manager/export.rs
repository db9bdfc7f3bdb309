//! Exports of VMs to files.
//!
//! The backend says which files a VM consists of. The manager adds the record, the small files
//! beside it and the base image, so that another host needs nothing else.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::Instant;

use super::{PATIENCE, VmManager, ephemeral};
use crate::abilities::{DynExport, ExportedVm, FileContent, MemoryMode};
use crate::archive::{
    ArchiveWriter, ExportHeader, ExportedImage, FILES, FileExtents, KEPT, ListedFile, RECORD, hash_of,
    image_entry, is_part,
};
use crate::blocking::blocking;
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::{Digest, ImageFacts, OverwritePolicy, PullProgress, PullStage, inspect};
use crate::lifecycle::Operation;
use crate::output_file::{FileReaders, OutputFile};
use crate::room::check_room;
use crate::span::{operation, within};
use crate::spec::{RootDisk, VmName};
use crate::steps::step;
use crate::store::{LockedVm, VmRecord};

/// How a VM is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmExportOptions {
    /// Whether the memory of a saved guest, and of snapshots, is part of it.
    pub memory: MemoryMode,
    /// What to do with a file that exists already.
    pub existing: OverwritePolicy,
}

impl Default for VmExportOptions {
    fn default() -> Self {
        Self { memory: MemoryMode::Include, existing: OverwritePolicy::Stays }
    }
}

impl VmExportOptions {
    /// Leaves the memory out.
    #[must_use]
    pub fn with_memory(mut self, memory: MemoryMode) -> Self {
        self.memory = memory;
        self
    }

    /// Sets what to do with a file that exists already.
    #[must_use]
    pub fn with_existing(mut self, existing: OverwritePolicy) -> Self {
        self.existing = existing;
        self
    }
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmExportSummary {
    /// The VM as it can be imported.
    pub vm: VmHandle,
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// What a host has to have where its guest is to continue, such as `QEMU 7.2 or newer`.
    pub needs: Vec<String>,
}

impl<H: Backend + 'static> VmManager<H> {
    /// Writes a VM that does not run to a file, or to a pipe, with its snapshots, its saved memory
    /// and its base image: [`import`](Self::import) creates the same VM of it, in another home or
    /// on another host.
    ///
    /// The file is this user's alone (0600), since it contains the VM's login key and what its
    /// guest knows. It gets the name `to` when it is complete and synced; until then its name ends
    /// with `.unfinished`.
    ///
    /// # Cancel safety
    /// A dropped future ends the export and removes the unfinished file. After a kill that file
    /// stays, until the next export to the same destination. The VM is not changed.
    ///
    /// # Errors
    /// `NotFound` without the VM; `InvalidState` unless it is prepared, saved or stopped;
    /// `InvalidInput` on `file` for a destination that is no file, on `data_disks` for a disk that
    /// is not the VM's own; `AlreadyExists`; `Busy`; `Unsupported` by a backend without
    /// [`Export`](crate::abilities::Export); `Record` for a part that is missing or damaged; `Host`
    /// for too little space, which is estimated beforehand; `Io`.
    pub async fn export(
        &self,
        name: &VmName,
        to: &Path,
        options: &VmExportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<VmExportSummary> {
        let export = self.export_in_span(name, to, options, progress);
        within(operation!("export", vm = name), export).await
    }

    async fn export_in_span(
        &self,
        name: &VmName,
        to: &Path,
        options: &VmExportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<VmExportSummary> {
        let place = ExportPlace::of(to, options.existing)?;
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        let record = self.finish_restore(&locked, record).await?;
        let vm = self.settle(record, Operation::Export).await?;
        if ephemeral::is_ephemeral(&vm.spec) {
            let why = "this VM is removed when the process that created it ends, so it is not exported";
            return Err(Error::invalid("vm", name, why));
        }
        let exported = self.export_of(&vm)?.export(&vm, options.memory).await?;
        let (kept, record) = (kept_files(&locked)?, record_bytes(&locked, &exported.vm)?);
        let image = exported.vm.spec.disk().and_then(RootDisk::base).map(inspect).transpose()?;
        let asker = Arc::new(());
        let vm = exported.vm.clone();
        let work = ExportWork {
            exported,
            kept,
            record,
            image,
            shown: to.to_owned(),
            progress: progress.clone(),
            asker: Arc::downgrade(&asker),
        };
        let (work, header) = blocking(move || {
            let header = work.header();
            (work, header)
        })
        .await?;
        let header = header?;
        place.check_room(&header)?;
        let output = place.begin(to)?;
        step("export: write the file").map_err(Error::io("write", to))?;
        // Passed to the thread and back, so that it is removed only when nothing writes to it.
        let (written, output, work) = blocking(move || {
            let written = work.write(&output, &header);
            (written, output, work)
        })
        .await?;
        let bytes = written?;
        if let (ExportOutput::File(output), ExportPlace::File(place)) = (output, &place) {
            output.name(place, options.existing).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::already_exists(Subject::File, to.display()),
                _ => Error::io("write", to)(error),
            })?;
        }
        drop((locked, asker));
        Ok(VmExportSummary { vm, path: to.to_owned(), bytes, needs: work.exported.needs })
    }

    /// Returns the ability of a VM's backend to export and import it.
    pub(super) fn export_of(&self, vm: &VmHandle) -> Result<DynExport<'_>> {
        let unsupported = || Error::Unsupported {
            backend: vm.backend.clone(),
            what: "exporting and importing VMs".to_owned(),
        };
        self.abilities_of(vm).export().ok_or_else(unsupported)
    }
}

/// Where an export goes.
enum ExportPlace {
    /// This path, with symbolic links resolved.
    File(PathBuf),
    Pipe,
}

/// What an export is written to.
enum ExportOutput {
    File(OutputFile),
    Pipe(File),
}

impl ExportPlace {
    /// Checks a destination.
    fn of(to: &Path, existing: OverwritePolicy) -> Result<Self> {
        let refused = |why: &str| Error::invalid("file", to.display(), why);
        let Some(name) = to.file_name() else { return Err(refused("this is not a file name")) };
        let found = to.metadata();
        if found.as_ref().is_ok_and(|found| found.file_type().is_fifo()) {
            return Ok(Self::Pipe);
        }
        if existing == OverwritePolicy::Stays && fs::symlink_metadata(to).is_ok() {
            return Err(Error::already_exists(Subject::File, to.display()));
        }
        match found {
            Ok(found) if found.is_file() => {
                to.canonicalize().map(Self::File).map_err(Error::io("examine", to))
            }
            Ok(found) if found.is_dir() => Err(refused("this is a directory: pass a file in it")),
            Ok(_) => Err(refused("this is a device or a socket: pass a file")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
                match parent.unwrap_or(Path::new(".")).canonicalize() {
                    Ok(parent) => Ok(Self::File(parent.join(name))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        Err(refused("there is no such directory"))
                    }
                    Err(error) => Err(Error::io("examine", to)(error)),
                }
            }
            Err(error) => Err(Error::io("examine", to)(error)),
        }
    }

    /// Refuses an export that a file system has no room for.
    fn check_room(&self, header: &ExportHeader) -> Result<()> {
        let Self::File(place) = self else { return Ok(()) };
        let bytes = header.stored_bytes().unwrap_or(u64::MAX);
        let dir = place.parent().unwrap_or(place);
        check_room(dir, bytes, |mib| format!("the export of `{}` has {mib} MiB", header.name))
    }

    fn begin(&self, to: &Path) -> Result<ExportOutput> {
        match self {
            Self::File(place) => OutputFile::begin(place, to, FileReaders::Owner).map(ExportOutput::File),
            Self::Pipe => {
                let pipe = File::options().write(true).open(to).map_err(Error::io("open", to))?;
                Ok(ExportOutput::Pipe(pipe))
            }
        }
    }
}

/// Returns the names of a VM's small files.
fn kept_files(locked: &LockedVm) -> Result<Vec<(String, PathBuf)>> {
    let dir = locked.kept();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("read", &dir))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", &dir))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        match entry.file_name().into_string() {
            Ok(name) if is_file && is_part(&name) => files.push((name, entry.path())),
            _ => {}
        }
    }
    files.sort();
    Ok(files)
}

/// Returns the record of a VM without what only this host has of it.
fn record_bytes(locked: &LockedVm, vm: &VmHandle) -> Result<Vec<u8>> {
    let vm =
        VmHandle { run: None, console_log: None, console_since: None, hypervisor_log: None, ..vm.clone() };
    locked.encode(&VmRecord::settled(vm))
}

/// An export in progress.
struct ExportWork {
    exported: ExportedVm,
    kept: Vec<(String, PathBuf)>,
    record: Vec<u8>,
    image: Option<ImageFacts>,
    shown: PathBuf,
    progress: watch::Sender<PullProgress>,
    /// Dropped when the caller no longer waits for the result.
    asker: Weak<()>,
}

impl ExportWork {
    /// Writes everything, syncs a file, and returns how many bytes it has. Blocks.
    fn write(&self, output: &ExportOutput, header: &ExportHeader) -> Result<u64> {
        let stored_bytes = header.stored_bytes().unwrap_or(u64::MAX);
        let file = match output {
            ExportOutput::File(file) => file.file(),
            ExportOutput::Pipe(pipe) => pipe,
        };
        self.show(0, stored_bytes);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut writer = ArchiveWriter::begin(file, &self.shown, now, header)?;
        let mut done_bytes = 0;
        for (listed, content) in header.files.iter().zip(self.contents()) {
            let path = match content {
                FileContent::Bytes(bytes) => {
                    writer.bytes(&listed.name, &bytes)?;
                    continue;
                }
                FileContent::Path(path) => path,
            };
            let file = File::open(&path).map_err(Error::io("read", &path))?;
            let extents = FileExtents::of(&file).map_err(Error::io("examine", &path))?;
            let found = writer.file(&listed.name, (&file, &extents, &path), |bytes| {
                done_bytes += bytes;
                self.show(done_bytes, stored_bytes);
                self.check_wanted()
            })?;
            let is_image = self.image.as_ref().is_some_and(|image| image.path == path);
            let announced = header.image.as_ref().map(|image| &image.digest);
            let is_changed = is_image && announced != Some(&found);
            if is_changed || (extents.bytes, extents.stored_bytes()) != (listed.bytes, listed.stored_bytes) {
                return Err(Error::record(path, "this file was changed while it was read: export it again"));
            }
        }
        let (file, written_bytes) = writer.finish()?;
        if let ExportOutput::File(_) = output {
            file.sync_all().map_err(Error::io("write", &self.shown))?;
        }
        Ok(written_bytes)
    }

    /// Returns the contents of the files after the header, in order.
    fn contents(&self) -> Vec<FileContent> {
        let mut contents = vec![FileContent::Bytes(self.record.clone())];
        contents.extend(self.kept.iter().map(|(_, path)| FileContent::Path(path.clone())));
        contents.extend(self.exported.files.iter().map(|file| file.content.clone()));
        contents.extend(self.image.iter().map(|image| FileContent::Path(image.path.clone())));
        contents
    }

    /// Creates the header, and reads the base image for its checksum. Blocks.
    fn header(&self) -> Result<ExportHeader> {
        let vm = &self.exported.vm;
        let state = vm.state.name().to_owned();
        let mut header = ExportHeader::new(vm.name().clone(), vm.id, vm.backend.clone(), state);
        header.needs.clone_from(&self.exported.needs);
        let mut names = vec![RECORD.to_owned()];
        names.extend(self.kept.iter().map(|(name, _)| format!("{KEPT}{name}")));
        names.extend(self.exported.files.iter().map(|file| format!("{FILES}{}", file.name)));
        let digest = self.image.as_ref().map(|image| self.digest_of(image)).transpose()?;
        if let (Some(image), Some(digest)) = (&self.image, &digest) {
            let image = ExportedImage { digest: digest.clone(), format: image.format };
            names.push(image_entry(&image));
            header.image = Some(image);
        }
        for (name, content) in names.into_iter().zip(self.contents()) {
            let (bytes, stored_bytes) = match content {
                FileContent::Bytes(bytes) => (bytes.len() as u64, bytes.len() as u64),
                FileContent::Path(path) => {
                    let file = File::open(&path).map_err(Error::io("read", &path))?;
                    let extents = FileExtents::of(&file).map_err(Error::io("examine", &path))?;
                    (extents.bytes, extents.stored_bytes())
                }
            };
            header.files.push(ListedFile { name, bytes, stored_bytes });
        }
        Ok(header)
    }

    fn digest_of(&self, image: &ImageFacts) -> Result<Digest> {
        let file = File::open(&image.path).map_err(Error::io("read", &image.path))?;
        let extents = FileExtents::of(&file).map_err(Error::io("examine", &image.path))?;
        let (total, mut done_bytes) = (extents.stored_bytes(), 0);
        let digest = hash_of(&file, &extents, |bytes| {
            done_bytes += bytes;
            let stage = PullStage::Finishing;
            self.progress.send_replace(PullProgress { stage, done_bytes, total_bytes: Some(total) });
            self.check_wanted().map_err(|_| io::ErrorKind::Interrupted.into())
        });
        let digest = digest.map_err(Error::io("read", &image.path))?;
        // A local image's directory has its checksum.
        let stored = image.path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        match stored.and_then(|name| name.strip_prefix("sha256-")) {
            Some(expected) if expected != digest.hex() => {
                let problem = format!("the base image is damaged: its checksum is {}", digest.hex());
                Err(Error::record(&image.path, problem))
            }
            _ => Ok(digest),
        }
    }

    fn show(&self, done_bytes: u64, total_bytes: u64) {
        let (stage, total_bytes) = (PullStage::Exporting, Some(total_bytes));
        self.progress.send_replace(PullProgress { stage, done_bytes, total_bytes });
    }

    fn check_wanted(&self) -> Result<()> {
        match self.asker.strong_count() {
            0 => Err(Error::io("write", &self.shown)(io::ErrorKind::Interrupted.into())),
            _ => Ok(()),
        }
    }
}
