//! Where this user's VMs are kept, from the arguments and the environment. The library never reads the environment.

use std::borrow::Cow;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use vmkit::Error;
use vmkit::image::ImageRef;
use vmkit::store::Home;

/// Answers the home: `--home`, else `VMKIT_HOME`, else the XDG directories.
///
/// # Errors
/// `InvalidInput` for a place that the library can't use; `Host` where the environment names none.
pub(crate) fn home(named: Option<PathBuf>) -> Result<Home, Error> {
    find(named, |name| env::var_os(name))
}

fn find(named: Option<PathBuf>, environment: impl Fn(&str) -> Option<OsString>) -> Result<Home, Error> {
    let set = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(root) = named.or_else(|| set("VMKIT_HOME")) {
        return Home::at(absolute("home", &root)?);
    }
    // A relative path in these variables is to be ignored. Source: the XDG Base Directory Specification.
    let xdg = |name: &str| set(name).filter(|path| path.is_absolute());
    let below_user = |below: &str| match set("HOME") {
        Some(user) => Ok(user.join(below)),
        None => Err(Error::Host {
            needed: "HOME".to_owned(),
            problem: "it is not set, and says where VMs are kept: set it, or VMKIT_HOME, or give --home"
                .to_owned(),
        }),
    };
    let data = xdg("XDG_DATA_HOME").map_or_else(|| below_user(".local/share"), Ok)?.join("vmkit");
    let cache = xdg("XDG_CACHE_HOME").map_or_else(|| below_user(".cache"), Ok)?.join("vmkit");
    let runtime = xdg("XDG_RUNTIME_DIR").map_or_else(|| data.join("run"), |path| path.join("vmkit"));
    Home::split(data, runtime, cache)
}

/// Answers the path seen from the root: a VM outlives the directory that its command was typed in.
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

/// Answers the path that a file's address has, `file:///PATH`; any other path is itself.
pub(crate) fn local<'a>(field: &'static str, path: &'a Path) -> Result<Cow<'a, Path>, Error> {
    let text = path.to_str().unwrap_or_default();
    if !text.get(..6).is_some_and(|begin| begin.eq_ignore_ascii_case("file:/")) {
        return Ok(Cow::Borrowed(path));
    }
    match text.parse() {
        Ok(ImageRef::Path(path)) => Ok(Cow::Owned(path)),
        Err(Error::Invalid { value, expected, .. }) => Err(Error::invalid(field, value, expected)),
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
        find(named.map(PathBuf::from), |name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into())
        })
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
    fn an_environment_without_a_home_is_refused_with_what_to_set() {
        let error = found(None, &[]).unwrap_err().to_string();
        assert!(error.starts_with("HOME: ") && error.contains("--home"), "{error}");
    }
}
