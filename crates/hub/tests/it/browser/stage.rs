//! A hub's API with a fleet that stands still until the test moves it. The answers are files, read
//! through the wire types, so that a type that changes breaks the test and not the page.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use slmops_api::Page;
use slmops_api::audit::{AuditEntry, AuditVerdict, Identity, Role};
use slmops_api::blueprint::Explanation;
use slmops_api::channel::ChannelStatus;
use slmops_api::device::{Device, DeviceEvent};
use slmops_api::fleet::{DeviceFilter, FleetSummary};
use slmops_api::model::{DeviceClass, Release};
use slmops_api::orders::Quarantined;
use slmops_api::problem::{PROBLEM_MEDIA_TYPE, Problem};
use slmops_api::rollout::{Rollout, RolloutState};
use slmops_api::telemetry::{Quantiles, TelemetryPoint, TelemetryQuery, TelemetrySeries};
use slmops_api::webhook::{Delivery, DeliveryState, Redeliver, Redelivered, Webhook};
use slmops_artifact::Digest;
use slmops_fleet_core::world::{FleetDevice, World};
use slmops_fleet_core::{blueprint, survey};
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;

/// The token that the stage knows.
pub const TOKEN: &str = "slmt_browser-test";

/// What the API tells now.
pub struct Fleet {
    pub devices: Vec<Device>,
    pub releases: Vec<Release>,
    pub rollouts: Vec<Rollout>,
    pub classes: Vec<DeviceClass>,
    pub audit: Vec<AuditEntry>,
    pub explanation: Explanation,
    pub history: Vec<DeviceEvent>,
    pub channels: Vec<ChannelStatus>,
    pub quarantine: Vec<Quarantined>,
    pub webhooks: Vec<Webhook>,
    pub deliveries: Vec<Delivery>,
    pub telemetry: Vec<TelemetrySeries>,
    /// The acts that a page asked for, as `rollout action`.
    pub acts: Vec<String>,
    /// What the token may do.
    pub role: Role,
    /// What the second rollout becomes in the end.
    pub halted: Rollout,
}

impl Fleet {
    /// A fleet of seven devices with a rollout under way.
    pub fn busy() -> Self {
        Self {
            devices: read(include_str!("../fixtures/devices.json")),
            releases: read(include_str!("../fixtures/releases.json")),
            rollouts: vec![
                read(include_str!("../fixtures/rollout_running.json")),
                read(include_str!("../fixtures/rollout_completed.json")),
            ],
            classes: read(include_str!("../fixtures/classes.json")),
            audit: read(include_str!("../fixtures/audit.json")),
            explanation: read(include_str!("../fixtures/explain.json")),
            history: read(include_str!("../fixtures/history.json")),
            channels: read(include_str!("../fixtures/channels.json")),
            quarantine: read(include_str!("../fixtures/quarantine.json")),
            webhooks: read(include_str!("../fixtures/webhooks.json")),
            deliveries: read(include_str!("../fixtures/deliveries.json")),
            telemetry: in_use(),
            acts: Vec::new(),
            role: Role::Operator,
            halted: read(include_str!("../fixtures/rollout_halted.json")),
        }
    }

    /// A hub that was just started.
    pub fn empty() -> Self {
        let mut fleet = Self::busy();
        fleet.devices.clear();
        fleet.releases.clear();
        fleet.rollouts.clear();
        fleet.audit.clear();
        fleet.channels.clear();
        fleet.quarantine.clear();
        fleet.webhooks.clear();
        fleet.telemetry.clear();
        fleet
    }
}

/// Two days of two versions: the newer one takes over, is faster, and fails more often.
fn in_use() -> Vec<TelemetrySeries> {
    let now = jiff::Timestamp::now();
    let hour = |ago: i64| {
        let at = now.as_second() / 3600 - ago;
        jiff::Timestamp::from_second(at * 3600).expect("a time of today")
    };
    let around = |p50: f64| Some(Quantiles { p05: p50 * 0.8, p50, p95: p50 * 1.5 });
    let point = |ago: i64, answered: u64, errors: u64, speed: f64| {
        // Something of a day's ups and downs.
        let wave = 1.0 + 0.12 * (ago as f64 / 3.8).sin();
        TelemetryPoint {
            start: hour(ago),
            reports: 60,
            answered,
            errors,
            crashes: 0,
            decoded_tokens: answered * 42,
            tokens_per_s: around(speed * wave),
            first_token_ms: around(9000.0 / speed * wave),
            memory_bytes: around(190e6 + 5e6 * wave),
        }
    };
    let series = |version: &str, points: Vec<TelemetryPoint>| TelemetrySeries {
        model: "smollm2-135m-instruct".parse().expect("a model"),
        version: version.parse().expect("a version"),
        points,
    };
    vec![
        series("1.1.0", (0..20).rev().map(|ago| point(ago, 300, 9, 39.0)).collect()),
        series("1.0.0", (0..46).rev().map(|ago| point(ago, 420, 2, 31.0)).collect()),
    ]
}

/// Reads a fixture; `@-90s` in it stands for the moment 90 seconds ago.
fn read<T: DeserializeOwned>(text: &str) -> T {
    let now = jiff::Timestamp::now();
    let mut value: Value = serde_json::from_str(text).expect("a fixture is JSON");
    fn settle(value: &mut Value, now: jiff::Timestamp) {
        match value {
            Value::String(text) => {
                let seconds = text.strip_prefix("@-").and_then(|it| it.strip_suffix('s'));
                if let Some(seconds) = seconds.and_then(|it| it.parse::<i64>().ok()) {
                    *text = (now - jiff::SignedDuration::from_secs(seconds)).to_string();
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|it| settle(it, now)),
            Value::Object(fields) => fields.values_mut().for_each(|it| settle(it, now)),
            _ => {}
        }
    }
    settle(&mut value, now);
    serde_json::from_value(value).expect("a fixture has the shape of its wire type")
}

/// A started stage.
pub struct Stage {
    pub url: String,
    pub fleet: Arc<Mutex<Fleet>>,
    events: broadcast::Sender<String>,
    open: watch::Sender<bool>,
}

#[derive(Clone)]
struct Shared {
    fleet: Arc<Mutex<Fleet>>,
    events: broadcast::Sender<String>,
    open: watch::Sender<bool>,
}

impl Stage {
    /// Serves the dashboard and this fleet on a free port of the loopback address.
    pub async fn start(fleet: Fleet) -> Self {
        let shared = Shared {
            fleet: Arc::new(Mutex::new(fleet)),
            events: broadcast::channel(64).0,
            open: watch::channel(true).0,
        };
        let Shared { fleet, events, open } = shared.clone();
        let router = slmops_hub::dashboard::router::<Shared>().merge(api());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = router.with_state(shared);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, fleet, events, open }
    }

    /// The address of a page, with the token in its fragment.
    pub fn page(&self, path: &str) -> String {
        format!("{}{path}#token={TOKEN}", self.url)
    }

    /// Changes the fleet and tells those who listen.
    pub fn change(&self, kind: &str, id: &str, change: impl FnOnce(&mut Fleet)) {
        change(&mut self.fleet.lock().unwrap());
        // Nobody need listen.
        let _ = self.events.send(json!({ "kind": kind, "id": id }).to_string());
    }

    /// Ends every event stream, and refuses new ones until told otherwise.
    pub fn cut_events(&self, cut: bool) {
        self.open.send_replace(!cut);
    }
}

fn api() -> Router<Shared> {
    Router::new()
        .route("/v1/fleet/summary", get(summary))
        .route("/v1/devices", get(devices))
        .route("/v1/devices/{id}", get(device))
        .route(
            "/v1/devices/{id}/explain",
            get(|State(it): State<Shared>| async move {
                Json(it.fleet.lock().unwrap().explanation.clone())
            }),
        )
        .route(
            "/v1/devices/{id}/history",
            get(|State(it): State<Shared>| async move { listing(&it, |f| f.history.clone()) }),
        )
        .route(
            "/v1/releases",
            get(|State(it): State<Shared>| async move { listing(&it, |f| f.releases.clone()) }),
        )
        .route("/v1/releases/{model}/{version}", get(release))
        .route(
            "/v1/rollouts",
            get(|State(it): State<Shared>| async move {
                listing(&it, |f| f.rollouts.iter().map(counted).collect())
            }),
        )
        .route("/v1/rollouts/{id}", get(rollout))
        .route("/v1/rollouts/{id}/transfers", get(async || Json(transfers())))
        .route("/v1/rollouts/{id}/{action}", post(act))
        .route(
            "/v1/classes",
            get(|State(it): State<Shared>| async move {
                Json(it.fleet.lock().unwrap().classes.clone())
            }),
        )
        .route(
            "/v1/channels",
            get(|State(it): State<Shared>| async move { listing(&it, |f| f.channels.clone()) }),
        )
        .route(
            "/v1/quarantine",
            get(|State(it): State<Shared>| async move { listing(&it, |f| f.quarantine.clone()) }),
        )
        .route("/v1/webhooks", get(webhooks))
        .route("/v1/webhooks/{id}/deliveries", get(deliveries))
        .route("/v1/webhooks/{id}/redeliver", post(redeliver))
        .route("/v1/telemetry", get(telemetry))
        .route("/v1/audit", get(audit))
        .route("/v1/audit/verify", get(verify))
        .route("/v1/whoami", get(whoami))
        .route("/v1/events", get(events))
        .route_layer(axum::middleware::from_fn(check_token))
}

async fn check_token(headers: HeaderMap, request: Request, next: Next) -> Response {
    let known = headers
        .get(header::AUTHORIZATION)
        .is_some_and(|value| *value == *format!("Bearer {TOKEN}"));
    if known {
        return next.run(request).await;
    }
    problem(StatusCode::UNAUTHORIZED, "the token is unknown")
}

fn problem(status: StatusCode, title: &str) -> Response {
    let body = Problem {
        kind: "urn:slmops:test".to_owned(),
        title: title.to_owned(),
        status: status.as_u16(),
        detail: String::new(),
        hint: Some("look again".to_owned()),
    };
    (status, [(header::CONTENT_TYPE, PROBLEM_MEDIA_TYPE)], Json(body)).into_response()
}

fn listing<T: Serialize>(shared: &Shared, items: impl FnOnce(&Fleet) -> Vec<T>) -> Json<Page<T>> {
    Json(Page { items: items(&shared.fleet.lock().unwrap()), cursor: None })
}

fn one<T: Serialize>(found: Option<T>, title: &str) -> Response {
    match found {
        Some(found) => Json(found).into_response(),
        None => problem(StatusCode::NOT_FOUND, title),
    }
}

/// Asks a question about the fleet as the hub does.
fn of_fleet<T>(shared: &Shared, ask: impl FnOnce(&World<'_>) -> T) -> T {
    let fleet = shared.fleet.lock().unwrap();
    let seen = |device: &Device| FleetDevice {
        id: device.id.clone(),
        name: device.name.clone(),
        class: device.class.clone(),
        labels: device.labels.clone().into_iter().collect(),
        facts: Arc::new(device.facts.clone()),
        budget_bytes: device.facts.memory_budget_bytes,
        config: Arc::new(blueprint::resolve(&[]).expect("no layers")),
        last_seen: device.last_seen,
        desired: Arc::new(device.desired.clone()),
        report: device.report.clone(),
        revoked: device.revoked,
        orders: Some(Box::new(device.orders.clone())),
    };
    let devices: Vec<FleetDevice> = fleet.devices.iter().map(seen).collect();
    let named = |it: &Release| {
        let release = it.release.clone();
        ((release.model.clone(), release.version.clone()), Arc::new(release))
    };
    let now = jiff::Timestamp::now();
    ask(&World {
        now,
        listening_since: now,
        devices: &devices,
        releases: &fleet.releases.iter().map(named).collect(),
        quarantine: &BTreeSet::new(),
        completed: &[],
    })
}

/// How a model came to five devices.
fn transfers() -> Value {
    let way = |way: &str, devices: u64, wan_bytes: u64, site_bytes: u64, half: u64, last: u64| {
        json!({
            "way": way, "devices": devices, "model_bytes": devices * 100_000_000,
            "wan_bytes": wan_bytes, "site_bytes": site_bytes,
            "half_confirmed_s": half, "last_confirmed_s": last,
        })
    };
    json!({
        "devices": 5,
        "ways": [
            way("whole", 1, 100_000_000, 0, 240, 240),
            way("delta", 2, 9_000_000, 0, 35, 41),
            way("site", 2, 0, 200_000_000, 52, 60),
        ],
    })
}

async fn summary(
    State(shared): State<Shared>,
    Query(filter): Query<DeviceFilter>,
) -> Json<FleetSummary> {
    Json(of_fleet(&shared, |world| survey::summarise(world, &filter, "site")))
}

/// Pages of at most four devices.
async fn devices(
    State(shared): State<Shared>,
    Query(filter): Query<DeviceFilter>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Json<Page<Device>> {
    const DEVICES: usize = 4;
    let after = query.get("cursor").cloned().unwrap_or_default();
    let mut names = of_fleet(&shared, |world| {
        let found = survey::page(world, &filter, &after, DEVICES + 1);
        found.into_iter().map(|device| device.name.clone()).collect::<Vec<_>>()
    });
    let more = names.len() > DEVICES;
    names.truncate(DEVICES);
    let fleet = shared.fleet.lock().unwrap();
    let named = |name: &String| fleet.devices.iter().find(|it| it.name == *name).cloned();
    let items = names.iter().filter_map(named).collect();
    Json(Page { items, cursor: names.pop().filter(|_| more) })
}

async fn device(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    let fleet = shared.fleet.lock().unwrap();
    let found = fleet.devices.iter().find(|it| it.name == id || it.id.as_str() == id);
    one(found, "there is no such device")
}

async fn release(
    State(shared): State<Shared>,
    Path((model, version)): Path<(String, String)>,
) -> Response {
    let fleet = shared.fleet.lock().unwrap();
    let same = |it: &&Release| {
        it.release.model.as_str() == model && it.release.version.to_string() == version
    };
    one(fleet.releases.iter().find(same), "there is no such release")
}

/// As the hub shows it.
fn counted(rollout: &Rollout) -> Rollout {
    let mut rollout = rollout.clone();
    rollout.recount();
    rollout
}

async fn rollout(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    let fleet = shared.fleet.lock().unwrap();
    let found = fleet.rollouts.iter().find(|it| it.id.as_str() == id).map(counted);
    one(found.as_ref(), "there is no such rollout")
}

async fn act(State(shared): State<Shared>, Path((id, action)): Path<(String, String)>) -> Response {
    let mut fleet = shared.fleet.lock().unwrap();
    fleet.acts.push(format!("{id} {action}"));
    let Some(found) = fleet.rollouts.iter_mut().find(|it| it.id.as_str() == id) else {
        return problem(StatusCode::NOT_FOUND, "there is no such rollout");
    };
    match action.as_str() {
        "pause" => found.state = RolloutState::Paused,
        "resume" => found.state = RolloutState::Running,
        _ => return problem(StatusCode::FORBIDDEN, "this needs an operator"),
    }
    Json(found.clone()).into_response()
}

async fn webhooks(State(shared): State<Shared>) -> Response {
    let fleet = shared.fleet.lock().unwrap();
    match fleet.role {
        Role::Viewer => problem(StatusCode::FORBIDDEN, "this needs an operator"),
        _ => Json(Page { items: fleet.webhooks.clone(), cursor: None }).into_response(),
    }
}

async fn deliveries(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Json<Page<Delivery>> {
    let wanted = |it: &&Delivery| {
        let of = it.message.contains(&id);
        of && query.get("state").is_none_or(|state| it.state.name() == state)
    };
    listing(&shared, |fleet| fleet.deliveries.iter().filter(wanted).cloned().collect())
}

async fn redeliver(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    Json(asked): Json<Redeliver>,
) -> Json<Redelivered> {
    let mut fleet = shared.fleet.lock().unwrap();
    fleet.acts.push(format!("{id} redeliver {:?}", asked.sequence));
    let mut found = 0;
    let dead = |it: &&mut Delivery| {
        it.state == DeliveryState::Dead && asked.sequence.is_none_or(|one| one == it.sequence)
    };
    for delivery in fleet.deliveries.iter_mut().filter(dead) {
        delivery.state = DeliveryState::Pending;
        found += 1;
    }
    for webhook in &mut fleet.webhooks {
        webhook.dead = webhook.dead.saturating_sub(found);
    }
    Json(Redelivered { deliveries: found })
}

async fn telemetry(
    State(shared): State<Shared>,
    Query(query): Query<TelemetryQuery>,
) -> Json<Page<TelemetrySeries>> {
    let of = |it: &&TelemetrySeries| query.model.as_ref().is_none_or(|model| it.model == *model);
    listing(&shared, |fleet| fleet.telemetry.iter().filter(of).cloned().collect())
}

async fn audit(
    State(shared): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Json<Page<AuditEntry>> {
    const ENTRIES: usize = 15;
    let before = query.get("cursor").and_then(|it| it.parse().ok()).unwrap_or(u64::MAX);
    let fleet = shared.fleet.lock().unwrap();
    let older = fleet.audit.iter().rev().filter(|entry| entry.sequence < before);
    let items: Vec<_> = older.take(ENTRIES).cloned().collect();
    let last = items.last().map_or(0, |entry| entry.sequence);
    Json(Page { items, cursor: (last > 1).then(|| last.to_string()) })
}

async fn verify(State(shared): State<Shared>) -> Json<AuditVerdict> {
    let fleet = shared.fleet.lock().unwrap();
    let head = fleet.audit.last().map_or(Digest::from([0; 32]), |entry| entry.hash);
    let entries = fleet.audit.len() as u64;
    Json(AuditVerdict { entries, head, from: 0, broken: None, cursor: None })
}

async fn whoami(State(shared): State<Shared>) -> Json<Identity> {
    let role = shared.fleet.lock().unwrap().role;
    Json(Identity { name: "ada".to_owned(), role })
}

async fn events(State(shared): State<Shared>) -> Response {
    if !*shared.open.borrow() {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "the events are cut");
    }
    Sse::new(notices(&shared)).into_response()
}

fn notices(shared: &Shared) -> impl Stream<Item = Result<Event, Infallible>> + use<> {
    let mut open = shared.open.subscribe();
    let cut = async move {
        // An error means that the stage is gone: that ends the stream as well.
        let _ = open.wait_for(|open| !*open).await;
    };
    let notices = BroadcastStream::new(shared.events.subscribe());
    let hello = stream::once(async { Ok(Event::default().comment("hello")) });
    let changed = notices
        .filter_map(|notice| async { notice.ok() })
        .map(|notice| Ok(Event::default().event("changed").data(notice)));
    hello.chain(changed).take_until(Box::pin(cut))
}
