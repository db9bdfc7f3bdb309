//! The way into guests by SSH: [`SshGuests`].

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};

use super::guests::{Guest, GuestInput, GuestOutput, Guests};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::Hypervisor;
use crate::manager::{self, Condition, VmManager};
use crate::spec::VmName;
use crate::ssh::{Event, Exit, Login, Session};

/// How much of what is sent is read at once.
const CHUNK_BYTES: usize = 32 << 10;

/// Enters guests by SSH, with the keys that are in the records of their VMs.
#[derive(Debug)]
pub struct SshGuests<H> {
    manager: VmManager<H>,
}

/// A guest that was entered by SSH.
#[derive(Debug)]
pub struct SshGuest {
    session: Session,
    user: String,
}

impl<H: Hypervisor + 'static> SshGuests<H> {
    /// Makes the ways into the guests of this manager's VMs.
    pub fn new(manager: VmManager<H>) -> Self {
        Self { manager }
    }
}

impl<H: Hypervisor + 'static> Guests for SshGuests<H> {
    type Guest = SshGuest;

    async fn enter(&self, vm: &VmName, deadline: Instant) -> Result<SshGuest> {
        // Without a key of vmkit's own in the VM no waiting helps; anything else may still come.
        match self.manager.ssh_target(vm, &Login::default()).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.manager.wait(vm, Condition::Ssh, deadline.saturating_duration_since(Instant::now())).await?;
        let user = self.manager.ssh_target(vm, &Login::default()).await?.user;
        let login = Login::default();
        let session = self.manager.log_in(vm, &login, deadline, manager::Guest::Known).await?;
        Ok(SshGuest { session, user })
    }
}

impl Guest for SshGuest {
    fn user(&self) -> &str {
        &self.user
    }

    async fn cloud_init(&self, deadline: Instant) -> Result<()> {
        let done = self.session.cloud_init_done(deadline, |_| ()).await?;
        let Some(why) = done.failure() else { return Ok(()) };
        let message = format!("cloud-init failed in the guest: {why}");
        Err(Error::Backend { message, kind: ErrorKind::Guest, source: None })
    }

    async fn run(
        &self,
        argv: Vec<String>,
        mut input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> Result<Exit> {
        let began = Instant::now();
        let (mut to, mut from) = self.session.spawn_own(&argv, deadline).await?.split();
        let feed = async {
            let mut buffer = vec![0; CHUNK_BYTES];
            loop {
                match input.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    // Whoever ends without having read everything tells so by how it ends.
                    Ok(read) => {
                        if to.write(&buffer[..read]).await.is_err() {
                            break;
                        }
                    }
                }
            }
            let _ = to.end().await;
            std::future::pending::<Exit>().await
        };
        let listen = async {
            loop {
                match from.next().await? {
                    Event::Stdout(bytes) | Event::Stderr(bytes) => output(&bytes),
                    Event::Ended(exit) => return Ok(exit),
                }
            }
        };
        let run = async {
            tokio::select! {
                exit = listen => exit,
                exit = feed => Ok(exit),
            }
        };
        timeout_at(deadline, run).await.unwrap_or_else(|_| {
            let awaited = "the end of a command in the guest".to_owned();
            Err(Error::TimedOut { awaited, after: began.elapsed(), console: String::new() })
        })
    }
}
