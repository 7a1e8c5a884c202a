//! Where blobs are if not in a folder: a bucket of an S3-compatible store.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path as StorePath;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::BlobError;

/// What every setting's name starts with.
const SETTING_PREFIX: &str = "AWS_";
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one request may take, but for those whose answer is a blob.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a request is tried again while the store is away or overloaded.
const RETRY_FOR: Duration = Duration::from_secs(20);
/// How often, at most.
const MAX_RETRIES: usize = 8;

/// A place in an S3-compatible store, and as whom to use it. Never shows the secret.
#[derive(Clone)]
pub struct S3 {
    bucket: String,
    prefix: StorePath,
    builder: AmazonS3Builder,
    options: ClientOptions,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_string())
    }
}

impl fmt::Display for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix.as_ref() {
            "" => write!(f, "s3://{}", self.bucket),
            prefix => write!(f, "s3://{}/{prefix}", self.bucket),
        }
    }
}

impl S3 {
    /// Reads `s3://BUCKET/PREFIX`. `settings` are environment variables, of which those that start
    /// with `AWS_` say region, endpoint and credentials; `ca_pem` are certificates to trust besides
    /// the system's. An endpoint on another machine is talked to by TLS only, unless
    /// `AWS_ALLOW_HTTP` is `true`.
    ///
    /// # Errors
    /// [`BlobError::Address`].
    pub fn parse(
        url: &str,
        settings: impl IntoIterator<Item = (String, String)>,
        ca_pem: Option<&[u8]>,
    ) -> Result<Self, BlobError> {
        let refused = |reason: String| BlobError::Address { reason };
        let place = url.strip_prefix("s3://");
        let place = place.ok_or_else(|| refused("it does not start with `s3://`".to_owned()))?;
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if bucket.is_empty() || !bucket.bytes().all(plain) {
            return Err(refused(format!("`{bucket}` is no name of a bucket")));
        }
        let prefix = StorePath::parse(prefix)
            .map_err(|_| refused(format!("`{prefix}` cannot start the names of objects")))?;

        let mut builder = AmazonS3Builder::new();
        let mut endpoint = None;
        let (mut allow_http, mut key, mut secret, mut role) = (false, false, false, false);
        for (name, value) in settings {
            if !name.starts_with(SETTING_PREFIX) {
                continue;
            }
            // The name that other tools use to give S3 an endpoint of its own.
            let name = match name.as_str() {
                "AWS_ENDPOINT_URL_S3" => "AWS_ENDPOINT_URL",
                name => name,
            };
            let Ok(setting) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else {
                continue;
            };
            match (name, setting) {
                ("AWS_ALLOW_HTTP", _) => allow_http = value == "true",
                (_, AmazonS3ConfigKey::Endpoint) => endpoint = Some(value),
                (_, setting) => {
                    key |= matches!(setting, AmazonS3ConfigKey::AccessKeyId);
                    secret |= matches!(setting, AmazonS3ConfigKey::SecretAccessKey);
                    role |= matches!(
                        setting,
                        AmazonS3ConfigKey::WebIdentityTokenFile
                            | AmazonS3ConfigKey::ContainerCredentialsRelativeUri
                            | AmazonS3ConfigKey::ContainerCredentialsFullUri
                            | AmazonS3ConfigKey::SkipSignature
                    );
                    builder = builder.with_config(setting, value);
                }
            }
        }
        if key != secret {
            let lacking = if key { "AWS_SECRET_ACCESS_KEY" } else { "AWS_ACCESS_KEY_ID" };
            return Err(refused(format!("{lacking} is not set, its other half is")));
        }
        if endpoint.is_some() && !key && !role {
            // Without an endpoint it is Amazon's, whose machines may have a role of their own.
            return Err(refused("neither AWS_ACCESS_KEY_ID nor a role is given".to_owned()));
        }
        if let Some(endpoint) = endpoint {
            let insecure = endpoint.strip_prefix("http://");
            if let Some(rest) = insecure {
                let local = ["127.0.0.1", "[::1]", "localhost"].into_iter().any(|host| {
                    rest.strip_prefix(host)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '/']))
                });
                if !local && !allow_http {
                    return Err(refused(format!(
                        "{endpoint} is another machine, and what is sent there could be read and \
                         changed on the way; set AWS_ALLOW_HTTP=true if the network is protected"
                    )));
                }
                allow_http = true;
            } else if !endpoint.starts_with("https://") {
                return Err(refused(format!("the endpoint `{endpoint}` is no URL")));
            }
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        }
        let mut options = ClientOptions::new()
            .with_allow_http(allow_http)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT);
        if let Some(pem) = ca_pem {
            let refusal = || refused("the file of certificates to trust holds none".to_owned());
            let certificates = Certificate::from_pem_bundle(pem).map_err(|_| refusal())?;
            if certificates.is_empty() {
                return Err(refusal());
            }
            for certificate in certificates {
                options = options.with_root_certificate(certificate);
            }
        }
        let bucket = bucket.to_owned();
        Ok(Self { bucket, prefix, builder, options })
    }

    /// The bucket's name.
    pub(super) fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The store: for what is answered at once, and for reading blobs, whose reader may be slow.
    pub(super) fn stores(&self) -> Result<[Arc<dyn ObjectStore>; 2], BlobError> {
        let build = |options: ClientOptions| -> Result<Arc<dyn ObjectStore>, BlobError> {
            let store = self
                .builder
                .clone()
                .with_bucket_name(&self.bucket)
                .with_client_options(options)
                .with_retry(RetryConfig {
                    backoff: BackoffConfig::default(),
                    max_retries: MAX_RETRIES,
                    retry_timeout: RETRY_FOR,
                })
                .build()
                .map_err(|error| BlobError::Address { reason: error.to_string() })?;
            Ok(Arc::new(PrefixStore::new(store, self.prefix.clone())))
        };
        Ok([build(self.options.clone())?, build(self.options.clone().with_timeout_disabled())?])
    }
}
