//! The address of a VM's network device.
//!
//! Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;

/// An Ethernet address; its text is `52:8a:…`, six lower-case hexadecimal bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Returns the address of the VM with this id: always the same one, and another for another VM.
    ///
    /// It begins with 0x52 as QEMU's own do, which makes it unicast and locally administered. The
    /// other 40 bits come from the id; with the 24 that QEMU leaves free, a thousand VMs would have
    /// two of the same address once in 33 times.
    pub fn of_vm(id: Uuid) -> Self {
        let [a, b, c, d, e, ..] = fnv1a(id.as_bytes()).to_be_bytes();
        Self([0x52, a, b, c, d, e])
    }

    /// Returns the six bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

/// Hashes with FNV-1a, 64 bit: a fixed function, where the standard library's hasher may change
/// with its version.
///
/// Source: RFC 9923.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl From<[u8; 6]> for MacAddr {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let byte = |part: &str| {
            let clean = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            clean.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some(bytes) => Ok(Self(bytes)),
            None => {
                let value: String = text.chars().take(40).collect();
                Err(Error::invalid("mac", value, "an Ethernet address is six bytes like 52:54:00:12:34:56"))
            }
        }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn the_address_of_a_vm_never_changes() {
        let id = Uuid::from_u128(0x6ba7_b810_9dad_41d1_80b4_00c0_4fd4_30c8);
        assert_eq!(MacAddr::of_vm(id).to_string(), "52:68:82:30:35:97");
    }

    #[test]
    fn ids_that_differ_in_one_bit_have_different_addresses() {
        let ids = (0..128).map(|bit| Uuid::from_u128(1 << bit));
        assert_eq!(ids.map(MacAddr::of_vm).collect::<HashSet<_>>().len(), 128);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5g",
            "5:254:00:12:34:56",
            "+1:00:00:00:00:00",
        ] {
            let error = text.parse::<MacAddr>().unwrap_err().to_string();
            assert!(error.contains("six bytes"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn the_address_of_any_vm_is_unicast_and_local(id: u128) {
            let [first, ..] = MacAddr::of_vm(Uuid::from_u128(id)).bytes();
            prop_assert_eq!(first & 0b11, 0b10);
        }

        #[test]
        fn an_address_survives_its_text(bytes: [u8; 6]) {
            let mac = MacAddr::from(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
            prop_assert_eq!(mac.to_string().to_uppercase().parse::<MacAddr>().unwrap(), mac);
        }
    }
}
