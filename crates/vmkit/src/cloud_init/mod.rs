//! The NoCloud seed: its documents, and the ISO that carries them.
