//! Logins to guests over SSH: [`SshGuests`].

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};

use super::guests::{ConnectedGuest, GuestConnector, GuestInput, GuestNotice, GuestOutput};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::Backend;
use crate::manager::{self, VmManager};
use crate::program::GuestExitStatus;
use crate::spec::VmName;
use crate::ssh::{LoginOptions, ProcessEvent, Session};

/// How much of the input is read at once.
const CHUNK_BYTES: usize = 32 << 10;

/// Logs in to guests over SSH, with the keys in the records of their VMs.
#[derive(Debug)]
pub struct SshGuests<H> {
    manager: VmManager<H>,
}

/// A guest that is connected over SSH.
#[derive(Debug)]
pub struct SshGuest<H> {
    manager: VmManager<H>,
    vm: VmName,
    /// The present session: a new one after cloud-init has restarted the guest.
    session: Mutex<Option<Arc<Session>>>,
    user: String,
}

impl<H: Backend + 'static> SshGuest<H> {
    fn session(&self) -> Result<Arc<Session>> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
        session.ok_or_else(|| Error::Ssh {
            target: self.vm.to_string(),
            problem: "the connection was lost while cloud-init was running".to_owned(),
            source: None,
        })
    }
}

impl<H: Backend + 'static> SshGuests<H> {
    /// Creates the logins to the guests of this manager's VMs.
    pub fn new(manager: VmManager<H>) -> Self {
        Self { manager }
    }
}

impl<H: Backend + 'static> GuestConnector for SshGuests<H> {
    type Guest = SshGuest<H>;

    async fn enter(&self, vm: &VmName, deadline: Instant, notice: GuestNotice<'_>) -> Result<SshGuest<H>> {
        // Without a key in the VM's record waiting does not help; everything else may still come
        // up.
        match self.manager.ssh_target(vm, &LoginOptions::default()).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let session = self.manager.enter(vm, deadline, manager::GuestAge::Known, notice).await?;
        let user = session.user().to_owned();
        let session = Mutex::new(Some(Arc::new(session)));
        Ok(SshGuest { manager: self.manager.clone(), vm: vm.clone(), session, user })
    }
}

impl<H: Backend + 'static> ConnectedGuest for SshGuest<H> {
    fn user(&self) -> &str {
        &self.user
    }

    async fn cloud_init(&self, deadline: Instant) -> Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let session = session.and_then(Arc::into_inner);
        let (session, done) = self.manager.cloud_init_through(&self.vm, session, deadline, |_| ()).await?;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(session));
        let Some(why) = done.failure() else { return Ok(()) };
        Err(Error::CloudInit { vm: self.vm.clone(), is_locked: false, problem: why })
    }

    async fn run(
        &self,
        argv: Vec<String>,
        mut input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> Result<GuestExitStatus> {
        let began = Instant::now();
        let session = self.session()?;
        let (mut to, mut from) = session.spawn_own(&argv, deadline).await?.split();
        let feed = async {
            let mut buffer = vec![0; CHUNK_BYTES];
            loop {
                match input.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    // The exit code of a command that ends without reading all of its input
                    // decides.
                    Ok(read) => {
                        if to.write(&buffer[..read]).await.is_err() {
                            break;
                        }
                    }
                }
            }
            let _ = to.end().await;
            std::future::pending::<GuestExitStatus>().await
        };
        let listen = async {
            loop {
                match from.next().await? {
                    ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes) => output(&bytes),
                    ProcessEvent::Ended(exit) => return Ok(exit),
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
            Err(Error::timed_out(awaited, began.elapsed()))
        })
    }
}
