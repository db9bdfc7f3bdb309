//! The operations of the library on one VM, each beside the same done by hand.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmkit::spec::{CloudInitConfig, Mib, RootDisk, VmSpec};

use crate::Result;
use crate::by_hand::{ByHand, Monitor};
use crate::figures::{Figure, Pair, Target};
use crate::guests::{Bench, Ours};

/// How long a guest may take to obey its power button before that counts as a failure of the
/// measurement.
const POWER_DOWN_LIMIT: Duration = Duration::from_secs(60);

struct Start<'a> {
    bench: &'a Bench,
    ours: Ours<'a>,
    by_hand: VmSpec,
}

impl Pair for Start<'_> {
    fn ours(&mut self) -> Result<Duration> {
        let took = self.ours.start()?;
        self.ours.stop(Duration::ZERO)?;
        Ok(took)
    }

    /// From exec until the reply to `qmp_capabilities`.
    fn bare(&mut self) -> Result<Duration> {
        let outfit = self.bench.outfit(&self.by_hand)?;
        let begin = Instant::now();
        let qemu = outfit.spawn()?;
        qemu.monitor()?;
        Ok(begin.elapsed())
    }
}

/// Measures a start.
pub(crate) fn start(bench: &Bench, runs: u32) -> Result<Figure> {
    let ours = bench.prepare(&bench.spec("ours")?)?;
    let mut pair = Start { bench, ours, by_hand: bench.spec("bare")? };
    Figure::measure("start", Target::Times(1.15), runs, &mut pair)
}

/// Two idle guests at a time; each turn of both sides uses them up.
struct StopIdle<'a> {
    bench: &'a Bench,
    ours: Option<Ours<'a>>,
    bare: Option<ByHand>,
}

impl StopIdle<'_> {
    fn ensure_guests(&mut self) -> Result<()> {
        if self.ours.is_none() && self.bare.is_none() {
            let (ours, bare) = self.bench.idle_guests()?;
            (self.ours, self.bare) = (Some(ours), Some(bare));
        }
        Ok(())
    }
}

impl Pair for StopIdle<'_> {
    fn ours(&mut self) -> Result<Duration> {
        self.ensure_guests()?;
        let mut ours = self.ours.take().expect("each side takes one turn with each pair of guests");
        let took = ours.stop(POWER_DOWN_LIMIT)?;
        if took >= POWER_DOWN_LIMIT {
            return Err("the guest did not hear its power button".into());
        }
        Ok(took)
    }

    /// From `system_powerdown` until the process has ended.
    fn bare(&mut self) -> Result<Duration> {
        self.ensure_guests()?;
        let mut bare = self.bare.take().expect("each side takes one turn with each pair of guests");
        let mut monitor = bare.monitor()?;
        let begin = Instant::now();
        monitor.execute("system_powerdown")?;
        bare.wait()?;
        Ok(begin.elapsed())
    }
}

/// Measures the stop of an idle guest.
pub(crate) fn stop_idle(bench: &Bench, runs: u32) -> Result<Figure> {
    let mut pair = StopIdle { bench, ours: None, bare: None };
    Figure::measure("stop_idle", Target::MsMore(10.0), runs, &mut pair)
}

struct Pause<'a> {
    ours: Ours<'a>,
    monitor: Monitor,
    _bare: ByHand,
    /// Whether it is the way back that is measured.
    back: bool,
}

impl<'a> Pause<'a> {
    fn new(bench: &'a Bench, back: bool) -> Result<Self> {
        let (ours, bare) = bench.idle_guests()?;
        Ok(Self { ours, monitor: bare.monitor()?, _bare: bare, back })
    }

    fn choose(&self, forth: Duration, back: Duration) -> Duration {
        if self.back { back } else { forth }
    }
}

impl Pair for Pause<'_> {
    fn ours(&mut self) -> Result<Duration> {
        let forth = self.ours.suspend()?;
        let back = self.ours.resume()?;
        Ok(self.choose(forth, back))
    }

    /// One command on a monitor that is there already.
    fn bare(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        self.monitor.execute("stop")?;
        let forth = begin.elapsed();
        let begin = Instant::now();
        self.monitor.execute("cont")?;
        Ok(self.choose(forth, begin.elapsed()))
    }
}

/// Measures a suspend.
pub(crate) fn suspend(bench: &Bench, runs: u32) -> Result<Figure> {
    Figure::measure("suspend", Target::MsMore(5.0), runs, &mut Pause::new(bench, false)?)
}

/// Measures a resume.
pub(crate) fn resume(bench: &Bench, runs: u32) -> Result<Figure> {
    Figure::measure("resume", Target::MsMore(5.0), runs, &mut Pause::new(bench, true)?)
}

struct Prepare<'a> {
    bench: &'a Bench,
    spec: VmSpec,
    image: PathBuf,
}

impl Pair for Prepare<'_> {
    /// With an overlay and a seed.
    fn ours(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        let vm = self.bench.prepare(&self.spec)?;
        let took = begin.elapsed();
        drop(vm);
        Ok(took)
    }

    /// The overlay alone.
    fn bare(&mut self) -> Result<Duration> {
        let overlay = self.bench.dir().join("by-hand.qcow2");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&self.image).arg(&overlay);
        let begin = Instant::now();
        let status = command.stdin(Stdio::null()).status()?;
        let took = begin.elapsed();
        if !status.success() {
            return Err(format!("qemu-img create ended with {status}").into());
        }
        std::fs::remove_file(&overlay)?;
        Ok(took)
    }
}

/// Measures a prepare.
pub(crate) fn prepare(bench: &Bench, runs: u32) -> Result<Figure> {
    let image = bench.dir().join("image.qcow2");
    let mut command = Command::new("qemu-img");
    let status = command.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1G").status()?;
    if !status.success() {
        return Err(format!("qemu-img create ended with {status}").into());
    }
    let spec = VmSpec::builder(vmkit::spec::VmName::new("prepared")?)
        .disk(RootDisk { image: image.clone(), size: Some(Mib::new(2048)?) })
        .cloud_init(CloudInitConfig::default())
        .accel(vmkit::spec::Accel::Tcg)
        .build()?;
    Figure::measure("prepare", Target::Ms(5.0), runs, &mut Prepare { bench, spec, image })
}
