//! The configuration of cloud-init in the guest.
//!
//! Pure. `crate::cloud_init` renders it and stores it.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::spec::UserName;
use crate::spec::beginning::{begins_with, is_mime};
#[cfg(feature = "cloud-init")]
use crate::spec::claims::{ClaimedHostKey, UserDataClaims, first_free};
use crate::spec::name::{LOGIN_USER, shortened};
use crate::spec::yaml::{self, TopLevel, YamlMistake};

/// The seed that cloud-init reads at its first boot (NoCloud).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CloudInitConfig {
    /// The guest's host name; by default the VM's name.
    pub hostname: Option<String>,
    /// The configuration of the system.
    pub user_data: UserData,
    /// A network-config (version 1 or 2) in cloud-init's format; by default DHCP on the first
    /// device.
    pub network_config: Option<String>,
    /// A counter that makes cloud-init run again: it is part of the instance-id.
    pub run: u32,
    /// vmkit's own login to the guest; given to cloud-init beside the user-data, typed or raw.
    pub access: Option<GuestAccess>,
    /// Public keys that no user of the guest accepts any more, as in `authorized_keys`: those of
    /// the VM that this one is a copy of. They are removed at each boot; at the first one, the
    /// guest gets a machine ID of its own, too.
    pub revoked_keys: Vec<String>,
}

/// vmkit's own login to a guest over SSH, with the keys of both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestAccess {
    /// The user that cloud-init creates for it, with sudo. It may be one of the typed users, who
    /// keeps the other keys.
    pub user: String,
    /// The key for the login.
    pub login_key: SshKeyPair,
    /// The Ed25519 host key of the guest's SSH server: set beforehand, so that it need not be
    /// trusted on first use.
    pub host_key: SshKeyPair,
}

/// The user-data, typed or raw.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserData {
    /// Fields that vmkit writes as cloud-config.
    Typed(CloudConfig),
    /// Text that is passed on unchanged: cloud-config, a script, or MIME parts.
    Raw(String),
}

impl fmt::Debug for UserData {
    /// Shows only the length of a raw text, which may have a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UserData::Typed(typed) => f.debug_tuple("Typed").field(typed).finish(),
            UserData::Raw(text) => write!(f, "Raw({} bytes)", text.len()),
        }
    }
}

impl Default for UserData {
    fn default() -> Self {
        UserData::Typed(CloudConfig::default())
    }
}

/// The typed part of cloud-config.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CloudConfig {
    /// Users to create. The image's own default user stays.
    pub users: Vec<GuestUser>,
    /// Packages to install.
    pub packages: Vec<String>,
    /// Files to write, in order.
    pub files: Vec<GuestFile>,
    /// Commands to run once at the first boot, in order; each is a program and its arguments,
    /// without a shell.
    pub commands: Vec<Vec<String>>,
    /// An Ed25519 host key for the guest's SSH server, so that cloud-init generates none and its
    /// identity is known beforehand.
    pub ssh_host_key: Option<SshKeyPair>,
}

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestUser {
    /// The login name.
    pub name: String,
    /// Public keys for the login, one `ssh-…` line each.
    pub ssh_keys: Vec<String>,
    /// Whether the user may become root without a password.
    pub sudo: bool,
    /// The login shell; by default the guest's default for a new user.
    pub shell: Option<String>,
}

/// A file of the guest.
#[derive(Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// The absolute path in the guest.
    pub path: PathBuf,
    /// The content.
    pub content: String,
    /// The permission bits, such as `0o644`.
    pub mode: u32,
    /// `USER` or `USER:GROUP`; by default root. A file of another user is written last, after the
    /// users are created.
    pub owner: Option<String>,
}

impl fmt::Debug for GuestFile {
    /// Shows only the length of the content, which may be a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFile")
            .field("path", &self.path)
            .field("content_bytes", &self.content.len())
            .field("mode", &self.mode)
            .field("owner", &self.owner)
            .finish()
    }
}

/// A pair of Ed25519 keys in OpenSSH's format.
#[derive(Clone, PartialEq, Eq)]
pub struct SshKeyPair {
    /// The private key in OpenSSH's format.
    pub private: String,
    /// The public key, one `ssh-ed25519 …` line.
    pub public: String,
}

impl fmt::Debug for SshKeyPair {
    /// Shows the public half only: a private key must not be logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshKeyPair").field("public", &self.public).finish_non_exhaustive()
    }
}

impl CloudInitConfig {
    /// The largest size of the user-data, or the network-config, in bytes: 1 MiB.
    ///
    /// An ISO could hold more; every backend supports this size.
    pub const MAX_BYTES: usize = 1 << 20;

    /// Checks every field, as [`VmSpecBuilder::build`](crate::spec::VmSpecBuilder::build) does.
    ///
    /// cloud-init itself skips invalid values and reports them only in a log inside the guest.
    ///
    /// # Errors
    /// `InvalidInput` on the very field, such as `cloud_init.users[0].name`; on `user_data` for raw
    /// text that is longer than [`MAX_BYTES`](Self::MAX_BYTES) or of no type that cloud-init
    /// supports; with line and column on `user_data` with `#cloud-config`, and on `network_config`,
    /// that is no YAML mapping.
    pub fn check(&self) -> Result<()> {
        self.check_fields()?;
        self.check_documents()
    }

    /// Checks every field, but not the contents of raw documents.
    pub(super) fn check_fields(&self) -> Result<()> {
        if let Some(hostname) = &self.hostname {
            check_hostname(hostname)?;
        }
        if let Some(network) = &self.network_config {
            Self::check_bytes("network_config", network.len())?;
        }
        match &self.user_data {
            UserData::Typed(typed) => typed.check()?,
            UserData::Raw(text) => check_raw(text)?,
        }
        self.access.as_ref().map_or(Ok(()), |access| access.check(&self.user_data))
    }

    /// Checks the contents of raw documents, as far as cloud-init parses YAML there.
    pub(super) fn check_documents(&self) -> Result<()> {
        if let UserData::Raw(text) = &self.user_data {
            check_user_data(text).map_err(|mistake| in_user_data(text, &mistake))?;
            self.access.as_ref().map_or(Ok(()), |access| access.check_beside(text))?;
        }
        let network = self.network_config.as_deref();
        network.map_or(Ok(()), |text| {
            check_network_config(text).map_err(|mistake| in_document("network_config", text, &mistake))
        })
    }

    pub(crate) fn check_bytes(field: &'static str, bytes: usize) -> Result<()> {
        if bytes <= Self::MAX_BYTES {
            return Ok(());
        }
        let bound = format!("it may have at most {} bytes", Self::MAX_BYTES);
        Err(Error::invalid(field, format!("{bytes} bytes"), bound))
    }
}

fn in_user_data(text: &str, mistake: &YamlMistake) -> Error {
    in_document("user_data", text, mistake)
}

/// Returns the error for a mistake in a raw document, with its line.
fn in_document(field: &'static str, text: &str, mistake: &YamlMistake) -> Error {
    let line = text.lines().nth(mistake.line - 1).unwrap_or_default();
    Error::invalid(field, shortened(line), mistake.with_place())
}

/// Returns the reason why vmkit's login can't be merged with raw user-data.
#[cfg(all(feature = "vmfile", feature = "cloud-init"))]
pub(crate) fn check_joinable(text: &str) -> Result<(), YamlMistake> {
    UserDataClaims::of(text).map(drop)
}

/// Returns no reason: without cloud-init vmkit has no login.
#[cfg(all(feature = "vmfile", not(feature = "cloud-init")))]
pub(crate) fn check_joinable(_text: &str) -> Result<(), YamlMistake> {
    Ok(())
}

/// Returns the user that vmkit may log in as beside this user-data: the image's own user, or one
/// whose name is free.
///
/// # Errors
/// `InvalidInput` on `user_data` for raw text that no login can be merged with.
#[cfg(feature = "cloud-init")]
#[cfg_attr(not(any(feature = "ssh", test)), expect(dead_code, reason = "without SSH there is no login"))]
pub(crate) fn free_login(
    user_data: &UserData,
    own: Option<&str>,
) -> Result<(String, Option<ClaimedHostKey>)> {
    match user_data {
        UserData::Raw(text) => {
            let claims = UserDataClaims::of(text).map_err(|mistake| in_user_data(text, &mistake))?;
            Ok((claims.login_name(own), claims.host_key))
        }
        UserData::Typed(typed) => {
            let is_free = |name: &str| typed.users.iter().all(|user| user.name != name);
            Ok((first_free(own, is_free), None))
        }
    }
}

/// The possible starts of raw user-data, in any case and after any space.
///
/// Source: `INCLUSION_TYPES_MAP` in cloud-init's `handlers/__init__.py`; the longer names there
/// start with these.
const RAW_BEGINNINGS: &[&str] =
    &["#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template: jinja"];

/// Returns the mistake that keeps cloud-init from parsing raw user-data as YAML. Other formats,
/// such as templates and MIME parts, are not checked.
pub(crate) fn check_user_data(text: &str) -> Result<(), YamlMistake> {
    match text {
        text if is_mime(text) || begins_with(text, "#cloud-config-jsonp") => Ok(()),
        text if begins_with(text, "#cloud-config-archive") => yaml::check(text, TopLevel::List),
        text if begins_with(text, "#cloud-config") => {
            yaml::check(text, TopLevel::Mapping { or_nothing: true })
        }
        _ => Ok(()),
    }
}

/// Returns the mistake that keeps cloud-init from parsing a network-config.
pub(crate) fn check_network_config(text: &str) -> Result<(), YamlMistake> {
    yaml::check(text, TopLevel::Mapping { or_nothing: false })
}

fn check_raw(text: &str) -> Result<()> {
    CloudInitConfig::check_bytes("user_data", text.len())?;
    if is_mime(text) || RAW_BEGINNINGS.iter().any(|beginning| begins_with(text, beginning)) {
        return Ok(());
    }
    let line: String = text.trim_start().lines().next().unwrap_or_default().chars().take(40).collect();
    Err(Error::invalid(
        "user_data",
        line,
        format!(
            "start it with one of `{}`, or use MIME parts with `MIME-Version:`",
            RAW_BEGINNINGS.join("`, `")
        ),
    ))
}

fn check_hostname(hostname: &str) -> Result<()> {
    let clean = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let sound = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(clean)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if hostname.len() <= 253 && hostname.split('.').all(sound) {
        return Ok(());
    }
    Err(Error::invalid(
        "cloud_init.hostname",
        shortened(hostname),
        "a host name has up to 253 bytes in labels of 1 to 63 letters, digits and dashes, joined by dots; no label \
         begins or ends with a dash",
    ))
}

impl CloudConfig {
    fn check(&self) -> Result<()> {
        for (index, user) in self.users.iter().enumerate() {
            let at = ConfigPath(format!("cloud_init.users[{index}]"));
            user.check(&at)?;
            if self.users[..index].iter().any(|other| other.name == user.name) {
                return Err(at.refused("name", &user.name, "the same user is named twice"));
            }
        }
        for (index, package) in self.packages.iter().enumerate() {
            let clean = package.chars().all(|c| c.is_ascii_graphic());
            if !clean || package.is_empty() || package.starts_with('-') {
                let field = format!("cloud_init.packages[{index}]");
                let expected = "a package is one word and does not begin with a dash";
                return Err(Error::invalid(field, shortened(package), expected));
            }
        }
        for (index, file) in self.files.iter().enumerate() {
            file.check(&ConfigPath(format!("cloud_init.files[{index}]")))?;
        }
        for (index, command) in self.commands.iter().enumerate() {
            let field = format!("cloud_init.commands[{index}]");
            if command.first().is_none_or(String::is_empty) {
                return Err(Error::invalid(field, "", "a command names its program first"));
            }
            if let Some(bad) = command.iter().find(|argument| argument.contains('\0')) {
                return Err(Error::invalid(field, shortened(bad), "an argument has no zero byte"));
            }
        }
        self.ssh_host_key
            .as_ref()
            .map_or(Ok(()), |key| key.check(&ConfigPath("cloud_init.ssh_host_key".to_owned())))
    }
}

impl GuestAccess {
    /// The user that vmkit logs in as, unless the image has one of its own.
    pub const USER: &str = LOGIN_USER;

    fn check(&self, beside: &UserData) -> Result<()> {
        let at = ConfigPath("cloud_init.access".to_owned());
        let user = GuestUser { name: self.user.clone(), ssh_keys: Vec::new(), sudo: true, shell: None };
        user.check(&at)?;
        self.login_key.check(&ConfigPath("cloud_init.access.login_key".to_owned()))?;
        self.host_key.check(&ConfigPath("cloud_init.access.host_key".to_owned()))?;
        let UserData::Typed(typed) = beside else { return Ok(()) };
        match &typed.ssh_host_key {
            Some(key) if *key != self.host_key => {
                Err(at.refused("host_key", "(not shown)", "another host key is given in `ssh_host_key`"))
            }
            _ => Ok(()),
        }
    }

    /// Checks that cloud-init can merge the login with raw user-data.
    #[cfg(feature = "cloud-init")]
    fn check_beside(&self, text: &str) -> Result<()> {
        let claims = UserDataClaims::of(text).map_err(|mistake| in_user_data(text, &mistake))?;
        if let Some(line) = claims.line_of(&self.user) {
            let expected = format!(
                "line {line} of the user-data creates a user or a group of this name, and cloud-init would \
                 not give the user vmkit's key: choose another name for vmkit's own login"
            );
            return Err(ConfigPath("cloud_init.access".to_owned()).refused("user", &self.user, &expected));
        }
        match &claims.host_key {
            Some(key) if key.private.trim_end() != self.host_key.private.trim_end() => {
                let expected = format!("line {} of the user-data has another host key", key.line);
                Err(ConfigPath("cloud_init.access".to_owned()).refused("host_key", "(not shown)", &expected))
            }
            _ => Ok(()),
        }
    }

    #[cfg(not(feature = "cloud-init"))]
    fn check_beside(&self, _text: &str) -> Result<()> {
        Ok(())
    }
}

/// The path of a value in the config, to name its fields.
struct ConfigPath(String);

impl ConfigPath {
    fn refused(&self, field: &str, value: &str, expected: &str) -> Error {
        Error::invalid(format!("{}.{field}", self.0), shortened(value), expected)
    }
}

impl GuestUser {
    fn check(&self, at: &ConfigPath) -> Result<()> {
        if UserName::new(&self.name).is_err() {
            let expected = "a user has a name of 1 to 32 of a-z, 0-9, _ and -, and begins with a letter or _";
            return Err(at.refused("name", &self.name, expected));
        }
        if self.name == "default" {
            let expected = "cloud-init uses this name for the image's own user: choose another name";
            return Err(at.refused("name", &self.name, expected));
        }
        for (index, key) in self.ssh_keys.iter().enumerate() {
            check_public_key(at, &format!("ssh_keys[{index}]"), key)?;
        }
        match &self.shell {
            Some(shell) if !is_guest_path(shell) => {
                Err(at.refused("shell", shell, "a shell is an absolute path in the guest, such as /bin/bash"))
            }
            _ => Ok(()),
        }
    }
}

impl GuestFile {
    fn check(&self, at: &ConfigPath) -> Result<()> {
        let shown = self.path.to_string_lossy();
        if !self.path.to_str().is_some_and(is_guest_path) || shown.ends_with('/') {
            let expected =
                "a file has an absolute path in the guest, in UTF-8 and without control characters";
            return Err(at.refused("path", &shown, expected));
        }
        if self.mode > 0o7777 {
            let expected = "permission bits are 0 to 0o7777";
            return Err(at.refused("mode", &format!("{:#o}", self.mode), expected));
        }
        let name = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        match &self.owner {
            Some(owner) if owner.split(':').count() > 2 || !owner.split(':').all(name) => {
                Err(at.refused("owner", owner, "an owner is USER or USER:GROUP"))
            }
            _ => Ok(()),
        }
    }
}

impl SshKeyPair {
    fn check(&self, at: &ConfigPath) -> Result<()> {
        const PRIVATE_HEAD: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\n";
        const PRIVATE_TAIL: &str = "-----END OPENSSH PRIVATE KEY-----";
        if !self.public.starts_with("ssh-ed25519 ") {
            return Err(at.refused("public", &self.public, "the public key is one line `ssh-ed25519 KEY`"));
        }
        check_public_key(at, "public", &self.public)?;
        if self.private.starts_with(PRIVATE_HEAD) && self.private.trim_end().ends_with(PRIVATE_TAIL) {
            return Ok(());
        }
        Err(at.refused(
            "private",
            "(not shown)",
            "the private key is the whole file that `ssh-keygen` writes",
        ))
    }
}

/// Returns whether the guest accepts this as the path of a file.
fn is_guest_path(path: &str) -> bool {
    path.starts_with('/') && path.len() < 4096 && !path.chars().any(char::is_control)
}

/// The types of public keys that OpenSSH accepts in `authorized_keys`.
///
/// Source: sshd(8), AUTHORIZED_KEYS FILE FORMAT.
const KEY_TYPES: &[&str] = &[
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

fn check_public_key(at: &ConfigPath, field: &str, key: &str) -> Result<()> {
    // Only the start of it: a user may have given the private key by mistake.
    let shown: String = key.chars().take(30).collect();
    if key.contains("PRIVATE KEY") {
        return Err(at.refused(field, &shown, "this is a private key: give the public one"));
    }
    let lines = key.trim_end().lines().count();
    if lines > 1 {
        return Err(at.refused(field, &shown, &format!("a public key is one line, and this is {lines}")));
    }
    if let Some(control) = key.trim_end().chars().find(|c| c.is_control()) {
        let expected = format!(
            "a public key has no control characters, and this has {control:?}: write a space between its parts"
        );
        return Err(at.refused(field, &shown, &expected));
    }
    let mut words = key.split_ascii_whitespace();
    if !words.next().is_some_and(|word| KEY_TYPES.contains(&word)) {
        let expected = format!("a public key begins with one of `{}`", KEY_TYPES.join("`, `"));
        return Err(at.refused(field, &shown, &expected));
    }
    let base64 = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    // Every key starts with the length of its type's name, three bytes of which are zero.
    if words.next().is_some_and(|word| word.starts_with("AAAA") && word.chars().all(base64)) {
        return Ok(());
    }
    Err(at.refused(field, &shown, "after its type a public key has its value, which begins with `AAAA`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@host";

    fn sound() -> CloudConfig {
        let user = GuestUser {
            name: "ada".into(),
            ssh_keys: vec![KEY.into()],
            sudo: true,
            shell: Some("/bin/sh".into()),
        };
        let file = GuestFile {
            path: "/etc/motd".into(),
            content: "hello".into(),
            mode: 0o644,
            owner: Some("ada:ada".into()),
        };
        CloudConfig {
            users: vec![user],
            packages: vec!["nginx=1.2".into()],
            files: vec![file],
            commands: vec![vec!["touch".into(), "/a b".into(), String::new()]],
            ssh_host_key: Some(SshKeyPair {
                private: "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n-----END OPENSSH PRIVATE KEY-----\n".into(),
                public: KEY.into(),
            }),
        }
    }

    fn typed(typed: CloudConfig) -> CloudInitConfig {
        CloudInitConfig { user_data: UserData::Typed(typed), ..CloudInitConfig::default() }
    }

    #[test]
    fn a_sound_config_passes() {
        typed(sound()).check().unwrap();
        CloudInitConfig::default().check().unwrap();
    }

    #[test]
    fn every_field_is_refused_by_its_own_name() {
        type Spoil = fn(&mut CloudConfig);
        let cases: &[(&str, Spoil)] = &[
            ("cloud_init.users[0].name: \"Ada\"", |c| c.users[0].name = "Ada".into()),
            ("cloud_init.users[0].name: \"\"", |c| c.users[0].name.clear()),
            ("cloud_init.users[0].name: \"a\\nb\"", |c| c.users[0].name = "a\nb".into()),
            ("cloud_init.users[0].name: \"default\"", |c| c.users[0].name = "default".into()),
            ("cloud_init.users[1].name: \"ada\": the same", |c| c.users.push(c.users[0].clone())),
            ("cloud_init.users[0].shell: \"sh\"", |c| c.users[0].shell = Some("sh".into())),
            ("cloud_init.users[0].ssh_keys[1]: \"\"", |c| c.users[0].ssh_keys.push(String::new())),
            ("cloud_init.users[0].ssh_keys[0]", |c| c.users[0].ssh_keys[0] += "\nssh-rsa AAAA"),
            ("cloud_init.users[0].ssh_keys[0]", |c| c.users[0].ssh_keys[0] = "ssh-rsa".into()),
            ("cloud_init.users[0].ssh_keys[0]", |c| c.users[0].ssh_keys[0] = "ssh-x AAAA".into()),
            ("cloud_init.packages[0]: \"-y\"", |c| c.packages[0] = "-y".into()),
            ("cloud_init.packages[0]: \"\"", |c| c.packages[0].clear()),
            ("cloud_init.packages[0]: \"a b\"", |c| c.packages[0] = "a b".into()),
            ("cloud_init.files[0].path: \"motd\"", |c| c.files[0].path = "motd".into()),
            ("cloud_init.files[0].path: \"/etc/\"", |c| c.files[0].path = "/etc/".into()),
            ("cloud_init.files[0].mode: \"0o10000\"", |c| c.files[0].mode = 0o10000),
            ("cloud_init.files[0].owner: \"a:b:c\"", |c| c.files[0].owner = Some("a:b:c".into())),
            ("cloud_init.files[0].owner: \":b\"", |c| c.files[0].owner = Some(":b".into())),
            ("cloud_init.commands[0]: \"\"", |c| c.commands[0].clear()),
            ("cloud_init.commands[0]", |c| c.commands[0][1] = "a\0b".into()),
        ];
        for (expected, spoil) in cases {
            let mut config = sound();
            spoil(&mut config);
            let error = typed(config).check().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn no_private_key_is_shown_in_an_error() {
        let mut config = sound();
        config.users[0].ssh_keys[0] = config.ssh_host_key.clone().unwrap().private + "SECRET";
        let error = typed(config.clone()).check().unwrap_err().to_string();
        assert!(error.contains("this is a private key") && !error.contains("SECRET"), "{error}");
        config.users.clear();
        config.ssh_host_key.as_mut().unwrap().private = "SECRET".into();
        let error = typed(config).check().unwrap_err().to_string();
        assert!(error.starts_with("cloud_init.ssh_host_key.private") && !error.contains("SECRET"), "{error}");
    }

    #[test]
    fn a_key_is_treated_as_private_only_if_its_header_says_so() {
        for (key, expected) in [
            (KEY.replace(' ', "\t"), "no control characters, and this has '\\t': write a space"),
            (format!("{KEY}\u{7}"), "no control characters, and this has '\\u{7}'"),
            (format!("{KEY}\n{KEY}\n"), "a public key is one line, and this is 2"),
        ] {
            let mut config = sound();
            config.users[0].ssh_keys[0] = key;
            let error = typed(config).check().unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("private"), "{error}");
        }
    }

    #[test]
    fn host_names_are_those_of_rfc_1123() {
        let check = |hostname: &str| {
            CloudInitConfig { hostname: Some(hostname.into()), ..CloudInitConfig::default() }.check()
        };
        for good in ["web", "Web-1.example.com", "1", &"a".repeat(63)] {
            check(good).unwrap();
        }
        let long = ["a"; 128].join(".");
        for bad in ["", "-a", "a-", "a..b", "a.", "a_b", "ü", "a b", &"a".repeat(64), &long] {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.starts_with("cloud_init.hostname: "), "{error}");
        }
    }

    #[test]
    #[cfg(feature = "cloud-init")]
    fn a_document_that_cloud_init_would_pass_over_is_refused_with_its_place() {
        let raw = |user_data: &str, network: Option<&str>| CloudInitConfig {
            user_data: UserData::Raw(user_data.into()),
            network_config: network.map(Into::into),
            ..CloudInitConfig::default()
        };
        let bad = "#cloud-config\n{[\"\n";
        let error = raw(bad, None).check().unwrap_err().to_string();
        assert!(error.starts_with("user_data: \"{[\\\"\": line 2, column 3: this is not YAML: "), "{error}");
        let error = raw("#!/bin/sh\n", Some("version: 2\n x: 1\n")).check().unwrap_err().to_string();
        assert!(error.starts_with("network_config: \" x: 1\": line 2, column "), "{error}");
        assert!(raw("#Cloud-Config-Archive\na: 1\n", None).check().is_err());
        // Other formats than cloud-config, or templates of it.
        for good in [
            "#!/bin/sh\n{[\n",
            "## template: jinja\n#cloud-config\na: {{ b }}\n{% if c %}\n",
            "#cloud-config-jsonp\n[{\"op\": \"add\"}]\n",
            "#cloud-config-archive\n- a\n",
            "#cloud-config\n# Mime-Version: 1.0\n{[\n",
        ] {
            raw(good, Some("network: {version: 2}\n")).check().unwrap();
        }
    }

    #[test]
    fn raw_user_data_has_to_begin_as_cloud_init_expects() {
        let check = |text: String| {
            CloudInitConfig { user_data: UserData::Raw(text), ..CloudInitConfig::default() }.check()
        };
        for good in [
            "#cloud-config\n{}",
            "\n #Cloud-Config",
            "#!/bin/sh",
            "#include http://a",
            "## template: jinja\n#cloud-config",
            "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n",
        ] {
            check(good.into()).unwrap();
        }
        for bad in ["", "users: []", "\u{feff}#cloud-config", "# cloud-config", "Content-Type: text/plain"] {
            let error = check(bad.into()).unwrap_err().to_string();
            assert!(error.starts_with("user_data: ") && error.contains("`#cloud-config`"), "{error}");
        }
        let error = check("#!".to_owned() + &"x".repeat(1 << 20)).unwrap_err().to_string();
        assert_eq!(error, "user_data: \"1048578 bytes\": it may have at most 1048576 bytes");
    }
}
