//! What tests of vmkit and of its backends have in common.
//!
//! [`conformance`] checks that a backend keeps the contract of [`vmkit::Hypervisor`]:
//!
//! ```
//! use vmkit::NoopHypervisor;
//! use vmkit_testkit::{Conformance, conformance, paper_spec};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let hypervisor = NoopHypervisor::new();
//! let report = conformance::run(move || hypervisor.clone(), Conformance::new(paper_spec)).await;
//! report.assert();
//! # }
//! ```
//!
//! [`walk`] does the same along any sequence of operations, for property tests. [`faulty_qemu`]
//! is the real QEMU with faults, and `propolis` (a feature) has a server to talk to.
//! [`crash`] cuts an operation before each of its steps, by a kill or by an error.

pub mod conformance;
pub mod crash;
pub mod faulty_qemu;
pub mod guest;
mod program;
#[cfg(feature = "propolis")]
pub mod propolis;
pub mod walk;

pub use conformance::Conformance;
pub use program::write_program;

use vmkit::spec::{Boot, Kernel, VmName, VmSpec};

/// Returns a kernel for x86, in Linux's format, that halts at once.
///
/// Source: Linux's Documentation/arch/x86/boot.rst.
pub fn paper_kernel() -> Vec<u8> {
    const SETUP_SECTORS: usize = 0x1f1;
    const ENTRY: usize = 0x200;
    const MAGIC: usize = 0x202;
    const VERSION: usize = 0x206;
    const CODE: usize = 0x268;
    let mut kernel = vec![0; 2048];
    kernel[SETUP_SECTORS] = 1;
    // jmp CODE
    kernel[ENTRY..ENTRY + 2].copy_from_slice(&[0xeb, (CODE - ENTRY - 2) as u8]);
    kernel[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
    kernel[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
    // cli; hlt; jmp to the hlt
    kernel[CODE..CODE + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    kernel
}

/// Returns a spec for a backend that runs nothing: what it names need not be there.
pub fn paper_spec(name: VmName) -> VmSpec {
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    VmSpec::builder(name).boot(Boot::Kernel(kernel)).build().expect("a kernel is all that a spec must have")
}
