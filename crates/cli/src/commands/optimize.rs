//! `slm optimize`.

use std::path::PathBuf;

use super::Session;
use crate::error::Result;
use crate::output::table;
use crate::ship::report::{self, Row};
use crate::ship::{engine, source};
use crate::units;

/// Make variants.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Make variants of a model from its 16-bit reference, without a hub. With \
                  --evaluate each is measured against the reference.",
    after_help = "Example:\n  $ slm optimize model.gguf --quantisation Q8_0,Q4_K_M --out variants --evaluate"
)]
pub struct Optimize {
    /// A GGUF file, or a Hugging Face folder of a Llama-architecture model
    pub model: PathBuf,
    /// GGUF file types, joined by commas
    #[arg(
        long,
        visible_alias = "quantization",
        value_delimiter = ',',
        required = true,
        value_name = "TYPES"
    )]
    pub quantisation: Vec<String>,
    /// The folder that the variants go to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Measure each variant
    #[arg(long)]
    pub evaluate: bool,
    /// How variants are measured
    #[command(flatten)]
    pub measuring: engine::MeasuringArgs,
}

impl Optimize {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        use crate::error::Context;
        std::fs::create_dir_all(&self.out).user(|| format!("create `{}`", self.out.display()))?;
        let original = source::original(session, &self.model).await?;
        let reference = source::reference(session, &original).await?;
        let mut made = Vec::new();
        for quantisation in &self.quantisation {
            let quantisation = quantisation.to_uppercase();
            let variant = source::variant(session, &reference, &quantisation).await?;
            let target = self.out.join(format!("{}.gguf", quantisation.to_lowercase()));
            std::fs::copy(&variant.path, &target)
                .user(|| format!("write `{}`", target.display()))?;
            made.push((quantisation, source::File { path: target, ..variant }));
        }
        if !self.evaluate {
            let files: Vec<&source::File> = made.iter().map(|(_, file)| file).collect();
            return session.out.show(&files, || {
                let rows = made.iter().map(|(name, file)| {
                    vec![
                        name.clone(),
                        units::bytes(file.size_bytes),
                        file.path.display().to_string(),
                    ]
                });
                table(&["type", ">size", "file"], rows)
            });
        }
        let measuring = self.measuring.load()?;
        let mut reports = vec![(
            "reference".to_owned(),
            engine::evaluate(session, "the reference", &reference, &reference, &measuring).await?,
        )];
        for (name, file) in &made {
            let report = engine::evaluate(session, name, file, &reference, &measuring).await?;
            reports.push((name.to_lowercase(), report));
        }
        let all: Vec<_> = reports.iter().map(|(_, report)| report).collect();
        session.out.show(&all, || {
            let rows: Vec<Row<'_>> = reports
                .iter()
                .map(|(name, report)| Row {
                    name: name.clone(),
                    classes: String::new(),
                    report,
                    gate: None,
                })
                .collect();
            report::measurements(&rows)
        })
    }
}
