//! How much memory Linux promises to one process.
//!
//! Source: the kernel's mm/overcommit-accounting.rst; proc_meminfo(5).

use std::fs;

use crate::spec::Mib;

/// Returns the most memory that a guest can be promised, now or ever; `None` where Linux promises
/// any amount, and where that can't be told.
///
/// A guest's memory is one mapping of QEMU's. As Linux is set up usually, it refuses a mapping that
/// is larger than memory and swap together, whatever is free, and takes any other; the pages come
/// as the guest touches them.
pub(in crate::host) fn most_promised() -> Option<Mib> {
    let policy = fs::read_to_string("/proc/sys/vm/overcommit_memory").ok()?;
    promised(&policy, &fs::read_to_string("/proc/meminfo").ok()?)
}

/// Returns it by the policy of overcommitment and by the figures of `/proc/meminfo`.
fn promised(policy: &str, meminfo: &str) -> Option<Mib> {
    let kib = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    let most = match policy.trim() {
        "0" => kib("MemTotal")?.checked_add(kib("SwapTotal")?)?,
        "2" => kib("CommitLimit")?,
        _ => return None,
    };
    Some(Mib::holding(most.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24684100 kB\nMemFree:          228144 kB\nSwapTotal:       1048576 kB\n\
        CommitLimit:    12342048 kB\n";

    #[test]
    fn linux_promises_memory_by_its_overcommit_policy() {
        let mib = |policy, meminfo| promised(policy, meminfo).map(Mib::mib);
        assert_eq!(mib("0\n", MEMINFO), Some((24_684_100_u64 + 1_048_576).div_ceil(1024)));
        assert_eq!(mib("1\n", MEMINFO), None);
        assert_eq!(mib("2\n", MEMINFO), Some(12_342_048_u64.div_ceil(1024)));
        for unknown in
            ["", "MemTotal: x kB\nSwapTotal: 0 kB\n", "MemTotal: 18446744073709551615 kB\nSwapTotal: 1 kB\n"]
        {
            assert_eq!(mib("0", unknown), None, "{unknown:?}");
        }
    }
}
