//! Files that describe machines: `vmkit.toml`, from its text to [`Project`].
//!
//! ```text
//! text ─ toml ─▶ values with their places ─ read ─▶ raw ─ resolve ─▶ Project ─▶ VmSpec, changes
//! ```
//!
//! It knows the format, what it means and how to point into it. It knows nothing of VMs that exist:
//! the manager has those, and [`spec::changes`](crate::spec::changes) says what lies between the
//! two. All of it is pure but [`load`], which reads the file. The format's reference is
//! `docs/vmkit-toml.md`.
//!
//! # Examples
//! ```
//! use std::path::Path;
//! use vmkit::spec::HostInputs;
//! use vmkit::vmfile::parse;
//!
//! let text = "version = 1\n[machine.web]\nimage = 'debian:12'\nforwards = ['8080:80']\n";
//! let project = parse(Path::new("/home/me/shop/vmkit.toml"), text, &|_| Err("not read here".into()))?;
//! let web = project.machine("web").expect("the file describes it");
//! assert_eq!(web.vm.as_str(), "shop-web");
//! let spec = web.spec(HostInputs { image: Some("/images/debian.qcow2".into()), ..HostInputs::default() })?;
//! assert_eq!(spec.cpus(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod document;
mod forms;
mod graph;
mod load;
mod project;
mod raw;
mod read;
mod resolve;
mod schema;
mod shared;

pub use crate::error::{VmfileError, VmfileProblem, VmfileSpan};
pub use load::{load, load_from};
pub use project::{
    CopySpec, MachineConfig, MachineOrigin, Project, ProvisionStep, ReadyProbes, RunPolicy, StepAction,
};
pub use resolve::{ReadText, parse};
pub use schema::schema;
