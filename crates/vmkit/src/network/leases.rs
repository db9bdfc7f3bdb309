//! The leases that dnsmasq gave out, as it writes them down.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::network::MacAddr;

/// The most that is read of a lease file, in bytes: some ten thousand leases.
const MOST_BYTES: u64 = 1 << 20;

/// Where the distributions' dnsmasq, NetworkManager's and LXC's keep their files; the last one is
/// that of dnsmasq on illumos.
///
/// Source for that: `LEASEFILE` in dnsmasq's `src/config.h`.
const DIRS: [&str; 5] =
    ["/var/lib/misc", "/var/lib/dnsmasq", "/run/dnsmasq", "/var/lib/NetworkManager", "/var/cache"];

/// An IPv4 lease. Those of IPv6 name no Ethernet address, so nothing can be found by it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DhcpLease {
    /// The second after 1970 in which it ends; 0 is never.
    expiry: u64,
    mac: MacAddr,
    address: Ipv4Addr,
}

impl DhcpLease {
    /// Reads one line: the end, the Ethernet address, the IPv4 address, the name and the client's
    /// id.
    ///
    /// Source: `lease_init` in dnsmasq's `src/lease.c`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let expiry = fields.next()?.parse().ok()?;
        let mac = fields.next()?;
        // The type of the hardware may stand before its address; 1 is Ethernet.
        let mac = mac.strip_prefix("01-").unwrap_or(mac).parse().ok()?;
        let address = fields.next()?.parse().ok()?;
        Some(Self { expiry, mac, address })
    }

    /// Returns whether it is in force at this second after 1970.
    fn is_in_force(&self, now: u64) -> bool {
        self.expiry == 0 || self.expiry > now
    }
}

/// Returns the files in which dnsmasq keeps its leases on this host.
pub(crate) fn default_lease_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for dir in DIRS {
        // A directory that is not there has no leases.
        let entries = Path::new(dir).read_dir().into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()).filter(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy());
            name.is_some_and(|name| name.ends_with(".leases") && name.contains("dnsmasq"))
        }));
    }
    files.sort();
    files
}

/// Returns the addresses that are leased to this Ethernet address now, the lease that ends last
/// first.
///
/// A file that is not there has no leases.
///
/// # Errors
/// `Io` when a file can't be read.
pub(crate) fn leased_to(mac: MacAddr, files: &[PathBuf]) -> Result<Vec<IpAddr>> {
    // A clock before 1970 leaves every lease in force.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut found = Vec::new();
    for path in files {
        let text = match read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let leases = text.lines().filter_map(DhcpLease::parse);
        found.extend(leases.filter(|lease| lease.mac == mac && lease.is_in_force(now)));
    }
    found.sort_by_key(|lease| std::cmp::Reverse(if lease.expiry == 0 { u64::MAX } else { lease.expiry }));
    Ok(found.into_iter().map(|lease| IpAddr::from(lease.address)).collect())
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    const MINE: &str = "52:54:00:12:34:56";

    fn leased(text: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dnsmasq.leases");
        fs::write(&file, text).unwrap();
        let files = [dir.path().join("none.leases"), file];
        let found = leased_to(MINE.parse().unwrap(), &files).unwrap();
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_leases_in_force_are_found_the_last_to_end_first() {
        let text = "4102444800 52:54:00:12:34:56 10.0.0.2 web 01:52:54:00:12:34:56\n\
                    1 52:54:00:12:34:56 10.0.0.9 * *\n\
                    0 01-52:54:00:12:34:56 10.0.0.3 * *\n\
                    4102444801 52:54:00:12:34:56 10.0.0.4 * *\n\
                    4102444800 52:54:00:65:43:21 10.0.0.5 other *\n\
                    duid 00:01:00:01:2c:aa\n\
                    4102444800 1193046 fd00::2 web 00:01\n\
                    torn 52:54";
        assert_eq!(leased(text), ["10.0.0.3", "10.0.0.4", "10.0.0.2"]);
    }

    #[test]
    fn without_a_file_or_a_lease_there_is_no_address() {
        assert_eq!(leased(""), Vec::<String>::new());
        assert_eq!(leased("\n\n"), Vec::<String>::new());
    }

    #[test]
    fn a_file_that_can_not_be_read_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = leased_to(MINE.parse().unwrap(), &[dir.path().to_owned()]).unwrap_err();
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_panic(line in any::<String>()) {
            let _ = DhcpLease::parse(&line);
        }

        #[test]
        fn a_written_lease_is_read(expiry: u64, bytes: [u8; 6], address: [u8; 4], name in "[a-z*]{1,20}") {
            let (mac, address) = (MacAddr::from(bytes), Ipv4Addr::from(address));
            let line = format!("{expiry} {mac} {address} {name} *");
            prop_assert_eq!(DhcpLease::parse(&line), Some(DhcpLease { expiry, mac, address }));
        }
    }
}
