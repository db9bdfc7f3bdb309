//! What a server takes for its firmware.
//!
//! Pure: a size to what is wrong with it. A server maps the file as it is, and panics where that
//! can't be done.
//!
//! Source: propolis-server, which maps whole pages below 4 GiB, of at most 2 MiB.

/// How large a page is, in bytes.
const PAGE_BYTES: u64 = 4096;
/// The largest firmware, in bytes.
const MOST_BYTES: u64 = 2 << 20;

/// Returns what keeps a server from taking a file of this size for its firmware, and what would be
/// right.
pub(crate) fn problem(bytes: u64) -> Option<String> {
    let right = format!(
        "a bootrom has whole pages of {PAGE_BYTES} bytes, at most {MOST_BYTES} bytes in all: use an \
         OVMF_CODE.fd without variables"
    );
    let wrong = match bytes {
        0 => "the file is empty".to_owned(),
        bytes if bytes > MOST_BYTES || !bytes.is_multiple_of(PAGE_BYTES) => {
            format!("the file has {bytes} bytes")
        }
        _ => return None,
    };
    Some(format!("{wrong}; {right}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_up_to_the_limit_fit_and_nothing_else() {
        for bytes in [4096, 8192, 2 << 20, 1_966_080] {
            assert_eq!(problem(bytes), None, "{bytes}");
        }
        for bytes in [0, 1, 4095, 5000, (2 << 20) + 1, (2 << 20) + 4096, 4 << 20, u64::MAX] {
            let problem = problem(bytes).unwrap();
            assert!(problem.contains("2097152") && problem.contains("4096"), "{problem}");
            assert!(bytes == 0 || problem.contains(&bytes.to_string()), "{problem}");
        }
    }
}
