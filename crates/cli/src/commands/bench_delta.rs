//! `slm bench delta`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use slmops_artifact::files;
use slmops_artifact::gguf::{self, TensorType};

use super::Session;
use super::bench::Taken;
use crate::bench::delta::rivals::{Cost, Measured, Tool};
use crate::bench::delta::versions::{self, Change};
use crate::error::{Context, Failure, Result};
use crate::output::{fields, table};
use crate::units;

/// The types that are measured besides those of the file.
const TYPES: [TensorType; 14] = [
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
    TensorType::F16,
    TensorType::BF16,
];
/// The cases that are measured in every one of them.
const TYPE_CASES: [Change; 2] = [Change::Light, Change::Strong];

/// `slm bench delta`.
#[derive(Debug, clap::Args)]
pub struct DeltaBench {
    /// The model whose versions are made, a GGUF file
    model: PathBuf,
    /// Measure the delta from the model to this file, instead of making versions
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cases", "kinds", "weights"])]
    new: Option<PathBuf>,
    /// What changes from one version to the next [default: everything]
    #[arg(long = "case", value_name = "CASE,…", value_enum, value_delimiter = ',')]
    cases: Vec<Change>,
    /// Tensor types that all matrices are quantised to, or `own` for those of the file [default: own
    /// with every case and tool; then every type with light and strong, by slm alone]
    #[arg(long = "type", value_name = "TYPE,…", value_delimiter = ',', value_parser = parse_kind)]
    kinds: Vec<Kind>,
    /// The tools [default: all that are installed]
    #[arg(long = "tool", value_name = "TOOL,…", value_enum, value_delimiter = ',')]
    tools: Vec<Tool>,
    /// Take so many weights of the model's first tensors; 0 means all
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    weights: u64,
    /// Where the files are made, and removed at the end [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// A type for all matrices; none is each one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind(Option<TensorType>);

fn parse_kind(given: &str) -> Result<Kind, String> {
    if given == "own" {
        return Ok(Kind(None));
    }
    let known = TYPES.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(given));
    known.map(|kind| Kind(Some(kind))).ok_or_else(|| {
        let names: Vec<_> = TYPES.iter().map(|kind| kind.name()).collect();
        format!("`{given}` is no type that is measured: own, {}", names.join(", "))
    })
}

/// All that was measured, and where.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    taken: Taken,
    model: String,
    pairs: Vec<Pair>,
}

/// Two versions, and what the tools made of them.
#[derive(Serialize)]
struct Pair {
    /// What changed, or the name of the new file that was given.
    case: String,
    #[serde(rename = "type")]
    kind: Option<&'static str>,
    new_bytes: u64,
    /// What coding every field's differences at their order-0 entropy would take.
    order0_bytes: u64,
    tools: Vec<Measured>,
    /// What tensors of each type take of our delta.
    by_type: Vec<OfType>,
}

/// Tensors of one type.
#[derive(Serialize)]
struct OfType {
    #[serde(rename = "type")]
    kind: &'static str,
    new_bytes: u64,
    order0_bytes: u64,
    delta_bytes: u64,
}

impl DeltaBench {
    pub(super) async fn run(self, session: &Session) -> Result<()> {
        let what = || "make a folder for the versions".to_owned();
        let folder = match &self.folder {
            Some(parent) => tempfile::tempdir_in(parent).user(what)?,
            None => tempfile::tempdir().internal(what)?,
        };
        let report = {
            let session = session.clone();
            tokio::task::spawn_blocking(move || self.measure(&session, folder.path()))
        };
        let report = report.await.internal(|| "measure deltas".to_owned())??;
        session.out.show(&report, || text(&report))
    }

    fn measure(&self, session: &Session, folder: &Path) -> Result<Report> {
        use clap::ValueEnum as _;
        let source = gguf::open(&self.model).user(|| format!("read `{}`", self.model.display()))?;
        let weights = if self.weights == 0 { u64::MAX } else { self.weights };
        let given = |cases: &[Change]| match self.cases.is_empty() {
            true => cases.to_vec(),
            false => self.cases.clone(),
        };
        let tools = |tools: &[Tool]| match self.tools.is_empty() {
            true => tools.to_vec(),
            false => self.tools.clone(),
        };
        let mut report = Report {
            taken: Taken::here(),
            model: self.model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            pairs: Vec::new(),
        };
        if let Some(new) = &self.new {
            let case = new.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let pair = Pair::measure(
                session,
                case,
                None,
                (&self.model, new),
                &tools(Tool::value_variants()),
                folder,
            )?;
            report.pairs.push(pair);
            return Ok(report);
        }
        let own = (Kind(None), given(Change::value_variants()), tools(Tool::value_variants()));
        let plan: Vec<(Kind, Vec<Change>, Vec<Tool>)> = if self.kinds.is_empty() {
            let of = |kind| (Kind(Some(kind)), given(&TYPE_CASES), tools(&[Tool::Slm]));
            std::iter::once(own).chain(TYPES.map(of)).collect()
        } else {
            let of = |kind: &Kind| (*kind, own.1.clone(), own.2.clone());
            self.kinds.iter().map(of).collect()
        };
        let (old_path, new_path) = (folder.join("old"), folder.join("new"));
        for (Kind(kind), cases, tools) in plan {
            let name = kind.map_or("own", TensorType::name);
            let stage = session.progress.stage(format!("make the first version ({name})"));
            let old = versions::version(&source, kind, None, weights)?;
            write(&old_path, &old)?;
            stage.done(units::bytes(old.len() as u64));
            for case in cases {
                write(&new_path, &versions::version(&source, kind, Some(case), weights)?)?;
                let paths = (&old_path, &new_path);
                let pair = Pair::measure(session, super::word(&case), kind, paths, &tools, folder)?;
                report.pairs.push(pair);
            }
        }
        Ok(report)
    }
}

impl Pair {
    fn measure(
        session: &Session,
        case: String,
        kind: Option<TensorType>,
        (old_path, new_path): (&PathBuf, &PathBuf),
        tools: &[Tool],
        folder: &Path,
    ) -> Result<Self> {
        let name = kind.map_or("own", TensorType::name);
        let stage = session.progress.stage(format!("{name}, {case}"));
        let map = |path: &Path| files::map(path).user(|| format!("read `{}`", path.display()));
        let (old, new) = (map(old_path)?, map(new_path)?);
        let order0 = slmops_delta::order0_bytes(&old, &new)
            .ok_or_else(|| Failure::user("the versions are no GGUF or safetensors files"))?;
        let mut pair = Self {
            case,
            kind: kind.map(TensorType::name),
            new_bytes: new.len() as u64,
            order0_bytes: order0.values().sum(),
            tools: Vec::new(),
            by_type: Vec::new(),
        };
        for tool in tools {
            stage.note(&super::word(tool));
            pair.tools.extend(tool.measure(old_path, new_path, folder)?);
        }
        if tools.contains(&Tool::Slm) {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let mut sums: BTreeMap<Option<TensorType>, (u64, u64)> = BTreeMap::new();
            for part in slmops_delta::encode(&old, &new, threads, &|_| ()).parts {
                let sum = sums.entry(part.kind.filter(|_| part.name.is_some())).or_default();
                *sum = (sum.0 + part.bytes, sum.1 + part.delta_bytes);
            }
            let rows = sums.into_iter().map(|(kind, (new_bytes, delta_bytes))| OfType {
                kind: kind.map_or("none", TensorType::name),
                new_bytes,
                order0_bytes: order0.get(&kind).copied().unwrap_or(0),
                delta_bytes,
            });
            pair.by_type.extend(rows);
        }
        let said = pair.tools.iter().map(|found| {
            format!("{} {}", super::word(&found.tool), percent(found.delta_bytes, pair.new_bytes))
        });
        stage.done(said.collect::<Vec<_>>().join(", "));
        Ok(pair)
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).user(|| format!("write `{}`", path.display()))
}

/// Of the new file.
fn percent(bytes: u64, of: u64) -> String {
    let percent = bytes as f64 * 100.0 / of.max(1) as f64;
    let decimals = if percent < 0.1 { 4 } else { 2 };
    format!("{percent:.decimals$}")
}

fn text(report: &Report) -> String {
    let model = ("model", report.model.clone());
    let mut text = fields(&[&report.taken.lines()[..], &[model]].concat());
    let rows = report.pairs.iter().flat_map(|pair| {
        pair.tools.iter().map(move |found| {
            let speed = |cost: Option<Cost>| match cost {
                Some(cost) => format!("{:.1}", pair.new_bytes as f64 / 1e6 / cost.cpu_s.max(0.01)),
                None => String::new(),
            };
            let memory = |cost: Option<Cost>| match cost {
                Some(cost) => {
                    let own = units::bytes(cost.own_peak_bytes);
                    format!("{} ({own})", units::bytes(cost.peak_bytes))
                }
                None => String::new(),
            };
            vec![
                pair.case.clone(),
                pair.kind.unwrap_or("own").to_owned(),
                units::bytes(pair.new_bytes),
                percent(pair.order0_bytes, pair.new_bytes),
                super::word(&found.tool),
                found.delta_bytes.to_string(),
                percent(found.delta_bytes, pair.new_bytes),
                format!("{:.3}", found.delta_bytes as f64 / pair.order0_bytes.max(1) as f64),
                speed(found.encode),
                speed(found.apply),
                memory(found.encode),
                memory(found.apply),
            ]
        })
    });
    text.push_str("\n\n");
    text.push_str(&table(
        &[
            "case",
            "type",
            ">file",
            ">order 0 %",
            "tool",
            ">bytes",
            ">%",
            ">of order 0",
            ">encode MB/s",
            ">apply MB/s",
            ">encode peak (own)",
            ">apply peak (own)",
        ],
        rows,
    ));
    let rows = report.pairs.iter().filter(|pair| pair.by_type.len() > 1).flat_map(|pair| {
        pair.by_type.iter().map(move |of| {
            vec![
                pair.case.clone(),
                of.kind.to_owned(),
                units::bytes(of.new_bytes),
                units::bytes(of.order0_bytes),
                units::bytes(of.delta_bytes),
                format!("{:.3}", of.delta_bytes as f64 / of.order0_bytes.max(1) as f64),
            ]
        })
    });
    text.push_str("\n\n");
    text.push_str(&table(
        &["case", "tensors of type", ">size", ">order 0", ">slm", ">of order 0"],
        rows,
    ));
    text
}
