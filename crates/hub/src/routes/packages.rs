//! The registry as release checks see it.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use slmops_api::ModelName;
use slmops_artifact::Digest;

use crate::registry::{Reference, Registry, RepositoryName};

/// Why the registry could not be asked.
pub type PackagesError = Box<dyn std::error::Error + Send + Sync>;
/// The registry's answer.
pub type PackagesFuture<'a, T> = BoxFuture<'a, Result<T, PackagesError>>;

/// What the release checks need of the registry.
pub trait Packages: Send + Sync + 'static {
    /// The manifest with this digest in the model's repository.
    fn manifest(&self, model: &ModelName, digest: Digest) -> PackagesFuture<'_, Option<Bytes>>;
    /// The size of the blob with this digest, if the model's repository has it.
    fn blob_size(&self, model: &ModelName, digest: Digest) -> PackagesFuture<'_, Option<u64>>;
    /// A whole small blob; none if it is absent or longer than `limit_bytes`.
    fn small_blob(
        &self,
        model: &ModelName,
        digest: Digest,
        limit_bytes: usize,
    ) -> PackagesFuture<'_, Option<Bytes>>;
    /// Digests of the manifests of this artifact type whose subject is `digest`.
    fn referrers(
        &self,
        model: &ModelName,
        digest: Digest,
        artifact_type: &'static str,
    ) -> PackagesFuture<'_, Vec<Digest>>;
}

impl Packages for Registry {
    fn manifest(&self, model: &ModelName, digest: Digest) -> PackagesFuture<'_, Option<Bytes>> {
        let repository = repository(model);
        Box::pin(async move {
            let Some(repository) = repository else { return Ok(None) };
            let found = Registry::manifest(self, &repository, &Reference::Digest(digest)).await?;
            Ok(found.map(|manifest| manifest.content.into()))
        })
    }

    fn blob_size(&self, model: &ModelName, digest: Digest) -> PackagesFuture<'_, Option<u64>> {
        let repository = repository(model);
        Box::pin(async move {
            let Some(repository) = repository else { return Ok(None) };
            Ok(Registry::blob_size(self, &repository, &digest).await?)
        })
    }

    fn small_blob(
        &self,
        model: &ModelName,
        digest: Digest,
        limit_bytes: usize,
    ) -> PackagesFuture<'_, Option<Bytes>> {
        let repository = repository(model);
        Box::pin(async move {
            let Some(repository) = repository else { return Ok(None) };
            match Registry::blob_size(self, &repository, &digest).await? {
                Some(size) if size <= limit_bytes as u64 => {
                    Ok(Some(self.blob(&repository, &digest, limit_bytes).await?))
                }
                _ => Ok(None),
            }
        })
    }

    fn referrers(
        &self,
        model: &ModelName,
        digest: Digest,
        artifact_type: &'static str,
    ) -> PackagesFuture<'_, Vec<Digest>> {
        let repository = repository(model);
        Box::pin(async move {
            let Some(repository) = repository else { return Ok(Vec::new()) };
            let found = Registry::referrers(self, &repository, digest, Some(artifact_type)).await?;
            Ok(found.into_iter().map(|descriptor| descriptor.digest).collect())
        })
    }
}

/// The model's repository; none for the few model names that are no repository names (`a--`), into
/// which nothing can be pushed either.
fn repository(model: &ModelName) -> Option<RepositoryName> {
    model.as_str().parse().ok()
}
