//! What a VM asks of this host that it can never have, told before anything is made of it.

use rustix::process::geteuid;

use super::facts::most_promised;
use super::users;
use crate::error::{Error, Result};
use crate::spec::{Mib, VmSpec};

/// Refuses a VM for QEMU that this host can never run: for its memory, or for the user that QEMU
/// shall run as.
///
/// # Errors
/// `InvalidInput` with the field, the value and what would be right.
pub(crate) async fn check(spec: &VmSpec) -> Result<()> {
    check_memory(spec.memory(), most_promised())?;
    let Some(user) = spec.run_as() else { return Ok(()) };
    if !geteuid().is_root() {
        return Err(Error::invalid("run_as", user, "only root can have QEMU run as another user"));
    }
    if users::is_unknown(user).await {
        return Err(Error::invalid(
            "run_as",
            user,
            "this host has no such user: use an existing one, or create it",
        ));
    }
    Ok(())
}

fn check_memory(memory: Mib, most: Option<Mib>) -> Result<()> {
    match most.filter(|most| memory > *most) {
        Some(most) => {
            let expected = format!("a guest on this host can have at most {most}: use less, or add swap");
            Err(Error::invalid("memory", memory, expected))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memory_that_can_never_be_had_is_refused() {
        let mib = |mib| Mib::new(mib).unwrap();
        check_memory(mib(8192), Some(mib(8192))).unwrap();
        check_memory(mib(1 << 30), None).unwrap();
        let error = check_memory(mib(8193), Some(mib(8192))).unwrap_err().to_string();
        assert!(
            error.starts_with("memory: \"8193MiB\": a guest on this host can have at most 8GiB"),
            "{error}"
        );
    }
}
