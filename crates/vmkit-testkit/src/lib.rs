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
//! [`walk`] does the same along any sequence of operations, for property tests. [`fake_qemu`] tells
//! the program `vmkit-fake-qemu` how to behave, and `propolis` (a feature) has a server to talk to.
//! [`crash`] cuts an operation before each of its steps, by a kill or by an error.

pub mod conformance;
pub mod crash;
pub mod fake_qemu;
pub mod guest;
mod program;
#[cfg(feature = "propolis")]
pub mod propolis;
pub mod walk;

pub use conformance::Conformance;
pub use program::write_program;

use vmkit::spec::{Boot, Kernel, VmName, VmSpec};

/// Returns the content of a file that looks like a Linux kernel for x86 to who looks at its header,
/// and boots nothing.
///
/// Source: the kernel's arch/x86/boot.rst.
pub fn paper_kernel() -> Vec<u8> {
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    let mut kernel = vec![0; 1024];
    kernel[SETUP_SECTORS] = 1;
    kernel[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
    kernel
}

/// Returns a spec for a backend that runs nothing: what it names need not be there.
pub fn paper_spec(name: VmName) -> VmSpec {
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    VmSpec::builder(name).boot(Boot::Kernel(kernel)).build().expect("a kernel is all that a spec must have")
}
