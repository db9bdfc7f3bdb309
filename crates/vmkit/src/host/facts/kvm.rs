//! A probe of whether KVM runs guest code on this host.
//!
//! An open `/dev/kvm` is no proof: in some virtual machines an emulator executes the guest, which
//! is slower than QEMU's own translator and lacks some instructions. So a tiny guest of 24 KiB
//! executes one instruction that such emulators lack, `lock cmpxchg16b`, and then 10^7 iterations
//! of a loop: some milliseconds on hardware, and many seconds in an emulator.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use kvm_ioctls::Kvm;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::timeout;
use uuid::Uuid;

use crate::host::facts::cache;
use crate::host::inherited::child_problem;

/// The device of KVM.
pub(crate) const DEVICE: &str = "/dev/kvm";

const CACHE: &str = "kvm.json";

/// How long the caller waits for the result. On hardware it takes some milliseconds.
const DEADLINE: Duration = Duration::from_millis(500);

/// Whether KVM is usable on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum KvmVerdict {
    /// It runs guest code at hardware speed.
    Usable,
    /// There is no `/dev/kvm`.
    Missing,
    /// This user may not open it.
    Denied {
        /// The error of the system.
        problem: String,
    },
    /// It opens, but does not run guests properly.
    Broken {
        /// What happened when guest code was run.
        reason: String,
    },
}

impl KvmVerdict {
    /// Returns whether `accel = auto` uses KVM.
    pub fn is_usable(&self) -> bool {
        *self == KvmVerdict::Usable
    }
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmVerdict::Usable => f.write_str("KVM runs guest code at hardware speed"),
            KvmVerdict::Missing => write!(f, "there is no {DEVICE}"),
            KvmVerdict::Denied { problem } => write!(f, "{DEVICE} can't be opened: {problem}"),
            KvmVerdict::Broken { reason } => write!(f, "{DEVICE} opens but is not usable: {reason}"),
        }
    }
}

/// A verdict from running code, with everything that it depends on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CachedVerdict {
    vmkit: String,
    boot_id: Uuid,
    kernel: String,
    verdict: KvmVerdict,
}

/// A verdict, and whether it holds until the host reboots.
#[derive(Debug, PartialEq, Eq)]
struct KvmFinding {
    verdict: KvmVerdict,
    lasting: bool,
}

impl KvmFinding {
    fn lasting(verdict: KvmVerdict) -> Self {
        Self { verdict, lasting: true }
    }

    fn for_now(reason: String) -> Self {
        Self { verdict: KvmVerdict::Broken { reason }, lasting: false }
    }
}

/// Returns whether KVM is usable, from the cache if it was probed in this boot.
///
/// Whether the device exists and can be opened is checked each time, since both change; the result
/// of running code is cached in `cache_dir`. Takes at most 500 ms.
///
/// # Cancel safety
/// The thread that runs the guest ends by itself soon after.
pub(crate) async fn probe(cache_dir: Option<&Path>, boot_id: Uuid, kernel: &str) -> KvmVerdict {
    let device = match open(Path::new(DEVICE)) {
        Ok(device) => device,
        Err(verdict) => return verdict,
    };
    let key = |verdict| CachedVerdict {
        vmkit: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id,
        kernel: kernel.to_owned(),
        verdict,
    };
    if let Some(cached) = cache_dir.and_then(|dir| cache::load::<CachedVerdict>(dir, CACHE)) {
        let verdict = cached.verdict.clone();
        if cached == key(verdict.clone()) {
            return verdict;
        }
    }
    let KvmFinding { verdict, lasting } = run(device).await;
    tracing::debug!(%verdict, lasting, "KVM was tried");
    if let (Some(dir), true) = (cache_dir, lasting) {
        cache::store(dir, CACHE, &key(verdict.clone()));
    }
    verdict
}

fn open(path: &Path) -> Result<Kvm, KvmVerdict> {
    let name = CString::new(path.as_os_str().as_bytes()).expect("the path of a device has no NUL");
    let device = Kvm::new_with_path(name).map_err(|error| {
        let error = io::Error::from(error);
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => KvmVerdict::Missing,
            Some(Errno::ACCESS | Errno::PERM) => KvmVerdict::Denied { problem: error.to_string() },
            _ => KvmVerdict::Broken { reason: format!("it can't be opened: {error}") },
        }
    })?;
    // The only version since Linux 2.6.22. Source: the kernel's virt/kvm/api.rst, 4.1.
    match device.get_api_version() {
        12 => Ok(device),
        other => {
            Err(KvmVerdict::Broken { reason: format!("it has version {other} of the KVM API (expected 12)") })
        }
    }
}

/// Runs the guest on a thread of its own and waits for the result until the deadline.
///
/// A thread and not a child process: a library can't fork a process with threads, and has no
/// program to execute. In KVM_RUN only a signal could interrupt it, and a library can't reserve
/// one; so a thread that exceeds the deadline is abandoned. The guest exits to the thread after
/// every part of its loop, and the thread ends when it finds that the caller no longer waits,
/// unless the kernel itself hangs.
async fn run(device: Kvm) -> KvmFinding {
    let (answer, answered) = oneshot::channel();
    let spawned =
        thread::Builder::new().name("vmkit-kvm-probe".to_owned()).spawn(move || guest::run(&device, answer));
    if let Err(error) = spawned {
        return KvmFinding::for_now(format!(
            "no thread could be started to test it: {}",
            child_problem(&error)
        ));
    }
    match timeout(DEADLINE, answered).await {
        Ok(Ok(finding)) => finding,
        Ok(Err(_)) => KvmFinding::for_now("the thread that tested it ended without a result".to_owned()),
        Err(_) => KvmFinding::for_now(format!("guest code did not end within {} ms", DEADLINE.as_millis())),
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod guest {
    use super::{KvmFinding, KvmVerdict};

    /// Returns an unknown result: the guest is written for x86-64.
    pub(super) fn run(_: &kvm_ioctls::Kvm, answer: tokio::sync::oneshot::Sender<KvmFinding>) {
        let reason = "vmkit can't test it on this kind of processor yet".to_owned();
        // The caller no longer waits.
        let _ = answer.send(KvmFinding::lasting(KvmVerdict::Broken { reason }));
    }
}

#[cfg(target_arch = "x86_64")]
mod guest {
    use std::io;
    use std::time::Duration;

    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
    use kvm_ioctls::{Kvm, VcpuExit};
    use rustix::time::{ClockId, clock_gettime};
    use tokio::sync::oneshot::Sender;

    use super::{KvmFinding, KvmVerdict};
    use crate::sys::TinyGuest;

    // The guest's memory: three levels of page tables that identity-map the first 2 MiB, a page of
    // code, a page of data. Source: AMD64 Architecture Programmer's Manual, volume 2, 5.3.
    const PML4: usize = 0x1000;
    const PDPT: usize = 0x2000;
    const PD: usize = 0x3000;
    const CODE: usize = 0x4000;
    const DATA: usize = 0x5000;
    const MEMORY_BYTES: usize = 0x6000;

    /// The guest writes here after the instruction.
    const PORT_EXCHANGED: u16 = 0x10;
    /// The guest writes here after a part of the loop.
    const PORT_TURNED: u16 = 0x11;

    /// The iterations of one part; an emulator needs some 100 ms for them.
    const TURNS: u32 = 100_000;
    const PARTS: u32 = 100;

    /// The processor time, not the wall time, in which 10^7 iterations must complete, so that a
    /// busy host does not look like a slow one. Hardware needs about 5 ms.
    const BUDGET: Duration = Duration::from_millis(200);

    /// The value that the guest leaves in its register RCX for the exchange.
    const MARK: u64 = 0x766d_6b69_7421;

    /// Runs the guest and returns the result; returns early if the caller no longer waits.
    pub(super) fn run(kvm: &Kvm, answer: Sender<KvmFinding>) {
        let finding = match prepared(kvm) {
            Ok(mut guest) => {
                let finding = judge(&mut guest, &answer);
                // The result does not wait for the removal of the VM. The caller may be gone.
                let _ = answer.send(finding);
                return;
            }
            Err((what, error)) => KvmFinding::for_now(format!("cannot {what}: {error}")),
        };
        // As above.
        let _ = answer.send(finding);
    }

    fn prepared(kvm: &Kvm) -> Result<TinyGuest, (&'static str, io::Error)> {
        let failed = |what: &'static str| move |error: kvm_ioctls::Error| (what, io::Error::from(error));
        let mut guest =
            TinyGuest::new(kvm, MEMORY_BYTES).map_err(|error| ("create a virtual machine", error))?;
        // Present and writable; the last level also marks a page of 2 MiB.
        guest.write(PML4, &(PDPT as u64 | 0x3).to_le_bytes());
        guest.write(PDPT, &(PD as u64 | 0x3).to_le_bytes());
        guest.write(PD, &0x83_u64.to_le_bytes());
        guest.write(CODE, &code());
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("query the processor that it offers"))?;
        let vcpu = guest.vcpu();
        vcpu.set_cpuid2(&cpuid).map_err(failed("set the processor's features"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("read the processor's state"))?;
        let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
        // Execute and read, accessed; 64-bit code.
        sregs.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..flat };
        // Read and write, accessed.
        let data = kvm_segment { selector: 16, type_: 0x3, db: 1, ..flat };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cr3 = PML4 as u64;
        // PAE.
        sregs.cr4 |= 1 << 5;
        // Paging and protection.
        sregs.cr0 |= 1 << 31 | 1;
        // Long mode enabled and active.
        sregs.efer |= 1 << 10 | 1 << 8;
        vcpu.set_sregs(&sregs).map_err(failed("enter long mode"))?;
        let regs = kvm_regs {
            rip: CODE as u64,
            rbx: DATA as u64,
            rcx: MARK,
            // Reserved, always set.
            rflags: 1 << 1,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs).map_err(failed("set the processor's registers"))?;
        Ok(guest)
    }

    fn code() -> Vec<u8> {
        let [t0, t1, t2, t3] = TURNS.to_le_bytes();
        #[rustfmt::skip]
        let code = vec![
            0xf0, 0x48, 0x0f, 0xc7, 0x0b,       //        lock cmpxchg16b [rbx]
            0xe6, PORT_EXCHANGED as u8,         //        out PORT_EXCHANGED, al
            0xb9, t0, t1, t2, t3,               // part:  mov ecx, TURNS
            0xff, 0xc9,                         // turn:  dec ecx
            0x75, 0xfc,                         //        jnz turn
            0xe6, PORT_TURNED as u8,            //        out PORT_TURNED, al
            0xeb, 0xf3,                         //        jmp part
        ];
        code
    }

    fn judge(guest: &mut TinyGuest, answer: &Sender<KvmFinding>) -> KvmFinding {
        let broken = |reason: String| KvmFinding::lasting(KvmVerdict::Broken { reason });
        if let Err(problem) = run_to(guest, PORT_EXCHANGED) {
            return broken(format!(
                "it can't execute `lock cmpxchg16b`, which every Linux guest needs ({problem})"
            ));
        }
        // RDX:RAX was zero like the memory, so RCX:RBX was stored there.
        let expected = u128::from(MARK) << 64 | DATA as u128;
        let found = guest.read_u128(DATA);
        if found != expected {
            return broken(format!("`lock cmpxchg16b` returned {found:#x} (expected {expected:#x})"));
        }
        let begun = processor_time();
        for part in 1..=PARTS {
            if answer.is_closed() {
                return KvmFinding::for_now("the caller no longer waited".to_owned());
            }
            if let Err(problem) = run_to(guest, PORT_TURNED) {
                return broken(format!("it can't execute a loop ({problem})"));
            }
            let spent = processor_time().saturating_sub(begun);
            if spent > BUDGET {
                let turns = u64::from(part) * u64::from(TURNS);
                return broken(format!(
                    "guest code does not run at hardware speed: {turns} turns of a loop took {} ms",
                    spent.as_millis()
                ));
            }
        }
        KvmFinding::lasting(KvmVerdict::Usable)
    }

    /// Runs the guest until it writes to the port; returns an error if it exits otherwise.
    fn run_to(guest: &mut TinyGuest, port: u16) -> Result<(), String> {
        loop {
            match guest.vcpu().run() {
                Ok(VcpuExit::IoOut(written, _)) if written == port => return Ok(()),
                Ok(VcpuExit::InternalError) => return Err("KVM_EXIT_INTERNAL_ERROR".to_owned()),
                Ok(other) => return Err(format!("it exited with {other:?}")),
                // A signal for this process, handled elsewhere.
                Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
    }

    /// Returns the processor time of this thread, including the guest.
    fn processor_time() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Instant;

    #[test]
    fn a_missing_device_is_missing_and_a_file_in_its_place_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvm");
        assert_eq!(open(&path).err(), Some(KvmVerdict::Missing));
        fs::write(&path, "").unwrap();
        let verdict = open(&path).err().unwrap();
        assert!(verdict.to_string().contains("version -1 of the KVM API (expected 12)"), "{verdict}");
    }

    #[tokio::test]
    async fn the_kvm_probe_ends_in_time_and_its_result_is_cached() {
        let dir = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let first = probe(Some(dir.path()), Uuid::nil(), "test").await;
        // The deadline, and a margin for a busy host.
        assert!(begun.elapsed() < DEADLINE + Duration::from_secs(5), "{:?}", begun.elapsed());
        println!("{first}, after {:?}", begun.elapsed());
        match cache::load::<CachedVerdict>(dir.path(), CACHE) {
            Some(cached) => {
                assert_eq!(cached.verdict, first);
                assert_eq!(probe(Some(dir.path()), Uuid::nil(), "test").await, first);
            }
            None => assert_ne!(first, KvmVerdict::Usable),
        }
    }

    #[tokio::test]
    async fn a_cached_fact_of_another_boot_kernel_or_version_is_probed_again() {
        if let Err(verdict) = open(Path::new(DEVICE)) {
            eprintln!("SKIP: {verdict}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let lie = KvmVerdict::Broken { reason: "a lie".to_owned() };
        let version = env!("CARGO_PKG_VERSION");
        for (vmkit, boot_id, kernel, believed) in [
            (version, Uuid::nil(), "test", true),
            (version, Uuid::max(), "test", false),
            (version, Uuid::nil(), "other", false),
            ("0.0.0", Uuid::nil(), "test", false),
        ] {
            let cached = CachedVerdict {
                vmkit: vmkit.to_owned(),
                boot_id,
                kernel: kernel.to_owned(),
                verdict: lie.clone(),
            };
            cache::store(dir.path(), CACHE, &cached);
            let found = probe(Some(dir.path()), Uuid::nil(), "test").await;
            assert_eq!(found == lie, believed, "{cached:?}");
        }
    }
}
