//! Reading the record of a VM from its two files.

use super::files::{MADE, SINCE, decode, read_bytes};
use super::home::Home;
use super::misplaced::misplaced;
use super::record::VmRecord;
use crate::error::Result;
use crate::spec::VmName;

/// Reads a VM's record: its present state, else the state of its creation and later changes;
/// returns `None` without a record.
pub(super) fn read(home: &Home, name: &VmName) -> Result<Option<VmRecord>> {
    let dir = home.vm(name);
    let path = dir.join(MADE);
    let Some(bytes) = read_bytes(&path)? else { return Ok(None) };
    let since = read_bytes(&dir.join(SINCE))?;
    // If the newer record is valid, the older one only has to be of the same VM.
    if let Some(since) = &since
        && let Some((id, of)) = VmRecord::whose(&bytes)
        && of == *name
    {
        let path = dir.join(SINCE);
        match decode(home, &path, since) {
            Ok(since) if since.handle.id == id && since.handle.name() == name => return Ok(Some(since)),
            Err(error) if VmRecord::is_newer(since) => return Err(error),
            // Truncated by a power cut, or another VM's: the record of the creation is still valid.
            _ => {}
        }
    }
    let made = decode(home, &path, &bytes)?;
    if made.handle.name() != name {
        return Err(misplaced(home, name, &made));
    }
    Ok(Some(made))
}
