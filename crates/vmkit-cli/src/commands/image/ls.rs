//! `vmkit image ls`.

use clap::Args;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::{human_image, json_image};

/// Lists the images that are kept here, or those that can be had.
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Lists the names of the catalogue instead: what can be had.
    #[arg(long)]
    available: bool,
    /// Prints a JSON array.
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let store = context.images()?;
        if self.available {
            let entries = store.catalogue().entries();
            if self.json {
                return output::json(&entries.iter().map(json_image::Available::of).collect::<Vec<_>>());
            }
            let mut table = Table::new(&["NAME", "TITLE", "ARCHITECTURES", "NOTE"]);
            for entry in entries {
                let arches: Vec<&str> = entry.arches.iter().map(|arch| arch.as_str()).collect();
                let note = if entry.newest { format!("also {}", entry.name.name()) } else { String::new() };
                table.row([entry.name.to_string(), entry.title, arches.join(" "), note]);
            }
            return output::text(table);
        }
        let (images, unreadable) = store.list()?;
        for error in &unreadable {
            output::warning(error);
        }
        match self.json {
            true => output::json(&images.iter().map(json_image::Kept::of).collect::<Vec<_>>()),
            false => output::text(human_image::list(&images)),
        }
    }
}
