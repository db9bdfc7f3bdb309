//! Programs in a guest by its agent, whose guest ends under them.

use std::time::{Duration, Instant};

use crate::harness::{LONG, Life};

#[test]
fn a_program_of_the_agent_ends_with_the_guest_with_that_reason() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    let script = "echo up >/dev/console; sleep 1; echo c >/proc/sysrq-trigger; sleep 1000";
    let begun = life.begin(&["exec", "-n", "--via", "agent", "web", "--", "sh", "-c", script]);
    life.says("web", "Kernel panic");
    let answer = begun.ended(LONG);
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the guest's kernel panicked: sysrq triggered crash"), "{answer:?}");
}

#[test]
fn a_program_of_the_agent_ends_with_a_reset_with_that_reason() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    let script = "echo up >/dev/console; sleep 1; echo b >/proc/sysrq-trigger; sleep 1000";
    let begun = life.begin(&["exec", "-n", "--via", "agent", "web", "--", "sh", "-c", script]);
    life.says("web", "sysrq: Resetting");
    let began = Instant::now();
    let answer = begun.ended(LONG);
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the guest was restarted"), "{answer:?}");
    // Long before the guest has booted again.
    assert!(began.elapsed() < Duration::from_secs(10), "{answer:?} after {:?}", began.elapsed());
    assert_eq!(life.state("web"), "running");
}
