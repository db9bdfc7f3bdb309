//! `zfs`: volumes, snapshots and clones. A volume is a sparse file below what stands for
//! `/dev/zvol`.
//!
//! Source: illumos, `usr/src/cmd/zfs/zfs_main.c` and `usr/src/lib/libzfs`, for the texts. What a
//! real one does beyond these commands, and all of its arithmetic of space, is not here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::call::{GetoptError, ParsedArgs};
use super::{Dataset, DatasetKind, Illumos, IllumosState, ToolOutput};

/// The default block size of a volume, in bytes.
const BLOCK_BYTES: u64 = 8192;

/// Properties that can be asked for, besides those that were set.
const KNOWN: [&str; 12] = [
    "available",
    "creation",
    "guid",
    "name",
    "origin",
    "referenced",
    "refreservation",
    "reservation",
    "type",
    "used",
    "volblocksize",
    "volsize",
];

pub(super) fn run(illumos: &Illumos, state: &mut IllumosState, args: &[String]) -> io::Result<ToolOutput> {
    let Some((command, args)) = args.split_first() else { return Ok(usage("missing command")) };
    let mut zfs = ZfsTool { illumos, state };
    let done = match command.as_str() {
        "create" => zfs.create(args),
        "snapshot" | "snap" => zfs.snapshot(args),
        "clone" => zfs.clone_snapshot(args),
        "destroy" => zfs.destroy(args),
        "set" => zfs.set(args),
        "get" => zfs.get(args),
        "list" => zfs.list(args),
        other => Err(ZfsFailure::Says(usage(&format!("unrecognized command '{other}'")))),
    };
    match done {
        Ok(said) | Err(ZfsFailure::Says(said)) => Ok(said),
        Err(ZfsFailure::Breaks(error)) => Err(error),
    }
}

type ZfsResult = Result<ToolOutput, ZfsFailure>;

/// Why nothing was done: the tool says so, or the stand-in itself is broken.
enum ZfsFailure {
    Says(ToolOutput),
    Breaks(io::Error),
}

impl From<io::Error> for ZfsFailure {
    fn from(error: io::Error) -> Self {
        Self::Breaks(error)
    }
}

fn usage(problem: &str) -> ToolOutput {
    ToolOutput::failed(2, format!("{problem}\nusage: zfs command args ..."))
}

fn fails<T>(text: impl AsRef<str>) -> Result<T, ZfsFailure> {
    Err(ZfsFailure::Says(ToolOutput::failed(1, text)))
}

fn typed(args: &[String], known: &str) -> Result<ParsedArgs, ZfsFailure> {
    ParsedArgs::parse(args, known).map_err(|wrong| {
        ZfsFailure::Says(usage(&match wrong {
            GetoptError::Unknown(letter) => format!("invalid option '{letter}'"),
            GetoptError::NoValue(letter) => format!("missing argument for '{letter}' option"),
        }))
    })
}

/// Returns a size in bytes: a number, with a suffix of K, M, G or T.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" => 10,
        "M" | "MB" => 20,
        "G" | "GB" => 30,
        "T" | "TB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn pool(name: &str) -> &str {
    name.split(['/', '@']).next().unwrap_or_default()
}

fn is_below(name: &str, ancestor: &str) -> bool {
    name.strip_prefix(ancestor).is_some_and(|rest| rest.starts_with(['/', '@']))
}

struct ZfsTool<'a> {
    illumos: &'a Illumos,
    state: &'a mut IllumosState,
}

impl ZfsTool<'_> {
    fn open(&self, name: &str) -> Result<&Dataset, ZfsFailure> {
        match self.state.datasets.get(name) {
            Some(dataset) => Ok(dataset),
            None => fails(format!("cannot open '{name}': dataset does not exist")),
        }
    }

    /// Checks that a dataset can be made here, and makes its ancestors where that is asked for.
    fn make_room(&mut self, name: &str, ancestors: bool) -> Result<(), ZfsFailure> {
        let good = |letter: char| letter.is_ascii_alphanumeric() || "-_.: /".contains(letter);
        if let Some(letter) = name.chars().find(|letter| !good(*letter)) {
            return fails(format!("cannot create '{name}': invalid character '{letter}' in name"));
        }
        if self.state.datasets.contains_key(name) {
            return fails(format!("cannot create '{name}': dataset already exists"));
        }
        if !self.state.datasets.contains_key(pool(name)) {
            return fails(format!("cannot create '{name}': no such pool '{}'", pool(name)));
        }
        let Some((parent, _)) = name.rsplit_once('/') else {
            return fails(format!("cannot create '{name}': missing dataset name"));
        };
        match self.state.datasets.get(parent).map(|parent| parent.kind) {
            Some(DatasetKind::Filesystem) => Ok(()),
            Some(_) => fails(format!("cannot create '{name}': parent is not a filesystem")),
            None if ancestors => {
                self.make_room(parent, true)?;
                self.state.datasets.insert(parent.to_owned(), Dataset::new(DatasetKind::Filesystem));
                Ok(())
            }
            None => fails(format!("cannot create '{name}': parent does not exist")),
        }
    }

    fn create(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "psV:b:o:")?;
        let name = match typed.operands.as_slice() {
            [name] => name,
            [] => return Err(ZfsFailure::Says(usage("missing dataset name argument"))),
            _ => return Err(ZfsFailure::Says(usage("too many arguments"))),
        };
        let mut dataset = Dataset::new(DatasetKind::Filesystem);
        dataset.properties = properties(&typed)?;
        if let Some(size) = typed.value('V') {
            let Some(size) = bytes(size) else {
                return fails(format!("bad volume size '{size}': invalid numeric value"));
            };
            if let Some(block) = typed.value('b') {
                dataset.properties.insert("volblocksize".to_owned(), block.to_owned());
            }
            dataset.kind = DatasetKind::Volume;
            if size == 0 || !size.is_multiple_of(dataset.block_bytes()) {
                let text = "volume size must be a multiple of volume block size";
                return fails(format!("cannot create '{name}': {text}"));
            }
            dataset.volsize = Some(size);
        }
        if typed.has('p') && self.state.datasets.contains_key(name) {
            return Ok(ToolOutput::default());
        }
        self.make_room(name, typed.has('p'))?;
        if let Some(size) = dataset.volsize {
            self.illumos.make_volume(name)?.set_len(size)?;
        }
        self.state.datasets.insert(name.clone(), dataset);
        Ok(ToolOutput::default())
    }

    fn snapshot(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "ro:")?;
        for name in &typed.operands {
            let Some((of, _)) = name.split_once('@') else {
                return Err(ZfsFailure::Says(usage("missing '@' in snapshot name")));
            };
            let failed = |why: &str| {
                fails(format!("cannot create snapshot '{name}': {why}\nno snapshots were created"))
            };
            let Some(dataset) = self.state.datasets.get(of) else { return failed("dataset does not exist") };
            if self.state.datasets.contains_key(name) {
                return failed("dataset already exists");
            }
            let mut snapshot = Dataset::new(DatasetKind::Snapshot);
            snapshot.volsize = dataset.volsize;
            if dataset.kind == DatasetKind::Volume {
                std::fs::create_dir_all(self.illumos.snapshots())?;
                std::fs::copy(self.illumos.volume(of), self.illumos.snapshot_file(name))?;
            }
            self.state.datasets.insert(name.clone(), snapshot);
        }
        Ok(ToolOutput::default())
    }

    fn clone_snapshot(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "po:")?;
        let [snapshot, name] = typed.operands.as_slice() else {
            return Err(ZfsFailure::Says(usage("missing source dataset argument")));
        };
        let origin = self.open(snapshot)?;
        if origin.kind != DatasetKind::Snapshot {
            return fails(format!(
                "cannot open '{snapshot}': operation not applicable to datasets of this type"
            ));
        }
        let volsize = origin.volsize;
        if pool(snapshot) != pool(name) && self.state.datasets.contains_key(pool(name)) {
            return fails(format!("cannot create '{name}': source and target pools differ"));
        }
        let mut dataset =
            Dataset::new(if volsize.is_some() { DatasetKind::Volume } else { DatasetKind::Filesystem });
        dataset.properties = properties(&typed)?;
        dataset.volsize = volsize;
        dataset.origin = Some(snapshot.clone());
        self.make_room(name, typed.has('p'))?;
        if volsize.is_some() {
            self.illumos.make_volume(name)?;
            std::fs::copy(self.illumos.snapshot_file(snapshot), self.illumos.volume(name))?;
        }
        self.state.datasets.insert(name.clone(), dataset);
        Ok(ToolOutput::default())
    }

    fn destroy(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "rRfnpvd")?;
        let [name] = typed.operands.as_slice() else {
            return Err(ZfsFailure::Says(usage("missing dataset argument")));
        };
        if name.contains('@') && !self.state.datasets.contains_key(name) {
            self.open(name.split('@').next().unwrap_or_default())?;
            return fails("could not find any snapshots to destroy; check snapshot names.");
        }
        if pool(name) == name {
            self.open(name)?;
            return fails(format!(
                "cannot destroy '{name}': operation does not apply to pools\nuse 'zfs destroy -r {name}' to destroy all \
                 datasets in the pool\nuse 'zpool destroy {name}' to destroy the pool itself"
            ));
        }
        let what = match self.open(name)?.kind {
            DatasetKind::Filesystem => "filesystem",
            DatasetKind::Volume => "volume",
            DatasetKind::Snapshot => "snapshot",
        };
        let (clones, children) = (typed.has('R'), typed.has('r') || typed.has('R'));
        let below: BTreeSet<String> =
            self.state.datasets.keys().filter(|other| is_below(other, name)).cloned().collect();
        let mut doomed = below.clone();
        doomed.insert(name.clone());
        let dependent = self.dependent(&doomed);
        let refused = |why: &str, switch: &str, names: &BTreeSet<String>| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            fails(format!(
                "cannot destroy '{name}': {what} {why}\nuse '{switch}' to destroy the following datasets:\n{}",
                names.join("\n")
            ))
        };
        if !dependent.is_empty() && !clones {
            return refused("has dependent clones", "-R", &dependent);
        }
        if !below.is_empty() && !children {
            return refused("has children", "-r", &below);
        }
        doomed.extend(dependent);
        for name in &doomed {
            if self.illumos.volume_is_busy(name) {
                return fails(format!("cannot destroy '{name}': dataset is busy"));
            }
        }
        for name in &doomed {
            if let Some(Dataset { volsize: Some(_), kind, .. }) = self.state.datasets.remove(name) {
                let file = match kind {
                    DatasetKind::Snapshot => self.illumos.snapshot_file(name),
                    _ => self.illumos.volume(name),
                };
                std::fs::remove_file(file)?;
            }
        }
        Ok(ToolOutput::default())
    }

    /// Returns what was cloned from these, and from what is below those, and so on.
    fn dependent(&self, doomed: &BTreeSet<String>) -> BTreeSet<String> {
        let mut all = doomed.clone();
        loop {
            let more: Vec<String> = self
                .state
                .datasets
                .iter()
                .filter(|(name, dataset)| {
                    let cloned = dataset.origin.as_ref().is_some_and(|origin| all.contains(origin));
                    !all.contains(*name) && (cloned || all.iter().any(|above| is_below(name, above)))
                })
                .map(|(name, _)| name.clone())
                .collect();
            if more.is_empty() {
                return all.difference(doomed).cloned().collect();
            }
            all.extend(more);
        }
    }

    fn set(&mut self, args: &[String]) -> ZfsResult {
        let Some((name, pairs)) = args.split_last().filter(|(_, pairs)| !pairs.is_empty()) else {
            return Err(ZfsFailure::Says(usage("missing property=value argument")));
        };
        self.open(name)?;
        for pair in pairs {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(ZfsFailure::Says(usage("missing value in property=value argument")));
            };
            let failed = |why: String| fails(format!("cannot set property for '{name}': {why}"));
            let dataset = self.state.datasets.get_mut(name).expect("it was opened");
            if key != "volsize" {
                dataset.properties.insert(key.to_owned(), value.to_owned());
                continue;
            }
            if dataset.kind != DatasetKind::Volume {
                return failed("'volsize' does not apply to datasets of this type".to_owned());
            }
            let Some(size) = bytes(value).filter(|size| *size > 0) else {
                return failed(format!("bad numeric value '{value}'"));
            };
            if !size.is_multiple_of(dataset.block_bytes()) {
                let block = dataset.block_bytes() / 1024;
                return failed(format!("'volsize' must be a multiple of volume block size ({block}K)"));
            }
            dataset.volsize = Some(size);
            OpenOptions::new().write(true).open(self.illumos.volume(name))?.set_len(size)?;
        }
        Ok(ToolOutput::default())
    }

    fn get(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "rHpd:o:s:t:")?;
        let Some((properties, names)) = typed.operands.split_first() else {
            return Err(ZfsFailure::Says(usage("missing property argument")));
        };
        let columns = typed.value('o').unwrap_or("name,property,value,source");
        let mut said = String::new();
        if !typed.has('H') {
            said += &format!("{}\n", columns.to_uppercase().replace(',', "  "));
        }
        for name in names {
            for property in properties.split(',') {
                let (value, source) = value(name, self.open(name)?, property)?;
                let cells: Vec<&str> = columns
                    .split(',')
                    .map(|column| match column {
                        "name" => name,
                        "property" => property,
                        "value" => &value,
                        _ => source,
                    })
                    .collect();
                said += &format!("{}\n", cells.join(if typed.has('H') { "\t" } else { "  " }));
            }
        }
        Ok(ToolOutput::ok(said))
    }

    fn list(&mut self, args: &[String]) -> ZfsResult {
        let typed = typed(args, "rHpd:o:t:s:S:")?;
        for name in &typed.operands {
            self.open(name)?;
        }
        let depth: Option<usize> = typed.value('d').and_then(|depth| depth.parse().ok());
        let recursive = typed.has('r') || depth.is_some();
        let types = typed.value('t');
        let wanted = |name: &str, kind: DatasetKind| {
            let among = typed.operands.is_empty()
                || typed.operands.iter().any(|top| {
                    let steps = name.strip_prefix(top.as_str()).map(|rest| rest.matches(['/', '@']).count());
                    name == top
                        || recursive && is_below(name, top) && steps <= Some(depth.unwrap_or(usize::MAX))
                });
            let named = typed.operands.iter().any(|operand| operand == name);
            among
                && match (types, kind) {
                    (None, DatasetKind::Snapshot) => named,
                    (None, _) => true,
                    (Some(types), kind) => types.split(',').any(|typed| is_type(typed, kind)),
                }
        };
        let columns: Vec<&str> =
            typed.value('o').unwrap_or("name,used,available,referenced,mountpoint").split(',').collect();
        let mut said = String::new();
        if !typed.has('H') {
            said += &format!("{}\n", columns.join("  ").to_uppercase());
        }
        for (name, dataset) in &self.state.datasets {
            if wanted(name, dataset.kind) {
                let cells: Result<Vec<String>, ZfsFailure> =
                    columns.iter().map(|column| Ok(value(name, dataset, column)?.0)).collect();
                said += &format!("{}\n", cells?.join(if typed.has('H') { "\t" } else { "  " }));
            }
        }
        Ok(ToolOutput::ok(said))
    }
}

fn is_type(typed: &str, kind: DatasetKind) -> bool {
    match typed {
        "all" => true,
        "filesystem" | "fs" => kind == DatasetKind::Filesystem,
        "volume" | "vol" => kind == DatasetKind::Volume,
        "snapshot" | "snap" => kind == DatasetKind::Snapshot,
        _ => false,
    }
}

/// Returns a property's value, in bytes where it is a size, and where it comes from.
fn value(name: &str, dataset: &Dataset, property: &str) -> Result<(String, &'static str), ZfsFailure> {
    let nothing = || "-".to_owned();
    let text = match property {
        "name" => name.to_owned(),
        "type" => match dataset.kind {
            DatasetKind::Filesystem => "filesystem".to_owned(),
            DatasetKind::Volume => "volume".to_owned(),
            DatasetKind::Snapshot => "snapshot".to_owned(),
        },
        "origin" => dataset.origin.clone().unwrap_or_else(nothing),
        "volsize" => {
            let source = if dataset.kind == DatasetKind::Volume { "local" } else { "-" };
            return Ok((dataset.volsize.map_or_else(nothing, |size| size.to_string()), source));
        }
        "volblocksize" if dataset.kind == DatasetKind::Volume => dataset.block_bytes().to_string(),
        property => match dataset.properties.get(property) {
            Some(value) => return Ok((value.clone(), "local")),
            None if KNOWN.contains(&property)
                || matches!(property, "avail" | "refer" | "mountpoint" | "sync") =>
            {
                nothing()
            }
            // A user's own, which has a colon, may be unset.
            None if property.contains(':') => nothing(),
            None => {
                let problem = format!("bad property list: invalid property '{property}'");
                return Err(ZfsFailure::Says(usage(&problem)));
            }
        },
    };
    Ok((text, "-"))
}

fn properties(typed: &ParsedArgs) -> Result<BTreeMap<String, String>, ZfsFailure> {
    typed
        .values('o')
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
            None => Err(ZfsFailure::Says(usage("missing '=' for property=value argument"))),
        })
        .collect()
}

impl Dataset {
    pub(super) fn new(kind: DatasetKind) -> Self {
        Self { kind, volsize: None, origin: None, properties: BTreeMap::new(), given: false }
    }

    fn block_bytes(&self) -> u64 {
        self.properties.get("volblocksize").and_then(|text| bytes(text)).unwrap_or(BLOCK_BYTES)
    }
}

impl Illumos {
    /// Returns the file that is a volume.
    pub(super) fn volume(&self, name: &str) -> PathBuf {
        self.dev().join("zvol/rdsk").join(name)
    }

    pub(super) fn make_volume(&self, name: &str) -> io::Result<File> {
        let path = self.volume(name);
        std::fs::create_dir_all(path.parent().expect("it is below a directory"))?;
        File::create(path)
    }

    fn snapshots(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    pub(super) fn snapshot_file(&self, name: &str) -> PathBuf {
        self.snapshots().join(name.replace('/', "%"))
    }

    /// Returns whether a server has a volume open.
    fn volume_is_busy(&self, name: &str) -> bool {
        let opened = File::open(self.volume(name));
        opened.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
    }
}
