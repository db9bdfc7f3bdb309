//! What illumos tells of a process in `/proc/PID/psinfo`.
//!
//! Pure: bytes to facts, so it is tested everywhere though only illumos has such files.

use uuid::Uuid;

/// The part of `psinfo_t` that is read, in bytes.
pub(super) const NEEDED_BYTES: usize = START + 16;

/// Where the number of threads lies, an `int`: none is left of a zombie.
const THREADS: usize = 4;
/// Where the start time lies, a `timestruc_t`: seconds since 1970 and nanoseconds, each of 8 bytes.
const START: usize = 88;

/// What tells one process from another.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PsInfo {
    /// Nanoseconds between 1970 and the process's start, by the clock as it was then.
    pub(super) start_time: u64,
    /// Whether only its number is left.
    pub(super) is_zombie: bool,
}

impl PsInfo {
    /// Reads the structure as a 64-bit program gets it, in the byte order of this host.
    ///
    /// Source: illumos, `sys/procfs.h`: `psinfo_t`; proc(5).
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let threads = i32::from_ne_bytes(bytes.get(THREADS..THREADS + 4)?.try_into().ok()?);
        let number = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let start_time = number(START)?.checked_mul(1_000_000_000)?.checked_add(number(START + 8)?)?;
        Some(Self { start_time, is_zombie: threads == 0 })
    }
}

/// Returns the name of the boot whose first process began at this time.
pub(super) fn boot_of(start_time: u64) -> Uuid {
    Uuid::from_u64_pair(0, start_time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn psinfo(threads: i32, seconds: u64, nanos: u64) -> Vec<u8> {
        let mut bytes = vec![0xa5; 416];
        bytes[4..8].copy_from_slice(&threads.to_ne_bytes());
        bytes[88..96].copy_from_slice(&seconds.to_ne_bytes());
        bytes[96..104].copy_from_slice(&nanos.to_ne_bytes());
        bytes
    }

    #[test]
    fn the_start_and_the_end_of_a_process_are_read() {
        let found = PsInfo::parse(&psinfo(3, 1_763_000_000, 42)).unwrap();
        assert_eq!(found, PsInfo { start_time: 1_763_000_000_000_000_042, is_zombie: false });
        assert!(PsInfo::parse(&psinfo(0, 1, 0)).unwrap().is_zombie);
    }

    #[test]
    fn each_boot_has_another_name_and_none_is_nil() {
        assert_eq!(boot_of(7), boot_of(7));
        assert_ne!(boot_of(7), boot_of(8));
        assert!(!boot_of(1_763_000_000_000_000_042).is_nil());
    }

    #[test]
    fn a_torn_or_absurd_one_is_none() {
        let whole = psinfo(1, 1, 1);
        assert_eq!(PsInfo::parse(&whole[..NEEDED_BYTES - 1]), None);
        assert!(PsInfo::parse(&whole[..NEEDED_BYTES]).is_some());
        assert_eq!(PsInfo::parse(&psinfo(1, u64::MAX, 0)), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PsInfo::parse(&bytes);
        }
    }
}
