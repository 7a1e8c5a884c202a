//! One HTTPS connection of a simulated device: nothing between it and the hub but TLS and HTTP/1.1.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, IF_NONE_MATCH, RETRY_AFTER};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::{Context, Failure, Result};

/// The longest that an answer is waited for.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Where the hub is and what it is recognised by.
#[derive(Clone)]
pub struct Target {
    address: SocketAddr,
    host: ServerName<'static>,
    tls: TlsConnector,
}

impl Target {
    /// The hub at `address`, with the certificate of its authority.
    pub fn new(address: SocketAddr, ca_pem: &[u8]) -> Result<Self> {
        let ca = CertificateDer::from_pem_slice(ca_pem)
            .internal(|| "read the hub's certificate authority".to_owned())?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca).internal(|| "trust the hub's certificate authority".to_owned())?;
        let mut config =
            rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        // Each connection stands for another device: none resumes what another began.
        config.resumption = rustls::client::Resumption::disabled();
        let tls = TlsConnector::from(Arc::new(config));
        Ok(Self { address, host: ServerName::IpAddress(address.ip().into()), tls })
    }
}

/// What came back.
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The body.
    pub body: Bytes,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
}

/// What is sent.
pub struct Call<'a> {
    /// How.
    pub method: Method,
    /// Path and query.
    pub path: &'a str,
    /// The bearer token.
    pub token: Option<&'a str>,
    /// `If-None-Match`.
    pub etag: Option<String>,
    /// A JSON body.
    pub body: Vec<u8>,
}

impl<'a> Call<'a> {
    /// A GET.
    pub fn get(path: &'a str, token: Option<&'a str>) -> Self {
        Self { method: Method::GET, path, token, etag: None, body: Vec::new() }
    }

    /// A POST.
    pub fn post(path: &'a str, token: Option<&'a str>, body: &impl serde::Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("the API's types always serialise");
        Self { method: Method::POST, path, token, etag: None, body }
    }
}

/// A connection that is kept, and made anew when it broke.
pub struct Wire {
    target: Target,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Wire {
    /// No connection yet.
    pub fn new(target: &Target) -> Self {
        Self { target: target.clone(), sender: None }
    }

    async fn connect(&mut self) -> Result<()> {
        let what = || "connect to the hub".to_owned();
        let Target { address, host, tls } = &self.target;
        let stream = TcpStream::connect(address).await.internal(what)?;
        stream.set_nodelay(true).internal(what)?;
        let stream = tls.connect(host.clone(), stream).await.internal(what)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.internal(what)?;
        tokio::spawn(connection);
        self.sender = Some(sender);
        Ok(())
    }

    /// Sends a call and reads the whole answer.
    pub async fn call(&mut self, call: Call<'_>) -> Result<Answer> {
        let answered = tokio::time::timeout(TIMEOUT, self.exchange(call)).await;
        let answer = answered
            .unwrap_or_else(|_| Err(Failure::internal("the hub did not answer for a minute")));
        if answer.is_err() {
            self.sender = None;
        }
        answer
    }

    async fn exchange(&mut self, call: Call<'_>) -> Result<Answer> {
        let what = || format!("{} {}", call.method, call.path);
        if self.sender.as_ref().is_none_or(SendRequest::is_closed) {
            self.connect().await?;
        }
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(call.path)
            .header(HOST, self.target.address.to_string());
        if let Some(token) = call.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(etag) = &call.etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        if !call.body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(Bytes::from(call.body.clone()))).internal(what)?;
        let sender = self.sender.as_mut().expect("it was just connected");
        sender.ready().await.internal(what)?;
        let response = sender.send_request(request).await.internal(what)?;
        let (head, body) = response.into_parts();
        let retry_after = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = retry_after.and_then(|text| text.parse().ok()).map(Duration::from_secs);
        let body = body.collect().await.internal(what)?.to_bytes();
        Ok(Answer { status: head.status, body, retry_after })
    }
}
