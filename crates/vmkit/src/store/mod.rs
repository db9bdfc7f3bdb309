//! Where VMs are kept on disk: one directory each.
