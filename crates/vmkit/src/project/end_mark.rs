//! How a step says that it has ended, in its own output: [`EndMark`].
//!
//! Pure. A program that a step leaves in the background has the step's output open, so its end
//! can't be seen from that. The mark comes behind all that the step itself has printed, in the same
//! pipe: a NUL, the step's token, a colon, the exit code and a NUL.

/// The longest exit code, in digits.
const MOST_DIGITS: usize = 3;

/// Looks for the mark of one step in what it prints.
#[derive(Debug)]
pub(super) struct EndMark {
    begin: Vec<u8>,
    held: Vec<u8>,
    code: Option<u32>,
}

impl EndMark {
    /// Creates the mark of the step with this token.
    pub(super) fn new(token: &str) -> Self {
        Self { begin: format!("\0{token}:").into_bytes(), held: Vec::new(), code: None }
    }

    /// Returns what of these bytes the step itself has printed, as far as that is known by now.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut own = Vec::new();
        if self.code.is_some() {
            // That is printed by what was left in the background.
            return own;
        }
        self.held.extend_from_slice(bytes);
        loop {
            let Some(nul) = self.held.iter().position(|byte| *byte == 0) else {
                own.append(&mut self.held);
                return own;
            };
            own.extend(self.held.drain(..nul));
            let common = self.held.iter().zip(&self.begin).take_while(|(one, other)| one == other).count();
            if common == self.begin.len() {
                let digits = &self.held[common..];
                match digits.iter().position(|byte| *byte == 0) {
                    Some(end) => match str::from_utf8(&digits[..end]).ok().and_then(|text| text.parse().ok())
                    {
                        Some(code) => {
                            self.code = Some(code);
                            return own;
                        }
                        None => own.push(self.held.remove(0)),
                    },
                    None if digits.len() <= MOST_DIGITS => return own,
                    None => own.push(self.held.remove(0)),
                }
            } else if common == self.held.len() {
                return own;
            } else {
                own.push(self.held.remove(0));
            }
        }
    }

    /// Returns what was held back as the beginning of a mark, and is none.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        if self.code.is_some() { Vec::new() } else { std::mem::take(&mut self.held) }
    }

    /// Returns the exit code of the step, once the mark has come.
    pub(super) fn code(&self) -> Option<u32> {
        self.code
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<u32>) {
        let mut mark = EndMark::new("token");
        let mut own: Vec<u8> = bytes.chunks(piece).flat_map(|piece| mark.take(piece)).collect();
        own.extend(mark.rest());
        (own, mark.code())
    }

    #[test]
    fn the_mark_is_found_however_it_is_cut_and_what_follows_is_ignored() {
        for piece in 1..30 {
            let found = all(b"a\0b\0token:x\0\0token:17\0later", piece);
            assert_eq!(found, (b"a\0b\0token:x\0".to_vec(), Some(17)), "{piece}");
        }
    }

    proptest! {
        #[test]
        fn output_without_a_mark_comes_out_as_it_went_in(
            bytes in prop::collection::vec(prop::sample::select(b"\0token:1\n".to_vec()), 0..60), piece in 1..9_usize
        ) {
            let (own, code) = all(&bytes, piece);
            prop_assert!(code.is_some() || own == bytes);
        }
    }
}
