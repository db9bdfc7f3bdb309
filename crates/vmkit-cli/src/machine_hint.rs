//! Hints for a VM's name that is the name of a machine in the file of machines.

use crate::project_file;

/// Returns a hint for each unknown VM if the file of machines here explains the name.
///
/// The file is read only then; a missing or faulty file is ignored here.
pub(crate) fn of(mut unknown: Vec<&str>) -> Vec<String> {
    unknown.dedup();
    if unknown.is_empty() {
        return Vec::new();
    }
    let Ok(project) = project_file::find(None).and_then(|file| file.load()) else {
        return Vec::new();
    };
    let file = project.file.display();
    let hint = |name: &str| match project.machine(name) {
        Some(machine) => Some(format!("the VM of the machine `{name}` in {file} is called `{}`", machine.vm)),
        None => {
            let machine = project.machines.iter().find(|machine| machine.vm.as_str() == name)?;
            Some(format!(
                "it is the VM of the machine `{0}` in {file}: `vmkit up {0}` creates it",
                machine.name
            ))
        }
    };
    unknown.into_iter().filter_map(hint).collect()
}
