//! The OpenAI-compatible HTTP surface of a [`ModelHost`].
//!
//! A parameter that OpenAI knows and this server does not follow is refused by name, never
//! ignored. Pages of other machines are kept out by their `Origin`.

mod adapters;
mod chat;
mod completions;
mod constrain;
mod document;
mod embeddings;
mod error;
mod feedback;
mod fields;
mod generate;
mod keys;
mod page;
mod responses;
mod tokens;
mod tools;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, delete, get, post};
use axum::serve::{Listener, ListenerExt as _};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutError};

use crate::constraint::Checked;
use crate::host::{HostState, ModelHost, ModelSpec};
use crate::metrics::prometheus;
use crate::otlp::{self, Collector};
use crate::worker::{AdapterFile, Sampling, Worker, WorkerError};
use error::ApiError;
use fields::Fields;

pub use keys::{KeyLimits, Keys, KeysError};

/// The most bytes of a request's body.
pub const MAX_BODY_BYTES: usize = 16 << 20;
/// How long requests under way may take after the server was asked to stop.
pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);
/// How long the worker may take to leave then.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// How long a body under way may take until more of it comes, by default.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
/// After how long without anything else a stream gets a comment, by default.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Paths that clients of llama.cpp's server ask for without `/v1`, too.
const WITHOUT_VERSION: [&str; 4] = ["/chat/completions", "/embeddings", "/models", "/responses"];

/// How the endpoint behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Origins beside this machine's own whose pages may call the endpoint.
    pub allowed_origins: Vec<String>,
    /// Who may call; anybody who reaches it if absent.
    pub keys: Option<Arc<Keys>>,
    /// After how long without anything else a stream gets a comment.
    pub keep_alive: Duration,
    /// How long the next part of a request's body may take to come.
    pub body_patience: Duration,
    /// Whether clients may load, unload and scale adapters for everybody. Where a model's bytes were
    /// verified, nobody should change what it answers afterwards.
    pub changes_adapters: bool,
    /// Whom [`serve_host`] tells what is counted.
    pub otlp: Option<Collector>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            allowed_origins: Vec::new(),
            keys: None,
            keep_alive: KEEP_ALIVE,
            body_patience: BODY_PATIENCE,
            changes_adapters: false,
            otlp: None,
        }
    }
}

#[derive(Clone)]
struct App {
    host: Arc<ModelHost>,
    options: Arc<ServerOptions>,
    checked: Arc<Checked>,
}

/// The paths, as `docs/endpoint-openapi.json` describes them.
pub fn router(host: Arc<ModelHost>, options: ServerOptions) -> Router {
    let patience = RequestBodyTimeoutLayer::new(options.body_patience);
    let app = App { host, options: Arc::new(options), checked: Arc::default() };
    let mut router = Router::new();
    for (path, methods) in routes() {
        let short = path.strip_prefix("/v1").filter(|short| WITHOUT_VERSION.contains(short));
        if let Some(short) = short {
            router = router.route(short, methods.clone());
        }
        router = router.route(path, methods);
    }
    router
        .fallback(async |request: Request| {
            ApiError::not_found(request.method(), request.uri().path()).into_response()
        })
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::wrong_method(request.method(), request.uri().path()).into_response()
        })
        .layer(patience)
        .layer(from_fn_with_state(app.clone(), around))
        .with_state(app)
}

fn routes() -> Vec<(&'static str, MethodRouter<App>)> {
    vec![
        ("/v1/models", get(models)),
        ("/v1/models/{model}", get(model)),
        (chat::PATH, post(chat::complete)),
        (completions::PATH, post(completions::complete)),
        (responses::PATH, post(responses::respond)),
        (embeddings::PATH, post(embeddings::embed)),
        (feedback::PATH, post(feedback::take)),
        (adapters::PATH, get(adapters::list).post(adapters::change)),
        ("/lora-adapters/{id}", delete(adapters::unload)),
        (tokens::TOKENISE, post(tokens::tokenise)),
        (tokens::DETOKENISE, post(tokens::detokenise)),
        ("/tokenizer_info", get(tokens::information)),
        (tokens::APPLY_TEMPLATE, post(tokens::apply_template)),
        ("/props", get(properties)),
        ("/health", get(health)),
        ("/metrics", get(metrics)),
        ("/openapi.json", get(document::show)),
        ("/", get(page::show)),
    ]
}

/// Why [`serve`] ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model could not be loaded.
    #[error("{0}")]
    Model(#[from] WorkerError),
    /// The listener failed.
    #[error("serve HTTP: {0}")]
    Listen(#[from] std::io::Error),
}

/// Serves one model on `listener` until `shutdown` completes; requests under way are finished.
/// While the model loads, `/health` answers 503; `on_ready` gets the worker once it is loaded.
///
/// # Errors
/// The model cannot be loaded, or the listener fails.
pub async fn serve(
    listener: TcpListener,
    model: ModelSpec,
    options: ServerOptions,
    on_ready: impl FnOnce(&Worker),
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let host = ModelHost::new();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let http = serve_host(listener, Arc::clone(&host), options, async move {
        let mut stopped = stopped;
        tokio::select! {
            () = shutdown => {}
            // Also when the sender is gone.
            _ = stopped.wait_for(|stop| *stop) => {}
        }
    });
    let load = async {
        let staged = host.stage(model).await?;
        on_ready(staged.worker());
        host.activate(staged);
        Ok::<(), WorkerError>(())
    };
    tokio::pin!(http);
    tokio::select! {
        served = &mut http => return Ok(served?),
        loaded = load => {
            if let Err(error) = loaded {
                let _ = stop.send(true);
                http.await?;
                return Err(error.into());
            }
        }
    }
    Ok(http.await?)
}

/// Serves a host on `listener` until `shutdown` completes; then requests under way are finished,
/// at most for [`SHUTDOWN_LIMIT`], and the host is shut down.
///
/// # Errors
/// The listener fails.
pub async fn serve_host(
    listener: TcpListener,
    host: Arc<ModelHost>,
    options: ServerOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (begun, begins) = tokio::sync::oneshot::channel::<()>();
    let (served_all, all_served) = tokio::sync::oneshot::channel::<()>();
    let pushed = options.otlp.clone().map(|collector| {
        let stop = async {
            let _ = all_served.await;
        };
        tokio::spawn(otlp::push(collector, Arc::clone(&host), stop, |_| {}))
    });
    let server = axum::serve(at_once(listener), router(Arc::clone(&host), options))
        .with_graceful_shutdown(async move {
            shutdown.await;
            drop(begun);
        })
        .into_future();
    let limit = async {
        let _ = begins.await;
        tokio::time::sleep(SHUTDOWN_LIMIT).await;
    };
    let served = tokio::select! {
        served = server => served,
        () = limit => Ok(()),
    };
    drop(served_all);
    if let Some(pushed) = pushed {
        pushed.await.expect("the pushes do not panic");
    }
    // A worker without requests has nothing left to do but to write its prompt cache.
    host.shut_down(LEAVE_LIMIT).await;
    served
}

/// A listener whose connections send each token of a stream as soon as there is one.
pub fn at_once(listener: TcpListener) -> impl Listener<Addr = SocketAddr> {
    listener.tap_io(|connection| {
        // A connection that broke meanwhile is noticed when it is read.
        let _ = connection.set_nodelay(true);
    })
}

/// What surrounds every request: who may call, the count, CORS.
async fn around(State(app): State<App>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let host = request.headers().get(header::HOST).cloned();
    let allowed =
        origin.as_ref().is_none_or(|origin| may_call(origin, host.as_ref(), &app.options));
    let endpoint = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let mut response = if !allowed {
        ApiError::foreign_origin().into_response()
    } else if request.method() == Method::OPTIONS && origin.is_some() {
        StatusCode::NO_CONTENT.into_response()
    } else {
        admitted(&app, &endpoint, request, next).await
    };
    app.host.metrics().count_http(&endpoint, response.status().as_u16());
    if let Some(origin) = origin.filter(|_| allowed) {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        let methods = HeaderValue::from_static("GET, POST, DELETE, OPTIONS");
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static(
                "authorization, content-type, openai-organization, openai-project, user-agent, x-stainless-arch, x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout",
            ),
        );
    }
    response
}

/// Answers whoever has a key, where keys are needed; whether it is well may be asked by anybody, and
/// the page holds nothing.
async fn admitted(app: &App, endpoint: &str, request: Request, next: Next) -> Response {
    let open = ["/", "/health"].contains(&endpoint);
    let keys = app.options.keys.as_ref().filter(|_| !open);
    let Some(keys) = keys else { return next.run(request).await };
    match keys.admit(request.headers(), request.method() == Method::POST) {
        Ok(permit) => permit.hold(next.run(request).await),
        Err(error) => error.into_response(),
    }
}

/// Whether a page of this origin may call: pages of this machine, those that are allowed, and the
/// endpoint's own, asked for by an IP address: a name could have come to mean this machine only now.
fn may_call(origin: &HeaderValue, asked: Option<&HeaderValue>, options: &ServerOptions) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    if options.allowed_origins.iter().any(|allowed| allowed == origin) {
        return true;
    }
    let Some((_, authority)) = origin.split_once("://") else { return false };
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(host, _)| host),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    let own = asked.is_some_and(|asked| asked == authority);
    matches!(host, "localhost" | "127.0.0.1" | "::1") || own && host.parse::<IpAddr>().is_ok()
}

/// Reads the JSON object that is the body of a request to `path`.
async fn read_fields(path: &str, body: Body) -> Result<Fields, ApiError> {
    match read_json(body).await? {
        Value::Object(fields) => Ok(Fields::of_path(path, fields)),
        _ => Err(ApiError::invalid("the request's body must be a JSON object".to_owned())),
    }
}

/// Reads JSON from a request.
async fn read_json(body: Body) -> Result<Value, ApiError> {
    let bytes = match axum::body::to_bytes(body, MAX_BODY_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) => {
            // What happened is somewhere in what axum makes of it.
            let first = std::error::Error::source(&error);
            let mut causes = std::iter::successors(first, |error| error.source());
            let known = causes.find_map(|cause| {
                if cause.is::<TimeoutError>() {
                    return Some(ApiError::too_slow());
                }
                let too_large = cause.to_string().contains("length limit");
                too_large.then(|| ApiError::too_large(MAX_BODY_BYTES))
            });
            let unreadable =
                || ApiError::invalid("the request's body could not be read".to_owned());
            return Err(known.unwrap_or_else(unreadable));
        }
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        ApiError::invalid(format!("the request's body is not valid JSON: {error}"))
    })
}

/// Checks the `model` of a request against the one that is served.
async fn check_model(app: &App, fields: &mut Fields) -> Result<Arc<ModelSpec>, ApiError> {
    Ok(adapters::asked(app, fields).await?.spec)
}

fn model_object(spec: &ModelSpec, worker: &Worker) -> Value {
    let info = worker.model_info();
    json!({
        "id": spec.id,
        "object": "model",
        "created": 0,
        "owned_by": "slmops",
        "meta": {
            "architecture": info.shape.architecture,
            "parameters": info.shape.parameters,
            "file_type": info.file_type,
            "size_bytes": info.tensor_bytes,
            "vocabulary": info.shape.vocabulary,
            "trained_context": info.shape.trained_context,
            "chat_template": info.chat_template.is_some(),
            "effective": worker.effective(),
        },
    })
}

/// An adapter as a model of its own, as vLLM lists it.
fn adapter_object(spec: &ModelSpec, adapter: &AdapterFile) -> Value {
    json!({
        "id": format!("{}:{}", spec.id, adapter.name),
        "object": "model",
        "created": 0,
        "owned_by": "slmops",
        "parent": spec.id,
        "meta": { "adapter": adapter.id, "path": adapter.path, "scale": adapter.scale },
    })
}

async fn models(State(app): State<App>) -> Response {
    let mut data = Vec::new();
    if let Some((spec, worker)) = app.host.current() {
        data.push(model_object(&spec, &worker));
        data.extend(worker.adapters().iter().map(|adapter| adapter_object(&spec, adapter)));
    }
    axum::Json(json!({ "object": "list", "data": data })).into_response()
}

async fn model(State(app): State<App>, Path(asked): Path<String>) -> Response {
    match app.host.current() {
        Some((spec, worker)) if spec.answers_to(&asked) => {
            axum::Json(model_object(&spec, &worker)).into_response()
        }
        Some((spec, worker)) => match adapters::adapter_named(&spec, &worker, &asked) {
            Some(adapter) => axum::Json(adapter_object(&spec, &adapter)).into_response(),
            None => ApiError::unknown_model(&asked, &spec.id).into_response(),
        },
        None => ApiError::from(crate::host::HostError::NoModel).into_response(),
    }
}

/// The configuration in effect, as the engine says it, and what the model brought with it.
async fn properties(State(app): State<App>) -> Result<Response, ApiError> {
    let (spec, worker) = app.host.current().ok_or(crate::host::HostError::NoModel)?;
    let info = worker.model_info();
    Ok(axum::Json(json!({
        "model": spec.id,
        "effective": worker.effective(),
        "extras": worker.spec().extras,
        "defaults": Sampling::default(),
        "chat_template": info.chat_template,
        "bos_token": info.beginning_text,
        "eos_token": info.end_text,
        "load_ms": info.load_ms,
    }))
    .into_response())
}

async fn health(State(app): State<App>) -> Response {
    let status = app.host.status();
    match status.state {
        HostState::Ready => {
            axum::Json(json!({ "status": "ok", "model": status.model })).into_response()
        }
        HostState::Asleep => {
            axum::Json(json!({ "status": "sleeping", "model": status.model })).into_response()
        }
        HostState::Empty => ApiError::from(crate::host::HostError::NoModel).into_response(),
        HostState::Restarting => ApiError::from(crate::host::HostError::Restarting).into_response(),
    }
}

async fn metrics(State(app): State<App>) -> Response {
    let families = app.host.metrics().families(&app.host.status());
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, prometheus::text(&families)).into_response()
}

/// Seconds since 1970, for `created`.
fn now_s() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// A new id, such as `chatcmpl-0123456789abcdef`.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}", rand::random::<u64>())
}

/// A response that streams server-sent events.
fn event_stream(events: impl futures_util::Stream<Item = Bytes> + Send + 'static) -> Response {
    use futures_util::StreamExt as _;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx would gather the pieces otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    let body = Body::from_stream(events.map(Ok::<_, std::convert::Infallible>));
    (headers, body).into_response()
}

/// An object of entries that are not null.
fn object(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Object(
        entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect::<Map<String, Value>>(),
    )
}
