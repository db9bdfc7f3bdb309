//! Machines that a file describes, over VMs and guests that are files: order, repetition, failure,
//! and a kill at every step.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroU16;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::common::{FileHypervisor, World};
use crate::shop::{SHOP, Shop, done, end, only, runtime, shop};
use vmkit::project::{
    EventKind, MachineAction, PlannedAction, ProjectEvent, ProjectOptions, ProjectReport, ProvisionPolicy,
};
use vmkit::spec::{Protocol, VmName};
use vmkit::{ActiveForward, ErrorKind, RunInfo, VmManager};
use vmkit_testkit::crash;

#[test]
fn machines_come_up_after_those_that_they_depend_on() {
    let (_temp, shop) = shop();
    let report = shop.up(SHOP);
    assert!(report.is_fine(), "{report:?}");
    let order = [
        "shop-db echo db-install",
        "shop-db db-is-up",
        "shop-web copy",
        "shop-web echo web-install",
        "shop-edge echo edge-install",
    ];
    let places = order.map(|line| shop.place_of(line));
    assert!(places.is_sorted(), "{:?}", shop.said());
    let expected = [
        MachineAction::Made,
        MachineAction::Started,
        MachineAction::Ran("copy to /srv/app".into()),
        MachineAction::Ran("install".into()),
        MachineAction::Ran("sync".into()),
    ];
    assert_eq!(done(&report, "web"), expected);
    assert_eq!(shop.state("shop-other"), "running");
}

#[test]
fn a_warning_about_a_guest_is_an_event_of_its_machine() {
    let (temp, shop) = shop();
    fs::write(temp.path().join("odd"), "").unwrap();
    let report = shop.up_as(SHOP, &only(&["db"]));
    assert!(report.is_fine(), "{report:?}");
    let events = shop.events.lock().unwrap();
    let told = |event: &ProjectEvent| match &event.what {
        EventKind::Notice(text) => Some((event.machine.clone(), text.clone())),
        _ => None,
    };
    let told: Vec<_> = events.iter().filter_map(told).collect();
    assert_eq!(told, [(Some("db".to_owned()), "the guest is odd".to_owned())]);
}

#[test]
fn a_guest_that_is_not_entered_is_asked_for_its_ports_from_the_host() {
    let temp = tempfile::tempdir().unwrap();
    // A user network closes the connection if the guest refuses, and keeps it open if something
    // listens.
    let [refuses, listens] = [false, true].map(|keeps| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!("it is IPv4") };
        thread::spawn(move || {
            let mut held = Vec::new();
            held.extend(listener.incoming().flatten().filter(|_| keeps));
        });
        address
    });
    let forward = |host, port| ActiveForward {
        protocol: Protocol::Tcp,
        host,
        guest_port: NonZeroU16::new(port).unwrap(),
    };
    let forwards = vec![forward(refuses, 22), forward(listens, 80), forward(refuses, 443)];
    let mut world = World::at(temp.path());
    let hypervisor =
        FileHypervisor::new(temp.path().join("fake")).with_run(RunInfo { forwards, ..RunInfo::default() });
    world.manager = VmManager::new(hypervisor, world.manager.home().clone());
    let shop = Shop::over(world);
    let text = |port: u16, timeout: &str| {
        format!(
            "version = 1\n[project]\nname = 'shop'\n[machine.web]\nkernel = 'vmlinuz'\nforwards = ['{port}']\n\
             ready = {{ tcp = [{port}], timeout = '{timeout}' }}\n"
        )
    };
    let report = shop.up(&text(80, "60s"));
    assert!(report.is_fine(), "{report:?}");
    let report = shop.up(&text(443, "3s"));
    assert!(end(&report, "web").ends_with(
        "s for the guest's TCP port 443, as `ready.tcp` asks for (nothing is known to listen there); `ready.timeout` says how long"
    ), "{report:?}");
    assert!(shop.said().is_empty(), "nobody gets in");
}

#[test]
fn a_second_up_changes_nothing() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let (said, remains) = (shop.said().len(), shop.world.remains());
    let report = shop.up(SHOP);
    assert!(report.is_unchanged(), "{report:?}");
    assert_eq!(shop.world.remains(), remains);
    // Only the question whether it is ready was asked again.
    assert_eq!(shop.said().len(), said + 1);
    assert_eq!(shop.world.boots(), 4);
}

#[test]
fn what_stopped_is_started_and_what_changed_is_run_again() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    runtime().block_on(shop.engine.manager().stop(&VmName::new("shop-db").unwrap(), Duration::ZERO)).unwrap();
    fs::write(shop.world.dir.join("app/index.html"), "hello again").unwrap();
    let report =
        shop.up(&SHOP.replace("echo web-sync", "echo web-sync-2").replace("echo web-install", "echo never"));
    assert_eq!(done(&report, "db"), [MachineAction::Started]);
    assert_eq!(
        done(&report, "web"),
        [MachineAction::Ran("copy to /srv/app".into()), MachineAction::Ran("sync".into())]
    );
    assert!(!shop.said().iter().any(|line| line.contains("never")), "a step that is run once was run again");
}

#[test]
fn a_failed_step_stops_its_machine_and_leaves_the_others() {
    let (_temp, shop) = shop();
    let broken = SHOP.replace("echo web-install", "fail");
    let report = shop.up(&broken);
    let said = end(&report, "web");
    assert!(said.starts_with("the step `install` of the machine `web` failed: exit code 3"), "{said}");
    assert_eq!((end(&report, "db"), end(&report, "other")), ("fine".into(), "fine".into()));
    assert_eq!(end(&report, "edge"), "skipped for web");
    assert_eq!(shop.state("shop-edge"), "", "what depends on it is not even made");
    assert!(!shop.said().iter().any(|line| line.contains("web-sync")), "what comes after it is not run");
    let log = fs::read_to_string(
        shop.world.manager.home().kept(&VmName::new("shop-web").unwrap()).join("provision.log"),
    );
    let log = log.unwrap();
    assert!(
        log.ends_with("--- install: begun\ndoing fail\nhalf a line\n--- install: failed: exit code 3\n"),
        "{log}"
    );
    shop.events.lock().unwrap().clear();
    shop.up(&broken);
    let is_end = |event: &ProjectEvent| matches!(&event.what, EventKind::Awaiting(what) if what.contains("interrupted step"));
    assert!(!shop.events.lock().unwrap().iter().any(is_end), "it ended by itself");
    let plan = runtime().block_on(shop.engine.plan(&shop.project(&broken), &only(&["web"]))).unwrap();
    let steps: Vec<_> =
        plan.machines[0].steps.iter().map(|step| format!("{} {}", step.name, step.why)).collect();
    assert_eq!(
        (plan.machines[0].machine.as_str(), steps.join(", ").as_str()),
        ("web", "install failed before, sync new")
    );
}

#[test]
fn a_step_that_takes_too_long_is_ended_and_what_was_cut_off_is_ended_before_anything_is_run() {
    let (_temp, shop) = shop();
    let ended = || fs::read_to_string(shop.world.dir.join("ended")).unwrap_or_default().lines().count();
    let hangs = SHOP.replace("'echo web-install'", "'hang', timeout = '90s'");
    let report = shop.up(&hangs);
    let said = end(&report, "web");
    assert!(
        said.contains("`install` of the machine `web` failed: it did not end within 90 s, and was ended"),
        "{said}"
    );
    assert_eq!(ended(), 1, "nothing else had to be ended");
    assert!(shop.up(SHOP).is_fine());
    assert_eq!(ended(), 2, "only what did not end well may still run");
    fs::write(shop.world.dir.join("app/index.html"), "changed").unwrap();
    assert!(shop.up(SHOP).is_fine());
    assert_eq!(ended(), 2);
}

#[test]
fn a_guest_without_a_way_to_root_is_reported_at_once() {
    let (_temp, shop) = shop();
    fs::write(shop.world.dir.join("no-sudo"), "").unwrap();
    let report = shop.up(SHOP);
    let said = end(&report, "db");
    assert!(said.contains("the machine `db` `vmkit`") && said.contains("neither sudo nor doas"), "{said}");
    // A step as the user who is logged in anyway needs no means.
    let own = SHOP.replace("shell = 'echo db-install'", "shell = 'echo db-install', user = 'vmkit'");
    let said = end(&shop.up(&own), "db");
    assert!(said.contains("can't become `root`"), "its ready command does: {said}");
    assert!(shop.said().contains(&"shop-db echo db-install".to_owned()), "{:?}", shop.said());
}

#[test]
fn output_is_printed_by_lines_with_machine_and_step() {
    let (_temp, shop) = shop();
    shop.up_as(SHOP, &only(&["db"]));
    let lines: Vec<_> = shop
        .events
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| match &event.what {
            EventKind::Output { step, line } => {
                Some(format!("{} {step} {line}", event.machine.as_ref().unwrap()))
            }
            _ => None,
        })
        .collect();
    assert_eq!(lines, ["db install doing echo db-install", "db install half a line"]);
}

#[test]
fn a_named_machine_comes_with_what_it_depends_on_and_goes_alone() {
    let (_temp, shop) = shop();
    shop.up_as(SHOP, &only(&["web"]));
    let states = ["db", "web", "edge", "other"].map(|name| shop.state(&format!("shop-{name}")));
    assert_eq!(states, ["running", "running", "", ""]);
    shop.down(SHOP, false, &only(&["web"]));
    assert_eq!((shop.state("shop-db"), shop.state("shop-web")), ("running", "stopped"));
    let unknown = runtime().block_on(shop.engine.up(&shop.project(SHOP), &only(&["wep"]), shop.listener()));
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn down_stops_in_the_other_order_and_removes_when_asked() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    shop.events.lock().unwrap().clear();
    assert!(shop.down(SHOP, false, &ProjectOptions::default()).is_fine());
    let stopped: Vec<_> =
        shop.events.lock().unwrap().iter().filter_map(|event| event.machine.clone()).collect();
    let place = |name: &str| stopped.iter().position(|stopped| stopped == name).unwrap();
    assert!(place("edge") < place("web") && place("web") < place("db"), "{stopped:?}");
    assert!(shop.down(SHOP, false, &ProjectOptions::default()).is_unchanged());
    assert!(shop.down(SHOP, true, &ProjectOptions::default()).is_fine());
    assert!(shop.world.remains().is_empty(), "{:?}", shop.world.remains());
}

#[test]
fn provisioning_can_be_repeated_by_name_and_by_force() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let provision = |steps: &[&str], force| {
        let steps = steps.iter().map(|&step| step.to_owned()).collect();
        let what = ProvisionPolicy { steps, force };
        let (project, web) = (shop.project(SHOP), only(&["web"]));
        let done = shop.engine.provision(&project, &what, &web, shop.listener());
        runtime().block_on(done).map(|report| done_of(&report))
    };
    let done_of_none: Vec<MachineAction> = Vec::new();
    assert_eq!(provision(&[], false).unwrap(), done_of_none);
    assert_eq!(provision(&["sync"], true).unwrap(), [MachineAction::Ran("sync".into())]);
    assert_eq!(provision(&[], true).unwrap().len(), 3);
    assert_eq!(provision(&["sink"], true).unwrap_err().kind(), ErrorKind::NotFound);
    shop.down(SHOP, false, &ProjectOptions::default());
    let report = runtime().block_on(shop.engine.provision(
        &shop.project(SHOP),
        &ProvisionPolicy::default(),
        &only(&["web"]),
        shop.listener(),
    ));
    assert!(end(&report.unwrap(), "web").contains("stopped"));
}

fn done_of(report: &ProjectReport) -> Vec<MachineAction> {
    report.machines.iter().flat_map(|machine| machine.done.clone()).collect()
}

#[test]
fn status_shows_state_readiness_and_provisioning() {
    let (_temp, shop) = shop();
    shop.up_as(SHOP, &only(&["db"]));
    let (project, all) = (shop.project(SHOP), ProjectOptions::default());
    let statuses = shop.engine.status(&project, &all, Duration::from_secs(5));
    let statuses = runtime().block_on(statuses).unwrap();
    let of = |name: &str| statuses.iter().find(|status| status.machine == name).unwrap();
    assert_eq!(of("db").ready, Some(true));
    assert_eq!(of("db").provisioning.as_ref().unwrap().done, ["install"]);
    assert!(matches!(of("web").handle, Ok(None)) && of("web").provisioning.is_none());
}

#[test]
fn a_machine_that_is_not_ready_is_reported_with_what_it_lacks() {
    let (_temp, shop) = shop();
    shop.up(SHOP);
    let status = |text: &str, patience: Duration| {
        let (project, db) = (shop.project(text), only(&["db"]));
        let statuses = runtime().block_on(shop.engine.status(&project, &db, patience)).unwrap();
        let status = statuses.into_iter().next().unwrap();
        assert_eq!(status.ready, Some(status.unready.is_none()));
        status.unready.map(|lack| (lack.probe, lack.how))
    };
    let second = Duration::from_secs(1);
    assert_eq!(status(SHOP, second), None);
    let (probe, how) = status(&SHOP.replace("db-is-up", "fail"), second).unwrap();
    assert_eq!(probe, "command");
    assert!(how.starts_with("waited 1.0 s for the ready command to succeed (last: exit code 3: "), "{how}");
    fs::write(shop.world.dir.join("mute"), "").unwrap();
    assert_eq!(status(SHOP, second), Some(("ssh".into(), "no reply within 1.0 s".into())));
}

#[test]
fn many_guests_that_do_not_reply_take_no_longer_than_one() {
    let (_temp, shop) = shop();
    let machines = (0..32).map(|number| format!("[machine.m{number}]\n")).collect::<String>();
    let text = format!(
        "version = 1\n[project]\nname = 'many'\n[defaults]\nkernel = 'vmlinuz'\ncloud_init = {{}}\nready = {{ ssh = true }}\n{machines}"
    );
    assert!(shop.up(&text).is_fine());
    fs::write(shop.world.dir.join("mute"), "").unwrap();
    let (project, all) = (shop.project(&text), ProjectOptions::default());
    let began = std::time::Instant::now();
    let statuses = shop.engine.status(&project, &all, Duration::from_secs(2));
    let statuses = runtime().block_on(statuses).unwrap();
    // One after the other they would take 64 s.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(statuses.iter().filter(|status| status.ready == Some(false)).count(), 32);
}

/// The test that is killed: `up`, or `up` of everything recreated, or `down --rm`.
#[test]
fn a_project_goes_up_and_down() {
    let Some(task) = crash::task() else {
        let (_temp, shop) = shop();
        assert!(shop.up(SHOP).is_fine() && shop.down(SHOP, true, &ProjectOptions::default()).is_fine());
        return;
    };
    let shop = Shop::at(&task.dir);
    task.arm();
    let report = match task.scenario.as_str() {
        "up" => shop.up(SHOP),
        _ => shop.down(SHOP, true, &ProjectOptions::default()),
    };
    assert!(report.is_fine(), "{report:?}");
}

#[test]
fn after_a_kill_of_up_the_next_command_finishes_it() {
    let check = |dir: &Path, place: &str| {
        let shop = Shop::at(dir);
        let report = shop.up(SHOP);
        assert!(report.is_fine(), "{place}: {report:?}");
        assert!(shop.up(SHOP).is_unchanged(), "{place}");
        assert_eq!(shop.world.boots(), 4, "{place}");
        let mut said = shop.said();
        said.retain(|line| !line.ends_with("db-is-up"));
        let all = said.len();
        said.sort();
        said.dedup();
        assert_eq!(said.len(), 5, "{place}: {said:?}");
        assert!(all <= 6, "{place}: only the step that was cut off is run twice: {:?}", shop.said());
        assert!(shop.world.temporaries().is_empty(), "{place}: {:?}", shop.world.temporaries());
        assert!(shop.down(SHOP, true, &ProjectOptions::default()).is_fine(), "{place}");
        assert!(shop.world.remains().is_empty(), "{place}: {:?}", shop.world.remains());
    };
    crash::kill_at_every_step("project::a_project_goes_up_and_down", "up", |_| (), check);
}

#[test]
fn after_a_kill_of_down_the_next_command_finishes_it_or_brings_the_machine_up() {
    for goes_up in [true, false] {
        let check = |dir: &Path, place: &str| {
            let shop = Shop::at(dir);
            if goes_up {
                let report = shop.up(SHOP);
                assert!(report.is_fine(), "{place}: {report:?}");
                assert!(shop.up(SHOP).is_unchanged(), "{place}");
            }
            let report = shop.down(SHOP, true, &ProjectOptions::default());
            assert!(report.is_fine(), "{place}: {report:?}");
            assert!(shop.world.remains().is_empty(), "{place}: {:?}", shop.world.remains());
        };
        let prepare = |dir: &Path| assert!(Shop::at(dir).up(SHOP).is_fine());
        crash::kill_at_every_step("project::a_project_goes_up_and_down", "down", prepare, check);
    }
}

#[test]
fn five_ups_at_once_do_it_once() {
    let temp = tempfile::tempdir().unwrap();
    let shop = Shop::at(temp.path());
    let begin = |_| crash::spawn("project::a_project_goes_up_and_down", "up", temp.path(), 0).unwrap();
    let children: Vec<_> = (0..5).map(begin).collect();
    for child in children {
        crash::assert_passed(&child.wait_with_output().unwrap());
    }
    assert_eq!(shop.world.boots(), 4);
    let steps = shop.said().iter().filter(|line| !line.ends_with("db-is-up")).count();
    assert_eq!(steps, 5, "{:?}", shop.said());
    assert!(shop.up(SHOP).is_unchanged());
}

/// Returns how long this thread has been on a processor.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap(), now.tv_nsec.try_into().unwrap())
}

#[test]
fn a_hundred_machines_with_files_are_planned_within_a_tenth_of_a_second() {
    let (_temp, shop) = shop();
    // A megabyte in sixty-four files, which every machine gets, and a script that is run when it
    // changed.
    for number in 0..64 {
        fs::write(shop.world.dir.join(format!("app/{number}")), vec![b'x'; 16 << 10]).unwrap();
    }
    let machines = |number: usize| {
        format!(
            "[machine.m{number}]\nprovision = [{{ name = 's', shell = 'x' }}, {{ name = 't', script = 'edge.sh', run = 'changed' }}]\n"
        )
    };
    let text = format!(
        "version = 1\n[project]\nname = 'many'\n[defaults]\nkernel = 'vmlinuz'\ncloud_init = {{}}\nfiles = [{{ from = 'app', to = '/srv/app' }}]\n{}",
        (0..100).map(machines).collect::<String>()
    );
    let project = shop.project(&text);
    assert!(shop.up(&text).is_fine());
    let runtime = runtime();
    let plan = |steps: usize| {
        let began = cpu_time();
        let plan = runtime.block_on(shop.engine.plan(&project, &ProjectOptions::default())).unwrap();
        let took = cpu_time() - began;
        for machine in &plan.machines {
            assert!(matches!(machine.action, Ok(PlannedAction::Keep)), "{machine:?}");
            assert_eq!(machine.steps.len(), steps, "{machine:?}");
        }
        took
    };
    // This thread's time on a processor, the best of several: what the host does besides is not the
    // plan's.
    let best = (0..10).map(|_| plan(0)).min().unwrap();
    assert!(best < Duration::from_millis(100), "{best:?}");
    fs::write(shop.world.dir.join("app/0"), "changed").unwrap();
    plan(1);
}
