//! Releases: checked against the registry, the keys and the gate before they are taken in.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use slmops_api::delta::DeltaJob;
use slmops_api::model::{Adapter, NewRelease, Release, Requirements, Variant};
use slmops_api::problem::Problem;
use slmops_api::report::Verdict;
use slmops_api::selector::version_numbers;
use slmops_api::{ModelName, Page};
use slmops_artifact::package::{self, parse_signature_manifest};
use slmops_artifact::signing::{BUNDLE_MEDIA_TYPE, MAX_BUNDLE_BYTES, PublicKey};

use super::input::{Body, PageQuery, Path, Query};
use super::packages::PackagesError;
use super::{ApiError, AppState, by};
use crate::auth::{AsOperator, AsViewer};
use crate::store::Registered;

/// The most variants of one release.
const MAX_VARIANTS: usize = 32;
/// The longest reason for releasing in spite of a gate, in bytes.
const MAX_REASON_BYTES: usize = 1000;
/// The longest version that a release requires, in bytes.
const MAX_VERSION_BYTES: usize = 64;
/// Signatures of one manifest that are tried, at most.
const MAX_SIGNATURES: usize = 16;

/// Register a release: its packages must be in the registry, signed by a registered key, and not
/// refused by the gate. The same content again is no error.
#[utoipa::path(post, path = "/v1/releases", tag = "releases", request_body = NewRelease,
    responses((status = 201, body = Release), (status = 200, body = Release),
        (status = 409, body = Problem), (status = 422, body = Problem)))]
pub async fn create(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Body(release): Body<NewRelease>,
) -> Result<(StatusCode, Json<Release>), ApiError> {
    check_shape(&release)?;
    check_gate(&release)?;
    let key = publisher_key(&state, &release).await?;
    for variant in &release.variants {
        check_variant(&state, &release, variant, &key).await?;
    }
    let title = format!("{} {}", release.model, release.version);
    let (status, registered) = match state.store.add_release(by(&operator), release).await? {
        Registered::New(release) => (StatusCode::CREATED, release),
        Registered::Same(release) => (StatusCode::OK, release),
    };
    state.events.announce("release", title);
    state.engine.frame_changed();
    Ok((status, Json((*registered).clone())))
}

fn refuse(detail: impl Into<String>, hint: &str) -> ApiError {
    ApiError::unacceptable("release", detail, hint)
}

fn check_shape(release: &NewRelease) -> Result<(), ApiError> {
    let count = release.variants.len();
    if !(1..=MAX_VARIANTS).contains(&count) {
        let detail = format!("{count} variants are not within 1 to {MAX_VARIANTS}");
        return Err(refuse(detail, "a release has one variant for each device class or so"));
    }
    let Requirements { engine, agent } = &release.requires;
    for version in [engine, agent].into_iter().flatten() {
        if version.len() > MAX_VERSION_BYTES || version_numbers(version).is_none() {
            let shown: String = version.chars().take(MAX_VERSION_BYTES).collect();
            let detail = format!("`{shown}` is no version that a device could have");
            return Err(refuse(detail, "a required version looks like 0.0.7100"));
        }
    }
    let mut names = BTreeSet::new();
    let mut manifests = BTreeSet::new();
    for variant in &release.variants {
        if !names.insert(&variant.name) || !manifests.insert(variant.manifest) {
            let detail = format!("variant {} is there twice", variant.name);
            return Err(refuse(detail, "name each variant once"));
        }
        if variant.report.subject != variant.weights {
            return Err(refuse(
                format!(
                    "variant {}: its report is about {}, not its weights {}",
                    variant.name,
                    variant.report.subject.short(),
                    variant.weights.short()
                ),
                "evaluate the very file that is released: `slm evaluate`",
            ));
        }
        if variant.report.adapter != variant.adapter.map(|adapter| adapter.digest) {
            return Err(refuse(
                format!("variant {}: its report is about another adapter, or none", variant.name),
                "evaluate it with the adapter that is released: `slm evaluate --adapter`",
            ));
        }
        // The reference is usually the original dequantised: another file, but one for all.
        let reference = release.variants[0].report.reference;
        if variant.report.reference != reference {
            return Err(refuse(
                format!(
                    "variant {}: its report compares with {}, the others' with {}",
                    variant.name,
                    variant.report.reference.short(),
                    reference.short()
                ),
                "evaluate all variants against the same reference",
            ));
        }
    }
    Ok(())
}

fn check_gate(release: &NewRelease) -> Result<(), ApiError> {
    if let Some(gate_override) = &release.gate_override {
        let reason = gate_override.reason.trim();
        if reason.is_empty() || reason.len() > MAX_REASON_BYTES {
            let detail = "an override of the gate needs a reason in a few words";
            return Err(refuse(detail, "say why; it is kept in the audit log"));
        }
        return Ok(());
    }
    for variant in &release.variants {
        let Some(gate) = &variant.gate else { continue };
        let rows: Vec<String> = gate
            .rows
            .iter()
            .filter(|row| row.verdict == Verdict::Worse)
            .map(|row| {
                format!(
                    "{} against {}: loss {:.4} [{:.4}, {:.4}], allowed {:.4}",
                    row.metric,
                    row.against,
                    row.loss.mean,
                    row.loss.low,
                    row.loss.high,
                    row.allowed
                )
            })
            .collect();
        if gate.verdict == Verdict::Worse || !rows.is_empty() {
            return Err(ApiError::unacceptable(
                "gate",
                format!(
                    "the gate says that variant {} is worse: {}",
                    variant.name,
                    rows.join("; ")
                ),
                "ship a better variant, or release in spite of the gate with a reason \
                 (`gate_override`)",
            ));
        }
    }
    Ok(())
}

/// The key of a release, if what it signed counts now.
pub(super) async fn publisher_key(
    state: &AppState,
    release: &NewRelease,
) -> Result<PublicKey, ApiError> {
    let keys = state.store.keys().await?;
    let key = keys.iter().find(|key| key.id == release.key).ok_or_else(|| {
        let detail = format!("publisher key {} is not registered", release.key);
        refuse(detail, "an admin registers it: `slm key create`")
    })?;
    if let Some(expires_at) = key.expires_at.filter(|_| key.is_expired(Timestamp::now())) {
        let detail = format!(
            "{} {} is signed by publisher key {} ({}), which expired at {expires_at}: no device \
             accepts it",
            release.model, release.version, key.name, key.id
        );
        return Err(refuse(
            detail,
            "ship it as a new version with another key: `slm key create NAME`, then \
             `slm ship … --key NAME`",
        ));
    }
    PublicKey::from_pem(&key.public_key)
        .map_err(|error| refuse(error.to_string(), "register the key again"))
}

fn unavailable(error: PackagesError) -> ApiError {
    tracing::error!(%error, "registry");
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let title = "The registry cannot be read";
    ApiError::new(status, "unavailable", title, error.to_string(), Some("try again".to_owned()))
}

async fn check_variant(
    state: &AppState,
    release: &NewRelease,
    variant: &Variant,
    key: &PublicKey,
) -> Result<(), ApiError> {
    let (packages, model) = (&state.packages, &release.model);
    let at =
        |what: String| format!("variant {} ({}): {what}", variant.name, variant.manifest.short());
    let push = "push the package first: `slm ship` does it all";
    let manifest = packages
        .manifest(model, variant.manifest)
        .await
        .map_err(unavailable)?
        .ok_or_else(|| refuse(at(format!("repository {model} has no such manifest")), push))?;
    let package = package::Package::parse(&manifest)
        .map_err(|error| refuse(at(first_line(&error)), "pack it with `slm ship`"))?;
    let weights = package.weights();
    if weights.digest != variant.weights || weights.size_bytes != variant.size_bytes {
        return Err(refuse(
            at(format!(
                "its weights are {} ({} bytes), not {} ({} bytes)",
                weights.digest.short(),
                weights.size_bytes,
                variant.weights.short(),
                variant.size_bytes
            )),
            "register what was packed",
        ));
    }
    let adapter =
        package.adapter().map(|file| Adapter { digest: file.digest, size_bytes: file.size_bytes });
    if adapter != variant.adapter {
        return Err(refuse(
            at("its adapter is not the one that the release names".to_owned()),
            "register what was packed",
        ));
    }
    for file in &package.files {
        match packages.blob_size(model, file.digest).await.map_err(unavailable)? {
            Some(size) if size == file.size_bytes => {}
            Some(size) => {
                let what = format!(
                    "{} has {size} bytes, its manifest says {}",
                    file.title, file.size_bytes
                );
                return Err(refuse(at(what), push));
            }
            None => {
                let what =
                    format!("{} ({}) is not in the registry", file.title, file.digest.short());
                return Err(refuse(at(what), push));
            }
        }
    }
    let signatures = packages
        .referrers(model, variant.manifest, BUNDLE_MEDIA_TYPE)
        .await
        .map_err(unavailable)?;
    let sign = "sign it with a registered key and push the signature";
    let mut last = "it has no signature".to_owned();
    for signature in signatures.into_iter().take(MAX_SIGNATURES) {
        let read = packages.manifest(model, signature).await.map_err(unavailable)?;
        let Some(signature) = read else { continue };
        let bundle = match parse_signature_manifest(&signature) {
            Ok(parsed) if parsed.subject.digest == variant.manifest => parsed.bundle.digest,
            Ok(_) => continue,
            Err(error) => {
                last = first_line(&error);
                continue;
            }
        };
        let bytes =
            packages.small_blob(model, bundle, MAX_BUNDLE_BYTES).await.map_err(unavailable)?;
        let Some(bytes) = bytes else {
            last = format!("its signature {} is not in the registry", bundle.short());
            continue;
        };
        match package::verify(&manifest, &bytes, std::slice::from_ref(key)) {
            Ok(_) => return Ok(()),
            Err(error) => last = first_line(&error),
        }
    }
    Err(refuse(at(last), sign))
}

/// An error's first line; the hub gives hints of its own.
fn first_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Releases, newest first.
#[utoipa::path(get, path = "/v1/releases", tag = "releases",
    params(("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<Release>)))]
pub async fn list(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<Release>>, ApiError> {
    let page = state.store.releases(query.into()).await?;
    let items = page.items.iter().map(|release| (**release).clone()).collect();
    Ok(Json(Page { items, cursor: page.cursor }))
}

/// One release.
#[utoipa::path(get, path = "/v1/releases/{model}/{version}", tag = "releases",
    params(("model" = String, Path), ("version" = String, Path)),
    responses((status = 200, body = Release), (status = 404, body = Problem)))]
pub async fn get(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path((model, version)): Path<(ModelName, String)>,
) -> Result<Json<Release>, ApiError> {
    let version = parse_version(&version)?;
    Ok(Json((*state.store.release(model, version).await?).clone()))
}

/// Deltas to the variants of a release from what devices run: which there are, and which are coming.
#[utoipa::path(get, path = "/v1/releases/{model}/{version}/deltas", tag = "releases",
    params(("model" = String, Path), ("version" = String, Path)),
    responses((status = 200, body = Page<DeltaJob>), (status = 404, body = Problem)))]
pub async fn deltas(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Path((model, version)): Path<(ModelName, String)>,
) -> Result<Json<Page<DeltaJob>>, ApiError> {
    let release = state.store.release(model.clone(), parse_version(&version)?).await?;
    let is_of = |job: &DeltaJob| release.release.variants.iter().any(|it| it.weights == job.to);
    let mut items = state.store.deltas(model).await?;
    items.retain(is_of);
    Ok(Json(Page { items, cursor: None }))
}

/// Parses the version in a path.
pub(super) fn parse_version(version: &str) -> Result<semver::Version, ApiError> {
    version.parse().map_err(|error| {
        let detail = format!("the version in the path is none: {error}");
        ApiError::bad_request(detail, "versions look like 1.2.3")
    })
}
