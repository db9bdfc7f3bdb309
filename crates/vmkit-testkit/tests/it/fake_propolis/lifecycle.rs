//! From the request that creates a VM to its last state, which stays readable.

use serde_json::{Value, json};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup, Gate, PropolisBehaviour};

use super::client::*;

fn fake() -> FakePropolis {
    FakePropolis::spawn(PropolisBehaviour::default()).unwrap()
}

/// Acts from a thread outside the runtime, which the requests would block.
fn held<T>(fake: &FakePropolis, gate: Gate, act: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let held = runtime.block_on(fake.hold(gate));
    let answer = act();
    drop(held);
    answer
}

fn state(fake: &FakePropolis) -> Value {
    ask(fake, "GET", "/instance", None).json()["instance"]["state"].clone()
}

#[test]
fn there_is_no_instance_before_the_first_ensure() {
    let fake = fake();
    let generation = json!({ "gen": 0 });
    for (method, path, body) in [
        ("GET", "/instance", None),
        ("GET", "/instance/spec", None),
        ("PUT", "/instance/state", Some(&json!("Run"))),
        ("GET", "/instance/state-monitor", Some(&generation)),
        ("GET", "/instance/serial/history?from_start=0", None),
        ("GET", "/instance/migration-status", None),
        ("POST", "/instance/nmi", None),
    ] {
        let answer = ask(&fake, method, path, body);
        assert_eq!((answer.status, answer.code()), (424, Some("NoInstance")), "{method} {path}");
        assert_eq!(answer.message(), "Server not initialized (no instance)");
    }
}

#[test]
fn a_life_from_creating_to_destroyed() {
    let fake = fake();
    ensure_well(&fake);
    assert_eq!(monitor(&fake, 0).json()["state"], "Creating");
    assert_eq!(monitor(&fake, 1).json()["gen"], 1);
    assert_eq!(fake.kernel_vms(), [ID]);
    assert_eq!(put_state(&fake, "Run").status, 204);
    assert_eq!(wait_for(&fake, "Running"), 3, "Creating, Starting, Running");
    assert_eq!(put_state(&fake, "Reboot").status, 204);
    assert_eq!(monitor(&fake, 5).json()["state"], "Running", "Rebooting, Running");
    assert_eq!(put_state(&fake, "Stop").status, 204);
    assert_eq!(wait_for(&fake, "Destroyed"), 8, "Stopping, Stopped, Destroyed");
    assert_eq!(fake.kernel_vms(), [""; 0]);
    assert_eq!(state(&fake), "Destroyed");
}

#[test]
fn a_request_for_a_state_is_queued_and_not_awaited() {
    let fake = fake();
    ensure_well(&fake);
    held(&fake, Gate::Event, || {
        assert_eq!(put_state(&fake, "Run").status, 204);
        assert_eq!(state(&fake), "Creating");
    });
    wait_for(&fake, "Running");
}

#[test]
fn a_second_ensure_is_refused_with_409_in_every_stage_of_a_life() {
    let fake = fake();
    let refused = || {
        let answer = ensure(&fake, &spec());
        assert_eq!((answer.status, answer.code()), (409, Some("AlreadyInitialized")));
    };
    std::thread::scope(|scope| {
        held(&fake, Gate::Ensure, || {
            let first = scope.spawn(|| ensure_well(&fake));
            // The first of the two requests creates the VM; the other is refused at once.
            while ask(&fake, "GET", "/instance", None).status != 200 {
                std::thread::yield_now();
            }
            refused();
            assert_eq!(state(&fake), "Creating");
            first
        })
        .join()
        .unwrap();
    });
    refused();
    held(&fake, Gate::Release, || {
        assert_eq!(put_state(&fake, "Stop").status, 204);
        wait_for(&fake, "Stopped");
        refused();
    });
    wait_for(&fake, "Destroyed");
    ensure_well(&fake);
    assert_eq!(monitor(&fake, 0).json()["gen"], 1, "generations begin again");
}

#[test]
fn a_client_that_gave_up_finds_the_instance_that_it_asked_for() {
    let fake = fake();
    held(&fake, Gate::Ensure, || {
        let body = ensure_body(&spec()).to_string();
        let request = format!(
            "PUT /instance HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut client = std::net::TcpStream::connect(fake.address()).unwrap();
        std::io::Write::write_all(&mut client, request.as_bytes()).unwrap();
        while ask(&fake, "GET", "/instance", None).status != 200 {
            std::thread::yield_now();
        }
    });
    while put_state(&fake, "Run").status != 204 {
        std::thread::yield_now();
    }
    wait_for(&fake, "Running");
}

#[test]
fn a_state_is_forbidden_with_403_and_its_reason_where_the_code_should_be() {
    let fake = fake();
    ensure_well(&fake);
    let forbidden = |state: &str, why: &str| {
        let answer = put_state(&fake, state);
        let code = format!("instance state change not allowed: {why}");
        assert_eq!((answer.status, answer.code()), (403, Some(code.as_str())));
        assert_eq!(answer.message(), "Forbidden");
    };
    forbidden("Reboot", "Operation requires an active instance");
    held(&fake, Gate::Event, || {
        assert_eq!(put_state(&fake, "Run").status, 204);
        assert_eq!(put_state(&fake, "Run").status, 204, "asked twice is asked once");
        forbidden("Reboot", "Instance is currently starting");
    });
    wait_for(&fake, "Running");
    held(&fake, Gate::Event, || {
        assert_eq!(put_state(&fake, "Stop").status, 204);
        assert_eq!(put_state(&fake, "Stop").status, 204, "asked twice is asked once");
        forbidden("Run", "Instance is preparing to stop");
        forbidden("Reboot", "Instance is preparing to stop");
    });
    wait_for(&fake, "Destroyed");
}

#[test]
fn nothing_can_be_asked_of_a_vm_that_is_run_down_but_its_last_state() {
    let fake = fake();
    run(&fake);
    let last = held(&fake, Gate::Release, || {
        assert_eq!(put_state(&fake, "Stop").status, 204);
        let last = wait_for(&fake, "Stopped");
        let mut answer = put_state(&fake, "Run");
        // It is stopped a moment before it is run down.
        while answer.status == 403 {
            answer = put_state(&fake, "Run");
        }
        assert_eq!((answer.status, answer.code()), (424, Some("NoInstance")));
        assert_eq!(ask(&fake, "GET", "/instance/serial/history?from_start=0", None).status, 424);
        assert_eq!(fake.kernel_vms(), [ID], "it is not destroyed before it has let go");
        last
    });
    assert_eq!(wait_for(&fake, "Destroyed"), last + 1);
    assert_eq!(monitor(&fake, last + 1).status, 200);
    let answer = monitor(&fake, last + 2);
    assert_eq!((answer.status, answer.code()), (410, Some("NoInstance")));
    assert_eq!(answer.message(), format!("No instance present; will never reach generation {}", last + 2));
}

#[test]
fn the_long_poll_waits_for_its_generation_and_may_skip_states() {
    let fake = fake();
    ensure_well(&fake);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| monitor(&fake, 2));
        assert_eq!(put_state(&fake, "Stop").status, 204);
        let answer = waiting.join().unwrap();
        assert!(answer.json()["gen"].as_u64().unwrap() >= 2);
        wait_for(&fake, "Destroyed");
        assert_eq!(monitor(&fake, 2).json()["gen"], 4, "a late request sees only the latest state");
    });
}

#[test]
fn a_vm_that_was_never_started_can_be_stopped() {
    let fake = fake();
    ensure_well(&fake);
    assert_eq!(put_state(&fake, "Stop").status, 204);
    wait_for(&fake, "Destroyed");
}

#[test]
fn a_failed_ensure_hides_its_reason_and_leaves_a_failed_instance() {
    let behaviour = PropolisBehaviour {
        ensure_fails: Some("the moon is full".to_owned()),
        ..PropolisBehaviour::default()
    };
    let fake = FakePropolis::spawn(behaviour).unwrap();
    let answer = ensure(&fake, &spec());
    assert_eq!(
        (answer.status, answer.code(), answer.message()),
        (500, Some("Internal"), "Internal Server Error")
    );
    assert!(!answer.text.contains("moon"));
    let told = fake.log().lines().any(|line| {
        let event: Value = serde_json::from_str(line).unwrap();
        event["error_message_internal"] == "VM initialization failed: the moon is full"
            && event["req_id"].as_str() == answer.request_id.as_deref()
    });
    assert!(told, "the log has the reason:\n{}", fake.log());
    assert_eq!(state(&fake), "Failed");
    assert_eq!(monitor(&fake, 0).json()["gen"], 2);
    assert_eq!(put_state(&fake, "Run").status, 424);
    assert_eq!(fake.kernel_vms(), [""; 0]);
}

#[test]
fn a_request_for_the_state_after_a_failed_ensure_waits_until_the_next_one() {
    let behaviour = PropolisBehaviour { ensure_fails: Some("no".to_owned()), ..PropolisBehaviour::default() };
    let fake = FakePropolis::spawn(behaviour).unwrap();
    assert_eq!(ensure(&fake, &spec()).status, 500);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| monitor(&fake, 3));
        assert!(!waiting.is_finished());
        // The request may not have arrived yet; it then waits for the end of one of these.
        while !waiting.is_finished() {
            assert_eq!(ensure(&fake, &spec()).status, 500);
        }
        assert_eq!(waiting.join().unwrap().status, 410, "what it waited for is no more");
    });
}

#[test]
fn a_vm_whose_devices_do_not_start_is_let_go_of_before_it_has_failed() {
    let fake =
        FakePropolis::spawn(PropolisBehaviour { start_fails: true, ..PropolisBehaviour::default() }).unwrap();
    for _ in 0..2 {
        ensure_well(&fake);
        held(&fake, Gate::Release, || {
            assert_eq!(put_state(&fake, "Run").status, 204);
            // The gate is not reached at once: from there on, there is nothing to stop.
            while put_state(&fake, "Stop").status != 424 {
                std::thread::yield_now();
            }
            assert_eq!(state(&fake), "Starting", "the failure is not published yet");
            assert_eq!(fake.kernel_vms(), [ID]);
        });
        assert_eq!(wait_for(&fake, "Failed"), 3, "Creating, Starting, Failed");
        assert_eq!(fake.kernel_vms(), [""; 0]);
        assert_eq!(put_state(&fake, "Stop").status, 424);
        assert_eq!(monitor(&fake, 4).status, 410, "it is the last state");
    }
}

/// Starts an ensure whose client disconnects once the server has the request.
fn ensure_and_go_away(fake: &FakePropolis, has_come: impl Fn() -> bool) {
    let body = ensure_body(&spec()).to_string();
    let request = format!(
        "PUT /instance HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut client = std::net::TcpStream::connect(fake.address()).unwrap();
    std::io::Write::write_all(&mut client, request.as_bytes()).unwrap();
    while !has_come() {
        std::thread::yield_now();
    }
}

#[test]
fn a_vm_is_unknown_until_its_server_has_created_it_and_comes_without_its_client() {
    let fake = fake();
    run(&fake);
    assert_eq!(put_state(&fake, "Stop").status, 204);
    wait_for(&fake, "Destroyed");
    held(&fake, Gate::Host, || {
        ensure_and_go_away(&fake, || !fake.kernel_vms().is_empty());
        assert!(fake.kernel_vms()[0].starts_with("cpuid-gen-"), "{:?}", fake.kernel_vms());
        assert_eq!(state(&fake), "Destroyed", "it is the VM before that is told of");
        assert_eq!(put_state(&fake, "Stop").status, 424);
        let second = ensure(&fake, &spec());
        assert_eq!(second.status, 400);
        assert!(
            second.message().contains("failed to read default CPUID settings from the host"),
            "{}",
            second.message()
        );
    });
    while put_state(&fake, "Run").status != 204 {
        std::thread::yield_now();
    }
    wait_for(&fake, "Running");
    assert_eq!(fake.kernel_vms(), [ID]);

    let fresh =
        FakePropolis::spawn(PropolisBehaviour { asks_host_millis: 300, ..PropolisBehaviour::default() })
            .unwrap();
    ensure_and_go_away(&fresh, || !fresh.kernel_vms().is_empty());
    assert_eq!(ask(&fresh, "GET", "/instance", None).status, 424);
    while ask(&fresh, "GET", "/instance", None).status != 200 {
        std::thread::yield_now();
    }
}

#[test]
fn a_request_for_a_vm_waits_while_its_devices_pause_and_one_for_its_state_does_not() {
    let fake = fake();
    run(&fake);
    for (asked, passing) in [("Reboot", "Rebooting"), ("Stop", "Stopping")] {
        std::thread::scope(|scope| {
            let waiting = held(&fake, Gate::Pause, || {
                assert_eq!(put_state(&fake, asked).status, 204);
                let generation = wait_for(&fake, passing);
                // Published a moment before: the only sign of pausing devices is that requests get
                // no reply.
                while !fake.is_pausing() {
                    std::thread::yield_now();
                }
                let waiting = scope.spawn(|| state(&fake));
                let spec = scope.spawn(|| ask(&fake, "GET", "/instance/spec", None).status);
                assert_eq!(monitor(&fake, 0).json(), monitor(&fake, generation).json());
                assert!(!waiting.is_finished() && !spec.is_finished());
                waiting
            });
            waiting.join().unwrap();
        });
        wait_for(&fake, if asked == "Stop" { "Destroyed" } else { "Running" });
    }
}

#[test]
fn a_panic_of_a_server_that_unwinds_leaves_its_vm_in_creating() {
    let fake = FakePropolis::spawn(PropolisBehaviour {
        dies: Some(vmkit_testkit::propolis::DeathPoint::Ensure),
        unwinds: true,
        ..PropolisBehaviour::default()
    })
    .unwrap();
    assert_eq!(ensure(&fake, &spec()).status, 500);
    assert!(fake.log().contains("state driver unexpectedly dropped result channel"), "{}", fake.log());
    assert_eq!(state(&fake), "Creating");
    assert_eq!(put_state(&fake, "Stop").status, 424);
    assert_eq!(ensure(&fake, &spec()).status, 409);
    assert_eq!(fake.kernel_vms(), [ID]);
}

#[test]
fn a_guest_that_shuts_itself_down_ends_its_vm() {
    let fake = fake();
    run(&fake);
    assert!(fake.power_off());
    wait_for(&fake, "Destroyed");
    assert_eq!(fake.kernel_vms(), [""; 0]);
}

#[test]
fn a_killed_server_leaves_its_vm_in_the_kernel() {
    let mut fake = fake();
    run(&fake);
    fake.kill();
    assert_eq!(fake.kernel_vms(), [ID]);
    assert!(std::net::TcpStream::connect(fake.address()).is_err());
}

#[test]
fn a_second_vm_of_the_same_id_takes_the_first_ones_place_in_the_kernel() {
    let mut first = fake();
    run(&first);
    let second = FakeSetup::default().vmm(first.vmm()).spawn().unwrap();
    run(&second);
    first.wait().unwrap();
    assert_eq!(second.kernel_vms(), [ID], "it is the second one's");
    assert_eq!(state(&second), "Running");
}

#[test]
fn the_spec_comes_back_with_the_cpus_that_the_host_has() {
    let fake = fake();
    ensure_well(&fake);
    let answer = ask(&fake, "GET", "/instance/spec", None);
    let told = &answer.json()["spec"]["value"];
    assert_eq!(told["components"], spec()["components"]);
    assert!(told["board"]["cpuid"]["entries"].is_array(), "it is filled in: {told}");
    assert!(told["board"].get("guest_hv_interface").is_none(), "what is the default is not told");
}

#[test]
fn old_clients_get_the_shapes_that_they_know() {
    let fake = fake();
    let body = ensure_body(&spec()).to_string();
    let ask_old = |request: &str, version: &str, body: &[u8]| {
        let head = format!("{request} HTTP/1.1\r\napi-version: {version}\r\ncontent-type: application/json");
        ask_raw(&fake, &head, body)
    };
    assert_eq!(ask_old("PUT /instance", "1.0.0", body.as_bytes()).status, 201);
    let oldest = ask_old("GET /instance/spec", "1.0.0", b"");
    assert_eq!(oldest.json()["spec"]["value"]["version"], "V0");
    assert_eq!(oldest.json()["spec"]["value"]["spec"]["components"], spec()["components"]);
    let old = ask_old("GET /instance/spec", "2.0.0", b"");
    assert_eq!(old.json()["spec"]["value"]["components"], spec()["components"]);
}
