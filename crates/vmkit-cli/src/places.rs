//! Where this user's VMs are kept, from the arguments and the environment. The library never reads
//! the environment.

use std::borrow::Cow;
use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use vmkit::Error;
use vmkit::image::ImageRef;
use vmkit::store::Home;

/// Returns the home: `--home`, else `VMKIT_HOME`, else the XDG directories.
///
/// # Errors
/// `InvalidInput` on the variable that names a place that the library can't use; `Host` where the
/// environment names none.
pub(crate) fn home(named: Option<PathBuf>) -> Result<Home, Error> {
    find(named, |name| env::var_os(name), &unusable_runtime).map(|found| found.home)
}

/// Returns why `XDG_RUNTIME_DIR` is not used, where it is set and `run` in the home takes its
/// place.
pub(crate) fn refused_runtime(named: Option<PathBuf>) -> Option<String> {
    find(named, |name| env::var_os(name), &unusable_runtime).ok()?.refused_runtime
}

/// The home, and what was set for it in vain.
#[derive(Debug)]
struct FoundHome {
    home: Home,
    refused_runtime: Option<String>,
}

fn find(
    named: Option<PathBuf>,
    environment: impl Fn(&str) -> Option<OsString>,
    unusable: &dyn Fn(&Path) -> Option<String>,
) -> Result<FoundHome, Error> {
    let set = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let one = |home: Home| FoundHome { home, refused_runtime: None };
    if let Some(root) = named {
        check_directory("home", &root)?;
        return Home::at(absolute("home", &root)?).map(one);
    }
    if let Some(root) = set("VMKIT_HOME") {
        let root = absolute("VMKIT_HOME", &root)?;
        check_directory("VMKIT_HOME", &root)?;
        return Home::at(root).map(one).map_err(|error| named_by("VMKIT_HOME", error));
    }
    // A relative path in these variables is to be ignored. Source: the XDG Base Directory
    // Specification.
    let xdg = |name: &str| set(name).filter(|path| path.is_absolute());
    let below_user = |below: &str| match set("HOME") {
        Some(user) if user.is_absolute() => check_directory("HOME", &user).map(|()| user.join(below)),
        Some(user) => Err(Error::invalid("HOME", user.display(), "the path must be absolute")),
        None => Err(Error::host(
            "HOME",
            "it is not set, and determines where VMs are stored: set it or VMKIT_HOME, or pass --home",
        )),
    };
    let (data_from, data) = match xdg("XDG_DATA_HOME") {
        Some(data) => check_directory("XDG_DATA_HOME", &data).map(|()| ("XDG_DATA_HOME", data))?,
        None => ("HOME", below_user(".local/share")?),
    };
    let data = data.join("vmkit");
    let cache = match xdg("XDG_CACHE_HOME") {
        Some(cache) => check_directory("XDG_CACHE_HOME", &cache).map(|()| cache)?,
        None => below_user(".cache")?,
    }
    .join("vmkit");
    let mut refused_runtime = None;
    if let Some(dir) = set("XDG_RUNTIME_DIR") {
        let tried = match unusable(&dir) {
            Some(why) => Err(why),
            None => Home::split(&data, dir.join("vmkit"), &cache).map_err(|error| match error {
                Error::Invalid { expected, .. } => expected,
                other => other.to_string(),
            }),
        };
        match tried {
            Ok(home) => return Ok(one(home)),
            Err(why) => refused_runtime = Some(format!("XDG_RUNTIME_DIR={}: {why}", dir.display())),
        }
    }
    let home = Home::split(&data, data.join("run"), cache).map_err(|error| named_by(data_from, error))?;
    Ok(FoundHome { home, refused_runtime })
}

/// Refuses a place that is there and is not a directory, or lies below such a one.
fn check_directory(variable: &'static str, path: &Path) -> Result<(), Error> {
    let is_none = match path.metadata() {
        Ok(found) => !found.is_dir(),
        Err(error) => error.kind() == io::ErrorKind::NotADirectory,
    };
    match is_none {
        true => {
            Err(Error::invalid(variable, path.display(), "this is not a directory (expected a directory)"))
        }
        false => Ok(()),
    }
}

/// Says of a place that can't be used which variable named it.
pub(crate) fn named_by(variable: &'static str, error: Error) -> Error {
    error.in_field(variable)
}

/// Returns why sockets can't be made below a runtime directory: `su` keeps the variable of another
/// user, and the directory is gone once its user has logged out.
///
/// Source: the XDG Base Directory Specification, which has programs fall back to another directory.
fn unusable_runtime(dir: &Path) -> Option<String> {
    let own = dir.join("vmkit");
    let user = rustix::process::geteuid().as_raw();
    if !dir.is_absolute() {
        return Some("the path is relative".to_owned());
    }
    for path in [dir, &own] {
        match path.metadata() {
            Ok(found) if !found.is_dir() => return Some(format!("{} is not a directory", path.display())),
            Ok(found) if found.uid() != user => {
                let (path, owner) = (path.display(), found.uid());
                return Some(format!("{path} belongs to user {owner}, and this is user {user}"));
            }
            Ok(_) => {}
            // It is made where it is missing.
            Err(error) if path == own && error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Some(format!("{}: {error}", path.display())),
        }
        if let Err(errno) = access(path, Access::WRITE_OK | Access::EXEC_OK) {
            return Some(format!("{}: {}", path.display(), io::Error::from(errno)));
        }
    }
    None
}

/// Returns the path seen from the root: a VM outlives the directory that its command was typed in.
///
/// # Errors
/// `InvalidInput` on the field for a path that is not UTF-8, which no record could keep.
pub(crate) fn absolute(field: &'static str, path: &Path) -> Result<PathBuf, Error> {
    let path = local(field, path)?;
    let absolute = std::path::absolute(&path).map_err(Error::io("find", &*path))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(Error::invalid(field, absolute.display(), "the path must be UTF-8")),
    }
}

/// Returns the absolute path of something that is read once: `-` is standard input, which may be a
/// pipe.
///
/// # Errors
/// As for [`absolute`].
pub(crate) fn input(field: &'static str, path: &Path) -> Result<PathBuf, Error> {
    absolute(field, stdin_or(path))
}

/// Returns the path of standard input for `-`, and any other as it is.
pub(crate) fn stdin_or(path: &Path) -> &Path {
    if path == Path::new("-") { Path::new("/dev/stdin") } else { path }
}

/// Returns the path that a file's address has, `file:///PATH`; any other path is itself.
pub(crate) fn local<'a>(field: &'static str, path: &'a Path) -> Result<Cow<'a, Path>, Error> {
    let text = path.to_str().unwrap_or_default();
    if !text.get(..6).is_some_and(|begin| begin.eq_ignore_ascii_case("file:/")) {
        return Ok(Cow::Borrowed(path));
    }
    match text.parse() {
        Ok(ImageRef::Path(path)) => Ok(Cow::Owned(path)),
        Err(error @ Error::Invalid { .. }) => Err(error.in_field(field)),
        Ok(_) | Err(_) => Ok(Cow::Borrowed(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_file_is_its_path() {
        let found = |text: &str| absolute("kernel", Path::new(text)).map(|path| path.display().to_string());
        assert_eq!(found("file:///a%20b/c").unwrap(), "/a b/c");
        assert_eq!(found("FILE:/a").unwrap(), "/a");
        assert!(found("file:a").unwrap().ends_with("/file:a"), "this is a name");
        let error = found("file:///%zz").unwrap_err().to_string();
        assert!(error.starts_with("kernel: \"file:///%zz\": "), "{error}");
    }

    fn found(named: Option<&str>, variables: &[(&str, &str)]) -> Result<Home, Error> {
        let value =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into());
        let unusable = |dir: &Path| (dir == Path::new("/gone")).then(|| "no such directory".to_owned());
        find(named.map(PathBuf::from), value, &unusable).map(|found| found.home)
    }

    #[test]
    fn an_argument_goes_before_the_environment() {
        let variables = [("VMKIT_HOME", "/env"), ("HOME", "/user")];
        assert_eq!(found(Some("/arg"), &variables).unwrap(), Home::at("/arg").unwrap());
        assert_eq!(found(None, &variables).unwrap(), Home::at("/env").unwrap());
    }

    #[test]
    fn without_either_the_xdg_directories_count() {
        let variables = [
            ("XDG_DATA_HOME", "/data"),
            ("XDG_RUNTIME_DIR", "/run/user/7"),
            ("XDG_CACHE_HOME", "not/absolute"),
            ("VMKIT_HOME", ""),
            ("HOME", "/user"),
        ];
        let expected = Home::split("/data/vmkit", "/run/user/7/vmkit", "/user/.cache/vmkit").unwrap();
        assert_eq!(found(None, &variables).unwrap(), expected);
        let data = "/user/.local/share/vmkit";
        let expected = Home::split(data, format!("{data}/run"), "/user/.cache/vmkit").unwrap();
        assert_eq!(found(None, &[("HOME", "/user")]).unwrap(), expected);
    }

    #[test]
    fn a_runtime_directory_that_can_not_be_used_gives_way_to_one_in_the_home() {
        let expected = Home::split("/data/vmkit", "/data/vmkit/run", "/user/.cache/vmkit").unwrap();
        let long = format!("/{}", "r".repeat(90));
        for runtime in ["/gone", &long] {
            let variables = [("XDG_DATA_HOME", "/data"), ("XDG_RUNTIME_DIR", runtime), ("HOME", "/user")];
            assert_eq!(found(None, &variables).unwrap(), expected, "{runtime}");
        }
    }

    #[test]
    fn a_runtime_directory_is_this_users_and_can_be_written_to() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        let why = |dir: &Path| unusable_runtime(dir).unwrap_or_default();
        assert_eq!(unusable_runtime(temp.path()), None);
        std::fs::create_dir(at("vmkit")).unwrap();
        assert_eq!(unusable_runtime(temp.path()), None);
        std::fs::write(at("file"), "").unwrap();
        assert!(why(&at("file")).contains("file is not a directory"));
        assert!(why(&at("gone")).contains("No such file or directory"));
        assert_eq!(why(Path::new("run")), "the path is relative");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(at("vmkit"), Some(65534), None).unwrap();
            assert!(why(temp.path()).contains("vmkit belongs to user 65534, and this is user 0"));
        }
    }

    #[test]
    fn an_unusable_home_is_reported_with_the_variable_that_names_it() {
        let long = format!("/{}", "h".repeat(100));
        for (variables, said) in [
            (vec![("VMKIT_HOME", long.as_str())], "VMKIT_HOME: \"/hhh"),
            (vec![("HOME", long.as_str())], "HOME: \"/hhh"),
            (vec![("HOME", "/user"), ("XDG_DATA_HOME", long.as_str())], "XDG_DATA_HOME: \"/hhh"),
            (vec![("HOME", "user")], "HOME: \"user\": the path must be absolute"),
            (vec![("HOME", "/dev/null")], "HOME: \"/dev/null\": this is not a directory"),
            (vec![("VMKIT_HOME", "/dev/null/x")], "VMKIT_HOME: \"/dev/null/x\": this is not a directory"),
            (vec![("HOME", "/user"), ("XDG_CACHE_HOME", "/dev/null")], "XDG_CACHE_HOME: \"/dev/null\": "),
        ] {
            let error = found(None, &variables).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }

    #[test]
    fn an_environment_without_a_home_is_refused_with_what_to_set() {
        let error = found(None, &[]).unwrap_err().to_string();
        assert!(error.starts_with("HOME: ") && error.contains("--home"), "{error}");
    }
}
