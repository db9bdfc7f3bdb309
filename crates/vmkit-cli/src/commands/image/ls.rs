//! `vmkit image ls`.

use clap::Args;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output::{self, TextTable};
use crate::{human_image, json_image};

/// List local images, or those that can be pulled.
#[derive(Debug, Args)]
pub(crate) struct ImageLsArgs {
    /// List the names of the catalogue instead, which can be pulled.
    #[arg(long)]
    available: bool,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

impl ImageLsArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let store = context.images()?;
        if self.available {
            let entries = store.catalogue().entries();
            if self.json {
                return output::json(&entries.iter().map(json_image::AvailableView::of).collect::<Vec<_>>());
            }
            let mut table = TextTable::new(&["NAME", "TITLE", "ARCHITECTURES", "ALSO"]);
            for entry in entries {
                let arches: Vec<&str> = entry.arches.iter().map(|arch| arch.as_str()).collect();
                let newest = entry.newest.then(|| entry.name.name().to_owned());
                let also: Vec<String> = newest.into_iter().chain(entry.aliases).collect();
                table.row([entry.name.to_string(), entry.title, arches.join(" "), also.join(" ")]);
            }
            return output::text(table);
        }
        let (images, unreadable) = store.list()?;
        for error in &unreadable {
            output::warning(error);
        }
        match self.json {
            true => output::json(&images.iter().map(json_image::ImageView::of).collect::<Vec<_>>()),
            false => {
                if images.is_empty() {
                    output::progress(
                        "no local images yet: `vmkit image pull debian:12` fetches one, --available lists the catalogue",
                    );
                }
                output::text(human_image::list(&images))
            }
        }
    }
}
