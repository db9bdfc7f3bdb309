//! Shows a person how far something is: a bar with rate and time left, on a terminal only.

use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmkit::image::{PullProgress, PullStage};

const WITH_TOTAL: &str =
    "{msg}  {wide_bar:.cyan/blue} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
const WITHOUT_TOTAL: &str = "{msg}  {spinner} {binary_bytes}  {binary_bytes_per_sec}";
const WAITING: &str = "{msg}  {spinner}";

/// The progress of one image; it is gone from the screen when this is dropped.
pub(crate) struct ImageProgressBar {
    bar: ProgressBar,
    what: String,
    /// What the bar's form was made for.
    shown: Option<(PullStage, Option<u64>)>,
}

impl ImageProgressBar {
    /// Creates a bar that is not shown yet.
    pub(crate) fn new(what: &str) -> Self {
        // Where standard error is no terminal, it shows nothing.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        Self { bar, what: crate::output::printable(what), shown: None }
    }

    /// Shows how far it is.
    pub(crate) fn show(&mut self, now: PullProgress) {
        // Before the form that shows them, or it begins with nothing of nothing.
        if let Some(total) = now.total_bytes {
            self.bar.set_length(total);
        }
        self.bar.set_position(now.done_bytes);
        if self.shown.replace((now.stage, now.total_bytes)) != Some((now.stage, now.total_bytes)) {
            let (template, doing) = match now.stage {
                PullStage::Asking => (WAITING, "asking"),
                PullStage::Waiting if now.done_bytes == 0 => (WAITING, "waiting for another process"),
                PullStage::Waiting => (WITHOUT_TOTAL, "waiting for another process"),
                PullStage::Finishing if now.total_bytes.is_none() => (WAITING, "finishing"),
                stage => {
                    let doing = match stage {
                        PullStage::Finishing => "checking",
                        PullStage::Converting => "converting",
                        PullStage::Exporting => "exporting",
                        PullStage::Importing => "importing",
                        _ => "fetching",
                    };
                    (if now.total_bytes.is_some() { WITH_TOTAL } else { WITHOUT_TOTAL }, doing)
                }
            };
            let style = ProgressStyle::with_template(template).expect("the template is part of the program");
            self.bar.set_style(style);
            self.bar.set_message(format!("{}: {doing}", self.what));
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
    }
}

impl Drop for ImageProgressBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Writes how long something took, such as `12.3 s`.
pub(crate) fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

/// Writes a number of bytes as people read it, such as `1.50 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}
