//! The references that are made and never written by hand: the page of the command line, the schema
//! of vmkit.toml.

use clap::Command;

/// Returns the page `docs/cli.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# The command line\n\n\
         This page is what `vmkit --help` and `vmkit COMMAND --help` print; a test keeps it so.\n",
    );
    let mut command = crate::command().term_width(100);
    command.build();
    describe(&mut page, &mut command, 2);
    page
}

/// Returns the JSON Schema of `vmkit.toml`, which is `docs/vmkit.schema.json`.
pub fn schema() -> String {
    format!("{:#}\n", vmkit::vmfile::schema())
}

fn describe(page: &mut String, command: &mut Command, level: usize) {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let help = command.render_long_help().to_string();
    let help: String = help.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    page.push_str(&format!("\n{} `{name}`\n\n```text\n{}```\n", "#".repeat(level), help));
    for below in command.get_subcommands_mut().filter(|below| below.get_name() != "help") {
        describe(page, below, level + 1);
    }
}
