//! Disk images: what a file is, and making overlays and empty disks.
