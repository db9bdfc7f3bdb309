//! Where the host reaches a guest by its Ethernet address: the neighbour table of illumos, and
//! leases.

use std::net::IpAddr;

use crate::network::MacAddr;

/// What prints the neighbour table.
///
/// Source: arp(8) of illumos.
pub(super) const COMMAND: [&str; 2] = ["arp", "-an"];

/// Finds the addresses of this Ethernet address in what `arp -an` prints.
///
/// A line is `DEVICE ADDRESS MASK [FLAGS] ETHERNET`, and the last one has no leading zeros in its
/// bytes. Addresses that the host publishes for others are no guest's.
pub(super) fn addresses_of(mac: MacAddr, table: &str) -> Vec<IpAddr> {
    let found = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, ethernet) = (words.get(1)?, words.last()?);
        (ethernet_of(ethernet)? == mac).then(|| address.parse().ok())?
    });
    found.collect()
}

/// Reads an Ethernet address as illumos prints it, without leading zeros.
pub(super) fn ethernet_of(text: &str) -> Option<MacAddr> {
    let byte = |part: &str| if part.len() <= 2 { u8::from_str_radix(part, 16).ok() } else { None };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    <[u8; 6]>::try_from(bytes?).ok().map(MacAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "Net to Media Table: IPv4
Device   IP Address               Mask      Flags      Phys Addr
------ -------------------- --------------- -------- ---------------
net0   10.0.0.1             255.255.255.255          0:1b:21:3c:9d:f8
net0   10.0.0.9             255.255.255.255 o        52:8:20:ab:cd:ef
net0   224.0.0.0            240.0.0.0       SM       01:00:5e:00:00:00
";

    #[test]
    fn a_guest_is_found_whose_address_is_printed_without_leading_zeros() {
        let found = addresses_of("52:08:20:ab:cd:ef".parse().unwrap(), TABLE);
        assert_eq!(found, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert!(addresses_of("52:08:20:ab:cd:ee".parse().unwrap(), TABLE).is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>(), bytes: [u8; 6]) {
            let _ = addresses_of(MacAddr::from(bytes), &text);
        }
    }
}
