//! What of a VM's host has to become another when its spec has: [`reshaping`].
//!
//! Pure. Only two things can: the network, which is made at every start anyway, and the size of the
//! root disk, which grows. Every other disk stays what its claim says, whatever a plan of today
//! would make.

use super::plan::{HostStep, StepDiff, VOLSIZE};

/// Returns what has to be done to a VM for which `done` was done, and `pending` perhaps, so that it
/// is as `planned`.
pub(super) fn reshaping(done: &[HostStep], pending: &[HostStep], planned: &[HostStep]) -> StepDiff {
    let mut shape = StepDiff::default();
    let changes = |step: &&HostStep| is_network(step) || is_growth(step);
    let gone = |step: &&HostStep| is_network(step) && !planned.contains(step);
    shape.going.extend(done.iter().chain(pending).filter(gone).cloned());
    for step in done.iter().filter(|step| !changes(step)) {
        let grown = planned.iter().find(|planned| is_larger_copy(step, planned));
        shape.coming.extend(grown.cloned());
        shape.steps.push(grown.unwrap_or(step).clone());
    }
    for step in planned.iter().filter(changes) {
        // A link that is taken away takes along whatever has its name.
        let is_done = done.contains(step) && !(is_network(step) && shape.going.iter().any(is_network));
        if !is_done {
            shape.coming.push(step.clone());
        }
        shape.steps.push(step.clone());
    }
    let again = shape.steps.iter().filter(|step| is_network(step) && !shape.coming.contains(step));
    shape.again = again.cloned().collect();
    let links = pending.iter().filter(|step| is_network(step));
    shape.pending.extend(links.chain(&shape.coming).cloned());
    shape
}

/// Returns to how many bytes the root disk was grown by these steps, where it was.
pub(super) fn grown_to(steps: &[HostStep]) -> Option<u64> {
    let bytes = |step: &HostStep| match step {
        HostStep::Command { run, .. } => {
            run.iter().find_map(|word| word.strip_prefix(VOLSIZE)).and_then(|bytes| bytes.parse().ok())
        }
        HostStep::Copy { size, .. } => size.map(|size| size.bytes()),
        HostStep::Blank { .. } => None,
    };
    steps.iter().filter_map(bytes).max()
}

fn is_network(step: &HostStep) -> bool {
    matches!(step, HostStep::Command { at_every_start: true, .. })
}

/// Returns whether a step makes something larger that an earlier one has made: it has nothing to
/// undo.
fn is_growth(step: &HostStep) -> bool {
    matches!(step, HostStep::Command { undo: None, at_every_start: false, .. })
}

fn is_larger_copy(done: &HostStep, planned: &HostStep) -> bool {
    match (done, planned) {
        (HostStep::Copy { path, size, .. }, HostStep::Copy { path: same, size: wanted, .. }) => {
            path == same && wanted.is_some() && size < wanted
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Mib;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn disk() -> HostStep {
        HostStep::Command {
            run: words("zfs clone a@b c"),
            undo: Some(words("zfs destroy c")),
            at_every_start: false,
        }
    }

    fn grown(bytes: u64) -> HostStep {
        HostStep::Command {
            run: words(&format!("zfs set volsize={bytes} c")),
            undo: None,
            at_every_start: false,
        }
    }

    fn vnic(link: &str) -> HostStep {
        HostStep::Command {
            run: words(&format!("dladm create-vnic -l {link} n0")),
            undo: Some(words("dladm delete-vnic n0")),
            at_every_start: true,
        }
    }

    fn copy(size: Option<u64>) -> HostStep {
        let size = size.map(|mib| Mib::new(mib).unwrap());
        HostStep::Copy { image: "/image".into(), path: "/root.raw".into(), size }
    }

    #[test]
    fn what_is_as_it_is_planned_stays() {
        let steps = [disk(), grown(2), vnic("a0")];
        let shape = reshaping(&steps, &[], &steps);
        assert!(shape.is_none() && shape.pending.is_empty(), "{shape:?}");
    }

    #[test]
    fn another_network_goes_before_the_new_one_comes() {
        let shape = reshaping(&[disk(), vnic("a0")], &[], &[disk(), vnic("b0")]);
        assert_eq!((shape.going, shape.coming), (vec![vnic("a0")], vec![vnic("b0")]));
        assert_eq!((shape.pending, shape.steps), (vec![vnic("b0")], vec![disk(), vnic("b0")]));
        assert!(shape.again.is_empty());
        assert_eq!(reshaping(&[vnic("a0")], &[], &[vnic("a0")]).again, [vnic("a0")]);
        assert_eq!(reshaping(&[disk()], &[], &[disk(), vnic("a0")]).coming, [vnic("a0")]);
        let none = reshaping(&[disk(), vnic("a0")], &[], &[disk()]);
        assert_eq!((none.going, none.steps), (vec![vnic("a0")], vec![disk()]));
    }

    #[test]
    fn a_disk_grows_and_is_never_recreated() {
        let shape = reshaping(&[disk(), grown(2)], &[], &[disk(), grown(4)]);
        assert_eq!((shape.going, shape.coming), (vec![], vec![grown(4)]));
        let shape = reshaping(&[copy(None)], &[], &[copy(Some(4))]);
        assert_eq!((shape.coming, shape.steps), (vec![copy(Some(4))], vec![copy(Some(4))]));
        assert!(reshaping(&[copy(Some(4))], &[], &[copy(None)]).is_none());
        let other = HostStep::Command {
            run: words("zfs clone x@y z"),
            undo: Some(words("zfs destroy z")),
            at_every_start: false,
        };
        let shape = reshaping(&[disk()], &[], &[other]);
        assert!(shape.is_none() && shape.steps == [disk()], "{shape:?}");
    }

    #[test]
    fn how_large_the_root_disk_is_can_be_read_off() {
        assert_eq!(grown_to(&[disk(), grown(4 << 20), vnic("a0")]), Some(4 << 20));
        assert_eq!(grown_to(&[copy(Some(4))]), Some(4 << 20));
        assert_eq!(grown_to(&[disk(), copy(None)]), None);
    }

    #[test]
    fn what_an_interrupted_change_may_have_created_is_removed_when_it_is_no_longer_wanted() {
        let shape = reshaping(&[disk(), vnic("a0")], &[vnic("b0")], &[disk(), vnic("a0")]);
        assert_eq!((shape.going, shape.coming), (vec![vnic("b0")], vec![vnic("a0")]));
        assert_eq!(shape.pending, [vnic("b0"), vnic("a0")]);
        let again = reshaping(&[disk(), vnic("a0")], &[vnic("b0")], &[disk(), vnic("b0")]);
        assert_eq!((again.going, again.coming), (vec![vnic("a0")], vec![vnic("b0")]));
    }
}
