//! Gates at which the machine of a fake server waits while a test holds them.

use std::sync::Arc;

use tokio::sync::watch;

use super::behaviour::Gate;

/// Gates that a test can hold; the machine waits at a held gate.
#[derive(Debug, Clone, Default)]
pub(super) struct MachineGates {
    host: Arc<tokio::sync::Mutex<()>>,
    pause: Arc<tokio::sync::Mutex<()>>,
    ensure: Arc<tokio::sync::Mutex<()>>,
    attach: Arc<tokio::sync::Mutex<()>>,
    event: Arc<tokio::sync::Mutex<()>>,
    release: Arc<tokio::sync::Mutex<()>>,
    /// How many clients of the serial port have come to the gate `attach`.
    attaching: Arc<watch::Sender<usize>>,
}

impl MachineGates {
    pub(super) fn of(&self, gate: Gate) -> Arc<tokio::sync::Mutex<()>> {
        match gate {
            Gate::Host => Arc::clone(&self.host),
            Gate::Ensure => Arc::clone(&self.ensure),
            Gate::Pause => Arc::clone(&self.pause),
            Gate::Attach => Arc::clone(&self.attach),
            Gate::Event => Arc::clone(&self.event),
            Gate::Release => Arc::clone(&self.release),
        }
    }

    pub(super) async fn pass(&self, gate: Gate) {
        if matches!(gate, Gate::Attach) {
            self.attaching.send_modify(|clients| *clients += 1);
        }
        drop(self.of(gate).lock_owned().await);
    }

    /// Waits until so many clients of the serial port have been sent the history.
    pub(super) async fn attaching(&self, clients: usize) {
        // The sender is this one's own.
        let _ = self.attaching.subscribe().wait_for(|now| *now >= clients).await;
    }
}
