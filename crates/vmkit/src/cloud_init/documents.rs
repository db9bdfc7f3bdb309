//! The three documents of the seed.
//!
//! Pure. They are serialized as YAML and never joined from text, so no input can become syntax.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use uuid::Uuid;

use crate::cloud_init::{Seed, mime};
use crate::error::{Error, Result};
use crate::network::MacAddr;
use crate::spec::claims::{UserDataClaims, UsersForm};
use crate::spec::{
    CloudConfig, CloudInitConfig, GuestAccess, GuestFile, GuestUser, SshKeyPair, UserData, VmName,
};

/// Removes the lines with its arguments from the `authorized_keys` of all users. The files stay,
/// with their owners and modes.
pub(super) const REVOKE: &str = r#"for key do
  cut -d: -f6 /etc/passwd | sort -u | while read -r home; do
    file=$home/.ssh/authorized_keys
    if [ -f "$file" ] && grep -qF -e "$key" "$file"; then
      kept=$(grep -vF -e "$key" "$file")
      printf '%s\n' "$kept" >"$file"
    fi
  done
done
"#;

/// Gives the guest another machine ID, where it has one. Source: machine-id(5).
const MACHINE_ID: &str = "id=$(tr -d - </proc/sys/kernel/random/uuid)
for file in /etc/machine-id /var/lib/dbus/machine-id; do
  if [ -s $file ] && [ ! -L $file ]; then
    echo $id >$file
  fi
done
";

/// Renders the seed of the VM `name` with this identity, and with this network device if it has
/// one.
///
/// The same input gives the same text. cloud-init runs once for each instance-id, which is `id` and
/// the config's [`run`](CloudInitConfig::run). The default network-config is DHCP over IPv4 on the
/// device with `mac`: a guest configured for DHCPv6 waits a minute for a server that does not
/// exist.
///
/// # Errors
/// `InvalidInput` as [`CloudInitConfig::check`], and on `user_data` if the rendered form is too
/// long.
pub fn render(config: &CloudInitConfig, name: &VmName, id: Uuid, mac: Option<MacAddr>) -> Result<Seed> {
    config.check()?;
    let bootcmd = revocation(&config.revoked_keys);
    let user_data = match (&config.user_data, &config.access) {
        (UserData::Raw(text), None) => text.clone(),
        (UserData::Raw(text), Some(access)) => beside(text, access, bootcmd)?,
        (UserData::Typed(typed), access) => {
            cloud_config(&CloudConfigDocument { bootcmd, ..CloudConfigDocument::of(typed, access.as_ref()) })?
        }
    };
    CloudInitConfig::check_bytes("user_data", user_data.len())?;
    let meta_data = MetaData {
        instance_id: format!("{id}-{}", config.run),
        local_hostname: config.hostname.as_deref().unwrap_or(name.as_str()),
    };
    let network_config = match &config.network_config {
        Some(text) => text.clone(),
        None => yaml("network_config", &NetworkDocument::dhcp(mac))?,
    };
    Ok(Seed { user_data, meta_data: yaml("meta_data", &meta_data)?, network_config })
}

/// Joins raw user-data with vmkit's own part, in the format of the user-data.
fn beside(text: &str, access: &GuestAccess, bootcmd: Vec<Vec<&str>>) -> Result<String> {
    let claims =
        UserDataClaims::of(text).map_err(|mistake| Error::invalid("user_data", "", mistake.with_place()))?;
    let mut ours = Vec::new();
    let prelude = ConfigPrelude::of(&claims);
    if prelude != ConfigPrelude::default() {
        ours.push(format!("#cloud-config\n{}", yaml("user_data", &prelude)?));
    }
    ours.push(cloud_config(&CloudConfigDocument {
        bootcmd,
        ..CloudConfigDocument::beside(&claims, access)
    })?);
    Ok(mime::joined(text, &ours))
}

/// Returns what makes a guest another one than the one with these keys, if there are some: it runs
/// before cloud-init adds others.
fn revocation(keys: &[String]) -> Vec<Vec<&str>> {
    let keys = keys.iter().filter_map(|key| {
        let (kind, rest) = key.trim().split_once(' ')?;
        // Without the comment.
        Some(&key.trim()[..kind.len() + 1 + rest.find(' ').unwrap_or(rest.len())])
    });
    let keys: Vec<_> = keys.collect();
    match keys.is_empty() {
        true => Vec::new(),
        false => vec![
            [&["sh", "-c", REVOKE, "sh"], &keys[..]].concat(),
            vec!["cloud-init-per", "instance", "vmkit-machine-id", "sh", "-c", MACHINE_ID],
        ],
    }
}

fn cloud_config(document: &CloudConfigDocument<'_>) -> Result<String> {
    Ok(format!("#cloud-config\n{}", yaml("user_data", document)?))
}

fn yaml(field: &'static str, document: &impl Serialize) -> Result<String> {
    serde_saphyr::to_string(document)
        .map_err(|error| Error::invalid(field, "", "it can't be written as YAML").with_source(error))
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    instance_id: String,
    local_hostname: &'a str,
}

/// A network-config of version 2.
#[derive(Serialize)]
struct NetworkDocument {
    version: u32,
    ethernets: BTreeMap<&'static str, EthernetConfig>,
}

#[derive(Serialize)]
struct EthernetConfig {
    #[serde(rename = "match")]
    device: EthernetMatch,
    dhcp4: bool,
    dhcp6: bool,
}

#[derive(Serialize)]
struct EthernetMatch {
    macaddress: String,
}

impl NetworkDocument {
    /// IPv6 is configured by router advertisements if there is a router: the kernel's default, for
    /// which nothing waits.
    fn dhcp(mac: Option<MacAddr>) -> Self {
        let ethernet = |mac: MacAddr| EthernetConfig {
            device: EthernetMatch { macaddress: mac.to_string() },
            dhcp4: true,
            dhcp6: false,
        };
        Self { version: 2, ethernets: mac.map(|mac| ("primary", ethernet(mac))).into_iter().collect() }
    }
}

/// A cloud-config document; empty fields are left out, since cloud-init takes an empty list for a
/// mistake.
#[derive(Default, Serialize)]
struct CloudConfigDocument<'a> {
    #[serde(skip_serializing_if = "UserList::is_empty")]
    users: UserList<'a>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    packages: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    write_files: Vec<FileEntry<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bootcmd: Vec<Vec<&'a str>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    runcmd: &'a [Vec<String>],
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    host_keys: Option<HostKeys<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    merge_how: Option<[MergeHow; 3]>,
}

impl<'a> CloudConfigDocument<'a> {
    fn of(config: &'a CloudConfig, access: Option<&'a GuestAccess>) -> Self {
        let joins = |user: &&GuestUser| access.is_some_and(|access| access.user == user.name);
        let mut users: Vec<_> = config.users.iter().map(UserEntry::named).collect();
        match (config.users.iter().position(|user| joins(&user)), access) {
            (Some(theirs), Some(access)) => users[theirs].let_in(access),
            (_, access) => users.extend(access.map(UserEntry::of_access)),
        }
        if !users.is_empty() {
            // A list of users replaces the image's own one, unless it is in the list.
            users.insert(0, UserEntry::Default("default"));
        }
        let host_key = config.ssh_host_key.as_ref().or(access.map(|access| &access.host_key));
        Self {
            users: UserList::List(users),
            packages: &config.packages,
            write_files: config.files.iter().map(FileEntry::of).collect(),
            bootcmd: Vec::new(),
            runcmd: &config.commands,
            host_keys: host_key.map(HostKeys::of),
            merge_how: None,
        }
    }

    /// Returns vmkit's own part beside a user's user-data.
    fn beside(claims: &UserDataClaims, access: &'a GuestAccess) -> Self {
        let ours = UserEntry::of_access(access);
        let users = match claims.users {
            // Whether the image's user is listed is the user-data's choice.
            UsersForm::Absent if !claims.may_list_users() => {
                UserList::List(vec![UserEntry::Default("default"), ours])
            }
            UsersForm::Mapping => UserList::Mapping(BTreeMap::from([(access.user.as_str(), ours.unnamed())])),
            _ => UserList::List(vec![ours]),
        };
        Self {
            users,
            host_keys: Some(HostKeys::of(&access.host_key)),
            merge_how: Some(MergeHow::ADDING),
            ..Self::default()
        }
    }
}

/// Keys that convert the earlier user-data to a form that vmkit's part can be merged with.
#[derive(Default, PartialEq, Eq, Serialize)]
struct ConfigPrelude<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    users: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh_keys: Option<BTreeMap<String, String>>,
}

impl<'a> ConfigPrelude<'a> {
    fn of(claims: &'a UserDataClaims) -> Self {
        let users = match &claims.users {
            UsersForm::Null => Some(&[][..]),
            UsersForm::Names(names) => Some(&names[..]),
            UsersForm::Absent | UsersForm::List | UsersForm::Mapping => None,
        };
        Self { users, ssh_keys: claims.has_null_keys.then(BTreeMap::new) }
    }
}

/// Users in one of the forms that cloud-init accepts.
#[derive(Serialize)]
#[serde(untagged)]
enum UserList<'a> {
    List(Vec<UserEntry<'a>>),
    Mapping(BTreeMap<&'a str, UserEntry<'a>>),
}

impl Default for UserList<'_> {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl UserList<'_> {
    fn is_empty(&self) -> bool {
        matches!(self, Self::List(users) if users.is_empty())
    }
}

/// How cloud-init merges a document with those before it.
///
/// Source: cloud-init's documentation, "Merging user-data sections".
#[derive(Serialize)]
struct MergeHow {
    name: &'static str,
    settings: &'static [&'static str],
}

impl MergeHow {
    /// Earlier values stay, and lists are extended at their start: cloud-init creates no users
    /// after one that fails.
    const ADDING: [MergeHow; 3] = [
        MergeHow { name: "list", settings: &["prepend"] },
        MergeHow { name: "dict", settings: &["no_replace", "recurse_list", "recurse_dict"] },
        MergeHow { name: "str", settings: &[] },
    ];
}

#[derive(Serialize)]
#[serde(untagged)]
enum UserEntry<'a> {
    Default(&'static str),
    Named {
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<&'a str>,
        /// The default is the system's: an SSH server refuses users whose shell is missing, and
        /// systems have different ones.
        #[serde(skip_serializing_if = "Option::is_none")]
        shell: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        sudo: Option<&'static str>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        ssh_authorized_keys: Vec<&'a str>,
    },
}

const SUDO: &str = "ALL=(ALL) NOPASSWD:ALL";

impl<'a> UserEntry<'a> {
    fn named(user: &'a GuestUser) -> Self {
        UserEntry::Named {
            name: Some(&user.name),
            shell: user.shell.as_deref(),
            sudo: user.sudo.then_some(SUDO),
            ssh_authorized_keys: user.ssh_keys.iter().map(String::as_str).collect(),
        }
    }

    fn of_access(access: &'a GuestAccess) -> Self {
        UserEntry::Named {
            name: Some(&access.user),
            shell: None,
            sudo: Some(SUDO),
            ssh_authorized_keys: vec![&access.login_key.public],
        }
    }

    /// Adds vmkit's login to this user.
    fn let_in(&mut self, access: &'a GuestAccess) {
        if let UserEntry::Named { sudo, ssh_authorized_keys, .. } = self {
            *sudo = Some(SUDO);
            ssh_authorized_keys.push(&access.login_key.public);
        }
    }

    /// Returns the entry without its name, as in a mapping of users.
    fn unnamed(mut self) -> Self {
        if let UserEntry::Named { name, .. } = &mut self {
            *name = None;
        }
        self
    }
}

#[derive(Serialize)]
struct FileEntry<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
    content: String,
    permissions: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    defer: bool,
}

impl<'a> FileEntry<'a> {
    fn of(file: &'a GuestFile) -> Self {
        // Anything else would survive as YAML too, but would be unreadable for a person who
        // inspects the seed.
        let plain = file.content.chars().all(|c| matches!(c, ' '..='~' | '\n'));
        let owner = file.owner.as_deref();
        Self {
            path: file.path.to_str().expect("the check let UTF-8 pass only"),
            encoding: (!plain).then_some("b64"),
            content: if plain { file.content.clone() } else { BASE64.encode(&file.content) },
            permissions: format!("{:04o}", file.mode),
            owner,
            // Files are written before users are created, except deferred ones.
            defer: owner.is_some_and(|owner| owner.split(':').any(|name| name != "root")),
        }
    }
}

/// A given host key, so that cloud-init generates none, and the removal of those from the image.
#[derive(Serialize)]
struct HostKeys<'a> {
    ssh_deletekeys: bool,
    ssh_keys: KeyPair<'a>,
}

#[derive(Serialize)]
struct KeyPair<'a> {
    ed25519_private: String,
    ed25519_public: &'a str,
}

impl<'a> HostKeys<'a> {
    fn of(key: &'a SshKeyPair) -> Self {
        // Without the final line feed OpenSSH rejects the file as damaged.
        let ed25519_private = format!("{}\n", key.private.trim_end());
        let ssh_keys = KeyPair { ed25519_private, ed25519_public: key.public.trim_end() };
        Self { ssh_deletekeys: true, ssh_keys }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::{Value, json};
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// Text that YAML readers have been known to misread.
    const HOSTILE: &[&str] = &[
        "",
        " ",
        "yes",
        "No",
        "on",
        "y",
        "null",
        "~",
        "true",
        "1",
        "-1",
        "1_000",
        "0o17",
        "017",
        "0x1f",
        "1e3",
        ".inf",
        ".nan",
        "12:30:45",
        "2024-01-01",
        "a: b",
        "a:",
        ": a",
        "- a",
        "-",
        "---",
        "...",
        "# a",
        "a # b",
        "#cloud-config",
        "%TAG",
        "|",
        ">",
        "|-",
        "&a",
        "*a",
        "!a",
        "!!str",
        "@a",
        "`a",
        "{a",
        "[a",
        "}",
        "]",
        ",",
        "?",
        "? a",
        "=",
        "<<",
        "'",
        "\"",
        "it's",
        "\\",
        "\\n",
        " lead",
        "trail ",
        "\tlead",
        "trail\t",
        "\n",
        "\n\n",
        "a\nb",
        "a\nb\n",
        "a\n\n",
        "\na",
        " a\n  b\n c",
        "a \nb",
        "a\r\nb",
        "\r",
        "\0",
        "\u{7}",
        "\u{7f}",
        "\u{85}",
        "\u{a0}",
        "\u{2028}",
        "\u{2029}",
        "\u{feff}",
        "\u{fffe}",
        "ü",
        "日本",
        "😀",
        "{{ x }}",
        "$HOME",
        "${x}",
        "a\u{301}",
    ];

    const ID: Uuid = Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef);

    fn seed(config: &CloudInitConfig) -> Seed {
        render(config, &VmName::new("web").unwrap(), ID, Some(MacAddr::of_vm(ID))).unwrap()
    }

    fn typed(typed: CloudConfig) -> CloudInitConfig {
        CloudInitConfig { user_data: UserData::Typed(typed), ..CloudInitConfig::default() }
    }

    /// Reads YAML as cloud-init does, with PyYAML; returns `None`, with a message, if this host has
    /// none.
    fn py_yaml(document: &str) -> Option<Value> {
        const READER: &str =
            "import json, sys, yaml\njson.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout)";
        if !Command::new("/usr/bin/python3")
            .args(["-c", "import yaml"])
            .output()
            .is_ok_and(|o| o.status.success())
        {
            println!("SKIP: PyYAML is not installed");
            return None;
        }
        let mut python = Command::new("/usr/bin/python3");
        let mut python =
            python.args(["-c", READER]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        python.stdin.take().unwrap().write_all(document.as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert!(output.status.success(), "PyYAML refused:\n{document}");
        Some(serde_json::from_slice(&output.stdout).unwrap())
    }

    #[test]
    fn every_field_is_written_as_cloud_init_expects_it() {
        let file = |content: &str, owner: Option<&str>| GuestFile {
            path: "/srv/a, b".into(),
            content: content.into(),
            mode: 0o4755,
            owner: owner.map(Into::into),
        };
        let config = typed(CloudConfig {
            users: vec![
                GuestUser {
                    name: "ada".into(),
                    ssh_keys: vec!["ssh-rsa AAAAB3".into()],
                    sudo: true,
                    shell: None,
                },
                GuestUser {
                    name: "null".into(),
                    ssh_keys: vec![],
                    sudo: false,
                    shell: Some("/bin/sh".into()),
                },
            ],
            packages: vec!["nginx".into()],
            files: vec![file("a\nb\n", Some("root:root")), file("ü", Some("ada"))],
            commands: vec![vec!["echo".into(), "a b".into()]],
            ssh_host_key: Some(SshKeyPair {
                private: "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n-----END OPENSSH PRIVATE KEY-----".into(),
                public: "ssh-ed25519 AAAAC3\n".into(),
            }),
        });
        let seed = seed(&config);
        assert!(seed.user_data.starts_with("#cloud-config\n"));
        let Some(read) = py_yaml(&seed.user_data) else { return };
        let expected = json!({
            "users": [
                "default",
                {
                    "name": "ada",
                    "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "ssh_authorized_keys": ["ssh-rsa AAAAB3"],
                },
                { "name": "null", "shell": "/bin/sh" },
            ],
            "packages": ["nginx"],
            "write_files": [
                { "path": "/srv/a, b", "content": "a\nb\n", "permissions": "4755", "owner": "root:root" },
                {
                    "path": "/srv/a, b",
                    "encoding": "b64",
                    "content": "w7w=",
                    "permissions": "4755",
                    "owner": "ada",
                    "defer": true,
                },
            ],
            "runcmd": [["echo", "a b"]],
            "ssh_deletekeys": true,
            "ssh_keys": {
                "ed25519_private":
                    "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n-----END OPENSSH PRIVATE KEY-----\n",
                "ed25519_public": "ssh-ed25519 AAAAC3",
            },
        });
        assert_eq!(read, expected);
    }

    #[test]
    fn hostile_texts_are_read_back_as_they_were() {
        let arguments: Vec<String> = HOSTILE.iter().map(ToString::to_string).collect();
        // A zero byte can't be in an argument, and the check refuses it.
        let command = [vec!["echo".to_owned()], arguments.clone()].concat();
        let command: Vec<String> = command.into_iter().filter(|text| !text.contains('\0')).collect();
        let file = |content: &String| GuestFile {
            path: "/f".into(),
            content: content.clone(),
            mode: 0,
            owner: None,
        };
        let config = typed(CloudConfig {
            files: arguments.iter().map(file).collect(),
            commands: vec![command.clone()],
            ..CloudConfig::default()
        });
        let Some(read) = py_yaml(&seed(&config).user_data) else { return };
        assert_eq!(read["runcmd"], json!([command]));
        for (wanted, found) in HOSTILE.iter().zip(read["write_files"].as_array().unwrap()) {
            let content = found["content"].as_str().unwrap();
            match found["encoding"].as_str() {
                Some("b64") => assert_eq!(BASE64.decode(content).unwrap(), wanted.as_bytes()),
                _ => assert_eq!(content, *wanted),
            }
        }
    }

    #[test]
    fn an_empty_config_is_still_a_cloud_config() {
        assert_eq!(seed(&CloudInitConfig::default()).user_data, "#cloud-config\n{}\n");
    }

    #[test]
    fn the_meta_data_has_another_instance_id_for_each_run() {
        let config = CloudInitConfig { run: 3, ..CloudInitConfig::default() };
        let first = seed(&CloudInitConfig::default());
        let Some(read) = py_yaml(&first.meta_data) else { return };
        assert_eq!(
            read,
            json!({ "instance-id": "12345678-9abc-4def-8123-456789abcdef-0", "local-hostname": "web" })
        );
        assert_eq!(py_yaml(&seed(&config).meta_data).unwrap()["instance-id"], format!("{ID}-3"));
    }

    #[test]
    fn host_names_that_look_like_numbers_or_nothing_stay_text() {
        for hostname in ["123", "1e3", "null", "yes", "0x1f", "1.5"] {
            let config = CloudInitConfig { hostname: Some(hostname.into()), ..CloudInitConfig::default() };
            let Some(read) = py_yaml(&seed(&config).meta_data) else { return };
            assert_eq!(read["local-hostname"], hostname);
        }
    }

    #[test]
    fn the_network_is_dhcp_on_the_device_of_the_vm() {
        let mac = MacAddr::of_vm(ID);
        let Some(read) = py_yaml(&seed(&CloudInitConfig::default()).network_config) else { return };
        let device = json!({ "match": { "macaddress": mac.to_string() }, "dhcp4": true, "dhcp6": false });
        assert_eq!(read, json!({ "version": 2, "ethernets": { "primary": device } }));

        let none = render(&CloudInitConfig::default(), &VmName::new("web").unwrap(), ID, None).unwrap();
        assert_eq!(py_yaml(&none.network_config).unwrap(), json!({ "version": 2, "ethernets": {} }));
    }

    #[test]
    fn an_address_of_digits_alone_is_no_number_in_base_60() {
        let mac = MacAddr::from([0x52, 0x10, 0x20, 0x30, 0x40, 0x50]);
        let document = yaml("network_config", &NetworkDocument::dhcp(Some(mac))).unwrap();
        let Some(read) = py_yaml(&document) else { return };
        assert_eq!(read["ethernets"]["primary"]["match"]["macaddress"], "52:10:20:30:40:50");
    }

    #[test]
    fn raw_documents_go_in_unchanged() {
        let config = CloudInitConfig {
            user_data: UserData::Raw("#!/bin/sh\r\necho \u{fc}".into()),
            network_config: Some("version: 1\nconfig: disabled".into()),
            ..CloudInitConfig::default()
        };
        let seed = seed(&config);
        assert_eq!(seed.user_data, "#!/bin/sh\r\necho \u{fc}");
        assert_eq!(seed.network_config, "version: 1\nconfig: disabled");
    }

    #[test]
    fn typed_user_data_over_the_limit_is_refused_with_the_bound() {
        let content = "ü".repeat(CloudInitConfig::MAX_BYTES / 2);
        let file = GuestFile { path: "/f".into(), content, mode: 0o644, owner: None };
        let config = typed(CloudConfig { files: vec![file], ..CloudConfig::default() });
        let error = render(&config, &VmName::new("web").unwrap(), ID, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(text.starts_with("user_data: ") && text.contains("at most 1048576 bytes"), "{text}");
    }

    #[test]
    fn no_secret_is_in_what_a_seed_shows_of_itself() {
        let config =
            CloudInitConfig { user_data: UserData::Raw("#!SECRET".into()), ..CloudInitConfig::default() };
        assert!(!format!("{:?}", seed(&config)).contains("SECRET"));
    }
}
