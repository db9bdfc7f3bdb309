//! `dladm`: VNICs and the links under them.
//!
//! Source: illumos, `usr/src/cmd/dladm/dladm.c` and `usr/src/lib/libdladm`, for the texts; dladm(8)
//! for the rules of names.

use std::collections::BTreeMap;

use rustix::fs::{FlockOperation, flock};

use super::call::{GetoptError, ParsedArgs};
use super::{Illumos, IllumosState, Link, LinkClass, ToolOutput};

/// The longest name of a link, in bytes.
const LONGEST_NAME: usize = 31;

pub(super) fn run(illumos: &Illumos, state: &mut IllumosState, args: &[String]) -> ToolOutput {
    let Some((command, args)) = args.split_first() else { return usage() };
    let done = match command.as_str() {
        "create-vnic" => create_vnic(state, args),
        "delete-vnic" => delete(illumos, state, args, LinkClass::Vnic),
        "show-vnic" => show(state, args, ShownField::Vnics),
        "create-etherstub" => create_etherstub(state, args),
        "delete-etherstub" => delete(illumos, state, args, LinkClass::Etherstub),
        "show-link" => show(state, args, ShownField::Links),
        "set-linkprop" => set_linkprop(state, args),
        other => die(format!("unknown subcommand '{other}'")),
    };
    done.unwrap_or_else(|said| said)
}

type DladmResult = Result<ToolOutput, ToolOutput>;

fn usage() -> ToolOutput {
    ToolOutput::failed(1, "usage:  dladm <subcommand> <args> ...")
}

fn die<T>(text: impl AsRef<str>) -> Result<T, ToolOutput> {
    Err(ToolOutput::failed(1, format!("dladm: {}", text.as_ref())))
}

fn typed(args: &[String], known: &str) -> Result<ParsedArgs, ToolOutput> {
    ParsedArgs::parse(args, known).or_else(|wrong| match wrong {
        GetoptError::Unknown(letter) => die(format!("unrecognized option '-{letter}'")),
        GetoptError::NoValue(letter) => die(format!("option '-{letter}' requires a value")),
    })
}

/// Returns the one operand that most commands have.
fn operand(typed: &ParsedArgs) -> Result<&str, ToolOutput> {
    match typed.operands.as_slice() {
        [one] => Ok(one),
        _ => Err(usage()),
    }
}

/// Checks the name of a link to be: a letter, then letters, digits, `_` and `.`, at its end a
/// number without leading zeros.
fn check_name(name: &str) -> Result<(), ToolOutput> {
    if name.len() > LONGEST_NAME {
        return die(format!("link name too long '{name}'"));
    }
    let letters = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
    let number = &name[letters.len()..];
    let good = letters.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && letters.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '.'))
        && !number.is_empty()
        && (number == "0" || !number.starts_with('0'));
    if good { Ok(()) } else { die(format!("invalid link name '{name}'")) }
}

fn create_vnic(state: &mut IllumosState, args: &[String]) -> DladmResult {
    let typed = typed(args, "tfR:l:m:n:p:r:v:V:A:H")?;
    let name = operand(&typed)?;
    check_name(name)?;
    let Some(over) = typed.value('l') else { return Err(usage()) };
    let Some(under) = state.links.get(over) else { return die(format!("invalid link name '{over}'")) };
    let failed = |status: &str| die(format!("vnic creation over {over} failed: {status}"));
    let mut mtu = under.mtu;
    let mut properties = BTreeMap::new();
    for (key, value) in typed.values('p').flat_map(|list| list.split(',')).map(pair) {
        match (key, value.parse()) {
            ("mtu", Ok(bytes)) if (1280..=9000).contains(&bytes) => mtu = bytes,
            ("mtu", Ok(_)) => return failed("MTU check failed, MTU outside of device's supported range"),
            ("mtu", Err(_)) => return failed("invalid value"),
            _ => drop(properties.insert(key.to_owned(), value.to_owned())),
        }
    }
    let vlan = match typed.value('v').map(str::parse) {
        None => 0,
        Some(Ok(vlan @ 1..=4094)) => vlan,
        Some(_) => return die(format!("invalid VLAN identifier '{}'", typed.value('v').unwrap_or_default())),
    };
    let mac = match typed.value('m') {
        None | Some("random" | "auto") => random_mac(state),
        Some(text) => match mac(text) {
            Some(mac) => mac,
            None => return die(format!("invalid MAC address '{text}'")),
        },
    };
    if state.links.contains_key(name) {
        return failed("object already exists");
    }
    let taken = |link: &Link| link.mac == mac && link.vlan == vlan && link.over.as_deref() == Some(over);
    if state.links.values().any(taken) {
        return failed("MAC address is already in use");
    }
    let link = Link {
        class: LinkClass::Vnic,
        over: Some(over.to_owned()),
        mac,
        mtu,
        vlan,
        temporary: typed.has('t'),
        properties,
        given: false,
    };
    state.links.insert(name.to_owned(), link);
    Ok(ToolOutput::default())
}

fn pair(text: &str) -> (&str, &str) {
    text.split_once('=').unwrap_or((text, ""))
}

/// Returns an address as `dladm` prints it, or `None` where it is not one of a single host.
fn mac(text: &str) -> Option<String> {
    let octets: Vec<u8> = text
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).ok().filter(|_| octet.len() < 3))
        .collect::<Option<_>>()?;
    let single = octets.len() == 6 && octets[0] & 1 == 0 && octets.iter().any(|octet| *octet != 0);
    let printed: Vec<String> = octets.iter().map(|octet| format!("{octet:x}")).collect();
    single.then(|| printed.join(":"))
}

/// Returns an unused address; the host counts, so that tests can be repeated.
fn random_mac(state: &IllumosState) -> String {
    let [.., high, middle, low] = state.calls.to_be_bytes();
    format!("2:8:20:{high:x}:{middle:x}:{low:x}")
}

fn create_etherstub(state: &mut IllumosState, args: &[String]) -> DladmResult {
    let typed = typed(args, "tR:")?;
    let name = operand(&typed)?;
    check_name(name)?;
    if state.links.contains_key(name) {
        return die("etherstub creation failed: object already exists");
    }
    state.links.insert(name.to_owned(), Link::bare(LinkClass::Etherstub, random_mac(state), typed.has('t')));
    Ok(ToolOutput::default())
}

fn delete(illumos: &Illumos, state: &mut IllumosState, args: &[String], class: LinkClass) -> DladmResult {
    let typed = typed(args, "tR:z:")?;
    let name = operand(&typed)?;
    let Some(link) = state.links.get(name) else { return die(format!("invalid link name '{name}'")) };
    if link.class != class {
        let what = if class == LinkClass::Vnic { "a vnic" } else { "an etherstub" };
        return die(format!("'{name}' is not {what}"));
    }
    let below = |link: &Link| link.over.as_deref() == Some(name);
    if state.links.values().any(below) || illumos.link_is_busy(name) {
        return die("vnic deletion failed: link busy");
    }
    state.links.remove(name);
    Ok(ToolOutput::default())
}

fn set_linkprop(state: &mut IllumosState, args: &[String]) -> DladmResult {
    let typed = typed(args, "tR:p:")?;
    let name = operand(&typed)?;
    let Some(link) = state.links.get_mut(name) else {
        return die(format!("link {name} is not valid: object not found"));
    };
    for (key, value) in typed.values('p').flat_map(|list| list.split(',')).map(pair) {
        if key != "mtu" {
            link.properties.insert(key.to_owned(), value.to_owned());
            continue;
        }
        match value.parse() {
            Ok(mtu) => link.mtu = mtu,
            Err(_) => return die(format!("cannot set link property 'mtu' on '{name}': invalid value")),
        }
    }
    Ok(ToolOutput::default())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ShownField {
    Vnics,
    Links,
}

fn show(state: &IllumosState, args: &[String], shown: ShownField) -> DladmResult {
    let typed = typed(args, "pPo:l:z:")?;
    let (default, what) = match shown {
        ShownField::Vnics => ("link,over,speed,macaddress,macaddrtype,vid,zone", "vnic"),
        ShownField::Links => ("link,class,mtu,state,bridge,over", "link"),
    };
    let parsable = typed.has('p');
    if parsable && typed.value('o').is_none() {
        return die("no output fields specified: required for -p");
    }
    let fields: Vec<String> =
        typed.value('o').unwrap_or(default).to_lowercase().split(',').map(str::to_owned).collect();
    let wanted = |name: &str, link: &Link| {
        (shown == ShownField::Links || link.class == LinkClass::Vnic)
            && typed.operands.iter().all(|wanted| wanted == name)
            && typed.value('l').is_none_or(|over| link.over.as_deref() == Some(over))
    };
    if let Some(missing) = typed.operands.iter().find(|name| !state.links.contains_key(*name)) {
        return die(format!("invalid {what} name '{missing}': object not found"));
    }
    let mut said = String::new();
    if !parsable {
        said += &format!("{}\n", fields.join(" ").to_uppercase());
    }
    for (name, link) in state.links.iter().filter(|(name, link)| wanted(name, link)) {
        let mut values = Vec::new();
        for field in &fields {
            let Some(value) = field_of(name, link, field) else {
                return die(format!("unknown output field `{field}'"));
            };
            // A lone field needs no separator, so nothing is escaped.
            let escape = parsable && fields.len() > 1;
            values.push(if escape { value.replace('\\', "\\\\").replace(':', "\\:") } else { value });
        }
        said += &format!("{}\n", values.join(if parsable { ":" } else { " " }));
    }
    Ok(ToolOutput::ok(said))
}

fn field_of(name: &str, link: &Link, field: &str) -> Option<String> {
    Some(match field {
        "link" => name.to_owned(),
        "over" => link.over.clone().unwrap_or_default(),
        "speed" => "1000".to_owned(),
        "macaddress" => link.mac.clone(),
        "macaddrtype" => "fixed".to_owned(),
        "vid" => link.vlan.to_string(),
        "zone" => "--".to_owned(),
        "mtu" => link.mtu.to_string(),
        "state" => "up".to_owned(),
        "bridge" => "--".to_owned(),
        "class" => match link.class {
            LinkClass::Phys => "phys".to_owned(),
            LinkClass::Vnic => "vnic".to_owned(),
            LinkClass::Etherstub => "etherstub".to_owned(),
        },
        _ => return None,
    })
}

impl Link {
    /// Returns a link with nothing under it.
    pub(super) fn bare(class: LinkClass, mac: String, temporary: bool) -> Self {
        let properties = BTreeMap::new();
        Self { class, over: None, mac, mtu: 1500, vlan: 0, temporary, properties, given: false }
    }
}

impl Illumos {
    /// Opens the file that represents a link in use; while it is open, the link can't be deleted.
    pub(crate) fn use_link(&self, name: &str) -> std::io::Result<std::fs::File> {
        std::fs::create_dir_all(self.dir.join("links"))?;
        let file = std::fs::File::create(self.dir.join("links").join(name))?;
        flock(&file, FlockOperation::LockShared)?;
        Ok(file)
    }

    fn link_is_busy(&self, name: &str) -> bool {
        let used = std::fs::File::open(self.dir.join("links").join(name));
        used.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
    }
}
