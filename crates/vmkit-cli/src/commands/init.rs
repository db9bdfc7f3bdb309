//! `vmkit init`.

use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use clap::Args;
use vmkit::Error;
use vmkit::error::Subject;
use vmkit::image::ImageRef;
use vmkit::vmfile::{self, Project, VmfileError};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;
use crate::project_file::FILE;

/// The machine's name if the directory's name can't be one.
const MACHINE: &str = "vm";

/// Write a small vmkit.toml into this directory: one machine, with its other options in comments.
///
/// The machine has the directory's name if that is a valid one. An existing vmkit.toml is not
/// changed. The image has to be a local image or one of the catalogue; nothing is fetched.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The image: debian:12, a file, an https:// address, oci://REGISTRY/NAME:TAG.
    #[arg(value_name = "IMAGE", default_value = "debian:12")]
    image: String,
}

impl InitArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let folder = env::current_dir().map_err(Error::io("find", "the current directory"))?;
        let path = folder.join(FILE);
        if fs::symlink_metadata(&path).is_ok() {
            return Err(taken(&path).into());
        }
        // As given: a relative path refers to the file's folder, which is this one.
        let image: ImageRef = self.image.parse()?;
        let (text, project) = described(&path, &self.image).map_err(Error::from)?;
        let arch = project.machines[0].machine().arch();
        context.images()?.check(&image.seen_from(&folder), arch, None)?;
        write_new(&path, &text)?;
        let machine = &project.machines[0];
        output::status(format_args!(
            "{FILE}: written, with the machine `{}`; `vmkit plan` shows what would be done, `vmkit up` does it",
            machine.name
        ));
        Ok(())
    }
}

/// Returns the text of the file, and the project that it describes.
///
/// # Errors
/// [`VmfileError`] if no file of machines could be valid in this folder.
fn described(path: &Path, image: &str) -> Result<(String, Project), VmfileError> {
    let parsed = |machine: &str| {
        let text = text(machine, image);
        let project = vmfile::parse(path, &text, &|_| Err("it names none".to_owned()))?;
        Ok((text, project))
    };
    let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    // A folder's name may be no valid machine name, or too long behind the project's name.
    match folder.filter(|name| is_plain(name)).map(parsed) {
        Some(Ok(found)) => Ok(found),
        _ => parsed(MACHINE),
    }
}

/// Returns whether a text is a bare key of TOML; the rules of the file check whether it is a
/// machine's name.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

fn text(machine: &str, image: &str) -> String {
    // A string in JSON is one in TOML as well; control characters were refused.
    let image = serde_json::Value::from(image);
    format!(
        "\
# Machines for vmkit: `vmkit plan` shows what would be done, `vmkit up` does it, `vmkit down` shuts them down.
# Every key, and what a change of it needs: docs/vmkit-toml.md. For an editor: `vmkit schema`.
version = 1

[machine.{machine}]
image = {image}
memory = \"1GiB\"
# cpus = 2
# disk = \"20GiB\"          # the root disk, grown to this size [default: the image's]
# forwards = [\"8080:80\"]  # 127.0.0.1:8080 of this host is forwarded to port 80 of the guest
# files = [{{ from = \"site\", to = \"/srv/site\" }}]
# provision = [{{ name = \"install\", shell = \"apt-get update && apt-get install -y nginx\" }}]
# ready.tcp = [80]        # the machine is ready once this port of the guest accepts connections
"
    )
}

/// Writes a file that has its name only when complete; an existing file stays.
fn write_new(path: &Path, text: &str) -> Result<(), Error> {
    let unfinished = path.with_file_name(format!("{FILE}.{}.new", std::process::id()));
    let written = write(&unfinished, text).and_then(|()| rename_to_nothing(&unfinished, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&unfinished);
        match error.kind() {
            ErrorKind::AlreadyExists => taken(path),
            _ => Error::io("write", path)(error),
        }
    })
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Renames a file, unless the target exists.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // The file system does not support the flag.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            renamed => return Ok(renamed?),
        }
    }
    fs::hard_link(from, to)?;
    fs::remove_file(from)
}

fn taken(path: &Path) -> Error {
    Error::already_exists(Subject::MachinesFile, path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(folder: &str) -> String {
        let path = Path::new("/srv").join(folder).join(FILE);
        described(&path, "debian:12").unwrap().1.machines[0].name.clone()
    }

    #[test]
    fn the_machine_is_called_as_the_folder_where_that_is_a_name() {
        assert_eq!(machine("web"), "web");
        assert_eq!(machine("9-lives"), "9-lives");
        for folder in ["My Project", "Web", "a.b", "-x", "日本", &"long".repeat(15)] {
            assert_eq!(machine(folder), MACHINE, "{folder}");
        }
        assert_eq!(described(Path::new("/vmkit.toml"), "debian:12").unwrap().1.machines[0].name, MACHINE);
    }

    #[test]
    fn what_stands_in_comments_is_right_as_well() {
        let text = text("web", "debian:12");
        let (head, machine) = text.split_once("[machine.web]\n").unwrap();
        let uncommented = format!("{head}[machine.web]\n{}", machine.replace("\n# ", "\n"));
        assert_eq!(uncommented.matches("\n# ").count(), 1, "the second line of the head");
        let project =
            vmfile::parse(Path::new("/web/vmkit.toml"), &uncommented, &|_| Err(String::new())).unwrap();
        assert_eq!((project.machines[0].steps.len(), &project.machines[0].ready.tcp[..]), (1, &[80][..]));
    }

    #[test]
    fn any_image_is_written_so_that_it_is_read_back() {
        for image in [r#"./a "b" \c.img"#, "./日本.img", "https://host/a?b='c'"] {
            let project = described(Path::new("/web/vmkit.toml"), image).unwrap().1;
            let read = project.machines[0].image.clone().unwrap();
            assert!(read.ends_with(image.trim_start_matches("./")), "{image}: {read}");
        }
    }

    #[test]
    fn a_file_that_came_meanwhile_stays() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(FILE);
        fs::write(&path, "mine").unwrap();
        let error = write_new(&path, "other").unwrap_err();
        assert_eq!(error.kind(), vmkit::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "nothing else is left");
    }
}
