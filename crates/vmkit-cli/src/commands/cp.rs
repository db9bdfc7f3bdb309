//! `vmkit cp`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IsTerminal, stderr, stdout};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::timeout;
use vmkit::spec::VmName;
use vmkit::ssh::{CopySummary, GuestFiles, check_download, check_upload};
use vmkit::{Error, ErrorKind};

use crate::console::signals::{CaughtSignals, die_of};
use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;
use crate::remote::streams::StdinStream;
use crate::remote::way::SshArgs;

/// How long to wait for the guest to remove the temporary file of an interrupted copy.
const TIDYING: Duration = Duration::from_secs(2);

/// How many failures of one copy are printed.
const MOST_TOLD: usize = 20;
/// The name of standard input and output on the command line, and their paths.
const STREAM: &str = "-";
const STDIN: &str = "/dev/stdin";
const STDOUT: &str = "/dev/stdout";

/// Copy files into a guest, or out of it.
///
/// A place in a guest is NAME:PATH; a relative path starts at the user's home. A path of this host
/// with a colon in it needs a slash before the colon, such as ./a:b. If the last place is a
/// directory, the sources are copied into it; DIR/. copies the content of DIR. Permissions and
/// holes are kept; a file appears under its name once it is complete. A dash is standard input as
/// the source and standard output as the target: `vmkit cp - web:file`, `vmkit cp web:file -`.
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Copy directories recursively.
    #[arg(long, short = 'r')]
    recursive: bool,
    #[command(flatten)]
    way: SshArgs,
    /// The sources, and last the target.
    #[arg(value_name = "PLACE", required = true, num_args = 2..)]
    places: Vec<OsString>,
}

/// A place on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
enum CopyPlace {
    Here(HostPlace),
    There(VmName, String),
}

/// A place of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum HostPlace {
    Path(PathBuf),
    /// Standard input or output.
    Stream,
}

impl CopyPlace {
    /// Parses `NAME:PATH`, and everything else as a place of this host; `stream` is the path of its
    /// stream.
    fn read(text: &OsStr, stream: &str) -> Result<Self, Error> {
        if text == STREAM || text == stream {
            return Ok(CopyPlace::Here(HostPlace::Stream));
        }
        let here = || CopyPlace::Here(HostPlace::Path(text.into()));
        let Some((name, path)) = text.to_str().and_then(|text| text.split_once(':')) else {
            return Ok(here());
        };
        if name.contains('/') || name.is_empty() {
            return Ok(here());
        }
        Ok(CopyPlace::There(VmName::new(name)?, path.to_owned()))
    }
}

impl fmt::Display for HostPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPlace::Path(path) => path.display().fmt(f),
            HostPlace::Stream => f.write_str(STREAM),
        }
    }
}

/// The direction of a copy, with all sources at one end.
#[derive(Debug, PartialEq, Eq)]
enum CopyPlan {
    Into { vm: VmName, from: Vec<HostPlace>, to: String },
    OutOf { vm: VmName, from: Vec<String>, to: HostPlace },
}

fn plan(places: &[OsString]) -> Result<CopyPlan, Error> {
    let (to, from) = places.split_last().expect("the arguments have two at least");
    let from = from.iter().map(|text| CopyPlace::read(text, STDIN)).collect::<Result<Vec<_>, _>>()?;
    match CopyPlace::read(to, STDOUT)? {
        CopyPlace::There(vm, to) => {
            if from.contains(&CopyPlace::Here(HostPlace::Stream)) && (from.len() > 1 || names_directory(&to))
            {
                let expected = "standard input is copied alone, and its target must name a file";
                return Err(Error::invalid("cp", format!("{vm}:{to}"), expected));
            }
            let here = |place: &CopyPlace| match place {
                CopyPlace::Here(here) => Ok(here.clone()),
                CopyPlace::There(other, _) => Err(Error::invalid(
                    "cp",
                    other,
                    "one side must be this host: copy out of one guest, then into the other",
                )),
            };
            Ok(CopyPlan::Into { vm, from: from.iter().map(here).collect::<Result<_, _>>()?, to })
        }
        CopyPlace::Here(to) => {
            let mut vm = None;
            let mut paths = Vec::new();
            for place in from {
                match place {
                    CopyPlace::There(name, path) if vm.as_ref().is_none_or(|vm| *vm == name) => {
                        vm = Some(name);
                        paths.push(path);
                    }
                    CopyPlace::There(name, _) => {
                        return Err(Error::invalid("cp", name, "all sources must be in the same guest"));
                    }
                    CopyPlace::Here(here) => {
                        return Err(Error::invalid(
                            "cp",
                            here,
                            "one side must be a guest, written NAME:PATH",
                        ));
                    }
                }
            }
            if to == HostPlace::Stream && paths.len() > 1 {
                let expected = "standard output takes one file: copy several to a directory";
                return Err(Error::invalid("cp", to, expected));
            }
            let vm = vm.expect("there is one source at least");
            Ok(CopyPlan::OutOf { vm, from: paths, to })
        }
    }
}

/// Returns whether a place in a guest must be a directory by its spelling.
fn names_directory(to: &str) -> bool {
    to.is_empty() || to.ends_with('/') || to.ends_with("/.")
}

impl CopyPlan {
    /// Checks the host's end before waiting for the guest. If at least one source can be copied,
    /// the copy starts, and reports the others.
    fn check_here(&self, recursive: bool) -> Result<(), Failure> {
        let checked: Vec<Result<(), Error>> = match self {
            CopyPlan::Into { vm, from, to } => {
                let check = |from: &HostPlace| match from {
                    HostPlace::Path(from) => check_upload(from, vm.as_str(), to, recursive),
                    HostPlace::Stream => Ok(()),
                };
                from.iter().map(check).collect()
            }
            CopyPlan::OutOf { vm, from, to: HostPlace::Path(to) } => {
                from.iter().map(|from| check_download(vm.as_str(), from, to)).collect()
            }
            CopyPlan::OutOf { to: HostPlace::Stream, .. } => return Ok(()),
        };
        if checked.iter().any(Result::is_ok) {
            return Ok(());
        }
        Failure::of(checked.into_iter().filter_map(Result::err).map(Failure::from).collect())
    }
}

impl CpArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let plan = plan(&self.places)?;
        plan.check_here(self.recursive)?;
        let (CopyPlan::Into { vm, .. } | CopyPlan::OutOf { vm, .. }) = &plan;
        let manager = context.manager()?;
        let done = context.block_on(async {
            let session = self.way.session(&manager, vm).await?;
            let files = session.files(vm.as_str(), self.way.timeout()).await?;
            let mut signals = CaughtSignals::catch().map_err(Error::io("watch for", "signals"))?;
            let bell = signals.bell().map_err(Error::io("watch for", "signals"))?;
            let bar = bar(&plan);
            let outcome = tokio::select! {
                copied = self.copy(&files, &plan, &bar) => copied,
                signal = signals.next(&bell) => {
                    bar.finish_and_clear();
                    // A guest that does not reply keeps the temporary file.
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

    /// Copies the sources one after the other. As with cp(1), the failure of one does not keep the
    /// others from being copied, unless all would fail by it.
    async fn copy(&self, files: &GuestFiles, plan: &CopyPlan, bar: &ProgressBar) -> Result<(), Failure> {
        let mut report = |progress: &vmkit::ssh::CopyProgress| {
            bar.set_length(progress.file_size);
            bar.set_position(progress.file_bytes);
            if bar.message() != progress.file {
                bar.set_message(output::printable(&progress.file));
            }
        };
        let mut failures = Vec::new();
        match plan {
            CopyPlan::Into { from, to, .. } => {
                // A trailing `/.` requires it to be a directory.
                let dir = format!("{}/.", if to.is_empty() { "." } else { to });
                let to = if from.len() > 1 { &dir } else { to };
                for from in from {
                    let copied = match from {
                        HostPlace::Path(from) => files.upload(from, to, self.recursive, &mut report).await,
                        HostPlace::Stream => {
                            let mut stdin = StdinStream::new()?;
                            files.upload_stream(&mut stdin, "standard input", to, &mut report).await
                        }
                    };
                    let Some(failure) = bar.suspend(|| tell(copied)) else { continue };
                    let goes_on = is_of_one(&failure) && files.is_dir(to).await.unwrap_or(false);
                    failures.push(failure.into());
                    if !goes_on {
                        break;
                    }
                }
            }
            CopyPlan::OutOf { from, to: HostPlace::Stream, .. } => {
                let mut stdout = tokio::io::stdout();
                let from = from.first().expect("there is one source at least");
                let copied = files.download_stream(from, &mut stdout, "standard output", &mut report).await;
                failures.extend(bar.suspend(|| tell(copied)).map(unwritten));
            }
            CopyPlan::OutOf { from, to: HostPlace::Path(to), .. } => {
                let to = if from.len() > 1 { to.join(".") } else { to.clone() };
                for from in from {
                    let copied = files.download(from, &to, self.recursive, &mut report).await;
                    let Some(failure) = bar.suspend(|| tell(copied)) else { continue };
                    let goes_on = is_of_one(&failure) && to.is_dir();
                    failures.push(failure.into());
                    if !goes_on {
                        break;
                    }
                }
            }
        }
        Failure::of(failures)
    }
}

/// Returns whether a failure concerns one source only, and not the connection or the target.
fn is_of_one(failure: &Error) -> bool {
    matches!(failure, Error::CopyPart { .. })
        || matches!(failure.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound)
}

/// Returns the failure of a write to standard output; a reader that closed the pipe is no failure.
fn unwritten(failure: Error) -> Failure {
    match failure {
        Error::Copy { source: Some(source), problem, from, to, kind } => match source.downcast::<io::Error>()
        {
            Ok(error) if error.kind() == io::ErrorKind::BrokenPipe => Failure::Output(*error),
            Ok(error) => Error::Copy { source: Some(error), problem, from, to, kind }.into(),
            Err(source) => Error::Copy { source: Some(source), problem, from, to, kind }.into(),
        },
        failure => failure.into(),
    }
}

/// Warns of what a copy left out, and returns why it failed, if it did.
fn tell(copied: Result<CopySummary, Error>) -> Option<Error> {
    let skip = |skipped: &[String]| {
        for skipped in skipped {
            output::warning(format_args!(
                "{skipped} was skipped: it is neither a file, a directory nor a link"
            ));
        }
    };
    match copied {
        Ok(copied) => skip(&copied.skipped),
        Err(failure) => {
            if let Error::CopyPart { failures, more, skipped, .. } = &failure {
                skip(skipped);
                failures.iter().take(MOST_TOLD).for_each(|failure| output::error(None, failure));
                match failures.len().saturating_sub(MOST_TOLD) + usize::try_from(*more).unwrap_or(usize::MAX)
                {
                    0 => {}
                    more => output::warning(format_args!("{more} more could not be copied")),
                }
            }
            return Some(failure);
        }
    }
    None
}

/// Creates the progress bar, which is visible on a terminal only.
fn bar(plan: &CopyPlan) -> ProgressBar {
    // The bar would be mixed with the file if both are on one terminal.
    let is_shown = matches!(plan, CopyPlan::OutOf { to: HostPlace::Stream, .. }) && stdout().is_terminal();
    if is_shown || !stderr().is_terminal() {
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

    fn planned(places: &[&str]) -> Result<CopyPlan, String> {
        let places: Vec<OsString> = places.iter().map(OsString::from).collect();
        plan(&places).map_err(|error| error.to_string())
    }

    #[test]
    fn a_place_in_a_guest_has_its_name_before_the_first_colon() {
        let vm = VmName::new("web").unwrap();
        let read = |text: &str| CopyPlace::read(text.as_ref(), STDIN);
        assert_eq!(read("web:/a:b").unwrap(), CopyPlace::There(vm.clone(), "/a:b".into()));
        assert_eq!(read("web:").unwrap(), CopyPlace::There(vm, String::new()));
        for here in ["a", "./a:b", "/a:b", "../web:x", ":a", "./-", STDOUT] {
            assert_eq!(read(here).unwrap(), CopyPlace::Here(HostPlace::Path(here.into())));
        }
        for stream in ["-", STDIN] {
            assert_eq!(read(stream).unwrap(), CopyPlace::Here(HostPlace::Stream));
        }
        assert!(read("Web:/a").is_err());
    }

    #[test]
    fn one_end_is_this_host_and_the_other_a_single_guest() {
        let into = planned(&["a", "b", "web:c"]).unwrap();
        assert!(matches!(into, CopyPlan::Into { from, .. } if from.len() == 2));
        assert!(
            matches!(planned(&["web:a", "web:b", "."]).unwrap(), CopyPlan::OutOf { from, .. } if from.len() == 2)
        );
        assert!(planned(&["a", "b"]).unwrap_err().contains("NAME:PATH"));
        assert!(planned(&["one:a", "two:b"]).unwrap_err().contains("one side must be this host"));
        assert!(planned(&["-", "-"]).unwrap_err().contains("NAME:PATH"));
        assert!(planned(&["web:a", "web:b", "-"]).unwrap_err().contains("takes one file"));
        for places in [&["-", "web:"][..], &["-", "web:dir/"], &["a", "-", "web:dir"]] {
            assert!(planned(places).unwrap_err().contains("must name a file"), "{places:?}");
        }
        assert!(planned(&["one:a", "two:b", "."]).unwrap_err().contains("in the same guest"));
    }
}
