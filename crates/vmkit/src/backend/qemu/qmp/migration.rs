//! A guest's memory and devices, written to a file and read from one: QEMU's migration.
//!
//! Source: QEMU, `qapi/migration.json`; docs/devel/migration.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::client::QmpClient;
use crate::error::{Error, Peer, Result};

/// The name by which QEMU knows the file that it writes to.
const FILE: &str = "memory";
/// More than any disk can do, in bytes per second: the default is 128 MiB.
const BANDWIDTH: u64 = 1 << 40;
/// The capability by which QEMU stops the guest and waits before it writes the rest.
const PAUSE: &str = "pause-before-switchover";
/// How often QEMU is asked again while it cancels a migration: of another client's, the events may
/// be off.
const RETRY: Duration = Duration::from_millis(5);

impl QmpClient {
    /// Writes the guest's memory and devices to a file, and returns when all of it is written.
    ///
    /// # Errors
    /// `Refused` for a device that can't be saved; `Protocol` with QEMU's cause if it fails;
    /// `TimedOut`. [`cancel_migration`](Self::cancel_migration) ends what was begun.
    pub(crate) async fn write_memory(&mut self, file: BorrowedFd<'_>, deadline: Instant) -> Result<()> {
        self.begin_writing(file, false, deadline).await?;
        self.migrated(deadline).await
    }

    /// Writes the memory of a guest that goes on meanwhile, and returns when the rest needs it to
    /// stand still: it does then, and its disks are as that memory has them.
    ///
    /// # Errors
    /// As [`write_memory`](Self::write_memory).
    pub(crate) async fn write_memory_live(&mut self, file: BorrowedFd<'_>, deadline: Instant) -> Result<()> {
        self.begin_writing(file, true, deadline).await?;
        self.reached("pre-switchover", deadline).await
    }

    /// Writes the rest of the memory after [`write_memory_live`](Self::write_memory_live); the
    /// guest still stands then.
    ///
    /// # Errors
    /// As [`write_memory`](Self::write_memory).
    pub(crate) async fn write_rest(&mut self, deadline: Instant) -> Result<()> {
        let state = json!({ "state": "pre-switchover" });
        self.execute("migrate-continue", Some(state), deadline).await?;
        self.migrated(deadline).await
    }

    async fn begin_writing(
        &mut self,
        file: BorrowedFd<'_>,
        pause_before_rest: bool,
        deadline: Instant,
    ) -> Result<()> {
        self.set_capabilities(&[("events", true), (PAUSE, pause_before_rest)], deadline).await?;
        let parameters = json!({ "max-bandwidth": BANDWIDTH });
        self.execute("migrate-set-parameters", Some(parameters), deadline).await?;
        self.execute_with_file("getfd", json!({ "fdname": FILE }), file, deadline).await?;
        let target = json!({ "uri": format!("fd:{FILE}") });
        self.execute("migrate", Some(target), deadline).await.map(drop)
    }

    /// Reads the guest's memory and devices from an inherited file. In a QEMU that was started with
    /// `-S` the guest is paused then, also one that ran when it was saved, and its disks are not
    /// written to before `cont`.
    ///
    /// # Errors
    /// `Protocol` if QEMU can't read it, which ends QEMU; `TimedOut`.
    pub(crate) async fn read_memory(&mut self, descriptor: i32, deadline: Instant) -> Result<()> {
        self.set_capabilities(&[("events", true), ("late-block-activate", true)], deadline).await?;
        let source = json!({ "uri": format!("fd:{descriptor}") });
        self.execute("migrate-incoming", Some(source), deadline).await?;
        self.migrated(deadline).await
    }

    /// Ends a migration in progress and resumes the guest's vCPUs, also after one that is complete.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn cancel_migration(&mut self, resume: bool, deadline: Instant) -> Result<()> {
        self.execute("migrate_cancel", None, deadline).await?;
        while self.is_migrating(deadline).await? && Instant::now() < deadline {
            sleep(RETRY).await;
        }
        match resume {
            true => self.cont_after_migration(deadline).await,
            false => Ok(()),
        }
    }

    /// Resumes the guest's vCPUs as soon as a migration that is complete lets them.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn cont_after_migration(&mut self, deadline: Instant) -> Result<()> {
        loop {
            match self.cont(deadline).await {
                // "Migration is not finalized yet".
                Err(Error::Refused { description, .. })
                    if description.contains("not finalized") && Instant::now() < deadline =>
                {
                    sleep(RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// Returns the versioned name of the machine that runs, such as `pc-q35-7.2`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn machine(&mut self, deadline: Instant) -> Result<String> {
        let property = json!({ "path": "/machine", "property": "type" });
        let answer = self.execute("qom-get", Some(property), deadline).await?;
        let name = answer.as_str().and_then(|name| name.strip_suffix("-machine"));
        name.map(str::to_owned)
            .ok_or_else(|| Error::protocol(Peer::Qemu, format!("unexpected type of the machine: {answer}")))
    }

    /// Returns the version of the QEMU that runs: major and minor number.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn version(&mut self, deadline: Instant) -> Result<(u32, u32)> {
        let answer = self.execute("query-version", None, deadline).await?;
        let number = |name: &str| answer["qemu"][name].as_u64().and_then(|number| number.try_into().ok());
        number("major").zip(number("minor")).ok_or_else(|| {
            Error::protocol(Peer::Qemu, format!("missing version in the reply to query-version: {answer}"))
        })
    }

    async fn set_capabilities(&mut self, which: &[(&str, bool)], deadline: Instant) -> Result<()> {
        let which = which.iter().map(|(name, on)| json!({ "capability": name, "state": on }));
        let arguments = json!({ "capabilities": which.collect::<Vec<Value>>() });
        self.execute("migrate-set-capabilities", Some(arguments), deadline).await.map(drop)
    }

    async fn is_migrating(&mut self, deadline: Instant) -> Result<bool> {
        let answer = self.execute("query-migrate", None, deadline).await?;
        let status = answer["status"].as_str();
        Ok(!matches!(status, None | Some("none" | "completed" | "failed" | "cancelled")))
    }

    /// Waits for the end of a migration.
    async fn migrated(&mut self, deadline: Instant) -> Result<()> {
        self.reached("completed", deadline).await
    }

    /// Waits until a migration has a status.
    async fn reached(&mut self, awaited: &str, deadline: Instant) -> Result<()> {
        let start = Instant::now();
        loop {
            let answer = self.execute("query-migrate", None, deadline).await?;
            match answer["status"].as_str() {
                Some(status) if status == awaited => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = answer["error-desc"].as_str().unwrap_or("QEMU gives no cause");
                    return Err(Error::protocol(
                        Peer::Qemu,
                        format!("could not save or load the memory: {why}"),
                    ));
                }
                _ => {}
            }
            // Each change of the status is an event.
            timeout_at(deadline, self.event("MIGRATION")).await.map_err(|_| {
                Error::timed_out("the guest's memory to be written or read", start.elapsed())
            })??;
        }
    }
}
