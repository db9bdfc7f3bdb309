//! A network of its own for a test, so that no test touches the host's.

use std::process::Command;
use std::thread;

/// Runs the test on a thread with a network namespace of its own, or says aloud why it is skipped.
pub(super) fn in_own_network(test: impl AsyncFnOnce() + Send) {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                if let Err(error) = crate::sys::leave_the_network() {
                    eprintln!("SKIP: a network namespace of its own can't be had: {error}");
                    return;
                }
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(test());
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Runs `ip` with these arguments and returns what it prints.
pub(super) fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
