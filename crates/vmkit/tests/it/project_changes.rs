//! What becomes of a project's machines when its file changes, is moved, or has two operations at
//! once.

use std::fs;
use std::io::Write;
use std::time::Duration;

use crate::shop::{SHOP, done, end, only, runtime, shop};
use vmkit::ErrorKind;
use vmkit::project::{
    EventKind, MachineAction, MachineOutcome, PlannedAction, ProjectEvent, ProjectOptions, ProjectReport,
};
use vmkit::spec::VmName;
use vmkit::vmfile;

#[test]
fn a_machine_that_left_the_file_is_shown_pruned_and_taken_down() {
    let (_temp, shop) = shop();
    let grown = format!("{SHOP}\n[machine.old]\n[machine.older]\n");
    shop.up(&grown);
    let plan = runtime().block_on(shop.engine.plan(&shop.project(SHOP), &ProjectOptions::default())).unwrap();
    let left: Vec<_> = plan.left.iter().map(|left| left.vm.as_str()).collect();
    assert_eq!(left, ["shop-old", "shop-older"]);
    assert!(shop.up(SHOP).is_unchanged(), "up leaves them alone unless asked");
    shop.down(SHOP, true, &only(&["older"]));
    assert_eq!((shop.state("shop-old"), shop.state("shop-older")), ("running", ""));
    let prune = ProjectOptions { prune: true, ..ProjectOptions::default() };
    shop.down(SHOP, true, &only(&["other"]));
    shop.events.lock().unwrap().clear();
    let report = shop.up_as(SHOP, &prune);
    assert_eq!(done(&report, "old"), [MachineAction::Stopped, MachineAction::Removed]);
    assert_eq!(shop.state("shop-old"), "");
    let events = shop.events.lock().unwrap();
    let place = |is: fn(&EventKind) -> bool| events.iter().position(|event| is(&event.what)).unwrap();
    let removed = place(|what| matches!(what, EventKind::Removing));
    assert!(removed < place(|what| matches!(what, EventKind::Making)), "what goes makes room: {events:?}");
}

#[test]
fn a_vm_of_another_origin_is_never_touched() {
    let (_temp, shop) = shop();
    let mine = crate::common::named(VmName::new("shop-db").unwrap());
    runtime().block_on(shop.engine.manager().create(mine)).unwrap();
    let report = shop.up(SHOP);
    assert!(end(&report, "db").contains("it belongs to no project"), "{report:?}");
    assert_eq!(end(&report, "web"), "skipped for db");
    let report = shop.down(SHOP, true, &ProjectOptions::default());
    assert!(end(&report, "db").contains("it belongs to no project"), "{report:?}");
    assert_eq!((end(&report, "other"), shop.state("shop-other")), ("fine".into(), ""));
    assert_eq!(shop.state("shop-db"), "prepared");
}

#[test]
fn machines_of_a_file_that_was_moved_are_named_with_their_owner_and_left_running() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let file = shop.world.dir.join("moved/vmkit.toml");
    let moved = vmfile::parse(&file, SHOP, &|_| Err("not here".into())).unwrap();
    let report = runtime()
        .block_on(shop.engine.down(&moved, true, &ProjectOptions::default(), shop.listener()))
        .unwrap();
    for machine in ["db", "web", "edge", "other"] {
        let (said, owner) = (end(&report, machine), shop.world.dir.join("vmkit.toml"));
        assert!(said.contains(&format!("`{machine}` of {}", owner.display())), "{said}");
        assert_eq!(shop.state(&format!("shop-{machine}")), "running");
    }
}

#[test]
fn vms_of_a_file_that_is_gone_are_reported_where_a_machine_has_none() {
    let (_temp, shop) = shop();
    let old = shop.world.dir.join("vmkit.toml");
    fs::write(&old, SHOP).unwrap();
    assert!(shop.up(SHOP).lost.is_empty());
    let file = shop.world.dir.join("shop2/vmkit.toml");
    let text = |name: &str, machine: &str| {
        format!(
            "version = 1\n[project]\nname = '{name}'\n[defaults]\nkernel = '../vmlinuz'\n[machine.{machine}]\n"
        )
    };
    let parse = |text: &str| vmfile::parse(&file, text, &|_| Err("not here".into())).unwrap();
    let all = text("shop2", "db") + "[machine.edge]\n[machine.other]\n[machine.web]\n[machine.new]\n";
    let project = parse(&all);
    let plan = || runtime().block_on(shop.engine.plan(&project, &ProjectOptions::default())).unwrap();
    assert!(plan().lost.is_empty(), "the other project is where it was");
    fs::remove_file(&old).unwrap();
    let planned = plan().lost;
    let told: Vec<_> = planned.iter().map(|lost| (lost.machine.as_str(), lost.vm.as_str())).collect();
    assert_eq!(
        told,
        [("db", "shop-db"), ("edge", "shop-edge"), ("other", "shop-other"), ("web", "shop-web")]
    );
    assert!(planned.iter().all(|lost| lost.file == old));
    let lost = |text: &str, machines: &[&str]| {
        let machines = machines.iter().map(|name| (*name).to_owned()).collect();
        let options = ProjectOptions { machines, ..ProjectOptions::default() };
        runtime().block_on(shop.engine.lost(&parse(text), &options)).unwrap()
    };
    assert_eq!(lost(&all, &[]), planned);
    assert_eq!(lost(&text("shop", "mail"), &[]), planned, "the project has the same name");
    assert!(lost(&text("shop2", "db"), &[]).is_empty(), "a project with other machines too was another one");
    let down = || {
        runtime()
            .block_on(shop.engine.down(&project, false, &ProjectOptions::default(), shop.listener()))
            .unwrap()
    };
    assert_eq!(down().lost, planned);
    shop.events.lock().unwrap().clear();
    let up =
        || runtime().block_on(shop.engine.up(&project, &ProjectOptions::default(), shop.listener())).unwrap();
    assert_eq!(up().lost, planned);
    let first = shop.events.lock().unwrap().first().map(|event| event.what.clone());
    assert!(
        matches!(first, Some(EventKind::Lost(lost)) if lost == planned),
        "they are told before one is made"
    );
    assert_eq!(shop.state("shop-db"), "running");
    assert!(up().lost.is_empty() && plan().lost.is_empty(), "nothing is made any more");
    assert!(down().lost.is_empty() && lost(&all, &["db"]).is_empty());
}

#[test]
fn a_port_of_the_host_goes_from_one_machine_to_another_in_one_go() {
    let (_temp, shop) = shop();
    let with = |machine: &str| {
        let header = format!("[machine.{machine}]");
        SHOP.replace(&header, &format!("{header}\nforwards = ['8080:80']"))
    };
    shop.up(SHOP);
    // In either order of the turns.
    for machine in ["web", "db", "edge", "other", "db"] {
        let report = shop.up(&with(machine));
        assert!(report.is_fine(), "{report:?}");
        assert_eq!(done(&report, machine), [MachineAction::Changed(vec!["forwards".into()])]);
        let changed = report.machines.iter().filter(|report| !report.done.is_empty()).count();
        assert!(changed <= 2, "{report:?}");
        assert!(shop.up(&with(machine)).is_unchanged());
    }
    let report = shop.up(SHOP);
    assert_eq!(done(&report, "db"), [MachineAction::Changed(vec!["forwards".into()])]);
    assert!(shop.up(SHOP).is_unchanged());
}

#[test]
fn a_vm_to_be_recreated_is_removed_only_once_the_new_one_can_be_created() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let boots = shop.world.boots();
    let gone = |key: &str| {
        let line = match key {
            "image" => "image = 'no-such.img'",
            "kernel" => "kernel = 'no-such-kernel'\nbackend = 'noop'",
            "data_disks" => "data_disks = ['no-such-disk.img']",
            _ => "backend = 'noop'\nfiles = [{ from = 'no-such-file', to = '/f' }]",
        };
        SHOP.replace("[machine.other]", &format!("[machine.other]\n{line}"))
    };
    for key in ["image", "kernel", "data_disks", "files"] {
        let text = gone(key);
        let (project, mut other) = (shop.project(&text), only(&["other"]));
        other.recreate = true;
        let line = text.lines().position(|line| line.contains("no-such")).unwrap() + 1;
        for refused in [
            runtime().block_on(shop.engine.up(&project, &other, shop.listener())),
            runtime().block_on(shop.engine.reload(&project, &other, shop.listener())),
        ] {
            let said = refused.unwrap_err().to_string();
            assert!(
                said.contains(&format!("vmkit.toml:{line}:")) && said.contains("no-such"),
                "{key}: {said}"
            );
            assert_eq!(shop.state("shop-other"), "running", "{key}");
        }
    }
    assert_eq!(shop.world.boots(), boots);
}

#[test]
fn all_missing_files_are_reported_before_anything_is_created() {
    let (_temp, shop) = shop();
    let text = SHOP
        .replace("'app'", "'no-app'")
        .replace("'edge.sh'", "'no-edge.sh'")
        .replace("[machine.other]", "[machine.other]\nkernel = 'no-kernel'\ndata_disks = ['no-disk.img']");
    let (project, all) = (shop.project(&text), ProjectOptions::default());
    let error = runtime().block_on(shop.engine.up(&project, &all, shop.listener())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let said = error.to_string();
    for words in ["no-app", "no-edge.sh", "no-kernel", "no-disk.img"] {
        let (line, column) = text
            .lines()
            .enumerate()
            .find_map(|(line, text)| text.find(&format!("'{words}'")).map(|column| (line + 1, column + 1)))
            .unwrap();
        let place = format!("vmkit.toml:{line}:{column}: ");
        assert!(said.lines().any(|it| it.contains(&place) && it.contains(words)), "{place}{words}: {said}");
    }
    assert_eq!(said.lines().count(), 4, "{said}");
    assert!(shop.world.remains().is_empty() && shop.events.lock().unwrap().is_empty());
    shop.up(SHOP);
    // What would count from the next start on is no better.
    let other = SHOP.replace("[machine.other]", "[machine.other]\nkernel = 'no-kernel'");
    let refused = runtime().block_on(shop.engine.up(&shop.project(&other), &all, shop.listener()));
    assert!(refused.unwrap_err().to_string().contains("no-kernel"));
    let plan = runtime().block_on(shop.engine.plan(&shop.project(&other), &only(&["other"]))).unwrap();
    assert!(plan.machines[0].action.as_ref().unwrap_err().to_string().contains("no-kernel"));
    // A machine that runs needs no kernel, but one that is started again does.
    fs::remove_file(shop.world.dir.join("vmlinuz")).unwrap();
    assert!(shop.up(SHOP).is_unchanged());
    let (project, db) = (shop.project(SHOP), only(&["db"]));
    let reload = shop.engine.reload(&project, &db, shop.listener());
    let said = runtime().block_on(reload).unwrap_err().to_string();
    assert!(said.contains("`kernel`") && said.contains("no such file"), "{said}");
    assert_eq!(shop.state("shop-db"), "running");
}

#[test]
fn an_image_that_can_not_be_fetched_is_pointed_at_and_is_no_bad_input() {
    let (_temp, shop) = shop();
    // Nothing listens there.
    let text = SHOP.replace("[machine.other]", "[machine.other]\nimage = 'http://127.0.0.1:1/x.img'");
    let report = shop.up_as(&text, &only(&["other"]));
    let MachineOutcome::Failed(error) = &report.machines[0].end else { panic!("{report:?}") };
    assert_eq!(error.kind(), ErrorKind::Remote);
    let line = text.lines().position(|line| line.starts_with("image")).unwrap() + 1;
    assert!(error.to_string().contains(&format!("vmkit.toml:{line}:")), "{error}");
    assert!(error.to_string().contains("cannot fetch"), "{error}");
}

#[test]
fn a_wait_for_another_process_is_reported_at_once_with_its_pid() {
    let (_temp, shop) = shop();
    let projects = shop.world.manager.home().projects().to_owned();
    fs::create_dir_all(&projects).unwrap();
    let lock = fs::File::create(projects.join("shop.lock")).unwrap();
    lock.lock().unwrap();
    (&lock).write_all(b"4242").unwrap();
    let options = ProjectOptions { patience: Duration::from_millis(200), ..ProjectOptions::default() };
    let project = shop.project(SHOP);
    let error = runtime().block_on(shop.engine.up(&project, &options, shop.listener())).unwrap_err();
    assert_eq!(error.to_string(), "the project `shop` is in use by process 4242");
    let events = shop.events.lock().unwrap();
    let [ProjectEvent { machine: None, what: EventKind::Queued { holder: Some(4242) }, .. }] = &events[..]
    else {
        panic!("{events:?}")
    };
}

#[test]
fn reload_starts_again_what_it_stopped() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let (project, web) = (shop.project(SHOP), only(&["web"]));
    let reload = shop.engine.reload(&project, &web, shop.listener());
    let report = runtime().block_on(reload).unwrap();
    assert_eq!(done(&report, "web"), [MachineAction::Stopped, MachineAction::Started]);
    assert_eq!(shop.world.boots(), 5);
}

#[test]
fn a_change_is_applied_when_it_can_be_and_the_plan_shows_it_before() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let changed = SHOP.replace(
        "[machine.other]",
        "[machine.other]\ncpus = 2\nforwards = ['8080:80']\nlabels = { team = 'a' }",
    );
    let planned = |text: &str| {
        let plan = runtime().block_on(shop.engine.plan(&shop.project(text), &only(&["other"]))).unwrap();
        let machine = plan.machines.into_iter().next().unwrap();
        let changes = machine.changes.iter().map(|change| format!("{} {}", change.field, change.applies));
        (machine.action.unwrap(), changes.collect::<Vec<_>>(), machine.pending)
    };
    let changes = ["cpus at the next start", "forwards at once", "labels at once"].map(str::to_owned);
    assert_eq!(planned(&changed), (PlannedAction::Keep, changes.to_vec(), vec![]));
    let report = shop.up(&changed);
    let now = MachineAction::Changed(vec!["forwards".into(), "labels".into()]);
    assert_eq!(done(&report, "other"), [now, MachineAction::Recorded(vec!["cpus".into()])]);
    assert_eq!(waits(&report, "other"), ["cpus"]);
    assert_eq!(planned(&changed), (PlannedAction::Keep, vec![], vec!["cpus".to_owned()]));
    let report = shop.up(&changed);
    assert!(report.is_unchanged());
    assert_eq!(waits(&report, "other"), ["cpus"], "what waits is told until it counts");
    let (project, other) = (shop.project(&changed), only(&["other"]));
    let report = runtime().block_on(shop.engine.reload(&project, &other, shop.listener())).unwrap();
    assert!(waits(&report, "other").is_empty(), "{report:?}");
    assert_eq!(planned(&changed), (PlannedAction::Keep, vec![], vec![]));
    let vm = runtime().block_on(shop.engine.manager().info(&VmName::new("shop-other").unwrap())).unwrap();
    assert_eq!(vm.spec.cpus(), 2);
}

fn waits(report: &ProjectReport, machine: &str) -> Vec<String> {
    report.machines.iter().find(|report| report.machine == machine).unwrap().pending.clone()
}

#[test]
fn a_change_that_recreates_a_machine_is_refused_unless_requested() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let changed = SHOP.replace("[machine.db]", "[machine.db]\nbackend = 'noop'");
    let plan = runtime().block_on(shop.engine.plan(&shop.project(&changed), &only(&["db"]))).unwrap();
    assert_eq!(*plan.machines[0].action.as_ref().unwrap(), PlannedAction::Recreate);
    let place = changed.lines().position(|line| line.starts_with("backend")).unwrap() + 1;
    for report in [shop.up(&changed), {
        let project = shop.project(&changed);
        runtime().block_on(shop.engine.reload(&project, &only(&["db"]), shop.listener())).unwrap()
    }] {
        let said = end(&report, "db");
        assert!(said.contains(&format!("vmkit.toml:{place}:")) && said.contains("`backend`"), "{said}");
        assert!(said.contains("--recreate"), "{said}");
        assert_eq!(report.machines.iter().find(|it| it.machine == "db").unwrap().anew, ["backend"]);
        assert_eq!(shop.state("shop-db"), "running");
    }
    let recreate = ProjectOptions { recreate: true, ..ProjectOptions::default() };
    let report = shop.up_as(&changed, &recreate);
    let expected = [
        MachineAction::Stopped,
        MachineAction::Removed,
        MachineAction::Made,
        MachineAction::Started,
        MachineAction::Ran("install".into()),
    ];
    assert_eq!(done(&report, "db"), expected);
}
