//! Clones of VMs that have neither disks nor memory: what their states are.

use super::NoopHypervisor;
use crate::abilities::{CloneRequest, Clones, MemoryMode, SnapshotKind};
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::lifecycle::{Operation, VmState, next};

impl Clones for NoopHypervisor {
    async fn create_clone(&self, source: &VmHandle, request: &CloneRequest) -> Result<VmHandle> {
        let continues = {
            let mut books = self.books();
            books.take_failure(Operation::Clone)?;
            let state = books.find(source)?.state.clone();
            match &request.snapshot {
                None => {
                    next(&state, Operation::Clone)?;
                    false
                }
                Some(name) => {
                    let snapshots = books.snapshots.get(&source.id).map_or(&[][..], Vec::as_slice);
                    let there = snapshots.iter().find(|there| there.name == *name);
                    let there = there.ok_or_else(|| Error::not_found(Subject::Snapshot, name))?;
                    there.kind == SnapshotKind::Memory && request.memory != MemoryMode::DisksOnly
                }
            }
        };
        let vm = self.prepare(&request.spec).await?;
        if !continues {
            return Ok(vm);
        }
        let mut books = self.books();
        let found = books.find(&vm)?;
        found.state = VmState::Saved;
        Ok(self.handle(&vm, found))
    }
}
