//! The kernel command lines that boot a guest on each machine type, under TCG too.

use std::collections::BTreeMap;

use super::manifest::Machine;

/// Returns the machines that Linux guests boot on, with the words of this guest put first.
pub(super) fn machines(words: &[&str]) -> BTreeMap<String, Machine> {
    // Under TCG on a busy machine the kernel's test of the timer can fail, and then it panics.
    let q35 = "no_timer_check".to_owned();
    // microvm has no HPET and no PM timer, and with hardware-reduced ACPI Linux leaves the PIT's
    // interrupt alone. When the host is busy, calibrating the TSC by reading the PIT fails, and
    // Linux hangs for want of any clock. A rate known beforehand cures that. If it is a little
    // wrong, so is the guest's clock.
    let microvm = format!("tsc_early_khz={}", tsc_khz());
    let cmdline =
        |last: &str| words.iter().copied().chain(["console=ttyS0", last]).collect::<Vec<_>>().join(" ");
    [("q35", q35), ("microvm", microvm)]
        .map(|(name, last)| (name.to_owned(), Machine { cmdline: cmdline(&last) }))
        .into()
}

/// Guesses the rate of the host's time-stamp counter: what the processor calls itself, else its
/// clock right now.
fn tsc_khz() -> u32 {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    parse_tsc_khz(&cpuinfo).unwrap_or(2_000_000)
}

fn parse_tsc_khz(cpuinfo: &str) -> Option<u32> {
    let field = |key: &str| {
        cpuinfo
            .lines()
            .find_map(|line| line.split_once(':').filter(|(name, _)| name.trim() == key))
            .map(|(_, value)| value.trim())
    };
    let nominal = field("model name")
        .and_then(|name| name.rsplit_once("@ ")?.1.strip_suffix("GHz")?.trim().parse::<f64>().ok());
    let current = field("cpu MHz").and_then(|clock| clock.parse::<f64>().ok());
    nominal
        .map(|ghz| ghz * 1e6)
        .or(current.map(|mhz| mhz * 1e3))
        .map(|khz| khz.round() as u32)
        .filter(|khz| *khz > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nominal_clock_of_a_processor_is_preferred_to_the_present_one() {
        let laptop = "model name\t: Intel(R) Core(TM) i7-8565U CPU @ 1.80GHz\ncpu MHz\t\t: 700.012\n";
        assert_eq!(parse_tsc_khz(laptop), Some(1_800_000));
        assert_eq!(parse_tsc_khz("model name\t: AMD EPYC\ncpu MHz\t\t: 2596.118\n"), Some(2_596_118));
        assert_eq!(parse_tsc_khz(""), None);
    }
}
