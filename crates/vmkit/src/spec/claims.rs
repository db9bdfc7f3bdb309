//! What raw user-data says of users, groups and host keys, and whether vmkit's own way in can be
//! joined with it.
//!
//! Pure. cloud-init joins two entries of one user in favour of the first, drops what it can't join,
//! and gives up making users at the first word that it does not understand, each without a word
//! outside the guest. So what it would make of a document is found out beforehand: vmkit takes a
//! name that the document leaves free, says its own part in the form that the document uses, and
//! refuses what would keep everybody out, with its line.
//!
//! Source: cloud-init 22.4, `distros/ug_util.py`, `config/cc_users_groups.py`, `config/cc_ssh.py`,
//! `mergers`.

use super::name::LOGIN_USER;
use super::raw_parts::{PartKind, RawPart, parts};
use super::yaml::YamlMistake;
use super::yaml_tree::{NodeKind, YamlNode, YamlTree};

/// The form in which `users` stands at the end, once cloud-init has joined all parts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum UsersForm {
    /// It is not there, or not to be seen.
    #[default]
    Absent,
    /// Nothing stands behind it.
    Null,
    /// A list of entries.
    List,
    /// A mapping of names to entries.
    Mapping,
    /// Names in one text, with commas between.
    Names(Vec<String>),
}

/// A name of a user or a group that the document makes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ClaimedName {
    name: String,
    line: usize,
}

/// An Ed25519 host key that the document hands in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClaimedHostKey {
    /// Its private half.
    pub(crate) private: String,
    /// Its public half, where that is given.
    pub(crate) public: Option<String>,
    /// Where it stands.
    pub(crate) line: usize,
}

/// What a document says.
#[derive(Debug, Default)]
pub(crate) struct UserDataClaims {
    names: Vec<ClaimedName>,
    /// The form of `users`.
    pub(crate) users: UsersForm,
    /// Whether nothing stands behind `ssh_keys`.
    pub(crate) has_null_keys: bool,
    /// The host key that vmkit has to expect.
    pub(crate) host_key: Option<ClaimedHostKey>,
    /// Whether it says how the image's own user shall be.
    shapes_own_user: bool,
    /// What can't be read before it is in the guest.
    unread: Vec<String>,
}

impl UserDataClaims {
    /// Reads user-data.
    ///
    /// # Errors
    /// The first thing that no way in can be joined with, or that keeps cloud-init from making
    /// users or host keys.
    pub(crate) fn of(text: &str) -> Result<Self, YamlMistake> {
        let mut claims = Self::default();
        for part in parts(text)? {
            match part.kind {
                PartKind::Config => claims.read(&part)?,
                PartKind::Opaque => claims.unread.push(part.text.into_owned()),
                PartKind::Archive | PartKind::Program => {}
            }
        }
        Ok(claims)
    }

    /// Returns where the document makes a user or a group of this name.
    pub(crate) fn line_of(&self, name: &str) -> Option<usize> {
        self.names.iter().find(|claimed| claimed.name == name).map(|claimed| claimed.line)
    }

    /// Returns whom vmkit may log in as: the image's own user, unless the document says something
    /// of that one, or a user of a name that is nowhere in it.
    pub(crate) fn login_name(&self, own: Option<&str>) -> String {
        let own = own.filter(|_| !self.shapes_own_user && self.unread.is_empty());
        first_free(own, |name| {
            self.line_of(name).is_none() && !self.unread.iter().any(|text| has_word(text, name))
        })
    }

    /// Returns whether what can't be read has a list of users.
    pub(crate) fn may_list_users(&self) -> bool {
        self.unread.iter().any(|text| text.lines().any(|line| line.starts_with("users:")))
    }

    fn read(&mut self, part: &RawPart<'_>) -> Result<(), YamlMistake> {
        let in_whole = |mistake| part.mistake(mistake);
        super::yaml::check(&part.text, super::yaml::TopLevel::Mapping { or_nothing: true })
            .map_err(in_whole)?;
        let tree = YamlTree::parse(&part.text).map_err(in_whole)?;
        let Some(root) = tree.root() else { return Ok(()) };
        self.read_root(root, part).map_err(in_whole)
    }

    fn read_root(&mut self, root: YamlNode<'_>, part: &RawPart<'_>) -> Result<(), YamlMistake> {
        let merges =
            part.has_merge_header || ["merge_how", "merge_type"].iter().any(|key| root.get(key).is_some());
        if let Some(users) = root.get("users") {
            let form = self.read_users(users, part)?;
            let is_joined = merges && self.users != UsersForm::Absent && self.users != form;
            if is_joined {
                return Err(
                    users.mistake(format!("`users` is merged with one of another form: {LIST_USERS}"))
                );
            }
            self.users = form;
        }
        if let Some(user) = root.get("user").filter(|user| user.kind() != NodeKind::Null) {
            self.read_old_user(user, part);
        }
        if let Some(own) = root.get("system_info").and_then(|info| info.get("default_user")) {
            self.read_old_user(own, part);
        }
        if let Some(groups) = root.get("groups") {
            self.read_groups(groups, part)?;
        }
        if let Some(keys) = root.get("ssh_keys") {
            self.read_host_keys(keys, part)?;
        }
        check_modules(root)
    }

    fn claim(&mut self, name: &str, at: YamlNode<'_>, part: &RawPart<'_>) {
        self.names.push(ClaimedName { name: name.trim().to_owned(), line: part.line(at.line()) });
    }

    fn read_users(&mut self, users: YamlNode<'_>, part: &RawPart<'_>) -> Result<UsersForm, YamlMistake> {
        match users.kind() {
            NodeKind::Null => Ok(UsersForm::Null),
            NodeKind::Other => Err(users.mistake(format!("`users` is not a list: {LIST_USERS}"))),
            NodeKind::Text => {
                let names = names_in(users.text().unwrap_or_default());
                names.iter().for_each(|name| self.claim(name, users, part));
                Ok(UsersForm::Names(names))
            }
            NodeKind::List => {
                for entry in users.items() {
                    self.read_list_entry(entry, part)?;
                }
                Ok(UsersForm::List)
            }
            NodeKind::Mapping => {
                for (key, value) in users.entries() {
                    self.read_mapping_entry(key, value, part)?;
                }
                Ok(UsersForm::Mapping)
            }
        }
    }

    fn read_list_entry(&mut self, entry: YamlNode<'_>, part: &RawPart<'_>) -> Result<(), YamlMistake> {
        match entry.kind() {
            NodeKind::Text => {
                let names = names_in(entry.text().unwrap_or_default());
                names.iter().for_each(|name| self.claim(name, entry, part));
            }
            NodeKind::List => {
                for name in entry.items() {
                    self.claim(name.text().unwrap_or_default(), name, part);
                }
            }
            NodeKind::Mapping => {
                let name = entry.get("name").map_or(Some("default"), YamlNode::text);
                self.read_attributes(name.unwrap_or_default(), entry, part)?;
            }
            NodeKind::Null | NodeKind::Other => {
                return Err(entry.mistake(format!(
                    "an entry of `users` is not a user, and cloud-init would create none of them: \
                     {LIST_USERS}"
                )));
            }
        }
        Ok(())
    }

    fn read_mapping_entry(
        &mut self,
        key: YamlNode<'_>,
        value: YamlNode<'_>,
        part: &RawPart<'_>,
    ) -> Result<(), YamlMistake> {
        let Some(name) = key.text() else {
            return Err(key.mistake("a user's name is not a string: write it in quotes"));
        };
        match value.kind() {
            NodeKind::Null | NodeKind::List => Err(value.mistake(format!(
                "the user `{name}` is not a mapping, and cloud-init would create no user at all: write \
                 `{name}: {{}}`, or {LIST_USERS}"
            ))),
            NodeKind::Mapping => self.read_attributes(name, value, part),
            NodeKind::Text | NodeKind::Other => {
                self.claim(name, key, part);
                Ok(())
            }
        }
    }

    /// Reads what an entry says of a user.
    fn read_attributes(
        &mut self,
        name: &str,
        entry: YamlNode<'_>,
        part: &RawPart<'_>,
    ) -> Result<(), YamlMistake> {
        self.claim(name, entry, part);
        let entries = entry.entries();
        if let Some((key, _)) = entries.iter().find(|(key, _)| key.text().is_none()) {
            return Err(key.mistake(
                "a key of a user is not a string, and cloud-init would create no user at all: write it in \
                 quotes",
            ));
        }
        self.shapes_own_user |=
            name == "default" && entries.iter().any(|(key, _)| key.text() != Some("name"));
        for key in ["groups", "primary_group", "primary-group"] {
            let Some(groups) = entry.get(key) else { continue };
            for group in groups.items().chain([groups]) {
                let names = names_in(group.text().unwrap_or_default());
                names.iter().for_each(|name| self.claim(name, group, part));
            }
        }
        Ok(())
    }

    /// Reads what `user`, or the system's own configuration, says of the image's own user.
    fn read_old_user(&mut self, user: YamlNode<'_>, part: &RawPart<'_>) {
        self.shapes_own_user = true;
        let name = match user.kind() {
            NodeKind::Mapping => user.get("name").and_then(YamlNode::text),
            _ => user.text(),
        };
        if let Some(name) = name {
            self.claim(name, user, part);
        }
    }

    fn read_groups(&mut self, groups: YamlNode<'_>, part: &RawPart<'_>) -> Result<(), YamlMistake> {
        let unusable = |node: YamlNode<'_>, what: &str| {
            let right = "write a list of names, or of `NAME: [MEMBER, ...]`";
            Err(node
                .mistake(format!("{what}, and cloud-init would create neither groups nor users: {right}")))
        };
        let mut found = Vec::new();
        match groups.kind() {
            NodeKind::Null | NodeKind::Other => return unusable(groups, "`groups` is not a list"),
            NodeKind::Text => found.push(groups),
            NodeKind::List => {
                for group in groups.items() {
                    match group.kind() {
                        NodeKind::Text => found.push(group),
                        NodeKind::Mapping => found.extend(members(group)?),
                        _ => return unusable(group, "an entry of `groups` is not a name"),
                    }
                }
            }
            NodeKind::Mapping => found.extend(members(groups)?),
        }
        for group in found {
            let names = names_in(group.text().unwrap_or_default());
            names.iter().for_each(|name| self.claim(name, group, part));
        }
        Ok(())
    }

    fn read_host_keys(&mut self, keys: YamlNode<'_>, part: &RawPart<'_>) -> Result<(), YamlMistake> {
        self.has_null_keys = keys.kind() == NodeKind::Null;
        if !matches!(keys.kind(), NodeKind::Null | NodeKind::Mapping) {
            return Err(keys.mistake(
                "`ssh_keys` has no keys and values: write `ed25519_private: |` and the key below it",
            ));
        }
        for (key, value) in keys.entries() {
            let name = key.text().unwrap_or_default();
            if value.kind() != NodeKind::Text {
                return Err(value.mistake(format!(
                    "`ssh_keys.{name}` is not a string, and the guest's SSH server would have no key at \
                     all: write it after `|`"
                )));
            }
        }
        let text = |key: &str| keys.get(key).and_then(YamlNode::text);
        match (text("ed25519_private"), text("ed25519_public")) {
            (Some(private), public) => {
                let at = keys.get("ed25519_private").unwrap_or(keys);
                if !private.ends_with('\n') {
                    return Err(at.mistake(
                        "`ssh_keys.ed25519_private` has no line end at its end, and OpenSSH rejects such a \
                         key as damaged: write it after `|`",
                    ));
                }
                self.host_key = Some(ClaimedHostKey {
                    private: private.to_owned(),
                    public: public.map(str::to_owned),
                    line: part.line(at.line()),
                });
            }
            (None, public) if public.is_some() || text("ed25519_certificate").is_some() => {
                return Err(keys.mistake(
                    "`ssh_keys` has only the public half of an Ed25519 key: add `ed25519_private`, or omit \
                     both",
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Returns the first of the names that vmkit logs in by that is free: the image's own user,
/// [`LOGIN_USER`], and that with an addition.
pub(super) fn first_free(own: Option<&str>, is_free: impl Fn(&str) -> bool) -> String {
    let addition = format!("{}-access", LOGIN_USER);
    let mut numbered = (2..).map(|number| format!("{addition}-{number}"));
    let mut fixed = own.into_iter().chain([LOGIN_USER, &addition]);
    match fixed.find(|name| is_free(name)) {
        Some(name) => name.to_owned(),
        None => numbered.find(|name| is_free(name)).expect("no user-data names all"),
    }
}

/// What is right in place of what can't be joined.
const LIST_USERS: &str = "write `users` as a list, such as `- default` and `- name: ann`";

/// Returns the names of groups that have members.
fn members(groups: YamlNode<'_>) -> Result<Vec<YamlNode<'_>>, YamlMistake> {
    let entries = groups.entries();
    let unusable = entries.iter().find(|(_, value)| !matches!(value.kind(), NodeKind::Text | NodeKind::List));
    match unusable {
        Some((_, value)) => Err(value.mistake(
            "the members of a group are not a list, and cloud-init would create neither groups nor users: \
             write `[]` if it has none",
        )),
        None => Ok(entries.into_iter().map(|(key, _)| key).collect()),
    }
}

/// Checks that the modules which make users and host keys are run.
fn check_modules(root: YamlNode<'_>) -> Result<(), YamlMistake> {
    let lists = ["cloud_init_modules", "cloud_config_modules", "cloud_final_modules"];
    let lists: Vec<YamlNode<'_>> = lists.iter().filter_map(|key| root.get(key)).collect();
    let Some(first) = root.get("cloud_init_modules") else { return Ok(()) };
    let entries: Vec<YamlNode<'_>> = lists.iter().flat_map(|list| list.items()).collect();
    let names: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.items().next().unwrap_or(*entry).text())
        .map(|name| name.trim_start_matches("cc_").replace('_', "-"))
        .collect();
    for module in ["users-groups", "ssh"] {
        if !names.iter().any(|name| name == module) {
            return Err(first.mistake(format!(
                "`cloud_init_modules` lacks `{module}`, so no login would work: add it to the list"
            )));
        }
    }
    Ok(())
}

fn names_in(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Returns whether a name stands in a text by itself.
fn has_word(text: &str, name: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    text.match_indices(name)
        .any(|(at, _)| !text[..at].ends_with(is_part) && !text[at + name.len()..].starts_with(is_part))
}
