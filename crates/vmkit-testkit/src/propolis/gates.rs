//! Gates at which the machine of a fake server waits while a test holds them.

use std::sync::Arc;

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
        drop(self.of(gate).lock_owned().await);
    }
}
