//! The only file with `unsafe`: kernel interfaces that no safe crate wraps. All except the closing
//! of descriptors is for Linux only.
#![expect(
    unsafe_code,
    reason = "KVM memory, the tun ioctl, passing descriptors through exec and what is done before one have no safe wrapper"
)]

use std::ffi::c_int;
use std::fs;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::FdFlags;
#[cfg(target_os = "linux")]
use tokio::io::Interest;
#[cfg(target_os = "linux")]
use tokio::io::unix::AsyncFd;

#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use guest::TinyGuest;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use tap::make_tap;

/// Closes the descriptors from this number on that the process inherited at its exec, which its
/// parent did not mean to pass on.
///
/// The program's own descriptors are not affected, for they are marked close-on-exec: std, tokio
/// and rustix do so.
pub(crate) fn close_inherited(first: RawFd) -> io::Result<()> {
    let numbers: Vec<RawFd> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|number| *number >= first)
        .collect();
    for number in numbers {
        // SAFETY: the call only reads flags, and fails for a number that is not open.
        let flags = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
        if flags.is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
            // SAFETY: it came with the exec, so no value of this program owns it.
            unsafe { rustix::io::close(number) };
        }
    }
    Ok(())
}

unsafe extern "C" {
    /// Source: signal(3p).
    #[link_name = "signal"]
    fn set_signal(signal: c_int, effect: usize) -> usize;
    /// Source: sigsetops(3).
    fn sigemptyset(set: *mut SignalSet) -> c_int;
    /// Source: pthread_sigmask(3).
    fn pthread_sigmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
}

/// The size of the largest `sigset_t`: 128 bytes, on Linux.
#[repr(C, align(16))]
struct SignalSet([u64; 16]);

/// Unblocks all signals in this thread, and in the threads and processes that it starts.
pub(crate) fn block_no_signal() -> io::Result<()> {
    const SIG_SETMASK: c_int = if cfg!(target_os = "linux") { 2 } else { 3 };
    let mut none = SignalSet([0; 16]);
    // SAFETY: the set is not smaller than the system's, which writes to it only here.
    let errno = unsafe {
        sigemptyset(&mut none);
        pthread_sigmask(SIG_SETMASK, &none, std::ptr::null_mut())
    };
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Resets a signal to its default action in this process, and in programs that it executes.
pub(crate) fn default_effect(signal: c_int) -> io::Result<()> {
    // SIG_DFL, on every system.
    set_effect(signal, 0)
}

/// Limits a signal to interrupting blocking calls. Unlike an ignored one, it has its default action
/// in programs that are executed.
pub(crate) fn no_effect(signal: c_int) -> io::Result<()> {
    extern "C" fn nothing(_: c_int) {}
    set_effect(signal, nothing as extern "C" fn(c_int) as usize)
}

fn set_effect(signal: c_int, effect: usize) -> io::Result<()> {
    // SAFETY: the action is SIG_DFL or a function without side effects, which may run at any time.
    match unsafe { set_signal(signal, effect) } {
        // SIG_ERR.
        usize::MAX => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Requests the kernel to kill the program that this command runs when the thread that spawns it
/// ends for any reason, including SIGKILL of the process.
///
/// The thread must outlive the program, so it must have no other purpose. A program that changes
/// its user at its exec is not killed, nor are the processes that it starts itself.
///
/// Source: PR_SET_PDEATHSIG(2const).
#[cfg(all(target_os = "linux", feature = "images"))]
pub(crate) fn end_with_this_thread(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;

    use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

    let parent: Pid = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent ended before the kernel was asked.
        if getppid() != Some(parent) {
            return Err(rustix::io::Errno::SRCH.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes two system calls and allocates nothing: an error is
    // the bare number.
    unsafe { command.pre_exec(ask) };
}

/// Registers a descriptor with tokio's reactor, to wait until it is readable.
///
/// # Panics
/// Outside a tokio runtime, and on one without I/O.
#[cfg(target_os = "linux")]
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number and its file until it is dropped, and the
    // `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// Moves this thread, and the threads and processes that it starts from now on, to a network
/// namespace of their own.
#[cfg(all(test, target_os = "linux", feature = "qemu"))]
pub(crate) fn leave_the_network() -> io::Result<()> {
    // SAFETY: only unsharing descriptor tables is dangerous, and this unshares none.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Tap devices.
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod tap {
    use std::ffi::c_int;
    use std::io;
    use std::os::fd::AsFd;

    use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

    /// Attaches a descriptor of `/dev/net/tun` to a new tap, and returns the tap's name.
    ///
    /// The name may have one `%d`, which the kernel replaces by the first free number. The tap
    /// carries Ethernet frames, each after a virtio-net header, and is removed with the last copy
    /// of the descriptor.
    ///
    /// Source: the kernel's networking/tuntap.rst.
    pub(crate) fn make_tap(tun: impl AsFd, name: &str) -> io::Result<String> {
        /// `struct ifreq`: a name of 16 bytes and a union of 24, of which only the flags are used.
        #[repr(C, align(8))]
        struct IfReq {
            name: [u8; 16],
            flags: u16,
            rest: [u8; 22],
        }
        const IFF_TAP: u16 = 0x0002;
        const IFF_NO_PI: u16 = 0x1000;
        const IFF_VNET_HDR: u16 = 0x4000;
        // Without it the kernel would attach to an existing persistent tap of this name.
        const IFF_TUN_EXCL: u16 = 0x8000;
        const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);

        let mut request =
            IfReq { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL, rest: [0; 22] };
        // The last byte stays zero.
        if name.len() >= request.name.len() || name.contains('\0') {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which has the size and layout of
        // `IfReq`, and keeps no pointer to it.
        unsafe { ioctl(tun, Updater::<TUNSETIFF, IfReq>::new(&mut request)) }?;
        let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }
}

/// Small guests for the probe of KVM.
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod guest {
    use std::ffi::c_void;
    use std::io;
    use std::ptr::{self, NonNull};

    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VcpuFd, VmFd};
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    /// A VM of KVM's with one vCPU and a little memory at guest address 0.
    ///
    /// It owns all three, since the kernel writes to the memory for as long as the vCPU may run.
    pub(crate) struct TinyGuest {
        // Dropped in this order: the memory goes last.
        vcpu: VcpuFd,
        _vm: VmFd,
        memory: PrivateMapping,
    }

    impl TinyGuest {
        /// Creates a VM with this many bytes of zeroed memory, a multiple of the page size.
        pub(crate) fn new(kvm: &Kvm, memory_bytes: usize) -> io::Result<Self> {
            let memory = PrivateMapping::new(memory_bytes)?;
            let vm = kvm.create_vm().map_err(io::Error::from)?;
            let slot = kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: memory_bytes as u64,
                userspace_addr: memory.start.as_ptr() as u64,
            };
            // SAFETY: the mapping is valid for all of its length, it is the only slot, and it
            // outlives the VM and its vCPU.
            unsafe { vm.set_user_memory_region(slot) }.map_err(io::Error::from)?;
            let vcpu = vm.create_vcpu(0).map_err(io::Error::from)?;
            Ok(Self { vcpu, _vm: vm, memory })
        }

        /// Returns the vCPU.
        pub(crate) fn vcpu(&mut self) -> &mut VcpuFd {
            &mut self.vcpu
        }

        /// Writes to the guest's memory.
        ///
        /// # Panics
        /// If the bytes do not fit.
        pub(crate) fn write(&mut self, address: usize, bytes: &[u8]) {
            let end = address.checked_add(bytes.len()).expect("an address in the tiny guest");
            assert!(end <= self.memory.len, "{end:#x} is beyond the guest's memory");
            // SAFETY: the range was checked; `&mut self` means that the vCPU is not running.
            unsafe {
                let target = self.memory.start.as_ptr().cast::<u8>().add(address);
                ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
            }
        }

        /// Reads 16 bytes of the guest's memory.
        ///
        /// # Panics
        /// If the range is not within the memory.
        pub(crate) fn read_u128(&mut self, address: usize) -> u128 {
            let end = address.checked_add(size_of::<u128>()).expect("an address in the tiny guest");
            assert!(end <= self.memory.len, "{end:#x} is beyond the guest's memory");
            // SAFETY: the range was checked; `&mut self` means that the vCPU is not running; any
            // bytes are a valid u128.
            unsafe { self.memory.start.as_ptr().cast::<u8>().add(address).cast::<u128>().read_unaligned() }
        }
    }

    /// Zeroed private memory of this process, mapped in pages.
    struct PrivateMapping {
        start: NonNull<c_void>,
        len: usize,
    }

    // SAFETY: the memory belongs to the owner of the value; nothing ties it to a thread.
    unsafe impl Send for PrivateMapping {}

    impl PrivateMapping {
        fn new(len: usize) -> io::Result<Self> {
            // SAFETY: the kernel chooses the address, so no other mapping is affected.
            let start = unsafe {
                mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
            }?;
            Ok(Self { start: NonNull::new(start).expect("mmap returns an address or an error"), len })
        }
    }

    impl Drop for PrivateMapping {
        fn drop(&mut self) {
            // SAFETY: this is the whole mapping that `new` created, and no borrow of it is left. It
            // fails only for an address that was never mapped.
            let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
        }
    }
}
