//! The identity of a guest that continues as a copy of another: the file `identity` exists as long
//! as it is that of the other.
//!
//! ```text
//!  identity ─▶ saved.json         the clone is created
//!  cont ─▶ the agent renews the identity ─▶ no identity        its first start
//! ```

use std::fs;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::agent::GuestAgent;
use super::identity::NewIdentity;
use super::layout::QemuLayout;
use super::qmp::client::QmpClient;
use super::snapshot_files::replace;
use super::{clock, parking};
use crate::abilities::IdentityPolicy;
use crate::backend::supervise::files::{is_gone, remove_file};
use crate::error::{Error, Peer, Result};
use crate::spec::{GuestAccess, VmSpec};

/// The version of the file's format.
const VERSION: u32 = 1;
/// The timeout of all of it: host keys are generated, and an emulated guest on a busy host is slow.
const LIMIT: Duration = Duration::from_secs(120);

/// What of an identity is another VM's, and what to do if it can't be renewed.
#[derive(Debug, Serialize, Deserialize)]
struct SharedIdentity {
    version: u32,
    /// The public key of the other VM's login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    former_login: Option<String>,
    may_share: bool,
    /// Whether its programs stand still until it is renewed.
    parked: bool,
}

/// Notes that the guest of a VM is to be given an identity.
///
/// # Errors
/// `Io`.
pub(super) fn demand(
    layout: &QemuLayout,
    former: Option<&GuestAccess>,
    policy: IdentityPolicy,
    parked: bool,
) -> Result<()> {
    let shared = SharedIdentity {
        version: VERSION,
        former_login: former.map(|access| access.login_key.public.clone()),
        may_share: policy == IdentityPolicy::MayShare,
        parked,
    };
    let path = layout.identity_mark();
    let text = serde_json::to_vec_pretty(&shared).map_err(std::io::Error::other);
    text.and_then(|text| replace(&path, &text)).map_err(Error::io("write", &path))
}

/// Returns whether the guest has the identity of another one.
pub(super) fn is_due(layout: &QemuLayout) -> bool {
    fs::symlink_metadata(layout.identity_mark()).is_ok()
}

/// Gives a guest that runs an identity of its own, if it has that of another.
///
/// # Errors
/// Those of the monitor and the agent, and `Protocol` with what could not be renewed, unless the
/// guest may share it; `Record` for a file of a newer vmkit.
pub(super) async fn settle(spec: &VmSpec, layout: &QemuLayout, qmp: &mut QmpClient) -> Result<()> {
    let path = layout.identity_mark();
    let text = match fs::read(&path) {
        Err(error) if is_gone(&error) => return Ok(()),
        text => text.map_err(Error::io("read", &path))?,
    };
    let shared: SharedIdentity = serde_json::from_slice(&text)
        .map_err(|error| Error::record(&path, "it can't be read: remove the VM").with_source(error))?;
    if shared.version > VERSION {
        let problem = format!("it is of a newer vmkit (format {}; this one knows {VERSION})", shared.version);
        return Err(Error::record(&path, problem));
    }
    match renew(spec, layout, &shared, qmp).await {
        Ok(()) => {}
        Err(error) if shared.may_share => {
            tracing::warn!(vm = %spec.name(), %error, "the guest shares its identity with the one that it is a copy of");
            if shared.parked {
                parking::unpark(layout).await;
            }
        }
        Err(error) => return Err(error),
    }
    remove_file(&path)
}

async fn renew(
    spec: &VmSpec,
    layout: &QemuLayout,
    shared: &SharedIdentity,
    qmp: &mut QmpClient,
) -> Result<()> {
    if !clock::agent_listens(qmp, Instant::now() + LIMIT).await? {
        let problem = "no guest agent runs in the guest, and only that can give it an identity of its own";
        return Err(Error::protocol(Peer::GuestAgent, problem));
    }
    let mut agent = GuestAgent::connect(&layout.agent_socket(), LIMIT).await?;
    let identity = NewIdentity {
        host_name: Some(spec.name()),
        access: spec.cloud_init().and_then(|config| config.access.as_ref()),
        former_login: shared.former_login.as_deref(),
    };
    let renewed = agent.renew_identity(&identity, LIMIT).await?;
    let problems: Vec<_> =
        renewed.shared.iter().map(|it| format!("{}: {}", it.part.as_str(), it.problem)).collect();
    match problems.is_empty() {
        true => Ok(()),
        false => {
            let problem = format!("the guest keeps a part of another's identity: {}", problems.join("; "));
            Err(Error::protocol(Peer::GuestAgent, problem))
        }
    }
}
