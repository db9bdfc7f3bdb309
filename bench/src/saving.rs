//! Saving a guest to disk and continuing it, each beside the same done by hand.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmkit::spec::VmSpec;

use crate::Result;
use crate::by_hand::ByHand;
use crate::figures::{Figure, Pair, Target};
use crate::guests::{Bench, Ours};

/// A number for the memory's file that QEMU does not use itself.
const MEMORY: i32 = 209;
/// The capabilities of a migration, as JSON.
const EVENTS: &str = r#"{"capabilities": [{"capability": "events", "state": true}]}"#;

/// Two guests that are saved and continued again and again.
struct Saving<'a> {
    bench: &'a Bench,
    ours: Ours<'a>,
    bare: Option<ByHand>,
    spec: VmSpec,
    memory: PathBuf,
    /// Whether it is the way back that is measured.
    back: bool,
}

impl<'a> Saving<'a> {
    fn new(bench: &'a Bench, back: bool) -> Result<Self> {
        let (ours, bare, spec) = bench.idle_guests_of_spec()?;
        let memory = bench.dir().join("by-hand.memory");
        Ok(Self { bench, ours, bare: Some(bare), spec, memory, back })
    }

    /// Pauses the guest, writes and syncs its memory, and ends its QEMU.
    fn save_bare(&mut self) -> Result<Duration> {
        let mut bare = self.bare.take().ok_or("a guest that was not continued")?;
        let mut monitor = bare.monitor()?;
        let begin = Instant::now();
        let file = File::create(&self.memory)?;
        monitor.execute("stop")?;
        monitor.execute_with("migrate-set-capabilities", EVENTS)?;
        monitor.execute_with("migrate-set-parameters", r#"{"max-bandwidth": 1099511627776}"#)?;
        monitor.give_file("memory", &file)?;
        monitor.execute_with("migrate", r#"{"uri": "fd:memory"}"#)?;
        monitor.says(r#""status": "completed""#)?;
        file.sync_all()?;
        monitor.execute("quit")?;
        bare.wait()?;
        Ok(begin.elapsed())
    }

    /// From exec until the reply to `cont`.
    fn restore_bare(&mut self) -> Result<Duration> {
        let outfit = self.bench.outfit(&self.spec)?.with_args(&["-incoming", "defer"]);
        let outfit = outfit.with_file(File::open(&self.memory)?, MEMORY)?;
        let begin = Instant::now();
        let bare = outfit.spawn()?;
        let mut monitor = bare.monitor()?;
        monitor.execute_with("migrate-set-capabilities", EVENTS)?;
        monitor.execute_with("migrate-incoming", &format!(r#"{{"uri": "fd:{MEMORY}"}}"#))?;
        monitor.says(r#""status": "completed""#)?;
        monitor.execute("cont")?;
        let took = begin.elapsed();
        self.bare = Some(bare);
        Ok(took)
    }

    fn choose(&self, forth: Duration, back: Duration) -> Duration {
        if self.back { back } else { forth }
    }
}

impl Pair for Saving<'_> {
    fn ours(&mut self) -> Result<Duration> {
        let forth = self.ours.save()?;
        let back = self.ours.start()?;
        Ok(self.choose(forth, back))
    }

    fn bare(&mut self) -> Result<Duration> {
        let forth = self.save_bare()?;
        let back = self.restore_bare()?;
        Ok(self.choose(forth, back))
    }
}

/// Measures a save.
pub(crate) fn save(bench: &Bench, runs: u32) -> Result<Figure> {
    Figure::measure("save", Target::Times(1.25), runs, &mut Saving::new(bench, false)?)
}

/// Measures a start of a saved guest. Its clock is set besides, which takes an emulated guest's
/// agent most of the time beyond the bare one.
pub(crate) fn restore(bench: &Bench, runs: u32) -> Result<Figure> {
    Figure::measure("restore", Target::MsMore(200.0), runs, &mut Saving::new(bench, true)?)
}
