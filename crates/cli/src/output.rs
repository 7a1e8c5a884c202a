//! What goes to stdout: a table or text for people, or JSON for programs.

use std::io::Write;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::error::{Context, Failure, Result};

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// Prints results.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// How.
    pub format: Format,
}

impl Out {
    /// Prints `value`: as JSON, or as the text that `text` makes of it.
    pub fn show<T: Serialize + ?Sized>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<()> {
        match self.format {
            Format::Text => print(&text()),
            Format::Json => {
                let json = serde_json::to_string_pretty(value)
                    .internal(|| "print the result as JSON".to_owned())?;
                print(&json)
            }
        }
    }

    /// Prints what was done when there is nothing else to show.
    pub fn done(&self, what: &str) -> Result<()> {
        self.show(&serde_json::json!({ "done": what }), || what.to_owned())
    }

    /// Whether JSON is wanted.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }
}

/// Writes a line to stdout. A reader that went away (`| head`) is no failure.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.write_all(b"\n")) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::internal("write to standard output").source(error)),
        Ok(()) => stdout.flush().internal(|| "write to standard output".to_owned()),
    }
}

/// A table without lines, so that it reads well and cuts well (`| awk`). Columns whose header
/// starts with `>` are aligned to the right.
pub fn table<R: IntoIterator<Item = Vec<String>>>(header: &[&str], rows: R) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|name| name.trim_start_matches('>').to_uppercase()));
    let mut any = false;
    for row in rows {
        any = true;
        table.add_row(row);
    }
    for (index, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    if !any {
        return "nothing yet".to_owned();
    }
    let lines: Vec<String> =
        table.to_string().lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// `key: value` lines, aligned.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    let lines: Vec<String> =
        pairs.iter().map(|(key, value)| format!("{key:width$}  {value}")).collect();
    lines.join("\n")
}
