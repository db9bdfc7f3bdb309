//! Implementing a custom backend, in four steps, and proving that it keeps the contract.
//!
//! `cargo run -p vmkit-testkit --example custom_backend`
//!
//! The backend here runs nothing: its VMs are files in a directory, `NAME.json` with an identity
//! and a state. That makes it short, and still a true backend: any number of programs may hold it
//! over the same directory.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkit::lifecycle::{FailureKind, Operation, next};
use vmkit::spec::{VmName, VmSpec};
use vmkit::{
    Abilities, Backend, BackendTag, ConsoleEndpoint, Error, Hypervisor, NoopHypervisor, Result,
    RouterHypervisor, RunInfo, Subject, VmHandle, VmState,
};
use vmkit_testkit::{Conformance, conformance, paper_spec};

// Step 1: a struct that implements `Hypervisor`. Plain `async fn`s do.

/// Keeps VMs on paper.
#[derive(Debug, Clone)]
struct PaperHypervisor {
    dir: PathBuf,
}

/// What is on the paper of one VM.
#[derive(Debug, Serialize, Deserialize)]
struct Sheet {
    id: Uuid,
    state: VmState,
}

impl PaperHypervisor {
    fn sheet(&self, name: &VmName) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// Reads a VM's sheet; `None` where there is none, or where the name belongs to another VM by
    /// now.
    fn read(&self, vm: &VmHandle) -> Result<Option<Sheet>> {
        let path = self.sheet(vm.name());
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::io("read", &path))?,
        };
        let sheet: Sheet = serde_json::from_slice(&text)
            .map_err(|error| Error::record(path, "cannot parse the sheet").with_source(error))?;
        Ok((sheet.id == vm.id).then_some(sheet))
    }

    fn write(&self, path: &Path, sheet: &Sheet) -> Result<PathBuf> {
        let temporary = path.with_extension(format!("{}.tmp", Uuid::new_v4()));
        let text = serde_json::to_vec(sheet).expect("a sheet is plain data");
        fs::File::create_new(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .map_err(Error::io("write", &temporary))?;
        Ok(temporary)
    }

    /// Does an operation: the table of `lifecycle::next` says whether it is legal and where it
    /// leads.
    fn change(&self, vm: &VmHandle, operation: Operation) -> Result<VmHandle> {
        let missing = || Error::NotFound { what: Subject::Vm, name: vm.name().to_string() };
        let mut sheet = self.read(vm)?.ok_or_else(missing)?;
        sheet.state = next(&sheet.state, operation)?;
        let path = self.sheet(vm.name());
        let temporary = self.write(&path, &sheet)?;
        fs::rename(&temporary, &path).map_err(Error::io("replace", &path))?;
        let mut handle = vm.clone().in_state(sheet.state);
        if handle.state.is_live() {
            handle.run.get_or_insert_with(RunInfo::default);
        }
        Ok(handle)
    }

    /// Sets a VM to failed, as a hypervisor's crash would.
    fn tear(&self, vm: &VmHandle) {
        let sheet = Sheet { id: vm.id, state: VmState::failed(FailureKind::Other, "the sheet was torn") };
        let path = self.sheet(vm.name());
        self.write(&path, &sheet)
            .and_then(|temporary| fs::rename(&temporary, &path).map_err(Error::io("replace", &path)))
            .expect("the directory is there as long as the VM is");
    }
}

impl Hypervisor for PaperHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        let path = self.sheet(spec.name());
        let temporary = self.write(&path, &Sheet { id, state: VmState::Prepared })?;
        // A link, unlike a rename, never replaces: of two that want the name, one gets it.
        let linked = fs::hard_link(&temporary, &path);
        fs::remove_file(&temporary).map_err(Error::io("remove", &temporary))?;
        match linked {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::AlreadyExists { what: Subject::Vm, name: spec.name().to_string() });
            }
            linked => linked.map_err(Error::io("create", &path))?,
        }
        Ok(VmHandle::preparing(id, self.tag(), spec.clone().with_id(id)).in_state(VmState::Prepared))
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Start)
    }

    async fn stop(&self, vm: &VmHandle, _timeout: Duration) -> Result<VmHandle> {
        self.change(vm, Operation::Stop)
    }

    async fn suspend(&self, _vm: &VmHandle) -> Result<VmHandle> {
        Err(Error::Unsupported { backend: self.tag(), what: "suspend".to_owned() })
    }

    async fn resume(&self, _vm: &VmHandle) -> Result<VmHandle> {
        Err(Error::Unsupported { backend: self.tag(), what: "resume".to_owned() })
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        let path = self.sheet(vm.name());
        match self.read(&vm)? {
            Some(_) => fs::remove_file(&path).map_err(Error::io("remove", &path)),
            None => Ok(()),
        }
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        Ok(self.read(vm)?.map_or(VmState::Destroyed, |sheet| sheet.state))
    }

    async fn guest_ip(&self, _vm: &VmHandle) -> Result<String> {
        Err(Error::Unsupported { backend: self.tag(), what: "a network".to_owned() })
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        if vm.backend == self.tag() {
            return Ok(ConsoleEndpoint::None);
        }
        let problem = format!("the handle belongs to the backend `{}`", vm.backend);
        Err(Error::record(self.sheet(vm.name()), problem))
    }
}

// Step 2: a tag of its own, and what it can do, told beforehand: together they make a `Backend`.

impl Backend for PaperHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::custom("paper").expect("letters, and none of the built-in names")
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        Abilities::none()
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::io("create", std::env::temp_dir()))?;
    let paper = PaperHypervisor { dir: dir.path().to_owned() };

    // Step 3: register it with the router, at run time, beside the others.
    let mut router = RouterHypervisor::new(BackendTag::Noop).with(NoopHypervisor::new());
    router.register(paper.clone());

    // Step 4: nothing more. A spec that names the tag, and every handle that carries it, is
    // dispatched to the backend.
    let by_paper = |name| {
        let spec = paper_spec(name);
        VmSpec::builder(spec.name().clone())
            .boot(spec.boot().clone())
            .backend(BackendTag::custom("paper").expect("letters, and none of the built-in names"))
            .build()
            .expect("the paper spec is valid, with another backend too")
    };
    let vm = router.prepare(&by_paper(VmName::new("hello")?)).await?;
    let vm = router.start(&vm).await?;
    println!("{} is {} by the backend `{}`", vm.name(), router.state(&vm).await?, vm.backend);
    router.destroy(vm).await?;

    // And the proof: the suite that every backend passes, on the backend alone and behind the
    // router.
    let (alone, torn) = (paper.clone(), paper.clone());
    let options = Conformance::new(by_paper).breaking(move |vm| torn.tear(vm));
    let leftovers = dir.path().to_owned();
    let options = options.finding_leftovers(move || {
        let entries = fs::read_dir(&leftovers).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect()
    });
    let report = conformance::run(move || alone.clone(), options.clone()).await;
    println!("{report}");
    let routed = move || RouterHypervisor::new(paper.tag()).with(paper.clone());
    let behind = conformance::run(routed, options).await;
    println!("behind the router: {}", behind.to_string().lines().last().unwrap_or_default());
    report.assert();
    behind.assert();
    Ok(())
}
