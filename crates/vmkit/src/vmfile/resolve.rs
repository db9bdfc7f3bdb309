//! From the text of a file of machines to a project: [`parse`].
//!
//! Pure: the caller provides the text of files that the file refers to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::document::{MergedDocument, NamedMachine, read_file, toml_of};
use super::forms::{FileMode, HostPath, TimeLimit};
use super::graph;
use super::project::{self, MachineConfig, Project, ReadyProbes, RunPolicy, StepAction, blame, place_of};
use super::raw;
use super::shared;
use crate::error::Error;
use crate::error::{VmfileError, VmfileProblem};
use crate::spec::{
    BackendOptions, Blueprint, CdromPatch, CloudConfig, CloudInitConfig, DataDisk, FieldConflict, GuestFile,
    GuestUser, Labels, NetworkConfig, Protocol, SpecPatch, UserData, VmName, VmSpec, check_joinable,
    check_network_config, check_user_data, yaml::YamlMistake,
};

/// The default timeout of a step, and of a machine's readiness.
const USUAL_LIMIT: Duration = Duration::from_secs(600);
/// Extensions that mark a path of an image rather than a name.
const FILE_ENDS: &[&str] =
    &[".qcow2", ".img", ".raw", ".qcow", ".vmdk", ".vdi", ".iso", ".gz", ".xz", ".zst", ".bz2"];
/// More problems than a person reads at once.
const MOST_PROBLEMS: usize = 50;

/// Returns the text of a file of the host, or what is wrong, such as `there is no such file`.
pub type ReadText<'a> = &'a dyn Fn(&Path) -> Result<String, String>;

/// Parses the text of a file of machines; `file` is its absolute path, and `read` reads the files
/// that it refers to.
///
/// # Errors
/// [`VmfileError`] with all problems: syntax errors of TOML; if there are none, unknown keys and
/// wrong values; if there are none, values that conflict.
pub fn parse(file: &Path, text: &str, read: ReadText<'_>) -> Result<Project, VmfileError> {
    // Editors of Windows write a byte order mark, which is no part of the text. A script with their
    // line ends would not run in a guest.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text: Arc<str> = text.replace("\r\n", "\n").into();
    let failed = |problems: Vec<VmfileProblem>| {
        // A problem in `defaults` is reported once, however many machines have it.
        let mut told: Vec<VmfileProblem> = Vec::new();
        for problem in problems {
            if told.len() < MOST_PROBLEMS && !told.contains(&problem) {
                told.push(problem);
            }
        }
        VmfileError::new(file, Arc::clone(&text), told)
    };
    if file.to_str().is_none() {
        let problem =
            VmfileProblem::new("the path of this file is not UTF-8, and its machines are known by its path");
        return Err(failed(vec![problem.help("move it to a directory whose name is UTF-8")]));
    }
    let document = toml_of(&text).map_err(failed)?;
    let mut problems = Vec::new();
    let whole = read_file(&document, &mut problems);
    let Some(whole) = whole.filter(|_| problems.is_empty()) else { return Err(failed(problems)) };
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut resolver = Resolver { folder, file, text: &text, read, problems };
    let (name, machines) = resolver.project(whole);
    let problems = resolver.problems;
    if !problems.is_empty() {
        return Err(failed(problems));
    }
    Ok(Project { name, file: file.to_owned(), machines, text: Arc::clone(&text) })
}

struct Resolver<'a> {
    file: &'a Path,
    folder: &'a Path,
    text: &'a str,
    read: ReadText<'a>,
    problems: Vec<VmfileProblem>,
}

/// A machine that is being resolved, for the places of its problems.
struct MachinePlace<'a> {
    places: &'a BTreeMap<String, Range<usize>>,
}

impl MachinePlace<'_> {
    fn of(&self, key: &str) -> Range<usize> {
        place_of(self.places, key)
    }

    /// Returns whether the machine has this key.
    fn has(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }
}

impl Resolver<'_> {
    fn project(&mut self, whole: MergedDocument) -> (String, Vec<MachineConfig>) {
        let name = self.project_name(whole.project, whole.project_span);
        let mut machines = Vec::with_capacity(whole.machines.len());
        for machine in whole.machines {
            machines.extend(self.machine(&name, machine));
        }
        if self.problems.is_empty() {
            self.problems.extend(graph::problems(&machines));
            self.problems.extend(shared::problems(&machines));
        }
        (name, machines)
    }

    fn project_name(&mut self, given: Option<String>, span: Range<usize>) -> String {
        let Some(name) = given else { return fit_name(self.folder) };
        if let Err(Error::Invalid { expected, .. }) = VmName::new(&name) {
            self.problems.push(VmfileProblem::new(format!("the project's name: {expected}")).at(span, ""));
        }
        name
    }

    fn machine(&mut self, project: &str, named: NamedMachine) -> Option<MachineConfig> {
        let NamedMachine { name, raw, places } = named;
        let at = MachinePlace { places: &places };
        let problems_before = self.problems.len();
        // An invalid name of the project was reported already; it is not the fault of every
        // machine.
        let joined = if VmName::new(project).is_ok() { format!("{project}-{name}") } else { name.clone() };
        let vm = match VmName::new(&name).and_then(|_| VmName::new(joined)) {
            Ok(vm) => Some(vm),
            Err(error) => {
                self.refuse_name(&error, &at);
                None
            }
        };
        let image = raw.image.as_ref().map(|image| self.image(&image.0));
        let ready = ready(&raw, &at, &mut self.problems);
        self.problems.extend(without_way_in(&raw, &at));
        let files = raw.files.iter().flatten().map(|copy| self.copy(copy)).collect();
        let steps = self.steps(&raw, &at);
        let blueprint = self.blueprint(&name, vm?, &raw, image.as_deref(), &at);
        if self.problems.len() > problems_before {
            return None;
        }
        let blueprint = blueprint?;
        let plan = MachineConfig {
            vm: blueprint.draft().name().clone(),
            name,
            image,
            depends_on: raw.depends_on.unwrap_or_default(),
            ready,
            files,
            steps,
            blueprint,
            places,
        };
        let unseen = unseen_ports(&plan);
        self.problems.extend(unseen);
        Some(plan)
    }

    fn refuse_name(&mut self, error: &Error, at: &MachinePlace<'_>) {
        let Error::Invalid { value, expected, .. } = error else { return };
        let message = format!("{value:?} can't be a VM's name: {expected}");
        self.problems
            .push(VmfileProblem::new(message).at(at.of(""), "").help("the VM is called PROJECT-MACHINE"));
    }

    /// Returns the path relative to the file's folder.
    fn absolute(&self, path: impl AsRef<Path>) -> PathBuf {
        let mut absolute = self.folder.to_owned();
        // So that `./a` and `../a` give the path that a person would write.
        for part in path.as_ref().components() {
            match part {
                std::path::Component::CurDir => {}
                std::path::Component::ParentDir if absolute.file_name().is_some() => {
                    absolute.pop();
                }
                part => absolute.push(part),
            }
        }
        absolute
    }

    /// Returns the image's text, with a path made absolute: only names and addresses mean the same
    /// everywhere.
    fn image(&self, text: &str) -> String {
        let is_address = text.contains("://") || text.starts_with("file:");
        let is_file = FILE_ENDS.iter().any(|end| text.to_ascii_lowercase().ends_with(end));
        if is_address || !(text.contains('/') || is_file) {
            return text.to_owned();
        }
        self.absolute(text).to_string_lossy().into_owned()
    }

    fn copy(&self, raw: &raw::RawCopy) -> project::CopySpec {
        project::CopySpec {
            from: self.absolute(&raw.from.0),
            to: raw.to.0.clone(),
            mode: raw.mode.map(|FileMode(bits)| bits),
            owner: raw.owner.as_ref().map(|owner| owner.0.clone()),
        }
    }

    fn steps(&mut self, raw: &raw::RawMachine, at: &MachinePlace<'_>) -> Vec<project::ProvisionStep> {
        let mut steps: Vec<project::ProvisionStep> = Vec::new();
        for (index, step) in raw.provision.iter().flatten().enumerate() {
            let key = format!("provision[{index}]");
            let action = match (&step.shell, &step.script, &step.copy) {
                (Some(shell), None, None) => StepAction::Shell(shell.0.clone()),
                (None, Some(script), None) => StepAction::Script(self.absolute(&script.0)),
                (None, None, Some(copy)) => StepAction::Copy(self.copy(copy)),
                (shell, script, copy) => {
                    let given = [shell.is_some(), script.is_some(), copy.is_some()];
                    let count = given.iter().filter(|given| **given).count();
                    let name = &step.name.0;
                    let message = format!("the step `{name}` has {count} of `shell`, `script` and `copy`");
                    let problem = VmfileProblem::new(message).at(at.of(&key), "");
                    self.problems.push(problem.help("a step does one thing: give it one of them"));
                    continue;
                }
            };
            if let Some(first) = steps.iter().position(|other| other.name == step.name.0) {
                let problem = VmfileProblem::new(format!("two steps are called `{}`", step.name.0))
                    .at(at.of(&format!("{key}.name")), "again here")
                    .also(at.of(&format!("provision[{first}].name")), "first here");
                self.problems
                    .push(problem.help("what was done is recorded by step name: give each step its own"));
            }
            let usual =
                if matches!(action, StepAction::Copy(_)) { RunPolicy::Changed } else { RunPolicy::Once };
            steps.push(project::ProvisionStep {
                name: step.name.0.clone(),
                action,
                run: step.run.unwrap_or(usual),
                user: step.user.as_ref().map_or("root".to_owned(), ToString::to_string),
                env: self.environment(step, &key, at),
                dir: step.dir.as_ref().map(|dir| dir.0.clone()),
                timeout: step.timeout.map_or(USUAL_LIMIT, |TimeLimit(limit)| limit),
            });
        }
        steps
    }

    fn environment(
        &mut self,
        step: &raw::RawStep,
        key: &str,
        at: &MachinePlace<'_>,
    ) -> BTreeMap<String, String> {
        let env = step.env.clone().unwrap_or_default();
        for (name, value) in &env {
            let head = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            let clean = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !head || !clean || value.contains('\0') {
                let message = format!("`{}` can't be in an environment", name.escape_debug());
                let problem = VmfileProblem::new(message).at(at.of(&format!("{key}.env.{name}")), "");
                self.problems.push(
                    problem.help("a variable's name is letters, digits and _, and no value has a zero byte"),
                );
            }
        }
        env
    }

    fn blueprint(
        &mut self,
        name: &str,
        vm: VmName,
        raw: &raw::RawMachine,
        image: Option<&str>,
        at: &MachinePlace<'_>,
    ) -> Option<Blueprint> {
        let cloud_init = self.cloud_init(name, raw, at);
        let labels = self.labels(name, raw, image, at);
        let options = self.backend_options(raw, at);
        let mut patch = SpecPatch::default();
        let path = |path: &Option<HostPath>| path.as_ref().map(|path| self.absolute(&path.0));
        patch.image = image.map(PathBuf::from);
        patch.disk = raw.disk;
        patch.cdrom = path(&raw.cdrom).map(CdromPatch::Insert);
        patch.kernel = path(&raw.kernel);
        patch.initrd = path(&raw.initrd);
        patch.cmdline.clone_from(&raw.cmdline);
        patch.firmware = raw.firmware;
        patch.machine = raw.machine;
        patch.accel = raw.accel;
        patch.cpus = raw.cpus.map(|cpus| cpus.0);
        patch.memory = raw.memory;
        patch.data_disks = Some(raw.data_disks.iter().flatten().map(|disk| self.data_disk(disk)).collect());
        patch.network.clone_from(&raw.network);
        patch.forwards.clone_from(&raw.forwards);
        patch.restrict = raw.restrict;
        patch.vnc = raw.vnc;
        patch.console_log = raw.console_log;
        patch.run_as.clone_from(&raw.run_as);
        patch.backend.clone_from(&raw.backend);
        patch.backend_options = Some(options);
        patch.labels = Some(labels);
        // An image gets vmkit's login through cloud-init; a bare kernel has no cloud-init.
        patch.cloud_init = (image.is_some() || raw.cloud_init.is_some()).then_some(cloud_init);
        let base = VmSpec::builder(vm);
        for FieldConflict { field, other, problem, .. } in patch.conflicts(&base) {
            let (key, message) = blame(field, "", problem);
            let problem = VmfileProblem::new(message).at(at.of(&key), "");
            self.problems.push(match at.has(other) && other != key {
                true => problem.also(at.of(other), format!("the {other}")),
                false => problem,
            });
        }
        let blueprint = Blueprint::new(patch.merged(base));
        let blueprint = blueprint.map_err(|error| self.refuse(&error, at)).ok()?;
        let has_cloud_init = blueprint.draft().cloud_init().is_some();
        Some(if has_cloud_init { blueprint.with_access() } else { blueprint })
    }

    /// Reports the spec's error about a value, at its place in the file.
    fn refuse(&mut self, error: &Error, at: &MachinePlace<'_>) {
        let (key, message) = match error {
            Error::Invalid { field, value, expected, .. } => blame(field, value, expected),
            error => (String::new(), error.to_string()),
        };
        self.problems.push(VmfileProblem::new(message).at(at.of(&key), ""));
    }

    fn data_disk(&self, disk: &DataDisk) -> DataDisk {
        match disk.clone() {
            DataDisk::Existing { path, readonly } => {
                DataDisk::Existing { path: self.absolute(path), readonly }
            }
            disk => disk,
        }
    }

    fn labels(
        &mut self,
        name: &str,
        raw: &raw::RawMachine,
        image: Option<&str>,
        at: &MachinePlace<'_>,
    ) -> Labels {
        let mut labels = Labels::default();
        let file = self.file.to_string_lossy();
        let own = [
            (Project::LABEL, Some(&*file)),
            (MachineConfig::LABEL, Some(name)),
            (MachineConfig::IMAGE_LABEL, image),
        ];
        for (key, value) in own.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            if let Err(error) = labels.set(key, value) {
                self.refuse(&error, at);
            }
        }
        for (key, value) in raw.labels.iter().flatten() {
            let place = at.of(&format!("labels.{key}"));
            if key.starts_with("vmkit.") {
                let problem = VmfileProblem::new("labels that begin with `vmkit.` are vmkit's own");
                self.problems.push(problem.at(place, "").help("give it another name"));
            } else if let Err(Error::Invalid { expected, .. }) = labels.set(key, value) {
                self.problems
                    .push(VmfileProblem::new(format!("the label {key:?}: {expected}")).at(place, ""));
            }
        }
        labels
    }

    fn backend_options(&mut self, raw: &raw::RawMachine, at: &MachinePlace<'_>) -> BackendOptions {
        let mut options = BackendOptions::default();
        for (key, value) in raw.backend_options.iter().flatten() {
            if let Err(error) = options.set(key, value) {
                self.refuse(&error, at);
            }
        }
        options
    }

    fn cloud_init(&mut self, name: &str, raw: &raw::RawMachine, at: &MachinePlace<'_>) -> CloudInitConfig {
        let Some(raw) = &raw.cloud_init else {
            return CloudInitConfig { hostname: Some(name.to_owned()), ..CloudInitConfig::default() };
        };
        let typed = [
            ("users", raw.users.is_some()),
            ("packages", raw.packages.is_some()),
            ("files", raw.files.is_some()),
            ("commands", raw.commands.is_some()),
        ];
        let own = self.document("user_data", raw.user_data.as_deref(), raw.user_data_file.as_ref(), at);
        if let (Some(_), Some((key, _))) = (&own, typed.iter().find(|(_, given)| *given)) {
            let message = format!("`{key}` and user-data of your own do not go together");
            let problem = VmfileProblem::new(message).at(at.of(&format!("cloud_init.{key}")), "");
            self.problems.push(problem.help("use one of the two"));
        }
        CloudInitConfig {
            hostname: Some(raw.hostname.clone().unwrap_or_else(|| name.to_owned())),
            user_data: own.map_or_else(|| UserData::Typed(typed_config(raw)), UserData::Raw),
            network_config: self.document(
                "network_config",
                raw.network_config.as_deref(),
                raw.network_config_file.as_ref(),
                at,
            ),
            ..CloudInitConfig::default()
        }
    }

    /// Returns a document that is given in the file, or in a file that it refers to.
    fn document(
        &mut self,
        key: &str,
        inline: Option<&str>,
        file: Option<&HostPath>,
        at: &MachinePlace<'_>,
    ) -> Option<String> {
        let Some(path) = file else { return self.inline_document(key, inline?, at) };
        let place = at.of(&format!("cloud_init.{key}_file"));
        if inline.is_some() {
            let problem =
                VmfileProblem::new(format!("`{key}` and `{key}_file` do not go together")).at(place, "");
            self.problems.push(problem.also(at.of(&format!("cloud_init.{key}")), "and here"));
            return None;
        }
        let path = self.absolute(&path.0);
        match (self.read)(&path) {
            // A byte order mark is no part of the document.
            Ok(text) => match mistake_in(key, text.trim_start_matches('\u{feff}')) {
                None => Some(text.trim_start_matches('\u{feff}').to_owned()),
                Some(YamlMistake { line, column, what, .. }) => {
                    let message = format!("`{key}_file`: {}:{line}:{column}: {what}", path.display());
                    self.problems.push(VmfileProblem::new(message).at(place, ""));
                    None
                }
            },
            Err(why) => {
                self.problems.push(
                    VmfileProblem::new(format!("`{key}_file`: {}: {why}", path.display())).at(place, ""),
                );
                None
            }
        }
    }

    /// Returns a document that is given in the file, or reports the mistake in it.
    fn inline_document(&mut self, key: &str, document: &str, at: &MachinePlace<'_>) -> Option<String> {
        let Some(mistake) = mistake_in(key, document) else { return Some(document.to_owned()) };
        let place = at.of(&format!("cloud_init.{key}"));
        let as_written = self.text.get(place.clone()).and_then(|written| written.find(document));
        let problem = match as_written {
            Some(begin) => {
                let start = place.start + begin + mistake.byte;
                let length =
                    self.text[start..].chars().next().filter(|c| *c != '\n').map_or(0, char::len_utf8);
                VmfileProblem::new(format!("`cloud_init.{key}`: {}", mistake.what))
                    .at(start..start + length, "")
            }
            // In a string with escapes the places don't match.
            None => VmfileProblem::new(format!("`cloud_init.{key}`: {}", mistake.with_place())).at(place, ""),
        };
        self.problems.push(problem);
        None
    }
}

/// Returns the mistake that keeps cloud-init from reading a document of this key.
fn mistake_in(key: &str, document: &str) -> Option<YamlMistake> {
    match key {
        "user_data" => check_user_data(document).and_then(|()| check_joinable(document)).err(),
        _ => check_network_config(document).err(),
    }
}

fn typed_config(raw: &raw::RawCloudInit) -> CloudConfig {
    CloudConfig {
        users: raw
            .users
            .iter()
            .flatten()
            .map(|user| GuestUser {
                name: user.name.to_string(),
                ssh_keys: user.ssh_keys.clone().unwrap_or_default(),
                sudo: user.sudo.unwrap_or_default(),
                shell: user.shell.as_ref().map(|shell| shell.0.clone()),
            })
            .collect(),
        packages: raw.packages.clone().unwrap_or_default(),
        files: raw
            .files
            .iter()
            .flatten()
            .map(|file| GuestFile {
                path: file.path.0.clone().into(),
                content: file.content.clone(),
                mode: file.mode.map_or(0o644, |FileMode(bits)| bits),
                owner: file.owner.clone(),
            })
            .collect(),
        commands: raw.commands.iter().flatten().map(|command| command.0.clone()).collect(),
        ssh_host_key: None,
    }
}

fn ready(raw: &raw::RawMachine, at: &MachinePlace<'_>, problems: &mut Vec<VmfileProblem>) -> ReadyProbes {
    let none = matches!(raw.network, Some(NetworkConfig::None));
    let reachable = raw.image.is_some() && !none;
    let table = raw.ready.as_ref();
    let ssh = table.and_then(|ready| ready.ssh).unwrap_or(reachable);
    let cloud_init = table.and_then(|ready| ready.cloud_init).unwrap_or(ssh);
    let tcp: Vec<u16> = table
        .iter()
        .flat_map(|ready| ready.tcp.iter().flatten())
        .filter_map(|port| port.0.try_into().ok())
        .collect();
    if none && !tcp.is_empty() {
        let problem = VmfileProblem::new("`ready.tcp` needs a network, and the machine has none");
        problems.push(problem.at(at.of("ready.tcp"), "").also(at.of("network"), "the network"));
    }
    ReadyProbes {
        ssh,
        cloud_init,
        tcp,
        command: table.and_then(|ready| ready.command.as_ref()).map(|command| command.0.clone()),
        timeout: table.and_then(|ready| ready.timeout).map_or(USUAL_LIMIT, |TimeLimit(limit)| limit),
    }
}

/// Reports everything that needs a login to a guest without one.
fn without_way_in(raw: &raw::RawMachine, at: &MachinePlace<'_>) -> Vec<VmfileProblem> {
    let has_network = !matches!(raw.network, Some(NetworkConfig::None));
    // cloud-init creates vmkit's user and installs its key.
    let has_key = raw.image.is_some() || raw.cloud_init.is_some();
    if has_network && has_key {
        return Vec::new();
    }
    let ready = raw.ready.as_ref();
    let asked = [
        ("files", raw.files.as_ref().is_some_and(|files| !files.is_empty())),
        ("provision", raw.provision.as_ref().is_some_and(|steps| !steps.is_empty())),
        ("ready.ssh", ready.is_some_and(|ready| ready.ssh == Some(true))),
        ("ready.cloud_init", ready.is_some_and(|ready| ready.cloud_init == Some(true))),
        ("ready.command", ready.is_some_and(|ready| ready.command.is_some())),
    ];
    let problem = |key: &str| match has_network {
        false => VmfileProblem::new(format!("`{key}` needs a network, and the machine has none"))
            .at(at.of(key), "")
            .also(at.of("network"), "the network"),
        true => VmfileProblem::new(format!("`{key}` needs a login to the guest, and there is none"))
            .at(at.of(key), "")
            .help("give the machine an `image`, or `cloud_init = {}` if the guest has cloud-init"),
    };
    asked.into_iter().filter(|(_, asked)| *asked).map(|(key, _)| problem(key)).collect()
}

/// Reports every port of `ready.tcp` that the host can't reach because no forward exists.
fn unseen_ports(machine: &MachineConfig) -> Vec<VmfileProblem> {
    let NetworkConfig::User(user) = machine.network() else { return Vec::new() };
    if machine.is_entered() {
        return Vec::new();
    }
    let is_seen = |port: u16| {
        user.forwards.iter().any(|it| it.guest_port.get() == port && it.protocol == Protocol::Tcp)
    };
    let unseen = machine.ready.tcp.iter().enumerate().filter(|(_, port)| !is_seen(**port));
    let problem = |(index, port): (usize, &u16)| {
        let message = format!(
            "`ready.tcp`: port {port} is checked from the host, since vmkit has no login to this guest, \
             and no forward leads to it"
        );
        let problem = VmfileProblem::new(message).at(machine.place(&format!("ready.tcp[{index}]")), "");
        problem.help(format!("add \"{port}\" to `forwards`"))
    };
    unseen.map(problem).collect()
}

/// Returns the folder's name, changed to a valid start of a VM's name.
fn fit_name(folder: &Path) -> String {
    const MOST: usize = 30;
    let name = folder.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let fit = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = name.chars().map(fit).take(MOST).collect();
    match name.trim_matches('-') {
        "" => "project".to_owned(),
        name => name.to_owned(),
    }
}
