//! What the pipeline asks of `optimize` and `evaluate`, with progress and a cache of reports.

use std::collections::BTreeMap;
use std::path::Path;

use semver::Version;
use slmops_api::probe::ProbeSet;
use slmops_api::report::{EvaluationReport, GateDecision};
use slmops_artifact::gguf::Header;

use super::source::File;
use crate::commands::Session;
use crate::error::{Failure, Result};
use crate::progress::Stage;

pub struct Suite;

fn later() -> Failure {
    Failure::internal("not connected yet")
}

pub fn suite(_file: Option<&Path>) -> Result<Suite> {
    Err(later())
}
pub fn repacked_bytes(_header: &Header) -> u64 {
    0
}
pub async fn reference(_from: &Path, _to: &Path, _stage: &Stage) -> Result<()> {
    Err(later())
}
pub async fn quantise(_from: &Path, _to: &Path, _kind: &str, _stage: &Stage) -> Result<()> {
    Err(later())
}
pub async fn evaluate(
    _session: &Session,
    _label: &str,
    _file: &File,
    _reference: &File,
    _suite: &Suite,
) -> Result<EvaluationReport> {
    Err(later())
}
pub fn gate(
    _c: &EvaluationReport,
    _o: &EvaluationReport,
    _q: &str,
    _e: Option<(&Version, &EvaluationReport)>,
) -> Result<GateDecision> {
    Err(later())
}
pub async fn probes(
    _session: &Session,
    _reference: &File,
    _variant: &File,
    _quantisation: &str,
) -> Result<ProbeSet> {
    Err(later())
}
pub fn tools() -> BTreeMap<String, String> {
    BTreeMap::new()
}
pub fn import_folder(_from: &Path, _to: &Path) -> Result<()> {
    Err(later())
}
pub fn damage(_from: &Path, _to: &Path) -> Result<()> {
    Err(later())
}
