//! Talk on stderr: bars on a terminal, one line for each finished stage elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::units;

const TICK: Duration = Duration::from_millis(120);

/// Where progress goes.
#[derive(Clone)]
pub struct Progress {
    bars: Option<MultiProgress>,
    quiet: bool,
}

impl Progress {
    /// Bars if stderr is a terminal, lines otherwise; nothing when `quiet`.
    pub fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Self { bars, quiet }
    }

    /// A line for people that stays.
    pub fn say(&self, text: impl AsRef<str>) {
        if self.quiet {
            return;
        }
        match &self.bars {
            Some(bars) => {
                // A terminal that went away is no reason to stop working.
                let _ = bars.println(text.as_ref());
            }
            None => eprintln!("{}", text.as_ref()),
        }
    }

    /// Starts a stage.
    pub fn stage(&self, what: impl Into<String>) -> Stage {
        let what = what.into();
        let bar = match &self.bars {
            Some(bars) => {
                let bar = bars.add(ProgressBar::new_spinner());
                bar.set_style(style("  {spinner:.cyan} {msg} {elapsed:.dim}"));
                bar.set_message(what.clone());
                bar.enable_steady_tick(TICK);
                bar
            }
            None => ProgressBar::hidden(),
        };
        Stage { progress: self.clone(), bar, what, started: Instant::now() }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
        .progress_chars("━╸ ")
}

/// A piece of work that takes a while.
pub struct Stage {
    progress: Progress,
    bar: ProgressBar,
    what: String,
    started: Instant,
}

impl Stage {
    /// Shows a bar of `done` of `total` steps.
    pub fn steps(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(style(
                "  {spinner:.cyan} {msg:34} {bar:24.cyan/dim} {pos}/{len} {elapsed:.dim}",
            ));
        }
        self.bar.set_position(done);
    }

    /// Shows a bar of `done` of `total` bytes.
    pub fn bytes(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(style(
                "  {spinner:.cyan} {msg:34} {bar:24.cyan/dim} {bytes}/{total_bytes} {elapsed:.dim}",
            ));
        }
        self.bar.set_position(done);
    }

    /// Says what exactly is being done.
    pub fn note(&self, note: &str) {
        self.bar.set_message(format!("{}: {note}", self.what));
    }

    /// Ends the stage well; `result` says what came of it.
    pub fn done(self, result: impl AsRef<str>) {
        self.bar.finish_and_clear();
        let took = self.started.elapsed();
        let took = if took.as_millis() < 200 {
            String::new()
        } else {
            format!(" ({})", units::duration(took))
        };
        let result = result.as_ref();
        let separator = if result.is_empty() { "" } else { ": " };
        self.progress.say(format!("  ✓ {}{separator}{result}{took}", self.what));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.finish_and_clear();
        }
    }
}
