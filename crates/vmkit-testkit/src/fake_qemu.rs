//! How the program `vmkit-fake-qemu` behaves, and how a test tells it.
//!
//! What of it is real and what is fake stands in the program's own documentation.
//!
//! ```no_run
//! use vmkit_testkit::fake_qemu::{FakeQemu, QemuBehaviour};
//! # fn main() -> std::io::Result<()> {
//! # let dir = std::path::Path::new("/tmp");
//! // In an integration test of this crate, the binary is `env!("CARGO_BIN_EXE_vmkit-fake-qemu")`.
//! let qemu = FakeQemu::install("target/debug/vmkit-fake-qemu".as_ref(), dir)?;
//! qemu.behave(&QemuBehaviour { ignore_power_down: true, ..QemuBehaviour::default() })?;
//! // Run `qemu.program()` as if it were QEMU; each one started from now on behaves so.
//! # Ok(()) }
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The variable that holds a [`QemuBehaviour`] as JSON, or the path of a file with one.
pub const VARIABLE: &str = "VMKIT_FAKE_QEMU";

/// How a fake QEMU behaves; as a default, well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuBehaviour {
    /// It says this and ends before it has opened anything, as QEMU does on arguments that it does
    /// not like.
    pub refusal: Option<StartRefusal>,
    /// Whether a monitor greets its clients; one that does not also never replies.
    pub greet: bool,
    /// It says this instead of its first greeting line, and goes on as usual.
    pub greeting: Option<String>,
    /// The commands that get no answer, and have no effect. With `qmp_capabilities` it greets and
    /// then stalls.
    pub mute: Vec<String>,
    /// The commands that are refused, with what is said.
    pub refuse: BTreeMap<String, String>,
    /// The commands at which it closes the connection, without effect or answer.
    pub hang_up: Vec<String>,
    /// Whether it says a line that is no JSON before each answer.
    pub junk: bool,
    /// Whether the guest does nothing when its power button is pressed.
    pub ignore_power_down: bool,
    /// For how long since its start the guest does not notice its power button, in milliseconds.
    pub deaf_ms: u64,
    /// How long the guest takes to shut down, in milliseconds of running.
    pub power_down_ms: u64,
    /// Whether SIGTERM, SIGINT and SIGHUP do nothing.
    pub ignore_sigterm: bool,
    /// What the guest prints on its console at once.
    pub console: String,
    /// What happens to it by itself.
    pub fate: Option<TimedFault>,
}

impl Default for QemuBehaviour {
    fn default() -> Self {
        Self {
            refusal: None,
            greet: true,
            greeting: None,
            mute: Vec::new(),
            refuse: BTreeMap::new(),
            hang_up: Vec::new(),
            junk: false,
            ignore_power_down: false,
            deaf_ms: 0,
            power_down_ms: 20,
            ignore_sigterm: false,
            console: "no guest runs here\n".to_owned(),
            fate: None,
        }
    }
}

/// An end before the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRefusal {
    /// What is written to the standard error.
    pub stderr: String,
    /// The exit code.
    pub code: i32,
}

/// Something that happens by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimedFault {
    /// How long after the start, in milliseconds.
    pub after_ms: u64,
    /// What happens.
    pub what: QemuFault,
}

/// What can happen to a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QemuFault {
    /// The guest's kernel panics, and pvpanic tells. SIGUSR1 does the same at any time.
    Panic,
    /// The virtualisation fails. SIGUSR2 does the same at any time.
    InternalError,
    /// A disk fails.
    IoError,
    /// The guest goes to sleep (ACPI S3), where it does not hear its power button until
    /// `system_wakeup`.
    Sleep,
    /// QEMU ends with this code.
    Exit(i32),
    /// QEMU kills itself by this signal.
    Signal(i32),
}

/// A fake QEMU under a name of its own, so that tests that run at once can have it behave
/// differently.
#[derive(Debug)]
pub struct FakeQemu {
    program: PathBuf,
}

impl FakeQemu {
    /// Links the program `binary` into `dir`, as `qemu-system-x86_64`; it behaves well until it is
    /// told otherwise.
    ///
    /// # Errors
    /// Whatever the system says to a new link in `dir`.
    pub fn install(binary: &Path, dir: &Path) -> io::Result<Self> {
        let program = dir.join("qemu-system-x86_64");
        symlink(binary, &program)?;
        Ok(Self { program })
    }

    /// Returns the path to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Sets the behaviour of every fake that is started from now on.
    ///
    /// # Errors
    /// Whatever the system says to a new file beside the program.
    pub fn behave(&self, behaviour: &QemuBehaviour) -> io::Result<()> {
        let path = file_beside(&self.program);
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(behaviour)?)?;
        std::fs::rename(&temporary, &path)
    }
}

/// Finds out how a fake QEMU that was called as `program` shall behave: by [`VARIABLE`], else by
/// the file beside it.
///
/// # Errors
/// Whatever the system says, and JSON that is no [`QemuBehaviour`].
pub fn behaviour_of(program: &Path, variable: Option<OsString>) -> io::Result<QemuBehaviour> {
    let path = match variable {
        Some(text) if text.to_string_lossy().starts_with('{') => {
            return Ok(serde_json::from_str(&text.to_string_lossy())?);
        }
        Some(path) => PathBuf::from(path),
        None => file_beside(program),
    };
    match std::fs::read(&path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(QemuBehaviour::default()),
        Err(error) => Err(error),
    }
}

fn file_beside(program: &Path) -> PathBuf {
    let mut name = program.as_os_str().to_owned();
    name.push(".json");
    PathBuf::from(name)
}
