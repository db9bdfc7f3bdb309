//! What a file is that QEMU shall boot as a kernel: [`check_kernel`].
//!
//! Only what QEMU certainly does not boot is refused; in doubt it is QEMU's and the guest's to say.
//! A ramdisk is not looked into: QEMU hands it to the kernel as it is, and some take a text for one
//! (iPXE a script).

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::input_file::InputFile;
use crate::spec::Arch;

/// How much of the file QEMU looks into for a header.
const HEAD_BYTES: u64 = 8192;
/// Where a Linux kernel for x86 has its size in sectors, its mark of a boot sector and its magic.
///
/// Source: the kernel's arch/x86/boot.rst.
const SETUP_SECTORS: usize = 0x1f1;
const BOOT_SECTOR: usize = 0x1fe;
const LINUX_X86: (usize, &[u8]) = (0x202, b"HdrS");
/// Where a Linux kernel for aarch64 has its magic. Source: the kernel's arch/arm64/booting.rst.
const LINUX_AARCH64: (usize, &[u8]) = (0x38, b"ARM\x64");
/// The magic of a multiboot header, aligned to four bytes. Source: the Multiboot Specification
/// 0.6.96, 3.1.
const MULTIBOOT: &[u8] = &0x1bad_b002_u32.to_le_bytes();
const ELF: &[u8] = b"\x7fELF";
/// Where an ELF file names its instruction set, and 386, Arm, x86-64 and aarch64. Source: elf(5).
const ELF_MACHINE: usize = 18;
const EM_386: u8 = 3;
const EM_ARM: u8 = 40;
const EM_X86_64: u8 = 62;
const EM_AARCH64: u8 = 183;
const EMPTY: &str = "the file is empty";
const GZIP: &[u8] = b"\x1f\x8b";

/// Opens a kernel for guests of this instruction set, and refuses what QEMU does not boot.
///
/// # Errors
/// `InvalidInput` on `kernel`, with the path and what would be right.
pub(crate) fn check_kernel(path: &Path, arch: Arch) -> Result<()> {
    let InputFile { file, bytes, .. } = InputFile::open("kernel", path)?;
    let mut head = Vec::new();
    file.take(HEAD_BYTES).read_to_end(&mut head).map_err(Error::io("read", path))?;
    match refusal(&head, bytes, arch) {
        Some(why) => Err(Error::invalid("kernel", path.display(), why)),
        None => Ok(()),
    }
}

/// Opens a ramdisk, and refuses one without anything in it.
///
/// # Errors
/// `InvalidInput` on `initrd`, with the path.
pub(crate) fn check_initrd(path: &Path) -> Result<()> {
    match InputFile::open("initrd", path)?.bytes {
        0 => Err(Error::invalid("initrd", path.display(), EMPTY)),
        _ => Ok(()),
    }
}

/// Returns why a file that begins like this, and is so long, is no kernel.
///
/// Source: QEMU's hw/i386/x86.c, `x86_load_linux`, and hw/arm/boot.c,
/// `arm_setup_direct_kernel_boot`.
fn refusal(head: &[u8], bytes: u64, arch: Arch) -> Option<String> {
    let has = |(at, magic): (usize, &[u8])| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let other = |arch: &str, machine: &str| {
        Some(format!(
            "this is a kernel for {arch}, and the machine type is not: use `{machine}`, or another kernel"
        ))
    };
    if bytes == 0 {
        return Some(EMPTY.to_owned());
    }
    match arch {
        Arch::X86_64 if has(LINUX_X86) => cut_short(head, bytes),
        Arch::X86_64 if has(LINUX_AARCH64) => other("aarch64", "virt"),
        Arch::Aarch64 if has(LINUX_AARCH64) => None,
        Arch::Aarch64 if has(LINUX_X86) => other("x86_64", "q35"),
        // Some multiboot kernels are ELF files as well.
        Arch::X86_64 if head.chunks_exact(4).any(|word| word == MULTIBOOT) => None,
        _ if head.starts_with(ELF) => elf_refusal(head, arch),
        _ if is_text(head) => Some("this is a text file, not a kernel".to_owned()),
        // Whatever else there is, QEMU puts into the memory of this machine and runs.
        Arch::Aarch64 => None,
        // Linux before 2.0 had a boot sector and no magic.
        Arch::X86_64 if has((BOOT_SECTOR, &[0x55, 0xaa])) => None,
        Arch::X86_64 if head.starts_with(GZIP) => {
            Some("this is compressed with gzip, which QEMU takes on aarch64 only: decompress it".to_owned())
        }
        Arch::X86_64 => Some(
            "this is not a kernel: QEMU boots Linux's bzImage, ELF files with a PVH entry, and multiboot \
             kernels"
                .to_owned(),
        ),
    }
}

/// Refuses a Linux kernel for x86 that ends before its second part.
fn cut_short(head: &[u8], bytes: u64) -> Option<String> {
    let sectors = match head[SETUP_SECTORS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (sectors + 1) * 512;
    (setup_bytes > bytes).then(|| {
        format!("the kernel is truncated: it has {bytes} bytes, and its first part alone has {setup_bytes}")
    })
}

/// Refuses an ELF file for another instruction set.
fn elf_refusal(head: &[u8], arch: Arch) -> Option<String> {
    let fitting = match arch {
        Arch::X86_64 => [EM_386, EM_X86_64],
        Arch::Aarch64 => [EM_ARM, EM_AARCH64],
    };
    let is_fitting = head.get(ELF_MACHINE).is_some_and(|machine| fitting.contains(machine));
    (!is_fitting).then(|| format!("this ELF file is not for {}", arch.as_str()))
}

/// Returns whether this is what people read.
fn is_text(head: &[u8]) -> bool {
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The last letter may lie across the end of what was read.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).expect("it is valid up to there")
        }
        Err(_) => return false,
    };
    !text.is_empty() && text.chars().all(|c| !c.is_control() || matches!(c, '\t' | '\n' | '\r' | '\u{c}'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns a file of zeros with these bytes at these places.
    fn file(bytes: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; bytes];
        for (at, part) in parts {
            file[*at..at + part.len()].copy_from_slice(part);
        }
        file
    }

    fn elf(machine: u8) -> Vec<u8> {
        file(4096, &[(0, ELF), (ELF_MACHINE, &[machine])])
    }

    fn said(file: &[u8], arch: Arch) -> String {
        let head = &file[..file.len().min(HEAD_BYTES as usize)];
        refusal(head, file.len() as u64, arch).unwrap_or_default()
    }

    #[test]
    fn what_qemu_boots_is_taken() {
        let multiboot_elf = file(8192, &[(0, ELF), (ELF_MACHINE, &[EM_386]), (4096, MULTIBOOT)]);
        for kernel in [
            vmkit_testkit::paper_kernel(),
            file(4096, &[LINUX_X86]),
            elf(EM_X86_64),
            elf(EM_386),
            multiboot_elf,
            file(512, &[(BOOT_SECTOR, &[0x55, 0xaa])]),
        ] {
            assert_eq!(said(&kernel, Arch::X86_64), "");
        }
        // An EFI stub before the magic, gzip, U-Boot's header, and bare machine code.
        for kernel in [
            file(4096, &[(0, b"MZ"), LINUX_AARCH64]),
            file(4096, &[(0, GZIP)]),
            file(64, &[(0, &[0x27, 0x05, 0x19, 0x56])]),
            elf(EM_AARCH64),
            vec![0xd5, 0x03, 0x20, 0x1f],
        ] {
            assert_eq!(said(&kernel, Arch::Aarch64), "");
        }
    }

    #[test]
    fn a_file_that_qemu_does_not_boot_is_reported_with_its_kind() {
        let long_text = "ein Kernel für den Gast\n".repeat(1000);
        for (kernel, arch, expected) in [
            (Vec::new(), Arch::X86_64, "the file is empty"),
            (b"#!/bin/sh\n".to_vec(), Arch::X86_64, "this is a text"),
            (long_text.clone().into_bytes(), Arch::Aarch64, "this is a text"),
            (vec![0; 100_000], Arch::X86_64, "not a kernel: QEMU boots Linux's bzImage"),
            (file(4096, &[(0, GZIP)]), Arch::X86_64, "compressed with gzip"),
            (file(2559, &[LINUX_X86]), Arch::X86_64, "it has 2559 bytes, and its first part alone has 2560"),
            (
                file(4096, &[LINUX_AARCH64]),
                Arch::X86_64,
                "a kernel for aarch64, and the machine type is not: use `virt`",
            ),
            (
                file(4096, &[LINUX_X86]),
                Arch::Aarch64,
                "a kernel for x86_64, and the machine type is not: use `q35`",
            ),
            (elf(EM_AARCH64), Arch::X86_64, "this ELF file is not for x86_64"),
            (elf(EM_X86_64), Arch::Aarch64, "this ELF file is not for aarch64"),
        ] {
            let said = said(&kernel, arch);
            assert!(said.contains(expected), "{expected}: {said:?}");
        }
        // Cut in the middle of a letter.
        assert!(is_text(&"ü".as_bytes()[..1].iter().fold(b"a".to_vec(), |mut text, byte| {
            text.push(*byte);
            text
        })));
        assert!(!is_text(b"\xfc\xfd") && !is_text(b"a\0b") && !is_text(b""));
    }

    proptest! {
        #[test]
        fn any_file_is_inspected_without_panic(head in any::<Vec<u8>>(), arm in any::<bool>()) {
            let arch = if arm { Arch::Aarch64 } else { Arch::X86_64 };
            let _ = refusal(&head, head.len() as u64, arch);
        }

        #[test]
        fn a_header_of_any_length_is_parsed_without_panic(bytes in 0x206_usize..8192, sectors in any::<u8>()) {
            let _ = said(&file(bytes, &[LINUX_X86, (SETUP_SECTORS, &[sectors])]), Arch::X86_64);
        }
    }
}
