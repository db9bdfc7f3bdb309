//! The reference of the command line is a page that is always true.

#[test]
fn the_page_has_the_text_of_help() {
    crate::support::assert_golden("../../docs/cli.md", &vmkit_cli::reference());
}

#[test]
fn the_schema_in_the_docs_is_the_one_that_reads_files() {
    crate::support::assert_golden("../../docs/vmkit.schema.json", &vmkit_cli::schema());
}
