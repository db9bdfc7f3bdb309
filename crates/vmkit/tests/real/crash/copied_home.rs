//! A kill at a step, and the next process works in a copy of the home: the original is as it was,
//! and goes on.

use std::path::Path;

use vmkit::ErrorKind;
use vmkit_testkit::crash::{self, StepSample};

use super::moved_home::copy;
use super::{LIVES, World, runtime};

/// Before how many steps each operation is killed: all would take half a minute more.
const KILLS: usize = 6;

#[test]
fn an_operation_in_a_copy_after_a_kill_leaves_the_original_as_it_was() {
    let mut sample = StepSample::new();
    for (word, before, allowed) in LIVES {
        let check = |dir: &Path, place: &str| {
            let original = World::at(dir);
            let state = original.listed();
            assert!(allowed.contains(&state), "{place}: {state}");
            original.settles();
            let (files, qemus) = (original.files(), original.qemus());
            if original.home.exists() {
                copy(&original.home, &dir.join("copy"));
            }
            let copied = World::of(dir, "copy");
            go_on_in_copy(&copied, word, qemus, place);
            copied.assert_removable(place);
            original.assert_untouched(&files, qemus, place);
            original.go_on(word, original.listed(), place);
            original.assert_removable(place);
        };
        let prepare = |dir: &Path| drop(World::prepared(dir, before));
        let test = "crash::a_whole_life_leaves_nothing";
        crash::kill_at_some_steps(&mut sample, KILLS, test, word, prepare, check);
    }
}

/// Does the operation in the copy, whose VM does not run: `qemus` run in the original.
fn go_on_in_copy(copied: &World, word: &str, qemus: usize, place: &str) {
    let state = copied.listed();
    assert!(!["running", "suspended"].contains(&state), "{place}: the copy is {state}");
    match word {
        // It would have to continue, to shut itself down.
        "stop" if state == "saved" && qemus > 0 => {
            let error = runtime().block_on(copied.operate(word)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy, "{place}: {error:?}");
        }
        "create" | "stop" | "remove" => copied.go_on(word, state, place),
        "start" if qemus == 0 => copied.go_on(word, state, place),
        _ => match runtime().block_on(copied.operate(word)) {
            Ok(()) => {
                let is_done = word.ends_with("forward") || (word, state) == ("save", "saved");
                assert!(is_done, "{place}: {word} in the copy");
            }
            Err(error) => {
                let expected = match word {
                    "start" => ErrorKind::Busy,
                    "unforward" => ErrorKind::NotFound,
                    _ => ErrorKind::InvalidState,
                };
                assert_eq!(error.kind(), expected, "{place}: {error:?}");
            }
        },
    }
    assert_eq!(copied.qemus(), usize::from(word == "start" && qemus == 0), "{place}");
}
