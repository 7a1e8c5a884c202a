//! Trust in the hub, with clocks that are wrong by ten years.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::time_provider::TimeProvider;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use slmops_agent::tls::{EARLIEST_NOW, PinnedAuthority};
use slmops_artifact::Digest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const YEAR_S: u64 = 365 * 24 * 3600;

#[derive(Debug)]
struct Clock(u64);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0)))
    }
}

struct Authority {
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(2099, 12, 31);
        let key = KeyPair::generate().unwrap();
        let der = parameters.self_signed(&key).unwrap().der().clone();
        Self { der, issuer: Issuer::new(parameters, key) }
    }

    fn digest(&self) -> Digest {
        Digest::of(&self.der)
    }

    /// A server with a certificate for `name` of this authority, and what it presents as its own.
    async fn serve(&self, name: &str, presented: &Self) -> std::net::SocketAddr {
        let mut parameters = CertificateParams::new([name.to_owned()]).unwrap();
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(2026, 12, 31);
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap().der().clone();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate, presented.der.clone()], key.into())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                let answer = b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(answer).await;
                let _ = stream.shutdown().await;
            }
        });
        address
    }
}

async fn connect(
    authority: &Arc<PinnedAuthority>,
    address: std::net::SocketAddr,
    now_s: u64,
) -> Result<u16, String> {
    let config = authority.client_config(Arc::new(Clock(now_s))).unwrap();
    let client = reqwest::Client::builder()
        .use_preconfigured_tls(config)
        .resolve("hub.test", address)
        .build()
        .unwrap();
    let url = format!("https://hub.test:{}/", address.port());
    let answer = client.get(url).send().await;
    answer.map(|answer| answer.status().as_u16()).map_err(|error| format!("{error:?}"))
}

#[tokio::test]
async fn a_wrong_clock_does_not_keep_the_hub_away() {
    let ours = Authority::new();
    let address = ours.serve("hub.test", &ours).await;
    for now_s in [0, EARLIEST_NOW - 10 * YEAR_S, EARLIEST_NOW, EARLIEST_NOW + 10 * YEAR_S] {
        let fresh = PinnedAuthority::new(ours.digest(), None);
        assert_eq!(connect(&fresh, address, now_s).await, Ok(204), "{now_s}");
        assert_eq!(fresh.certificate(), Some(ours.der.as_ref()));
        let stored = PinnedAuthority::new(ours.digest(), Some(ours.der.to_vec()));
        assert_eq!(connect(&stored, address, now_s).await, Ok(204), "{now_s}");
    }
}

#[tokio::test]
async fn only_the_pinned_authority_counts() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let pinned = || PinnedAuthority::new(ours.digest(), None);
    // Another authority; ours shown beside a certificate that it did not sign; another name.
    let cases = [
        theirs.serve("hub.test", &theirs).await,
        theirs.serve("hub.test", &ours).await,
        ours.serve("other.test", &ours).await,
    ];
    for (case, address) in cases.into_iter().enumerate() {
        for now_s in [0, EARLIEST_NOW, EARLIEST_NOW + 10 * YEAR_S] {
            let refused = connect(&pinned(), address, now_s).await.unwrap_err();
            assert!(refused.contains("InvalidCertificate"), "case {case}: {refused}");
        }
    }
    // A stored certificate that is not the pinned one is not trusted either.
    let swapped = PinnedAuthority::new(ours.digest(), Some(theirs.der.to_vec()));
    let address = theirs.serve("hub.test", &theirs).await;
    assert!(connect(&swapped, address, EARLIEST_NOW).await.is_err());
}
