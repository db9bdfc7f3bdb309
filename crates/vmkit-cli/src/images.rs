//! The store of images as this user has it: with an own catalogue, mirrors, logins at registries
//! and a proxy, each found where the environment says. The library never reads the environment.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::watch;
use vmkit::Error;
use vmkit::image::{Catalogue, ImageRef, ImageStore, Proxies, PullProgress, watch_progress};
use vmkit::spec::Arch;
use vmkit::store::Home;

use crate::places::named_by;

/// Returns the store of the images in a home.
///
/// # Errors
/// `Record` for an own catalogue that can't be used; `InvalidInput` for a mirror or a proxy that is
/// no address.
pub(crate) fn store(home: &Home) -> Result<ImageStore, Error> {
    let mut catalogue = Catalogue::built_in();
    if let Some(file) = config_file(var)
        && let Some(text) = read(&file)?
    {
        catalogue = catalogue.extended(&text, &file)?;
    }
    if let Some(mirrors) = text("VMKIT_MIRROR", var)? {
        catalogue = catalogue.with_mirrors(&mirrors).map_err(|error| named_by("VMKIT_MIRROR", error))?;
    }
    let mut store = ImageStore::new(home, catalogue).with_login_files(login_files(var));
    if let Some(path) = var("PATH") {
        store = store.with_credential_helpers(&path);
    }
    Ok(store.with_proxies(proxies(var)?))
}

/// Returns the proxies of the environment, as curl reads them: `http_proxy` in lower case only, for
/// a web server sets HTTP_PROXY to what a request says.
///
/// Source: "Environment variables" in curl(1).
fn proxies(var: impl Fn(&str) -> Option<OsString>) -> Result<Proxies, Error> {
    let first = |names: &[&'static str]| -> Result<Option<(&'static str, String)>, Error> {
        let Some(name) = names.iter().find(|name| var(name).is_some()) else { return Ok(None) };
        Ok(text(name, &var)?.map(|value| (*name, value)))
    };
    let mut proxies = Proxies::default();
    if let Some((variable, url)) = first(&["http_proxy", "all_proxy", "ALL_PROXY"])? {
        proxies = proxies.with_http(variable, &url)?;
    }
    if let Some((variable, url)) = first(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])? {
        proxies = proxies.with_https(variable, &url)?;
    }
    Ok(match first(&["no_proxy", "NO_PROXY"])? {
        Some((_, except)) => proxies.with_exceptions(&except),
        None => proxies,
    })
}

/// Returns the architecture of this host.
pub(crate) fn host_arch() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 }
}

/// Reads the name of an architecture.
pub(crate) fn arch(text: &str) -> Result<Arch, Error> {
    match text {
        "x86_64" | "amd64" => Ok(Arch::X86_64),
        "aarch64" | "arm64" => Ok(Arch::Aarch64),
        _ => Err(Error::invalid("arch", text, "write x86_64 or aarch64")),
    }
}

/// Reads an image as it was typed; a relative path is seen from here.
pub(crate) fn image(text: &str) -> Result<ImageRef, Error> {
    from_here(text.parse()?)
}

/// Returns the image with a relative path seen from here.
pub(crate) fn from_here(image: ImageRef) -> Result<ImageRef, Error> {
    let here = env::current_dir().map_err(Error::io("find", "the current directory"))?;
    Ok(image.seen_from(&here))
}

/// The receiver of an image's progress.
pub(crate) type ProgressSender = watch::Sender<PullProgress>;

/// Does what sends progress, and shows it to a person meanwhile.
pub(crate) async fn watched<T>(
    what: &str,
    work: impl AsyncFnOnce(&ProgressSender) -> Result<T, Error>,
) -> Result<T, Error> {
    let (sender, receiver) = watch::channel(PullProgress::default());
    let mut bar = crate::progress::ImageProgressBar::new(what);
    bar.show(PullProgress::default());
    watch_progress(work(&sender), receiver, &mut |now| bar.show(now)).await
}

fn var(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// Returns the text of a variable.
///
/// # Errors
/// `InvalidInput` on the variable for what is not UTF-8; it may have a password, so it is not
/// repeated.
fn text(name: &'static str, var: impl Fn(&str) -> Option<OsString>) -> Result<Option<String>, Error> {
    let value = var(name).map(OsString::into_string).transpose();
    value.map_err(|_| Error::invalid(name, "…", "the value is not UTF-8 (expected UTF-8)"))
}

/// Returns the user's own catalogue: `$XDG_CONFIG_HOME/vmkit/images.toml`.
fn config_file(var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // A relative path in this variable is to be ignored. Source: the XDG Base Directory
    // Specification.
    let named = var("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let config = named.or_else(|| var("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(config.join("vmkit/images.toml"))
}

/// Returns where logins at registries may be, the first that is there counts.
///
/// Source: containers-auth.json(5), and Docker's documentation of `DOCKER_CONFIG`.
fn login_files(var: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let below = |name: &str, file: &str| var(name).map(|dir| Path::new(&dir).join(file));
    let files = [
        var("REGISTRY_AUTH_FILE").map(PathBuf::from),
        below("DOCKER_CONFIG", "config.json"),
        below("XDG_RUNTIME_DIR", "containers/auth.json"),
        below("HOME", ".docker/config.json"),
    ];
    files.into_iter().flatten().collect()
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn the_own_catalogue_is_found_by_the_xdg_directories() {
        let found = |variables: &'static [(&str, &str)]| {
            config_file(|name| {
                variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into())
            })
        };
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(found(&[("XDG_CONFIG_HOME", "/c"), ("HOME", "/u")]), path("/c/vmkit/images.toml"));
        assert_eq!(found(&[("XDG_CONFIG_HOME", "c"), ("HOME", "/u")]), path("/u/.config/vmkit/images.toml"));
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn a_proxy_that_can_not_be_read_is_refused_by_the_variable_that_names_it() {
        let of = |set: &'static str| {
            proxies(|name| (name == set).then(|| "gopher://proxy".into())).map_err(|error| error.to_string())
        };
        for name in ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            let error = of(name).unwrap_err();
            assert!(error.starts_with(&format!("{name}: \"gopher://…\": ")), "{error}");
        }
        of("HTTP_PROXY").unwrap();
    }

    #[test]
    fn a_variable_that_is_not_utf_8_is_refused_by_its_name() {
        for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
            let value = OsStr::from_bytes(b"http://me:pw@a\xff");
            let error = proxies(|other| (other == name).then(|| value.to_owned())).unwrap_err().to_string();
            assert_eq!(error, format!("{name}: \"…\": the value is not UTF-8 (expected UTF-8)"));
        }
    }

    #[test]
    fn both_names_of_an_architecture_are_read() {
        assert_eq!(arch("arm64").unwrap(), arch("aarch64").unwrap());
        assert!(arch("mips").unwrap_err().to_string().contains("x86_64 or aarch64"));
    }
}
