//! The hub's HTTP API as this program uses it.

use std::time::Duration;

use reqwest::{Method, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use slmops_api::problem::{PROBLEM_MEDIA_TYPE, Problem};

use crate::error::{Context, Exit, Failure, Result};
use crate::home::{Access, Home};

/// The longest JSON answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// How long to wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a silent connection is kept.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The most pages of a listing that are followed.
const MAX_PAGES: usize = 1000;

/// A hub and the right to talk to it.
#[derive(Clone)]
pub struct Hub {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Hub {
    /// The hub that `home` or the environment names.
    pub fn connect(home: &Home) -> Result<Self> {
        Self::new(home.access()?)
    }

    /// A client for `access`. Plain HTTP is refused for anything but loopback.
    pub fn new(access: Access) -> Result<Self> {
        let url = Url::parse(&access.hub)
            .user(|| format!("read the hub's URL `{}`", access.hub))
            .map_err(|failure| failure.hint("write it as https://host:port"))?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let loopback = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        match url.scheme() {
            "https" => {}
            "http" if loopback => {}
            "http" => {
                return Err(Failure::user(format!(
                    "the hub {} would be spoken to without encryption",
                    access.hub
                ))
                .hint("use its https:// address; plain HTTP is for loopback alone"));
            }
            other => {
                return Err(Failure::user(format!("`{other}` is no scheme of a hub's URL"))
                    .hint("write it as https://host:port"));
            }
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("slm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            // The hub is addressed directly: its token must not pass a proxy by accident.
            .no_proxy()
            // The hub has an authority of its own; others do not vouch for it.
            .tls_built_in_root_certs(false);
        if let Some(pem) = &access.ca_pem {
            let ca = reqwest::Certificate::from_pem(pem).user(|| "read the hub's CA".to_owned())?;
            builder = builder.add_root_certificate(ca);
        }
        let http = builder.build().internal(|| "prepare the HTTP client".to_owned())?;
        Ok(Self { http, base: access.hub, token: access.token })
    }

    /// The hub's URL, without a final slash.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// A request with the token, for callers that stream.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let url =
            if path.starts_with("http") { path.to_owned() } else { format!("{}{path}", self.base) };
        self.http.request(method, url).bearer_auth(&self.token)
    }

    /// Sends a request and returns its answer if it is a success.
    pub async fn send(&self, request: reqwest::RequestBuilder, what: &str) -> Result<Response> {
        let response = request.send().await.map_err(|error| self.unreachable(error, what))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refused(response, what).await)
    }

    /// Like [`Hub::send`], with `None` for 404.
    pub async fn find(
        &self,
        request: reqwest::RequestBuilder,
        what: &str,
    ) -> Result<Option<Response>> {
        let response = request.send().await.map_err(|error| self.unreachable(error, what))?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => Ok(Some(response)),
            _ => Err(refused(response, what).await),
        }
    }

    fn unreachable(&self, error: reqwest::Error, what: &str) -> Failure {
        let failure = Failure::user(format!("{what}: the hub {} does not answer", self.base));
        let failure = failure.source(error.without_url());
        let text = failure.line().to_lowercase();
        if text.contains("certificate") || text.contains("unknownissuer") {
            failure.hint("its certificate does not descend from the CA in your context: if the hub was set up anew, run `slm up` there again or set SLM_CA")
        } else {
            failure.hint("is it running? Start it with `slm up`; `slm doctor` looks closer")
        }
    }

    /// `GET path` as JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<T> {
        let response = self.send(self.request(Method::GET, path), what).await?;
        json(response, what).await
    }

    /// Every item of a listing, page by page.
    pub async fn list<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<Vec<T>> {
        self.list_where(path, &(), what).await
    }

    /// Every item of a listing that a filter means, page by page.
    pub async fn list_where<T: DeserializeOwned>(
        &self,
        path: &str,
        filter: &impl Serialize,
        what: &str,
    ) -> Result<Vec<T>> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let mut request = self.request(Method::GET, path).query(filter);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let response = self.send(request, what).await?;
            let page: slmops_api::Page<T> = json(response, what).await?;
            items.extend(page.items);
            cursor = page.cursor;
            if cursor.is_none() {
                return Ok(items);
            }
        }
        Err(Failure::internal(format!("{what}: the hub's listing does not end")))
    }

    /// A call with a JSON body whose answer is JSON.
    pub async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
        what: &str,
    ) -> Result<T> {
        let response = self.send(self.request(method, path).json(body), what).await?;
        json(response, what).await
    }

    /// A call whose answer does not matter.
    pub async fn act(&self, method: Method, path: &str, what: &str) -> Result<()> {
        self.send(self.request(method, path), what).await.map(|_| ())
    }
}

/// Reads a bounded JSON answer.
pub async fn json<T: DeserializeOwned>(response: Response, what: &str) -> Result<T> {
    let bytes = bounded(response, what).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::internal(format!("{what}: the hub's answer is not understood"))
            .source(error)
            .hint("are `slm` and the hub of the same version?")
    })
}

/// Reads a bounded body.
pub async fn bounded(mut response: Response, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| {
        Failure::internal(format!("{what}: read the answer")).source(error.without_url())
    })? {
        if bytes.len() + piece.len() > MAX_ANSWER_BYTES {
            return Err(Failure::internal(format!(
                "{what}: the answer is longer than {MAX_ANSWER_BYTES} bytes"
            )));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// What a refusal means to a person: the problem document's words and hint.
async fn refused(response: Response, what: &str) -> Failure {
    let status = response.status();
    let exit = if status.is_server_error() { Exit::Internal } else { Exit::User };
    let is_problem = response
        .headers()
        .get(reqwest::header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(PROBLEM_MEDIA_TYPE.as_bytes()));
    let body = bounded(response, what).await.unwrap_or_default();
    let told = |message: String, hint: Option<String>| {
        let failure = Failure::user(format!("{what}: {message}")).exit(exit);
        let usual = match status {
            StatusCode::UNAUTHORIZED => Some(TOKEN_HINT),
            StatusCode::INSUFFICIENT_STORAGE => Some(SPACE_HINT),
            _ => None,
        };
        match hint.or(usual.map(str::to_owned)) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    };
    if let (true, Ok(problem)) = (is_problem, serde_json::from_slice::<Problem>(&body)) {
        let message = if problem.detail.is_empty() { problem.title } else { problem.detail };
        return told(message, problem.hint);
    }
    // The registry's own errors (OCI distribution-spec, "Error Codes").
    let registry = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let message = registry
        .as_ref()
        .and_then(|value| value.pointer("/errors/0/message"))
        .and_then(|message| message.as_str())
        .map_or_else(|| format!("the hub answered {status}"), str::to_owned);
    told(message, None)
}

const TOKEN_HINT: &str =
    "the token is unknown or has expired: set SLM_TOKEN, or run `slm up` on the hub's machine";
const SPACE_HINT: &str =
    "free some space on the hub's disk and run the same again: it goes on where it stopped";
