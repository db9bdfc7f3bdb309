//! `vmkit cp`.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, timeout};
use vmkit::Error;
use vmkit::spec::VmName;
use vmkit::ssh::{Copied, Files};

use crate::console::signals::{Signals, die_of};
use crate::context::Context;
use crate::failure::Failure;
use crate::output;
use crate::remote::way::Way;

/// How long is waited for the guest to remove what a copy that was cut off has begun.
const TIDYING: Duration = Duration::from_secs(2);

/// Copies files into a guest, or out of it.
///
/// A place in a guest is NAME:PATH; a path there that does not begin at the root begins at the user's home. A path of this host
/// with a colon in it is written with a slash before that, such as ./a:b. Where the last place is a directory, what is copied
/// goes into it. Permissions and holes are kept; a file appears under its name when it is whole.
#[derive(Debug, Args)]
pub(crate) struct Cp {
    /// Copies directories, and all below them.
    #[arg(long, short = 'r')]
    recursive: bool,
    #[command(flatten)]
    way: Way,
    /// Names what is copied, and last of all where to.
    #[arg(value_name = "PLACE", required = true, num_args = 2..)]
    places: Vec<String>,
}

/// A place as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There(VmName, String),
}

impl Place {
    /// Reads `NAME:PATH`, and everything else as a path of this host.
    fn read(text: &str) -> Result<Self, Error> {
        let Some((name, path)) = text.split_once(':') else { return Ok(Place::Here(text.into())) };
        if name.contains('/') || name.is_empty() {
            return Ok(Place::Here(text.into()));
        }
        Ok(Place::There(VmName::new(name)?, path.to_owned()))
    }
}

/// Which way it goes, all sources at one end.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Into { vm: VmName, from: Vec<PathBuf>, to: String },
    OutOf { vm: VmName, from: Vec<String>, to: PathBuf },
}

fn plan(places: &[String]) -> Result<Plan, Error> {
    let (to, from) = places.split_last().expect("the arguments have two at least");
    let from = from.iter().map(|text| Place::read(text)).collect::<Result<Vec<_>, _>>()?;
    match Place::read(to)? {
        Place::There(vm, to) => {
            let here = |place: &Place| match place {
                Place::Here(path) => Ok(path.clone()),
                Place::There(other, _) => Err(Error::invalid(
                    "cp",
                    other,
                    "one end is this host: copy out of one guest, then into the other",
                )),
            };
            Ok(Plan::Into { vm, from: from.iter().map(here).collect::<Result<_, _>>()?, to })
        }
        Place::Here(to) => {
            let mut vm = None;
            let mut paths = Vec::new();
            for place in from {
                match place {
                    Place::There(name, path) if vm.as_ref().is_none_or(|vm| *vm == name) => {
                        vm = Some(name);
                        paths.push(path);
                    }
                    Place::There(name, _) => {
                        return Err(Error::invalid("cp", name, "all that is copied comes from one guest"));
                    }
                    Place::Here(path) => {
                        let expected = "one end is a guest, written NAME:PATH";
                        return Err(Error::invalid("cp", path.display(), expected));
                    }
                }
            }
            let vm = vm.expect("there is one source at least");
            Ok(Plan::OutOf { vm, from: paths, to })
        }
    }
}

impl Cp {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let plan = plan(&self.places)?;
        let (Plan::Into { vm, .. } | Plan::OutOf { vm, .. }) = &plan;
        let manager = context.manager()?;
        let done = context.block_on(async {
            let session = self.way.session(&manager, vm).await?;
            let files = session.files(vm.as_str(), Instant::now() + self.way.timeout()).await?;
            let mut signals = Signals::catch().map_err(Error::io("watch for", "signals"))?;
            let bell = signals.bell().map_err(Error::io("watch for", "signals"))?;
            let bar = bar();
            let outcome = tokio::select! {
                copied = self.copy(&files, &plan, &bar) => copied,
                signal = signals.next(&bell) => {
                    bar.finish_and_clear();
                    // A guest that does not answer keeps what it has.
                    let _ = timeout(TIDYING, files.tidy_up()).await;
                    die_of(signal);
                    Ok(())
                }
            };
            bar.finish_and_clear();
            outcome
        });
        done.map_err(|failure| failure.of_vm(vm))
    }

    async fn copy(&self, files: &Files, plan: &Plan, bar: &ProgressBar) -> Result<(), Failure> {
        let many = match plan {
            Plan::Into { from, .. } => from.len() > 1,
            Plan::OutOf { from, .. } => from.len() > 1,
        };
        let mut report = |progress: &vmkit::ssh::Progress| {
            bar.set_length(progress.file_size);
            bar.set_position(progress.file_bytes);
            if bar.message() != progress.file {
                bar.set_message(output::printable(&progress.file));
            }
        };
        match plan {
            Plan::Into { from, to, .. } => {
                // With this behind it, it has to be a directory.
                let to =
                    if many { format!("{}/.", if to.is_empty() { "." } else { to }) } else { to.clone() };
                for from in from {
                    tell(&files.upload(from, &to, self.recursive, &mut report).await?);
                }
            }
            Plan::OutOf { from, to, .. } => {
                let to = if many { to.join(".") } else { to.clone() };
                for from in from {
                    tell(&files.download(from, &to, self.recursive, &mut report).await?);
                }
            }
        }
        Ok(())
    }
}

fn tell(copied: &Copied) {
    for skipped in &copied.skipped {
        output::warning(format_args!("{skipped} was left out: it is neither file, directory nor link"));
    }
}

/// Makes the bar, for a person only.
fn bar() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{wide_msg} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.expect("the template is sound"));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(places: &[&str]) -> Result<Plan, String> {
        let places: Vec<String> = places.iter().map(|place| (*place).to_owned()).collect();
        plan(&places).map_err(|error| error.to_string())
    }

    #[test]
    fn a_place_in_a_guest_has_its_name_before_the_first_colon() {
        let vm = VmName::new("web").unwrap();
        assert_eq!(Place::read("web:/a:b").unwrap(), Place::There(vm.clone(), "/a:b".into()));
        assert_eq!(Place::read("web:").unwrap(), Place::There(vm, String::new()));
        for here in ["a", "./a:b", "/a:b", "../web:x", ":a"] {
            assert_eq!(Place::read(here).unwrap(), Place::Here(here.into()));
        }
        assert!(Place::read("Web:/a").is_err());
    }

    #[test]
    fn one_end_is_this_host_and_the_other_a_single_guest() {
        let into = planned(&["a", "b", "web:c"]).unwrap();
        assert!(matches!(into, Plan::Into { from, .. } if from.len() == 2));
        assert!(
            matches!(planned(&["web:a", "web:b", "."]).unwrap(), Plan::OutOf { from, .. } if from.len() == 2)
        );
        assert!(planned(&["a", "b"]).unwrap_err().contains("NAME:PATH"));
        assert!(planned(&["one:a", "two:b"]).unwrap_err().contains("one end is this host"));
        assert!(planned(&["one:a", "two:b", "."]).unwrap_err().contains("from one guest"));
    }
}
