//! What QEMU says when it refuses to start, read for what matters to a user.
//!
//! Pure. The whole of it stays in the log.

use std::path::PathBuf;

/// Returns the disk that another process has locked, where QEMU says that one has.
///
/// Source: QEMU's block/file-posix.c, `raw_check_lock_bytes`, and its hint in
/// `raw_handle_perm_lock`: since 2.12.
pub(super) fn locked_disk(words: &str) -> Option<PathBuf> {
    let is_lock = |line: &str| line.contains("Failed to get ") && line.trim_end().ends_with(" lock");
    if !words.lines().any(is_lock) {
        return None;
    }
    let hint = words.lines().find_map(|line| line.split_once("Is another process using the image ["))?.1;
    Some(PathBuf::from(hint.rsplit_once("]?")?.0))
}

/// Reports whether QEMU could not get a port of the host.
pub(super) fn is_port_refused(words: &str) -> bool {
    words.contains("Could not set up host forwarding rule")
}

/// Returns QEMU's last words in short: without the program and the switch, which may be hundreds of
/// characters.
pub(super) fn in_short(words: &str) -> String {
    if let Some(path) = locked_disk(words) {
        return format!("another process uses the disk {}", path.display());
    }
    let line = words.trim().lines().next_back().unwrap_or_default();
    let line = line
        .strip_prefix("qemu-system-")
        .and_then(|line| line.split_once(": "))
        .map_or(line, |(_, rest)| rest);
    // `-switch value: what is wrong`. A value may have a colon, and none with a blank behind it
    // that QEMU wrote itself.
    match line.strip_prefix('-').and_then(|line| line.split_once(": ")) {
        Some((_, rest)) => rest.to_owned(),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 and 10.0 say it.
    const LOCKED: &str = "qemu-system-x86_64: -blockdev driver=raw,node-name=data0,file.driver=file,file.filename=/d/a [1].img: \
                          Failed to get \"write\" lock\nIs another process using the image [/d/a [1].img]?\n";

    #[test]
    fn a_disk_in_use_is_found_in_the_messages_of_qemu() {
        assert_eq!(locked_disk(LOCKED), Some("/d/a [1].img".into()));
        assert_eq!(
            locked_disk(&LOCKED.replace("\"write\"", "shared \"write\"")),
            Some("/d/a [1].img".into())
        );
        assert_eq!(locked_disk("qemu: Is another process using the image [/d]?"), None);
        assert_eq!(in_short(LOCKED), "another process uses the disk /d/a [1].img");
    }

    #[test]
    fn the_last_message_of_qemu_is_reported_without_the_switch_before_it() {
        for (words, short) in [
            (
                "qemu-system-x86_64: -blockdev driver=qcow2,x=/a: Could not open '/a': No such file",
                "Could not open '/a': No such file",
            ),
            ("warning\nqemu-system-x86_64: cannot set up guest memory", "cannot set up guest memory"),
            ("Segmentation fault", "Segmentation fault"),
            ("", ""),
        ] {
            assert_eq!(in_short(words), short);
        }
    }
}
