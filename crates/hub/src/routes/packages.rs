//! The registry as release checks see it.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use slmops_api::ModelName;
use slmops_artifact::Digest;

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

/// A registry without packages.
pub struct NoPackages;

impl Packages for NoPackages {
    fn manifest(&self, _: &ModelName, _: Digest) -> PackagesFuture<'_, Option<Bytes>> {
        Box::pin(async { Ok(None) })
    }

    fn blob_size(&self, _: &ModelName, _: Digest) -> PackagesFuture<'_, Option<u64>> {
        Box::pin(async { Ok(None) })
    }

    fn small_blob(
        &self,
        _: &ModelName,
        _: Digest,
        _: usize,
    ) -> PackagesFuture<'_, Option<Bytes>> {
        Box::pin(async { Ok(None) })
    }

    fn referrers(
        &self,
        _: &ModelName,
        _: Digest,
        _: &'static str,
    ) -> PackagesFuture<'_, Vec<Digest>> {
        Box::pin(async { Ok(vec![]) })
    }
}
