//! The one file with `unsafe`: what the kernel offers and no safe crate wraps.
#![expect(unsafe_code, reason = "KVM memory, the tun ioctl and passing descriptors through exec have no safe wrapper")]
