//! Verifies OpenPGP signatures: detached ones, and clear-signed texts.
//!
//! Pure: the caller reads the bytes. A signature is valid if
//!
//! - a key of the catalogue made it while that key was valid, or a subkey that the key bound for
//!   signing; a key that has expired since does not invalidate what it signed before;
//! - the key was not revoked;
//! - it is a signature over a file or a text, and has not expired itself;
//! - its hash can't be forged.
//!
//! A key is identified by its fingerprint, wherever the key comes from.
//!
//! Source: RFC 9580.

use std::io::Read;

use pgp::composed::{CleartextSignedMessage, Deserializable, DetachedSignature, SignedPublicKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{PublicKey, PublicSubkey, Signature, SignatureType};
use pgp::types::KeyDetails;

use super::digest::hex;

/// The largest signature, in bytes: a file may have several.
pub(super) const MOST_SIGNATURE_BYTES: usize = 64 << 10;

/// The largest public key, in bytes: one from a keyserver has many signatures of other keys.
pub(super) const MOST_KEY_BYTES: usize = 1 << 20;

/// A public key with the expected fingerprint, undamaged and not revoked.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    /// The fingerprint of the primary key, in upper-case hexadecimal digits.
    pub(super) fingerprint: String,
    key: SignedPublicKey,
}

/// Verifies a detached signature; `open` returns the signed bytes, from the beginning each time.
/// `now` is in seconds since 1970.
///
/// Returns the fingerprint of the key.
///
/// # Errors
/// What is wrong with the signature, or that no trusted key has signed.
pub(super) fn verify_detached<R: Read>(
    signature: &[u8],
    keys: &[Certificate],
    now: u64,
    mut open: impl FnMut() -> std::io::Result<R>,
) -> Result<String, String> {
    let is_armored = signature.trim_ascii_start().starts_with(b"-----BEGIN");
    let parsed = if is_armored {
        DetachedSignature::from_armor_many(signature).map(|(all, _)| all.collect::<Vec<_>>())
    } else {
        DetachedSignature::from_bytes_many(signature).map(Iterator::collect)
    };
    let signatures = parsed
        .and_then(|all| all.into_iter().collect::<Result<Vec<_>, _>>())
        .map_err(|error| format!("the signature can't be read: {error}"))?;
    let signatures: Vec<&Signature> = signatures.iter().map(|one| &one.signature).collect();
    trusted(&signatures, keys, now, |signature, signer| match open() {
        Ok(data) => signer.has_made(signature, data),
        Err(_) => false,
    })
}

/// Verifies a clear-signed text, and returns the key's fingerprint and the signed part.
///
/// # Errors
/// As for [`verify_detached`].
pub(super) fn verify_inline(text: &[u8], keys: &[Certificate], now: u64) -> Result<(String, String), String> {
    let (message, _) = CleartextSignedMessage::from_armor(text)
        .map_err(|error| format!("no signature in it can be read: {error}"))?;
    let signed = message.signed_text();
    let signatures: Vec<&Signature> = message.signatures().iter().collect();
    let fingerprint =
        trusted(&signatures, keys, now, |signature, signer| signer.has_made(signature, signed.as_bytes()))?;
    Ok((fingerprint, signed))
}

/// A key that may have signed.
#[derive(Clone, Copy)]
enum SigningKey<'a> {
    Primary(&'a PublicKey),
    Subkey(&'a PublicSubkey),
}

impl SigningKey<'_> {
    fn has_made(self, signature: &Signature, data: impl Read) -> bool {
        match self {
            SigningKey::Primary(key) => signature.verify(key, data).is_ok(),
            SigningKey::Subkey(key) => signature.verify(key, data).is_ok(),
        }
    }
}

/// Returns the fingerprint of the first key that has made one of the signatures.
fn trusted(
    signatures: &[&Signature],
    keys: &[Certificate],
    now: u64,
    mut verify: impl FnMut(&Signature, SigningKey<'_>) -> bool,
) -> Result<String, String> {
    if signatures.is_empty() {
        return Err("there is no signature in it".to_owned());
    }
    let over_data: Vec<&&Signature> = signatures.iter().filter(|one| is_over_data(one)).collect();
    if over_data.is_empty() {
        return Err("its signature is not one of a file".to_owned());
    }
    let strong: Vec<&&Signature> = over_data.into_iter().filter(|one| is_strong(one)).collect();
    if strong.is_empty() {
        return Err("it is signed with a hash that can be forged".to_owned());
    }
    let has_expired: Vec<bool> = strong.iter().map(|one| has_expired(one, now)).collect();
    if has_expired.iter().all(|has| *has) {
        return Err("the signature has expired: its publisher has to sign it again".to_owned());
    }
    let strong: Vec<&&Signature> =
        strong.into_iter().zip(has_expired).filter(|(_, has)| !has).map(|(one, _)| one).collect();
    for key in keys {
        for signature in &strong {
            let Some(made) = signature.created() else { continue };
            for signer in key.signers(made.as_secs()) {
                if verify(signature, signer) {
                    return Ok(key.fingerprint.clone());
                }
            }
        }
    }
    let wanted: Vec<&str> = keys.iter().map(|key| key.fingerprint.as_str()).collect();
    let by: Vec<String> = signatures
        .iter()
        .flat_map(|one| one.issuer_key_id())
        .map(|id| id.to_string().to_uppercase())
        .collect();
    let by = if by.is_empty() { "a key that it does not name".to_owned() } else { by.join(", ") };
    Err(format!("no valid signature by {}; it is signed by {by}", wanted.join(" or ")))
}

impl Certificate {
    /// Reads a key in ASCII armour.
    ///
    /// # Errors
    /// If the key has another fingerprint, is revoked or damaged, or can't be read.
    pub(super) fn read(fingerprint: &str, armoured: &[u8]) -> Result<Self, String> {
        let of = fingerprint;
        let (key, _) = SignedPublicKey::from_armor_single(armoured)
            .map_err(|error| format!("the key {of} can't be read: {error}"))?;
        let found = hex(key.fingerprint().as_bytes()).to_uppercase();
        if found != *of {
            return Err(format!("the key {of} has another fingerprint, {found}"));
        }
        if !key.details.revocation_signatures.is_empty() {
            return Err(format!("the key {of} is revoked"));
        }
        key.verify_bindings().map_err(|error| format!("the key {of} is damaged: {error}"))?;
        Ok(Self { fingerprint: fingerprint.to_owned(), key })
    }

    /// Returns the keys that might have signed at this time, in seconds since 1970.
    fn signers(&self, made: u32) -> Vec<SigningKey<'_>> {
        let in_time = |created: u32, expires_after: Option<u32>| {
            made >= created && expires_after.is_none_or(|after| after == 0 || made - created < after)
        };
        let mut signers = Vec::new();
        let own = self.key.details.users.iter().flat_map(|user| &user.signatures);
        let own = own.chain(&self.key.details.direct_signatures);
        let newest = own.max_by_key(|one| one.created().map(|time| time.as_secs()));
        let expires_after = newest.and_then(|one| one.key_expiration_time()).map(|time| time.as_secs());
        let created = self.key.primary_key.created_at().as_secs();
        if !in_time(created, expires_after) {
            return signers;
        }
        signers.push(SigningKey::Primary(&self.key.primary_key));
        for subkey in &self.key.public_subkeys {
            let is_revoked = |one: &Signature| one.typ() == Some(SignatureType::SubkeyRevocation);
            let binding = subkey.signatures.iter().max_by_key(|one| one.created().map(|time| time.as_secs()));
            let Some(binding) = binding else { continue };
            let expires_after = binding.key_expiration_time().map(|time| time.as_secs());
            let created = subkey.key.created_at().as_secs();
            if binding.key_flags().sign()
                && !subkey.signatures.iter().any(is_revoked)
                && in_time(created, expires_after)
            {
                signers.push(SigningKey::Subkey(&subkey.key));
            }
        }
        signers
    }
}

/// Returns whether this is a signature over a file or a text, and not over a key or a user id.
fn is_over_data(signature: &Signature) -> bool {
    matches!(signature.typ(), Some(SignatureType::Binary | SignatureType::Text))
}

/// Returns whether a signature has expired by its own expiry time; 0 means none.
fn has_expired(signature: &Signature, now: u64) -> bool {
    let after = signature.signature_expiration_time().map(|time| u64::from(time.as_secs()));
    let created = signature.created().map(|time| u64::from(time.as_secs()));
    match (created, after.filter(|after| *after > 0)) {
        (Some(created), Some(after)) => now >= created + after,
        _ => false,
    }
}

fn is_strong(signature: &Signature) -> bool {
    matches!(
        signature.hash_alg(),
        Some(
            HashAlgorithm::Sha224
                | HashAlgorithm::Sha256
                | HashAlgorithm::Sha384
                | HashAlgorithm::Sha512
                | HashAlgorithm::Sha3_256
                | HashAlgorithm::Sha3_512
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Catalogue, PublicKey};

    macro_rules! fixture {
        ($name:literal) => {
            include_bytes!(concat!("../../tests/signatures/", $name))
        };
    }

    const ONE: &str = "5A88DABF613BE576F30FF9839CE137947B24AC90";
    const TWO: &str = "019F3568F6EFDF23AF1094D4DC0C8ACEB8D03BE9";
    const EXPIRING: &str = "8DCCD14D59A172887544C5868BBB458E0E7684A2";
    const REVOKED: &str = "F7C0D129A9191C7ACC3C96336D0166C35F065AFC";
    const SHORT: &str = "BF4D1E73E7238EBE998E0F77ACE8355212EA02DF";
    const SUMS: &[u8] = fixture!("SUMS");
    /// The beginning of 2026.
    const NOW: u64 = 1_767_225_600;

    fn key(fingerprint: &str) -> Result<Certificate, String> {
        let public: &[u8] = match fingerprint {
            ONE => fixture!("one.pub"),
            TWO => fixture!("two.pub"),
            EXPIRING => fixture!("expiring.pub"),
            SHORT => fixture!("short.pub"),
            _ => fixture!("revoked.pub"),
        };
        Certificate::read(fingerprint, public)
    }

    fn verified(signature: &[u8], data: &[u8], fingerprint: &str) -> Result<String, String> {
        verify_detached(signature, &[key(fingerprint)?], NOW, || Ok(data))
    }

    #[test]
    fn what_gnupg_signed_is_verified() {
        for (signature, fingerprint) in [
            (&fixture!("one.asc")[..], ONE),
            (fixture!("one.sig"), ONE),
            (fixture!("two.sig"), TWO),
            (fixture!("both.sig"), ONE),
            (fixture!("both.sig"), TWO),
            // The key has expired since, and was valid when it signed.
            (fixture!("expiring.sig"), EXPIRING),
            (fixture!("text.sig"), SHORT),
        ] {
            assert_eq!(verified(signature, SUMS, fingerprint).as_deref(), Ok(fingerprint));
        }
    }

    #[test]
    fn what_was_changed_or_signed_by_another_is_refused() {
        let mut changed = SUMS.to_vec();
        changed[0] = b'c';
        for (signature, data, fingerprint, why) in [
            (&fixture!("one.sig")[..], &changed[..], ONE, "no valid signature by 5A88DABF"),
            (fixture!("one.sig"), SUMS, TWO, "it is signed by 9CE137947B24AC90"),
            (fixture!("revoked.sig"), SUMS, REVOKED, "is revoked"),
            (fixture!("sha1.sig"), SUMS, TWO, "can be forged"),
            (fixture!("short.sig"), SUMS, SHORT, "the signature has expired"),
            (b"", SUMS, ONE, "no signature"),
            (b"<html>", SUMS, ONE, "can't be read"),
            (
                b"-----BEGIN PGP SIGNATURE-----\n\n!!!!\n-----END PGP SIGNATURE-----\n",
                SUMS,
                ONE,
                "can't be read",
            ),
        ] {
            let refusal = verified(signature, data, fingerprint).unwrap_err();
            assert!(refusal.contains(why), "{why}: {refusal}");
        }
    }

    #[test]
    fn a_signature_is_valid_until_it_expires_and_only_over_data() {
        let verified = |signature: &[u8], now| {
            verify_detached(signature, &[key(SHORT).unwrap()], now, || Ok(SUMS)).map(drop)
        };
        // Signed on 1 March 2024, for 30 days.
        let signed: u64 = 1_709_294_400;
        assert_eq!(verified(fixture!("short.sig"), signed + 30 * 86_400 - 1), Ok(()));
        let refusal = verified(fixture!("short.sig"), signed + 30 * 86_400).unwrap_err();
        assert!(refusal.contains("has expired"), "{refusal}");
        // One that has expired does not spoil another one.
        let both = [&fixture!("short.sig")[..], fixture!("text.sig")].concat();
        assert_eq!(verified(&both, NOW), Ok(()));

        // What the key signed of itself is none over a file.
        let of_key = key(SHORT).unwrap().key.details.users[0].signatures[0].clone();
        let refusal = trusted(&[&of_key], &[key(SHORT).unwrap()], NOW, |_, _| true).unwrap_err();
        assert!(refusal.contains("not one of a file"), "{refusal}");
    }

    #[test]
    fn a_key_must_have_the_expected_fingerprint() {
        let refusal = Certificate::read(TWO, fixture!("one.pub")).unwrap_err();
        assert!(refusal.contains("has another fingerprint, 5A88DABF"), "{refusal}");
    }

    #[test]
    fn a_key_signs_only_while_it_is_valid() {
        let certificate = key(EXPIRING).unwrap();
        let at = |seconds: u32| certificate.signers(seconds).len();
        let (before, during, after) = (1_700_000_000, 1_709_251_200, 1_720_000_000);
        assert_eq!((at(before), at(during), at(after)), (0, 1, 0));
    }

    #[test]
    fn of_a_text_with_its_signature_only_what_was_signed_is_read() {
        let text = fixture!("CHECKSUM.inline");
        let (fingerprint, signed) = verify_inline(text, &[key(ONE).unwrap()], NOW).unwrap();
        assert_eq!(fingerprint, ONE);
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&signed), lines(std::str::from_utf8(fixture!("CHECKSUM")).unwrap()));

        let text = String::from_utf8(text.to_vec()).unwrap();
        let before = format!("SHA256 (test.img) = {}\n{text}", "f".repeat(64));
        let within = text.replace("(test.img) = a", "(test.img) = b");
        for forged in [before.as_str(), &within, "", "SHA256 (test.img) = 00"] {
            assert!(verify_inline(forged.as_bytes(), &[key(ONE).unwrap()], NOW).is_err(), "{forged}");
        }
        let behind = format!("{text}SHA256 (other.img) = {}\n", "f".repeat(64));
        if let Ok((_, signed)) = verify_inline(behind.as_bytes(), &[key(ONE).unwrap()], NOW) {
            assert!(!signed.contains("other.img"));
        }
    }

    #[test]
    fn the_keys_that_come_with_vmkit_are_whole_and_may_sign() {
        let catalogue = Catalogue::built_in();
        let now = u32::try_from(
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
        );
        let mut signed = Vec::new();
        for entry in catalogue.entries() {
            for arch in entry.arches {
                let Some(signature) = catalogue.find(&entry.name, arch).unwrap().signature else { continue };
                for key in &signature.keys {
                    let PublicKey::Here(public) = &key.public else { continue };
                    let certificate = Certificate::read(&key.fingerprint, public.as_bytes())
                        .unwrap_or_else(|error| panic!("{}: {error}", entry.name));
                    assert!(
                        !certificate.signers(now.unwrap()).is_empty(),
                        "{}: its key has expired",
                        entry.name
                    );
                }
                signed.push(entry.name.name().to_owned());
            }
        }
        signed.dedup();
        assert_eq!(signed, ["alma", "alpine", "arch", "fedora", "opensuse", "rocky", "ubuntu"]);
    }

    #[test]
    fn what_fedora_really_signs_is_verified_by_the_key_that_comes_with_vmkit() {
        let name = crate::image::ImageName::new("fedora:44").unwrap();
        let found = Catalogue::built_in().find(&name, crate::spec::Arch::Aarch64).unwrap();
        let key = found.signature.unwrap().keys.remove(0);
        let PublicKey::Here(public) = key.public else { panic!("it comes with vmkit") };
        let keys = [Certificate::read(&key.fingerprint, public.as_bytes()).unwrap()];
        let (fingerprint, signed) =
            verify_inline(fixture!("Fedora-Cloud-44-1.7-aarch64-CHECKSUM"), &keys, NOW).unwrap();
        assert_eq!(fingerprint, "36F612DCF27F7D1A48A835E4DBFCF71C6D9F90A6");
        let image = found.url.rsplit('/').next().unwrap();
        let line = signed.lines().find(|line| line.starts_with(&format!("SHA256 ({image}) = "))).unwrap();
        assert!(line.ends_with("55c60a3b80d3616a08705afd0459e75fe9f03c54aba7a46e4002a41a72fa0d5b"), "{line}");
    }

    proptest::proptest! {
        // Each case verifies with RSA, which takes its time without optimisation.
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

        #[test]
        fn reading_any_signature_never_panics(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            damage in proptest::prelude::any::<(proptest::sample::Index, u8)>(),
        ) {
            let _ = verified(&bytes, SUMS, ONE);
            let _ = verify_inline(&bytes, &[key(ONE).unwrap()], NOW);
            let mut damaged = fixture!("two.sig").to_vec();
            let at = damage.0.index(damaged.len());
            damaged[at] = damage.1;
            let _ = verified(&damaged, SUMS, TWO);
        }
    }
}
