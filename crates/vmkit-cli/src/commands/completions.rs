//! `vmkit completions`.

use clap::Args;
use clap_complete::Shell;

use crate::failure::Failure;
use crate::output;

/// Print a completion script for a shell.
///
/// For bash: `vmkit completions bash > ~/.local/share/bash-completion/completions/vmkit`
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

impl CompletionsArgs {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut crate::command(), "vmkit", &mut script);
        output::bytes(&script)
    }
}
