//! Packing a variant as a ModelPack artifact, signing it, and pushing both.

use std::path::Path;

use slmops_api::ModelName;
use slmops_api::probe::{PROBES_FILE, ProbeSet};
use slmops_api::report::EvaluationReport;
use slmops_artifact::Digest;
use slmops_artifact::lineage::{LINEAGE_FILE, Lineage};
use slmops_artifact::package::{
    self, ADAPTER_FILE, Descriptor, EMPTY_CONFIG, MANIFEST_MEDIA_TYPE, MODEL_FILE, ModelConfig,
    Package, PackageFile, REPORT_FILE,
};
use slmops_artifact::signing::{self, PrivateKey};

use crate::error::{Context, Result};
use crate::registry::Repository;
use crate::ship::source::AdapterFile;

/// What goes into one package.
pub struct Contents<'a> {
    /// The model file.
    pub model: &'a Path,
    /// Its digest.
    pub weights: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The adapter that is applied to it.
    pub adapter: Option<&'a AdapterFile>,
    /// What every device that runs it must reproduce.
    pub probes: &'a ProbeSet,
    /// Where it comes from.
    pub lineage: &'a Lineage,
    /// What was measured of it.
    pub report: &'a EvaluationReport,
    /// For the manifest.
    pub config: &'a ModelConfig,
}

/// A pushed package.
pub struct Pushed {
    /// Its manifest's digest.
    pub manifest: Digest,
    /// Bytes that travelled.
    pub sent_bytes: u64,
}

/// Packs, signs and pushes; what the registry holds already does not travel again.
pub async fn push(
    repository: &Repository<'_>,
    name: &ModelName,
    tag: &str,
    key: &PrivateKey,
    contents: &Contents<'_>,
    on_progress: impl FnMut(u64, u64),
) -> Result<Pushed> {
    let json = |what: &str, value: Result<Vec<u8>, serde_json::Error>| {
        value.internal(|| format!("write {what}"))
    };
    let documents = [
        (PROBES_FILE, json(PROBES_FILE, serde_json::to_vec_pretty(contents.probes))?),
        (LINEAGE_FILE, contents.lineage.to_bytes()),
        (REPORT_FILE, json(REPORT_FILE, serde_json::to_vec_pretty(contents.report))?),
    ];
    let mut files = vec![PackageFile::new(MODEL_FILE, contents.weights, contents.size_bytes)];
    files.extend(
        contents.adapter.map(|file| {
            PackageFile::new(ADAPTER_FILE, file.adapter.digest, file.adapter.size_bytes)
        }),
    );
    files.extend(documents.iter().map(|(title, bytes)| PackageFile::of_bytes(title, bytes)));
    let package = Package::new(files, contents.config).internal(|| format!("pack {name} {tag}"))?;
    let bundle = signing::sign(name.as_str(), &package.signed_files(), key)
        .internal(|| format!("sign {name} {tag}"))?;

    let mut sent = repository.push_file(contents.model, contents.weights, on_progress).await?;
    if let Some(file) = contents.adapter {
        sent += repository.push_file(&file.path, file.adapter.digest, |_, _| ()).await?;
    }
    for (_, bytes) in documents {
        sent += repository.push_bytes(bytes).await?;
    }
    sent += repository.push_bytes(package.config_bytes().unwrap_or_default().to_vec()).await?;
    let manifest = package.manifest_bytes();
    let subject = Descriptor::of_bytes(MANIFEST_MEDIA_TYPE, &manifest);
    sent += manifest.len() as u64;
    repository.push_manifest(tag, manifest).await?;
    // The signature is a referrer of the manifest (OCI image-spec 1.1, "Manifest with subject").
    sent += repository.push_bytes(EMPTY_CONFIG.to_vec()).await?;
    let bundle_digest = Digest::of(&bundle);
    let bundle_size = bundle.len() as u64;
    sent += repository.push_bytes(bundle).await?;
    let signature = package::signature_manifest(&subject, bundle_digest, bundle_size);
    let reference = Digest::of(&signature).to_string();
    sent += signature.len() as u64;
    repository.push_manifest(&reference, signature).await?;
    Ok(Pushed { manifest: subject.digest, sent_bytes: sent })
}
