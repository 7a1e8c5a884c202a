//! `slm evaluate`.

use std::path::PathBuf;

use slmops_api::report::{EvaluationReport, Verdict};

use super::Session;
use crate::error::{Context, Exit, Failure, Result};
use crate::output::table;
use crate::ship::report::{self, Row};
use crate::ship::{engine, source};

/// Measure a model.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Measure a model file against a reference: perplexity, KL divergence, agreement, \
                  the task suite, speed and memory. With --gate the answer decides the exit code: \
                  0 no worse or too few samples, 3 worse.",
    after_help = "Example:\n  $ slm evaluate q4_k_m.gguf --reference f16.gguf --gate --out report.json"
)]
pub struct Evaluate {
    /// The GGUF file
    pub model: PathBuf,
    /// The file to compare with [default: the model's own 16-bit form]
    #[arg(long, value_name = "FILE")]
    pub reference: Option<PathBuf>,
    /// A LoRA adapter (GGUF) that is applied to the model and to what it is compared with
    #[arg(long, value_name = "FILE")]
    pub adapter: Option<PathBuf>,
    /// How it is measured
    #[command(flatten)]
    pub measuring: engine::MeasuringArgs,
    /// Ask the gate
    #[arg(long)]
    pub gate: bool,
    /// Where the report goes, as JSON
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

impl Evaluate {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let model = source::inspect(&self.model)?;
        let reference = match &self.reference {
            Some(file) => source::inspect(file)?,
            None => {
                let original = source::original(session, &self.model).await?;
                source::reference(session, &original).await?
            }
        };
        let measuring = self.measuring.load()?;
        let adapter = self.adapter.as_deref().map(source::adapter).transpose()?;
        let measure = async |label, file| {
            engine::evaluate(session, label, file, &reference, adapter.as_ref(), &measuring).await
        };
        let base = measure("the reference", &reference).await?;
        let measured = measure("the model", &model).await?;
        if let Some(out) = &self.out {
            let what = || format!("write `{}`", out.display());
            let json = serde_json::to_vec_pretty(&measured).internal(what)?;
            std::fs::write(out, json).user(what)?;
        }
        let decision = if self.gate {
            Some(engine::gate(&measured, &base, &model.file_type, None)?)
        } else {
            None
        };
        session.out.show(&measured, || {
            let rows = [
                Row {
                    name: "reference".to_owned(),
                    classes: String::new(),
                    report: &base,
                    gate: None,
                },
                Row {
                    name: model.file_type.to_lowercase(),
                    classes: String::new(),
                    report: &measured,
                    gate: decision.as_ref(),
                },
            ];
            let mut text = report::measurements(&rows);
            text.push_str("\n\n");
            text.push_str(&tasks(&measured));
            if let Some(decision) = &decision {
                text.push_str("\n\n");
                text.push_str(&report::gate_table(decision));
            }
            text
        })?;
        match decision {
            Some(decision) if decision.verdict == Verdict::Worse => {
                let failure = Failure::user(format!("`{}` is worse", self.model.display()));
                Err(failure
                    .exit(Exit::Gate)
                    .hint("the rows above say in what; docs/gates.md explains them"))
            }
            _ => Ok(()),
        }
    }
}

fn tasks(report: &EvaluationReport) -> String {
    let rows = report.tasks.iter().map(|task| {
        let right = task.items.iter().filter(|item| **item).count();
        vec![
            task.name.clone(),
            format!("{right}/{}", task.items.len()),
            format!("[{:.0} %, {:.0} %]", task.accuracy.low * 100.0, task.accuracy.high * 100.0),
        ]
    });
    table(&["task", ">right", ">95 % interval"], rows)
}
