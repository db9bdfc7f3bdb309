//! Whether a text is the YAML that cloud-init takes.
//!
//! Pure. cloud-init passes over a whole document that is not, and says so in a log inside the guest
//! alone. Its parser, PyYAML, refuses a little more than this one, such as a tab between a key and
//! its value; what this one refuses, that one does as well.

/// What a document has to be at its top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TopLevel {
    /// Keys and values; with `or_nothing` a document of comments alone will do.
    Mapping { or_nothing: bool },
    /// A list.
    List,
}

/// The first thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct YamlMistake {
    /// Its line, counted from 1.
    pub(crate) line: usize,
    /// Its column, counted from 1; a column is a character.
    pub(crate) column: usize,
    /// Where it is in the text, in bytes.
    pub(crate) byte: usize,
    /// What it is: lower case, no full stop.
    pub(crate) what: String,
}

impl YamlMistake {
    /// Returns what to say of it where its place in the text is told by words.
    pub(crate) fn with_place(&self) -> String {
        format!("line {}, column {}: {}", self.line, self.column, self.what)
    }
}

/// Returns what is wrong with a text that has to be one document of YAML.
///
/// # Errors
/// The first mistake.
#[cfg(feature = "cloud-init")]
pub(crate) fn check(text: &str, top: TopLevel) -> Result<(), YamlMistake> {
    use granit_parser::{Event, Marker, Parser};

    let mistake = |at: &Marker, what: String| YamlMistake {
        line: at.line(),
        column: at.col() + 1,
        byte: at.byte_offset().unwrap_or_default().min(text.len()),
        what: format!("{what}; cloud-init would ignore all of this"),
    };
    let (mut documents, mut has_top) = (0, false);
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| mistake(error.marker(), format!("this is not YAML: {}", error.info())))?;
        let found = match event {
            Event::DocumentStart(..) if documents == 1 => {
                return Err(mistake(&span.start, "a second document begins here".to_owned()));
            }
            Event::DocumentStart(..) => {
                documents += 1;
                continue;
            }
            Event::MappingStart(..) => Some(TopLevel::Mapping { or_nothing: false }),
            Event::SequenceStart(..) => Some(TopLevel::List),
            Event::Scalar(..) | Event::Alias(..) => None,
            _ => continue,
        };
        if !has_top {
            has_top = true;
            let what = match (top, found) {
                (TopLevel::Mapping { .. }, Some(TopLevel::Mapping { .. }))
                | (TopLevel::List, Some(TopLevel::List)) => continue,
                (TopLevel::Mapping { .. }, _) => {
                    "this is not YAML with keys and values, each `key: value`, at the top level"
                }
                (TopLevel::List, _) => "this is not YAML with a list at the top level",
            };
            return Err(mistake(&span.start, what.to_owned()));
        }
    }
    match (has_top, top) {
        (true, _) | (false, TopLevel::Mapping { or_nothing: true }) => Ok(()),
        (false, _) => Err(mistake(&Marker::new(0, 1, 0).with_byte_offset(Some(0)), "it is empty".to_owned())),
    }
}

/// Returns nothing: without YAML the whole seed is refused.
#[cfg(not(feature = "cloud-init"))]
pub(crate) fn check(_text: &str, _top: TopLevel) -> Result<(), YamlMistake> {
    Ok(())
}

#[cfg(all(test, feature = "cloud-init"))]
mod tests {
    use super::*;

    const CONFIG: TopLevel = TopLevel::Mapping { or_nothing: true };

    fn said(text: &str, top: TopLevel) -> String {
        let mistake = check(text, top).expect_err("it has an error");
        let before = &text[..mistake.byte];
        assert_eq!(mistake.line, before.matches('\n').count() + 1, "{text:?}");
        assert_eq!(
            mistake.column,
            before.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
            "{text:?}"
        );
        mistake.with_place()
    }

    #[test]
    fn what_people_write_passes() {
        for text in [
            "#cloud-config\n",
            "#cloud-config\r\npackages:\r\n- curl\r\n",
            "#cloud-config\n---\na: 1\n...\n",
            "#cloud-config\nruncmd: [\n  ls, # all\n  [sh, -c, 'echo a: b']\n]\n",
            "#cloud-config\nruncmd: [\nls\n]\n",
            "#cloud-config\na: \"two\nlines\"\nb: 'x'\n",
            "#cloud-config\nwrite_files:\n- path: /a\n  content: |\n    #!/bin/sh\n    x: {[\"\n",
            "#cloud-config\na: &x {b: 1}\nc:\n  <<: *x\n  d: !!binary aGk=\n",
            "#cloud-config\n{\"a\": [{\"b\": null}]}\n",
            "#cloud-config\na: 1\na: 2\n",
            "#cloud-config\nä: \"ü😀\"\n",
        ] {
            assert_eq!(check(text, CONFIG), Ok(()), "{text:?}");
        }
        check("#cloud-config-archive\n- type: text/cloud-config\n", TopLevel::List).unwrap();
    }

    #[test]
    fn a_mistake_is_reported_with_line_and_column_in_characters() {
        for (text, expected) in [
            ("#cloud-config\n{[\"\n", "line 2, column 3: this is not YAML: "),
            ("#cloud-config\nü: *é\n", "line 2, column 4: this is not YAML: "),
            ("#cloud-config\na:\n\tb: 1\n", "line 3, column 2: this is not YAML: "),
            ("#cloud-config\nruncmd: echo a: b\n", "line 2, column 15: this is not YAML: "),
            ("#cloud-config\n\n- a\n", "line 3, column 1: this is not YAML with keys and values"),
            ("#cloud-config\na:1\n", "line 2, column 1: this is not YAML with keys and values"),
            ("#cloud-config\na: 1\n---\nb: 2\n", "line 3, column 1: a second document begins here"),
        ] {
            let said = said(text, CONFIG);
            assert!(said.starts_with(expected), "{said}");
        }
        assert!(said("# none\n", TopLevel::Mapping { or_nothing: false }).contains("it is empty"));
        assert!(said("a: 1\n", TopLevel::List).contains("with a list"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\]{}:,&*!|>'\"%@`#\\- \\t\\nabü]{0,60}") {
            let _ = check(&text, CONFIG).map_err(|mistake| text[mistake.byte..].len());
        }
    }
}
