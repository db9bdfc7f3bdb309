//! The format of machine files: every example is read and every bad case refused, by vmkit and by
//! the JSON Schema alike.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jsonschema::Validator;
use proptest::prelude::*;
use vmkit::error::Subject;
use vmkit::spec::{Boot, DataDisk, Firmware, HostInputs, NetworkConfig, TakesEffect, UserData, changes};
use vmkit::vmfile::{Project, RunPolicy, StepAction, VmfileError, load, parse, schema};
use vmkit::{Error, ErrorKind};

const FILE: &str = "/home/me/shop/vmkit.toml";

fn read(text: &str) -> Result<Project, VmfileError> {
    parse(Path::new(FILE), text, &|_| Err("there is no such file".to_owned()))
}

fn refused(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

/// Returns the files of a directory, in order, at least one.
fn files(dir: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "toml"));
    files.sort();
    assert!(!files.is_empty());
    files
}

fn validator() -> Validator {
    jsonschema::validator_for(&schema()).unwrap()
}

/// Returns the file as an editor sees it that checks by the schema.
fn as_json(file: &Path) -> serde_json::Value {
    let table: toml::Table = toml::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    serde_json::to_value(table).unwrap()
}

#[test]
fn every_example_is_read_and_the_schema_accepts_it() {
    let validator = validator();
    for file in files("../../examples/projects") {
        let project = load(&file).unwrap_or_else(|error| panic!("{error}"));
        for machine in &project.machines {
            let copies = machine.files.iter().map(|copy| &copy.from);
            let steps = machine.steps.iter().filter_map(|step| match &step.action {
                StepAction::Script(path) => Some(path),
                StepAction::Copy(copy) => Some(&copy.from),
                _ => None,
            });
            for path in copies.chain(steps) {
                assert!(path.exists(), "{}: {}", file.display(), path.display());
            }
            machine.spec(HostInputs { image: Some("/image".into()), ..HostInputs::default() }).unwrap();
        }
        let errors: Vec<String> = validator.iter_errors(&as_json(&file)).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{}: {errors:?}", file.display());
    }
}

#[test]
fn a_wrong_shape_is_refused_by_both() {
    let validator = validator();
    for file in files("tests/vmfile/shape") {
        load(&file).unwrap_err();
        assert!(!validator.is_valid(&as_json(&file)), "the schema accepts {}", file.display());
    }
}

/// Returns a file with one machine that says this, and an image unless it says that itself.
fn with(line: &str) -> String {
    let image = if line.starts_with("image") { "" } else { "image = 'debian:12'\n" };
    format!("version = 1\n[machine.web]\n{image}{line}\n")
}

fn schema_refuses(validator: &Validator, text: &str) -> bool {
    let table: toml::Table = toml::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    !validator.is_valid(&serde_json::to_value(table).unwrap())
}

#[test]
fn every_mistake_alone_is_refused_by_both() {
    let validator = validator();
    let lines = include_str!("../vmfile/one-mistake.txt").lines().filter(|line| !line.is_empty());
    let files =
        ["[project]\nname = 'My Shop'", "[defaults]\ndepends_on = ['web']", "[machine.Web_1]\nimage = 'x:1'"];
    let files = files.map(|table| format!("{}{table}\n", with("")));
    let mut count = 0;
    for text in lines.map(with).chain(files) {
        count += 1;
        let said = refused(&text);
        assert_eq!(said.lines().count(), 1, "one mistake a case: {said}\n{text}");
        assert!(schema_refuses(&validator, &text), "the schema accepts what vmkit refuses: {said}\n{text}");
    }
    assert!(count > 80, "{count}");
}

#[test]
fn every_form_that_a_value_can_have_is_accepted_by_both() {
    let validator = validator();
    for line in include_str!("../vmfile/right.txt").lines().filter(|line| !line.is_empty()) {
        let text = with(line);
        read(&text).unwrap_or_else(|error| panic!("{error}"));
        assert!(!schema_refuses(&validator, &text), "the schema refuses {text}");
    }
}

#[test]
fn what_the_documentation_shows_is_accepted_by_both() {
    let validator = validator();
    let page = include_str!("../../../../docs/vmkit-toml.md");
    let mut shown = page.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).peekable();
    assert!(shown.peek().is_some(), "the page shows no file");
    for text in shown {
        read(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert!(!schema_refuses(&validator, text), "{text}");
    }
}

#[test]
fn what_does_not_go_together_only_vmkit_can_refuse() {
    let validator = validator();
    for file in files("tests/vmfile/sense") {
        load(&file).unwrap_err();
        let errors: Vec<String> = validator.iter_errors(&as_json(&file)).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "move {} to shape/: {errors:?}", file.display());
    }
}

#[test]
fn what_is_not_toml_is_refused() {
    for file in files("tests/vmfile/toml") {
        let text = fs::read_to_string(&file).unwrap();
        assert!(toml::from_str::<toml::Table>(&text).is_err(), "{}", file.display());
        assert_eq!(load(&file).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn defaults_are_laid_under_every_machine() {
    let project = read(
        "version = 1\n[project]\nname = 'shop'\n[defaults]\nimage = 'debian:12'\nmemory = '1GiB'\n\
         labels = { team = 'web', tier = 'all' }\nforwards = ['80']\n[defaults.cloud_init]\npackages = ['curl']\n\
         [machine.web]\nmemory = 512\nlabels = { tier = 'front' }\nforwards = []\n\
         cloud_init.hostname = 'www'\n[machine.api]\n",
    );
    let project = project.unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<&str> = project.machines.iter().map(|machine| machine.vm.as_str()).collect();
    assert_eq!(names, ["shop-web", "shop-api"]);
    let specs: Vec<_> = project
        .machines
        .iter()
        .map(|machine| {
            machine.spec(HostInputs { image: Some("/image".into()), ..HostInputs::default() }).unwrap()
        })
        .collect();
    assert_eq!((specs[0].memory().mib(), specs[1].memory().mib()), (512, 1024));
    assert_eq!(specs[0].labels().get("team"), Some("web"));
    assert_eq!((specs[0].labels().get("tier"), specs[1].labels().get("tier")), (Some("front"), Some("all")));
    let forwards = |index: usize| match specs[index].network() {
        NetworkConfig::User(user) => user.forwards.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!((forwards(0), forwards(1)), (1, 2));
    let config = specs[0].cloud_init().unwrap();
    assert_eq!(config.hostname.as_deref(), Some("www"));
    let UserData::Typed(typed) = &config.user_data else { panic!("{config:?}") };
    assert_eq!(typed.packages, ["curl"]);
    assert_eq!(specs[1].cloud_init().unwrap().hostname.as_deref(), Some("api"));
}

#[test]
fn paths_are_seen_from_the_file_and_names_stay() {
    let project = read(
        "version = 1\n[machine.a]\nimage = './a.qcow2'\ndata_disks = ['10GiB', '../d.raw:ro']\n\
         files = [{ from = 'site', to = '/srv' }]\nprovision = [{ name = 's', script = 'sub/s.sh' }]\n\
         [machine.b]\nimage = 'debian:12'\n[machine.c]\nimage = 'https://example.org/x.img'\n\
         [machine.d]\nimage = 'x.img'\n[machine.e]\nkernel = '/boot/vmlinuz'\ninitrd = 'initrd'\n",
    );
    let project = project.unwrap_or_else(|error| panic!("{error}"));
    let images: Vec<_> = project.machines.iter().map(|machine| machine.image.as_deref()).collect();
    let (file, other) = (Some("/home/me/shop/a.qcow2"), Some("/home/me/shop/x.img"));
    assert_eq!(images, [file, Some("debian:12"), Some("https://example.org/x.img"), other, None]);
    let machine = &project.machines[0];
    assert_eq!(machine.files[0].from, Path::new("/home/me/shop/site"));
    assert_eq!(machine.steps[0].action, StepAction::Script("/home/me/shop/sub/s.sh".into()));
    let spec = machine.spec(HostInputs { image: Some("/kept".into()), ..HostInputs::default() }).unwrap();
    let existing = DataDisk::Existing { path: "/home/me/d.raw".into(), readonly: true };
    assert_eq!(spec.data_disks()[1], existing);
    let Boot::Kernel(kernel) = project.machines[4].spec(HostInputs::default()).unwrap().boot().clone() else {
        panic!("it has a kernel")
    };
    assert_eq!(kernel.initrd.as_deref(), Some(Path::new("/home/me/shop/initrd")));
}

#[cfg(feature = "images")]
#[test]
fn a_path_is_a_path_to_the_images_as_well() {
    use vmkit::image::ImageRef;
    for text in [
        "debian",
        "debian:12",
        "x.img",
        "x.QCOW2",
        "./x",
        "../x:1",
        "/srv/x",
        "a/b",
        "disk.tar.gz",
        "https://example.org/x.img",
        "oci://registry/name:tag",
        "file:///srv/x.raw",
        "noble",
    ] {
        let project = read(&format!("version = 1\n[machine.a]\nimage = '{text}'\n")).unwrap();
        let is_path = matches!(text.parse().unwrap(), ImageRef::Path(_)) && !text.starts_with("file:");
        let image = project.machines[0].image.as_deref().unwrap();
        assert_eq!(image != text || text.starts_with('/'), is_path, "{text}: {image}");
    }
}

#[test]
fn readiness_and_steps_have_their_defaults() {
    let project = read(
        "version = 1\n[machine.a]\nimage = 'x:1'\nready.tcp = [80]\n\
         provision = [{ name = 's', shell = 'true' }, { name = 'c', copy = { from = 'f', to = '/f' } }]\n\
         [machine.b]\nkernel = 'k'\n[machine.c]\nimage = 'x:1'\nnetwork = 'none'\n[machine.d]\nimage = 'x:1'\n\
         ready = { cloud_init = false, command = 'test -e /ok', timeout = '90s' }\n",
    );
    let project = project.unwrap_or_else(|error| panic!("{error}"));
    let ready: Vec<_> = project.machines.iter().map(|m| (m.ready.ssh, m.ready.cloud_init)).collect();
    assert_eq!(ready, [(true, true), (false, false), (false, false), (true, false)]);
    let entered: Vec<_> = project.machines.iter().map(|machine| machine.is_entered()).collect();
    assert_eq!(entered, [true, false, false, true]);
    assert_eq!(project.machines[0].ready.tcp, [80]);
    assert_eq!(project.machines[3].ready.timeout, Duration::from_secs(90));
    let runs: Vec<_> = project.machines[0].steps.iter().map(|step| step.run).collect();
    assert_eq!(runs, [RunPolicy::Once, RunPolicy::Changed]);
    assert_eq!(project.machines[0].steps[0].user, "root");
    assert!(project.machines[1].spec(HostInputs::default()).unwrap().cloud_init().is_none());
}

#[test]
fn machines_come_after_what_they_depend_on() {
    let project = read(
        "version = 1\n[defaults]\nimage = 'x:1'\n[machine.web]\ndepends_on = ['app']\n[machine.mail]\n\
         [machine.app]\ndepends_on = ['db', 'cache']\n[machine.db]\n[machine.cache]\ndepends_on = ['db']\n",
    );
    let project = project.unwrap_or_else(|error| panic!("{error}"));
    let order: Vec<&str> = project.in_order().iter().map(|machine| machine.name.as_str()).collect();
    assert_eq!(order, ["mail", "db", "cache", "app", "web"]);
}

#[test]
fn a_folder_of_any_name_gives_the_project_one() {
    for (folder, name) in [
        ("/home/me/shop", "shop"),
        ("/home/me/My Shop!", "my-shop"),
        ("/", "project"),
        ("/srv/---", "project"),
        ("/srv/日本", "project"),
    ] {
        let file = Path::new(folder).join("vmkit.toml");
        let project =
            parse(&file, "version = 1\n[machine.a]\nimage = 'x:1'\n", &|_| Err(String::new())).unwrap();
        assert_eq!(project.name, name, "{folder}");
    }
}

#[test]
fn a_vm_created_from_the_file_has_no_changes_until_the_file_changes() {
    let text = "version = 1\n[machine.web]\nimage = 'debian:12'\nmemory = '1GiB'\n";
    let machine = |text: &str| read(text).unwrap().machines.remove(0);
    let found = HostInputs {
        image: Some("/images/sha256-abc".into()),
        firmware: Some(Firmware::Uefi),
        ..HostInputs::default()
    };
    let recorded = machine(text).spec(found).unwrap().with_id(uuid::Uuid::from_u128(7));
    assert_eq!(machine(text).spec_over(&recorded).unwrap(), recorded);
    let changed = |from: &str, to: &str| {
        let wanted = machine(&text.replace(from, to)).spec_over(&recorded).unwrap();
        let changes = changes(&recorded, &wanted, true);
        changes.into_iter().map(|change| (change.field, change.to, change.applies)).collect::<Vec<_>>()
    };
    assert_eq!(changed("1GiB", "2GiB"), [("memory", "2GiB".into(), TakesEffect::NextStart)]);
    assert_eq!(changed("debian:12", "debian:13"), [("image", "debian:13".into(), TakesEffect::Anew)]);
}

#[test]
fn an_error_about_a_spec_points_into_the_file() {
    let text = "version = 1\n[machine.web]\nimage = 'debain:12'\nnetwork = 'tap:br9'\n";
    let project = read(text).unwrap();
    let machine = project.machine("web").unwrap();
    let blamed = |field: &'static str| {
        project.blamed(machine, Error::invalid(field, "it", "there is none")).to_string()
    };
    assert_eq!(blamed("image"), format!("{FILE}:3:9: `image`: \"it\": there is none"));
    assert_eq!(blamed("network.bridge"), format!("{FILE}:4:11: `network`: \"it\": there is none"));
    assert_eq!(blamed("memory"), format!("{FILE}:2:10: `memory`: \"it\": there is none"));
    let other = project.blamed(machine, Error::not_found(Subject::Vm, "x"));
    assert_eq!(other.kind(), ErrorKind::NotFound);
}

#[test]
fn a_mistake_in_the_defaults_is_reported_once() {
    let text = "version = 1\n[defaults]\nkernel = 'k'\nready.command = 'true'\n[machine.a]\n[machine.b]\n";
    let said = refused(text);
    assert!(said.starts_with(&format!("{FILE}:4:17: `ready.command` needs")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_path_that_is_not_utf_8_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let file = Path::new(std::ffi::OsStr::from_bytes(b"/home/me/\xff/vmkit.toml"));
    let error =
        parse(file, "version = 1\n[machine.a]\nimage = 'x:1'\n", &|_| Err(String::new())).unwrap_err();
    assert!(error.to_string().contains("the path of this file is not UTF-8"), "{error}");
}

#[test]
fn line_ends_and_a_byte_order_mark_are_nothing_special() {
    let text = "version = 1\n[machine.web]\nimage = 'debian:12'\ncpus = 0\n";
    let plain = refused(text);
    assert_eq!(plain, format!("{FILE}:4:8: `cpus` is 1 to 255"));
    assert_eq!(refused(&text.replace('\n', "\r\n")), plain);
    assert_eq!(refused(&format!("\u{feff}{text}")), plain);
    let script = "version = 1\r\n[machine.web]\r\nimage = 'x:1'\r\nprovision = [{ name = 'a', shell = '''\r\necho a\r\necho b\r\n''' }]\r\n";
    let project = read(script).unwrap();
    assert_eq!(project.machines[0].steps[0].action, StepAction::Shell("echo a\necho b\n".into()));
}

#[test]
fn bottomless_files_are_refused_and_not_followed() {
    let deep = |one: &str, times: usize| format!("version = 1\nx = {}\n", one.repeat(times));
    for text in [
        deep("[", 100_000),
        deep("{ a = ", 50_000),
        format!("version = 1\n{} = 1\n", vec!["a"; 100_000].join(".")),
        format!("version = 1\n[{}]\n", vec!["a"; 100_000].join(".")),
        "version = 1\n[[a]]\n".to_owned() + &"[[a.a]]\n".repeat(50_000),
    ] {
        let said = refused(&text);
        assert!(said.len() < 20_000, "{} bytes", said.len());
    }
}

#[test]
fn files_that_are_none_are_refused_by_path_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmkit.toml");
    let refusal = |path: &Path| {
        let error = load(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(text.starts_with(&format!("{}: ", path.display())), "{text}");
        text
    };
    assert!(refusal(&path).contains("no such file"));
    assert!(refusal(dir.path()).contains("a directory"));
    assert!(refusal(Path::new("/dev/zero")).contains("a device"));
    assert!(refusal(Path::new("/a/https:/b/c")).ends_with("are not fetched here: download the file first"));
    for (content, reason) in [
        (Vec::new(), "the file is empty"),
        (b"version = 1\n[machine.a]\nimage = '\xff'\n".to_vec(), "not UTF-8 from its byte 33 on, in line 3"),
        (vec![b'#'; (1 << 20) + 1], "more than 1048576 bytes"),
    ] {
        fs::write(&path, content).unwrap();
        let text = refusal(&path);
        assert!(text.contains(reason), "{text}");
    }
}

/// Returns how long this thread has been on a processor.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap(), now.tv_nsec.try_into().unwrap())
}

#[test]
fn a_hundred_machines_are_read_and_compared_within_100_ms() {
    let mut text = "version = 1\n[defaults]\nimage = 'debian:12'\nmemory = '1GiB'\n".to_owned();
    for index in 0..100 {
        let (port, below) =
            (10_000 + index, if index > 0 { format!("'m{}'", index - 1) } else { String::new() });
        write!(
            text,
            "[machine.m{index}]\ncpus = 2\nforwards = ['{port}:80']\ndepends_on = [{below}]\n\
             [machine.m{index}.cloud_init]\npackages = ['nginx']\nusers = [{{ name = 'ada', sudo = true }}]\n\
             [[machine.m{index}.provision]]\nname = 'a'\nshell = 'true'\nenv = {{ A = 'b' }}\n"
        )
        .unwrap();
    }
    let once = || {
        let begun = cpu_time();
        let project = read(&text).unwrap();
        assert_eq!(project.in_order().len(), 100);
        for machine in &project.machines {
            let found = HostInputs { image: Some("/image".into()), ..HostInputs::default() };
            let recorded = machine.spec(found).unwrap();
            assert!(changes(&recorded, &machine.spec_over(&recorded).unwrap(), true).is_empty());
        }
        cpu_time() - begun
    };
    // This thread's time on a processor, the best of a few: what else the machine does is not what
    // is measured.
    let best = (0..10).map(|_| once()).min().unwrap();
    assert!(best < Duration::from_millis(100), "{best:?}");
}

/// A file with something of everything, to be damaged.
const SAMPLE: &str = include_str!("../../../../examples/projects/three-tiers.toml");

proptest! {
    #[test]
    fn reading_any_text_never_panics(text in "\\PC{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn errors_of_a_damaged_file_name_places_inside_it(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), "[\\PC\\n\"=\\[\\].{}]{0,6}", 0usize..12), 1..5),
    ) {
        let mut text = SAMPLE.to_owned();
        for (at, new, cut) in damage {
            let start = text.floor_char_boundary(at.index(text.len().max(1)));
            let end = text.ceil_char_boundary((start + cut).min(text.len()));
            text.replace_range(start..end, &new);
        }
        if let Err(error) = read(&text) {
            prop_assert!(!error.problems().is_empty());
            for problem in error.problems() {
                for place in problem.place.iter().chain(&problem.also) {
                    prop_assert!(error.text().get(place.span.clone()).is_some(), "{place:?}");
                }
            }
        }
    }
}

#[test]
fn a_mark_at_the_beginning_moves_no_column() {
    let text = "\u{feff}version = 1\n[machine.web]\nimage = 'debian:12'\n";
    read(text).unwrap_or_else(|error| panic!("{error}"));
    assert!(refused("\u{feff}verzion = 1\n").starts_with("/home/me/shop/vmkit.toml:1:1: "));
    assert!(refused("\u{feff}").contains("the file is empty"));
}

#[test]
fn a_misspelled_key_is_one_mistake_though_it_is_needed() {
    let said = refused("verson = 1\n[machine.web]\nimage = 'debian:12'\n");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("did you mean `version`?"), "{said}");
    // One that is no other key's stands for none.
    assert_eq!(refused("something = 1\n[machine.web]\nimage = 'debian:12'\n").lines().count(), 2);
}

#[test]
fn a_file_that_is_no_image_is_refused_with_the_formats_that_are() {
    for image in ["", " "] {
        let said = refused(&with(&format!("image = '{image}'")));
        assert!(
            said.contains("`image`: an image is a name such as debian:12, a path, or an address"),
            "{said}"
        );
    }
}
