//! Overlays over the disks of a running guest: QEMU's block graph.
//!
//! Source: QEMU, `qapi/block-core.json`.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::client::QmpClient;
use crate::error::{Error, Peer, Result};

/// The name of the job that merges layers.
const JOB: &str = "merge";
/// What QEMU needs to take a command that ends a job.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);

/// An overlay that becomes a disk of a running guest.
#[derive(Debug)]
pub(crate) struct LiveOverlay<'a> {
    /// The name of the disk's node as it is now.
    pub(crate) node: String,
    /// The name of the overlay's node, at most 31 letters.
    pub(crate) overlay: String,
    /// The overlay's file.
    pub(crate) path: &'a Path,
}

impl QmpClient {
    /// Returns the name of the node that a disk of the guest is.
    ///
    /// # Errors
    /// `Protocol` without a disk of that device; as [`execute`](Self::execute).
    pub(crate) async fn node_of(&mut self, device: &str, deadline: Instant) -> Result<String> {
        let found = self.execute("query-block", None, deadline).await?;
        let path = format!("/machine/peripheral/{device}-dev");
        // On PCI, the device below is named.
        let is_ours = |disk: &&Value| {
            let qdev = disk["qdev"].as_str().and_then(|qdev| qdev.strip_prefix(&path));
            qdev.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let disk = found.as_array().into_iter().flatten().find(is_ours);
        let node = disk.and_then(|disk| disk["inserted"]["node-name"].as_str()).map(str::to_owned);
        node.ok_or_else(|| {
            Error::protocol(Peer::Qemu, format!("missing the disk `{device}` in the reply to query-block"))
        })
    }

    /// Returns the names of a node and of those below it, from the top.
    ///
    /// No stable command of QEMU 7.2 names them.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn chain_of(&mut self, node: &str, deadline: Instant) -> Result<Vec<String>> {
        let graph = self.execute("x-debug-query-block-graph", None, deadline).await?;
        let list = |name: &str| graph[name].as_array().map_or(&[][..], Vec::as_slice);
        let (nodes, edges) = (list("nodes"), list("edges"));
        let mut at = nodes.iter().find(|found| found["name"] == node && found["type"] == "block-driver");
        let mut chain = Vec::new();
        while let Some(node) = at.filter(|_| chain.len() <= nodes.len()) {
            chain.push(node["name"].as_str().unwrap_or_default().to_owned());
            let edge = edges.iter().find(|edge| edge["parent"] == node["id"] && edge["name"] == "backing");
            at = edge.and_then(|edge| nodes.iter().find(|found| found["id"] == edge["child"]));
        }
        Ok(chain)
    }

    /// Copies into `node` what is between it and `base`, which is the next below it then, and is
    /// recorded in the node's file as `name`; `None` is for a disk over nothing.
    ///
    /// # Errors
    /// `Protocol` with QEMU's cause if it fails; `TimedOut`; as [`execute`](Self::execute). The
    /// disk is what it was.
    pub(crate) async fn stream(
        &mut self,
        node: &str,
        base: Option<(&str, &str)>,
        deadline: Instant,
    ) -> Result<()> {
        let mut arguments = json!({ "job-id": JOB, "device": node });
        if let Some((base, name)) = base {
            arguments["base-node"] = base.into();
            arguments["backing-file"] = name.into();
        }
        self.execute("block-stream", Some(arguments), deadline).await?;
        let start = Instant::now();
        loop {
            let jobs = self.execute("query-block-jobs", None, deadline).await?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["device"] == JOB);
            if job.is_none() {
                break;
            }
            // Each change of a job is an event.
            let ended = self.event("JOB_STATUS_CHANGE");
            if timeout_at(deadline, ended).await.is_err() {
                let cancel = json!({ "device": JOB, "force": true });
                self.execute("block-job-cancel", Some(cancel), Instant::now() + CANCEL_LIMIT).await?;
                return Err(Error::timed_out("QEMU to merge layers of a disk", start.elapsed()));
            }
        }
        let chain = self.chain_of(node, deadline).await?;
        match chain.get(1).map(String::as_str) == base.map(|(base, _)| base) {
            true => Ok(()),
            false => Err(Error::protocol(Peer::Qemu, "could not merge layers of a disk: see QEMU's log")),
        }
    }

    /// Puts overlays over the disks of the guest, all at one instant: what was written to so far
    /// is not any more.
    ///
    /// # Errors
    /// As [`execute`](Self::execute); then the disks are as they were.
    pub(crate) async fn put_overlays(
        &mut self,
        overlays: &[LiveOverlay<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let done = async {
            for overlay in overlays {
                let node = json!({
                    "driver": "qcow2", "node-name": overlay.overlay, "discard": "unmap", "backing": null,
                    "file": { "driver": "file", "filename": overlay.path, "discard": "unmap" },
                });
                self.execute("blockdev-add", Some(node), deadline).await?;
            }
            let put = |overlay: &LiveOverlay<'_>| {
                let data = json!({ "node": overlay.node, "overlay": overlay.overlay });
                json!({ "type": "blockdev-snapshot", "data": data })
            };
            let actions: Vec<Value> = overlays.iter().map(put).collect();
            self.execute("transaction", Some(json!({ "actions": actions })), deadline).await
        };
        let Err(error) = done.await else { return Ok(()) };
        for overlay in overlays {
            self.forget_node(&overlay.overlay, deadline).await;
        }
        Err(error)
    }

    /// Closes the file of a node that nothing uses, if there is such a node.
    pub(crate) async fn forget_node(&mut self, node: &str, deadline: Instant) {
        let arguments = json!({ "node-name": node });
        if let Err(error) = self.execute("blockdev-del", Some(arguments), deadline).await {
            tracing::debug!(%error, node, "there is no node to be closed");
        }
    }
}
