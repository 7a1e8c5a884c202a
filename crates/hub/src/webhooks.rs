//! Tells other programs of what the audit log says: a CloudEvent for each entry that a webhook wants,
//! signed, and tried until it is taken or given up.
//! It never reads an answer's body. Start reading at [`Dispatcher::run`]; what is kept is in
//! `store/webhooks.rs`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use jiff::{SignedDuration, Timestamp};
use rand::Rng as _;
use reqwest::{Client, Url, header, redirect};
use serde_json::json;
use sha2::Sha256;
use slmops_api::WebhookId;
use slmops_api::audit::AuditEntry;
use slmops_api::webhook::{
    DeliveryState, EVENT_TYPE_PREFIX, NewWebhook, SECRET_PREFIX, WebhookRetry,
};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use crate::auth::Secret;
use crate::engine::stopped;
use crate::events::Events;
use crate::store::{Attempted, Leased, Store, StoreError, WebhookRow, message_id};
use crate::tls::{self, TlsError};

/// How often webhooks are looked at even if nothing is heard: what other hubs on the same database
/// wrote, and what becomes due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Events of one webhook that are on their way at once.
const AT_ONCE: u32 = 8;
/// How long changes are let come in before they are looked at: a large fleet reports all the time.
const SETTLE: Duration = Duration::from_millis(50);
/// How soon a client that could not be made is tried again.
const RETRY_CLIENT: Duration = Duration::from_secs(60);
/// A lease is longer than an attempt may take by this.
const LEASE_MARGIN: Duration = Duration::from_secs(2);
/// The media type of a CloudEvent in structured JSON (CloudEvents 1.0, HTTP binding, section 3.2).
const CLOUD_EVENT: &str = "application/cloudevents+json; charset=utf-8";

/// Why a URL is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{shown}` cannot be a webhook: {why}")]
pub struct UrlError {
    shown: String,
    why: &'static str,
}

/// Checks where events may be posted to. Private addresses are good, since receivers are often in the
/// same network as the hub; addresses by which a cloud machine tells its secrets are not.
///
/// # Errors
/// [`UrlError`]; the URL's query is not in it, since it may be a secret.
pub fn check_url(given: &str) -> Result<Url, UrlError> {
    let shown: String = given.split('?').next().unwrap_or_default().chars().take(100).collect();
    let refused = |why| UrlError { shown: shown.clone(), why };
    let url = Url::parse(given).map_err(|_| refused("it is no URL"))?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err(refused("its scheme is neither https nor http"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("it holds a password"));
    }
    if url.fragment().is_some() {
        return Err(refused("it has a fragment, which no receiver gets"));
    }
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    if let Ok(ip) = host.parse::<std::net::IpAddr>() {
        let local = match ip.to_canonical() {
            std::net::IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
            std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        if local || ip.is_unspecified() || ip.is_multicast() {
            return Err(refused("nothing that takes webhooks has such an address"));
        }
    }
    Ok(url)
}

/// The client that posts to a webhook. It follows no redirect and uses no proxy, so that events go
/// where an administrator said, or nowhere.
///
/// # Errors
/// If the webhook's CA cannot be used.
pub fn client(asked: &NewWebhook) -> Result<Client, TlsError> {
    let tls = match &asked.ca_pem {
        Some(pem) => tls::client_config(pem)?,
        None => tls::system_client_config()?,
    };
    Ok(Client::builder()
        .use_preconfigured_tls(tls)
        .user_agent(concat!("slmops/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .no_proxy()
        .pool_max_idle_per_host(AT_ONCE as usize)
        .build()
        .expect("a client of constant settings is made"))
}

/// An entry of the audit log as a CloudEvent 1.0 in JSON.
fn cloud_event(source: &str, entry: &AuditEntry) -> Vec<u8> {
    let event = json!({
        "specversion": "1.0",
        "id": entry.hash,
        "source": source,
        "type": format!("{EVENT_TYPE_PREFIX}{}", entry.action),
        "subject": entry.object,
        "time": entry.at,
        "datacontenttype": "application/json",
        "data": {
            "sequence": entry.sequence,
            "actor": entry.actor,
            "action": entry.action,
            "object": entry.object,
            "details": entry.details,
        },
    });
    event.to_string().into_bytes()
}

/// `webhook-signature`: HMAC-SHA256 over `id.timestamp.body` (Standard Webhooks 1.0, "Signature
/// scheme").
fn signature(secret: &Secret, message: &str, timestamp: i64, body: &[u8]) -> String {
    let key = secret.expose().trim_start_matches(SECRET_PREFIX);
    // A secret that this program made is base64.
    let key = STANDARD.decode(key).unwrap_or_default();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("HMAC takes keys of any length");
    mac.update(format!("{message}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

/// How long to wait after so many attempts: doubled each time, less up to half by chance, so that
/// what failed together does not come back together.
fn delay(retry: &WebhookRetry, attempts: u32) -> Duration {
    let doubled = retry.first_delay_ms.saturating_mul(1 << attempts.saturating_sub(1).min(30));
    let most = doubled.min(retry.max_delay_ms);
    Duration::from_millis(rand::rng().random_range(most / 2..=most))
}

/// Delivers what webhooks want.
pub struct Dispatcher {
    /// Where webhooks, deliveries and the audit log are.
    pub store: Arc<dyn Store>,
    /// Says that something changed.
    pub events: Events,
    /// The hub, as events name their source.
    pub source: String,
}

/// What a round did for a webhook.
enum Round {
    /// Nothing was due; when something will be, if that is known.
    Quiet(Option<Timestamp>),
    /// Everything that was tried was taken.
    Taken,
    /// Something was not.
    Failed,
}

/// What is remembered of a webhook between rounds; none of it must be.
#[derive(Default)]
struct Place {
    client: Option<Client>,
    /// Rounds in a row that failed.
    failures: u32,
    /// Not looked at before, after a failure: a receiver that is down is asked once in a while,
    /// and not by each event.
    rests_until: Option<tokio::time::Instant>,
}

impl Dispatcher {
    /// Delivers until `stop` turns true. What is on its way then is tried again later.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let source: Arc<str> = self.source.into();
        let mut changes = self.events.subscribe();
        let mut places: HashMap<WebhookId, Place> = HashMap::new();
        let mut busy: HashSet<WebhookId> = HashSet::new();
        let mut rounds: JoinSet<(WebhookRow, Result<Round, StoreError>)> = JoinSet::new();
        loop {
            match self.store.webhooks().await {
                Ok(rows) => {
                    places.retain(|id, _| rows.iter().any(|row| row.webhook.id == *id));
                    for row in rows {
                        let id = row.webhook.id.clone();
                        let place = places.entry(id.clone()).or_default();
                        let rests = place
                            .rests_until
                            .is_some_and(|until| until > tokio::time::Instant::now());
                        if rests || busy.contains(&id) {
                            continue;
                        }
                        let Some(client) = client_of(place, &row) else { continue };
                        // After a failure one event asks whether the receiver is back.
                        let at_once = if place.failures > 0 { 1 } else { AT_ONCE };
                        busy.insert(id);
                        let (store, source) = (Arc::clone(&self.store), Arc::clone(&source));
                        rounds.spawn(async move {
                            let done = round(&*store, &client, &row, &source, at_once).await;
                            (row, done)
                        });
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot look at the webhooks"),
            }
            tokio::select! {
                Some(ended) = rounds.join_next() => {
                    let Ok((row, done)) = ended else { continue };
                    busy.remove(&row.webhook.id);
                    if let Some(place) = places.get_mut(&row.webhook.id) {
                        place.note(&row, done);
                    }
                }
                changed = changes.recv() => {
                    // What comes together is looked at together.
                    if let Err(broadcast::error::RecvError::Closed) = changed {
                        break;
                    }
                    tokio::time::sleep(SETTLE).await;
                    changes = changes.resubscribe();
                    for place in places.values_mut().filter(|place| place.failures == 0) {
                        place.rests_until = None;
                    }
                }
                () = tokio::time::sleep(until_next(&places)) => {}
                () = stopped(&mut stop) => break,
            }
        }
    }
}

/// How long nothing must be looked at.
fn until_next(places: &HashMap<WebhookId, Place>) -> Duration {
    let now = tokio::time::Instant::now();
    let rests = places.values().filter_map(|place| place.rests_until).filter(|at| *at > now);
    rests.min().map_or(LOOK_EVERY, |at| (at - now).min(LOOK_EVERY))
}

impl Place {
    fn note(&mut self, row: &WebhookRow, done: Result<Round, StoreError>) {
        let webhook = &row.webhook;
        let rest = match done {
            Ok(Round::Quiet(due)) => {
                let left = due.map(|at| at.duration_since(Timestamp::now()));
                let left = left.map(|left| Duration::try_from(left).unwrap_or(Duration::ZERO));
                Some(left.map_or(LOOK_EVERY, |left| left.min(LOOK_EVERY)))
            }
            Ok(Round::Taken) => {
                self.failures = 0;
                None
            }
            Ok(Round::Failed) => {
                self.failures = self.failures.saturating_add(1);
                Some(delay(&webhook.asked.retry, self.failures))
            }
            Err(error) => {
                tracing::warn!(%error, webhook = %webhook.id, "cannot deliver");
                Some(LOOK_EVERY)
            }
        };
        self.rests_until = rest.map(|rest| tokio::time::Instant::now() + rest);
    }
}

fn client_of(place: &mut Place, row: &WebhookRow) -> Option<Client> {
    if place.client.is_none() {
        match client(&row.webhook.asked) {
            Ok(client) => place.client = Some(client),
            Err(error) => {
                tracing::warn!(%error, webhook = %row.webhook.id, "cannot deliver");
                place.rests_until = Some(tokio::time::Instant::now() + RETRY_CLIENT);
            }
        }
    }
    place.client.clone()
}

/// Takes what is due, tries each once, and notes what became of it.
async fn round(
    store: &dyn Store,
    client: &Client,
    row: &WebhookRow,
    source: &str,
    at_once: u32,
) -> Result<Round, StoreError> {
    let id = &row.webhook.id;
    let now = Timestamp::now();
    let due = store.webhook_work_at(id.clone(), now).await?;
    if due.is_none_or(|at| at > now) {
        return Ok(Round::Quiet(due));
    }
    let retry = row.webhook.asked.retry;
    let lease = Duration::from_millis(retry.timeout_ms) + LEASE_MARGIN;
    let until = after(now, lease);
    let leased = store.lease_deliveries(id.clone(), now, until, at_once).await?;
    if leased.is_empty() {
        // Of the entries that came none was wanted, or another hub was quicker: there may be more.
        return Ok(Round::Taken);
    }
    let attempts = leased.iter().map(|leased| attempt(client, row, source, leased));
    let attempted = futures_util::future::join_all(attempts).await;
    let failed = attempted.iter().any(|one| one.state != DeliveryState::Delivered);
    for one in attempted.iter().filter(|one| one.state == DeliveryState::Dead) {
        let (sequence, last) = (one.sequence, &one.last);
        tracing::warn!(webhook = %id, sequence, last, "gave an event up; `slm webhook redeliver`");
    }
    store.finish_deliveries(id.clone(), attempted).await?;
    Ok(if failed { Round::Failed } else { Round::Taken })
}

fn after(now: Timestamp, wait: Duration) -> Timestamp {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    now.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// Posts one event once.
async fn attempt(client: &Client, row: &WebhookRow, source: &str, leased: &Leased) -> Attempted {
    let entry = &leased.entry;
    let retry = &row.webhook.asked.retry;
    let message = message_id(&row.webhook.id, entry.sequence);
    let body = cloud_event(source, entry);
    let now = Timestamp::now();
    let timestamp = now.as_second();
    // One for each secret that holds (Standard Webhooks 1.0, "Multiple signatures").
    let signatures = row.secrets(now).map(|secret| signature(secret, &message, timestamp, &body));
    let signatures = signatures.collect::<Vec<_>>().join(" ");
    let request = client
        .post(&row.webhook.asked.url)
        .timeout(Duration::from_millis(retry.timeout_ms))
        .header(header::CONTENT_TYPE, CLOUD_EVENT)
        .header("webhook-signature", signatures)
        .header("webhook-timestamp", timestamp.to_string())
        .header("webhook-id", message);
    let (taken, last) = match request.body(body).send().await {
        Ok(answer) => (answer.status().is_success(), answer.status().as_u16().to_string()),
        Err(error) if error.is_timeout() => (false, "no answer in time".to_owned()),
        Err(error) if error.is_connect() => (false, "no connection".to_owned()),
        Err(_) => (false, "the connection broke".to_owned()),
    };
    let attempts = leased.attempts + 1;
    let state = match taken {
        true => DeliveryState::Delivered,
        false if attempts >= retry.attempts => DeliveryState::Dead,
        false => DeliveryState::Pending,
    };
    Attempted {
        sequence: entry.sequence,
        attempts: leased.attempts,
        state,
        next_at: after(Timestamp::now(), delay(retry, attempts)),
        last,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_standard_webhooks() {
        // The vector of the reference libraries (standard-webhooks).
        let secret = Secret::kept("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned());
        let found = signature(
            &secret,
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(found, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn only_http_urls_that_could_be_receivers() {
        for good in ["https://example.com/hook?key=1", "http://127.0.0.1:80/", "http://[::1]/x"] {
            assert!(check_url(good).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("", "no URL"),
            ("example.com/hook", "no URL"),
            ("ftp://example.com", "neither https nor http"),
            ("file:///etc/passwd", "neither https nor http"),
            ("javascript:alert(1)", "neither https nor http"),
            ("https://ann:secret@example.com/", "password"),
            ("https://example.com/#x", "fragment"),
            ("http://169.254.169.254/latest/meta-data", "such an address"),
            ("http://[fe80::1]/", "such an address"),
            ("http://[::ffff:169.254.169.254]/", "such an address"),
            ("http://0.0.0.0/", "such an address"),
            ("http://2852039166/", "such an address"),
        ] {
            let error = check_url(bad).expect_err(bad).to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
        let secret = check_url("ftp://example.com/?key=hidden").unwrap_err().to_string();
        assert!(!secret.contains("hidden"), "{secret}");
    }

    #[test]
    fn delays_grow_to_their_bound() {
        let retry = WebhookRetry { first_delay_ms: 100, max_delay_ms: 1000, ..Default::default() };
        for (attempts, most) in [(1, 100), (2, 200), (4, 800), (5, 1000), (60, 1000)] {
            let delay = delay(&retry, attempts).as_millis() as u64;
            assert!((most / 2..=most).contains(&delay), "{attempts}: {delay}");
        }
    }
}
