//! From an image to the output of a program in a guest.
//!
//! `cargo run -p vmkit-cli --example launch -- debian:12`
//!
//! The image is a name of the catalogue, a file or an address, as for `vmkit launch`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example shows what it does")]

use std::time::Duration;

use vmkit::image::{Catalogue, ImageStore};
use vmkit::launch::{LaunchEvent, LaunchOptions, launch};
use vmkit::ssh::GuestCommand;
use vmkit::store::Home;
use vmkit::{Error, Result, VmManager};

fn main() -> Result<()> {
    // First, before any thread: QEMU's parent is this program, started again.
    vmkit::run_if_keeper();
    run(&std::env::args().nth(1).unwrap_or_else(|| "debian:12".to_owned()))
}

#[tokio::main]
async fn run(image: &str) -> Result<()> {
    // A service has a directory of its own; images are kept there.
    let dir = tempfile::tempdir().map_err(Error::io("create", "a directory"))?;
    let home = Home::at(dir.path())?;
    let store = ImageStore::new(&home, Catalogue::built_in());
    let manager = VmManager::qemu(home);

    let mut options = LaunchOptions::of_image(&image.parse()?)?;
    options.timeout = Duration::from_secs(600);
    options.ephemeral = true;
    let mut report = |event| {
        if let LaunchEvent::Ended(stage, took) = event {
            eprintln!("{}: {:.1} s", stage.as_str(), took.as_secs_f64());
        }
    };
    // On a failure, `failed.stage` says how far it came, and `failed.vm` which VM is left.
    let launched = launch(&manager, &store, options, &mut report).await.map_err(|failed| failed.error)?;

    let name = launched.vm.name().clone();
    let ran = manager.exec(&name, &GuestCommand::new(["uname", "-a"]), Duration::from_secs(60)).await?;
    println!("{}{}", ran.exit, if ran.exit.is_success() { "" } else { ": it failed" });
    print!("{}", ran.stdout_text());

    // The VM goes with its guard, running or not.
    drop(launched.owner);
    manager.remove_orphan(&name).await.map(drop)
}
