//! Circles in a graph of uses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::Violation;

/// A graph of uses, each pair with the first place that has it.
#[derive(Default)]
pub(super) struct UseGraph {
    uses: BTreeMap<String, BTreeMap<String, (PathBuf, usize)>>,
}

impl UseGraph {
    /// Adds a use of one name by another; a use by itself is none.
    pub(super) fn add(&mut self, [from, to]: [String; 2], file: &Path, line: usize) {
        if from != to {
            self.uses.entry(from).or_default().entry(to).or_insert_with(|| (file.to_owned(), line));
        }
    }

    /// Returns each use that belongs to a circle.
    pub(super) fn circles(&self) -> Vec<Violation> {
        let mut violations = Vec::new();
        for (from, targets) in &self.uses {
            for (to, (file, line)) in targets {
                if let Some(back) = self.way(to, from) {
                    let message = format!("`{from}` uses `{to}`, and that `{}`: a circle", back.join("`, `"));
                    violations.push(Violation { path: file.clone(), line: *line, message });
                }
            }
        }
        violations
    }

    /// Returns the shortest way from one name to another, without the first.
    fn way<'a>(&'a self, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
        let mut seen = BTreeSet::from([from]);
        let mut ways = vec![vec![from]];
        while !ways.is_empty() {
            let mut longer = Vec::new();
            for way in ways {
                for next in self.uses.get(way[way.len() - 1]).into_iter().flat_map(BTreeMap::keys) {
                    let way: Vec<&str> = way.iter().copied().chain([next.as_str()]).collect();
                    if next == to {
                        return Some(way[1..].to_vec());
                    }
                    if seen.insert(next) {
                        longer.push(way);
                    }
                }
            }
            ways = longer;
        }
        None
    }
}
