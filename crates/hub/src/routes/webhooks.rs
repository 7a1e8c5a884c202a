//! Webhooks.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::SignedDuration;
use serde::Deserialize;
use slmops_api::problem::Problem;
use slmops_api::webhook::{
    ATTEMPTS, CreatedWebhook, Delivery, DeliveryState, FIRST_DELAY_MS, MAX_DELAY_MS, MAX_OVERLAP_S,
    NewWebhook, Redeliver, Redelivered, Rotate, TIMEOUT_MS, Webhook,
};
use slmops_api::{Page, WebhookId};

use super::input::{Body, Path, Query};
use super::{ApiError, AppState, by, new_id};
use crate::auth::{self, AsAdmin, AsOperator};
use crate::store::{MAX_PAGE, PageRequest};
use crate::tls::TlsError;
use crate::webhooks;

/// How long two secrets sign unless asked otherwise, in seconds.
const DEFAULT_OVERLAP_S: u64 = 24 * 3600;
/// The longest URL, in bytes.
const MAX_URL_BYTES: usize = 2000;
/// The most patterns of one webhook.
const MAX_PATTERNS: usize = 32;
/// The longest pattern, in bytes.
const MAX_PATTERN_BYTES: usize = 64;

fn check(asked: &NewWebhook) -> Result<(), ApiError> {
    let url_hint =
        "write it as https://host/path; http:// is for networks that nobody listens in on";
    if asked.url.len() > MAX_URL_BYTES {
        let detail = format!("the URL is longer than {MAX_URL_BYTES} bytes");
        return Err(ApiError::bad_request(detail, url_hint));
    }
    webhooks::check_url(&asked.url)
        .map_err(|error| ApiError::bad_request(error.to_string(), url_hint))?;
    let good = |pattern: &String| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let plain = |byte: u8| byte.is_ascii_lowercase() || b"._".contains(&byte);
        (1..=MAX_PATTERN_BYTES).contains(&pattern.len()) && name.bytes().all(plain)
    };
    if !(1..=MAX_PATTERNS).contains(&asked.events.len()) || !asked.events.iter().all(good) {
        return Err(ApiError::bad_request(
            format!("`events` are not 1 to {MAX_PATTERNS} actions of the audit log"),
            "write `rollout.decide`, `rollout.*` or `*`; `slm audit list` shows actions",
        ));
    }
    let retry = &asked.retry;
    for (name, value, (least, most)) in [
        ("attempts", u64::from(retry.attempts), (u64::from(ATTEMPTS.0), u64::from(ATTEMPTS.1))),
        ("first_delay_ms", retry.first_delay_ms, FIRST_DELAY_MS),
        ("max_delay_ms", retry.max_delay_ms, MAX_DELAY_MS),
        ("timeout_ms", retry.timeout_ms, TIMEOUT_MS),
    ] {
        if !(least..=most).contains(&value) {
            return Err(ApiError::bad_request(
                format!("retry.{name} = {value} is not within {least} to {most}"),
                "choose a value within the bounds",
            ));
        }
    }
    webhooks::client(asked).map(|_| ()).map_err(|error| match error {
        TlsError::ClientCa { reason } => ApiError::bad_request(
            format!("`ca_pem`: {reason}"),
            "send the CA of the receiver's certificate in PEM (`--ca FILE`)",
        ),
        error => ApiError::bad_request(error.to_string(), "send another CA"),
    })
}

/// Tell another program of events from now on. The answer holds the secret of the signatures, once.
#[utoipa::path(post, path = "/v1/webhooks", tag = "webhooks", request_body = NewWebhook,
    responses((status = 201, body = CreatedWebhook), (status = 400, body = Problem),
        (status = 409, body = Problem)))]
pub async fn create(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Body(asked): Body<NewWebhook>,
) -> Result<(StatusCode, Json<CreatedWebhook>), ApiError> {
    check(&asked)?;
    let id: WebhookId = new_id("w");
    let secret = auth::new_webhook_secret();
    let webhook = state.store.add_webhook(by(&operator), id, asked, secret.clone()).await?;
    state.events.announce("webhook", &webhook.id);
    let created = CreatedWebhook { webhook, secret: secret.expose().to_owned() };
    Ok((StatusCode::CREATED, Json(created)))
}

/// All webhooks, without their secrets.
#[utoipa::path(get, path = "/v1/webhooks", tag = "webhooks",
    responses((status = 200, body = Page<Webhook>)))]
pub async fn list(
    State(state): State<AppState>,
    AsOperator(_): AsOperator,
) -> Result<Json<Page<Webhook>>, ApiError> {
    let rows = state.store.webhooks().await?;
    Ok(Json(Page { items: rows.into_iter().map(|row| row.webhook).collect(), cursor: None }))
}

/// Tell it no more.
#[utoipa::path(delete, path = "/v1/webhooks/{id}", tag = "webhooks",
    params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Problem)))]
pub async fn remove(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Path(id): Path<WebhookId>,
) -> Result<StatusCode, ApiError> {
    state.store.remove_webhook(by(&operator), id.clone()).await?;
    state.events.announce("webhook", &id);
    Ok(StatusCode::NO_CONTENT)
}

/// Give it a new secret. Until the overlap is over, events carry a signature by the one before too.
#[utoipa::path(post, path = "/v1/webhooks/{id}/rotate", tag = "webhooks",
    params(("id" = String, Path)), request_body = Rotate,
    responses((status = 200, body = CreatedWebhook), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub async fn rotate(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Path(id): Path<WebhookId>,
    Body(Rotate { overlap_s }): Body<Rotate>,
) -> Result<Json<CreatedWebhook>, ApiError> {
    let overlap_s = overlap_s.unwrap_or(DEFAULT_OVERLAP_S);
    if overlap_s > MAX_OVERLAP_S {
        let detail = format!("`overlap_s` is more than {MAX_OVERLAP_S}");
        return Err(ApiError::bad_request(detail, "change the receiver's secret within 30 days"));
    }
    let secret = auth::new_webhook_secret();
    let by = by(&operator);
    let until = by.at + SignedDuration::from_secs(overlap_s as i64);
    let webhook = state.store.rotate_webhook(by, id, secret.clone(), until).await?;
    state.events.announce("webhook", &webhook.id);
    Ok(Json(CreatedWebhook { webhook, secret: secret.expose().to_owned() }))
}

/// Tell it of a test: `slmops.webhook.test`, by the way that every event goes.
#[utoipa::path(post, path = "/v1/webhooks/{id}/test", tag = "webhooks",
    params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Problem)))]
pub async fn test(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<WebhookId>,
) -> Result<StatusCode, ApiError> {
    state.store.test_webhook(by(&operator), id.clone()).await?;
    state.events.announce("webhook", &id);
    Ok(StatusCode::NO_CONTENT)
}

/// `?state=…&cursor=…&limit=…`.
#[derive(Deserialize)]
pub struct DeliveriesQuery {
    state: Option<DeliveryState>,
    cursor: Option<String>,
    limit: Option<u32>,
}

/// Its deliveries, newest first: those that wait, and the last of the delivered and the dead.
#[utoipa::path(get, path = "/v1/webhooks/{id}/deliveries", tag = "webhooks",
    params(("id" = String, Path), ("state" = Option<DeliveryState>, Query),
        ("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<Delivery>), (status = 404, body = Problem)))]
pub async fn deliveries(
    State(state): State<AppState>,
    AsOperator(_): AsOperator,
    Path(id): Path<WebhookId>,
    Query(query): Query<DeliveriesQuery>,
) -> Result<Json<Page<Delivery>>, ApiError> {
    let limit = query.limit.unwrap_or(PageRequest::default().limit).clamp(1, MAX_PAGE);
    let page = PageRequest { cursor: query.cursor, limit };
    Ok(Json(state.store.deliveries(id, query.state, page).await?))
}

/// Try a delivery again, or all dead ones, as often as new ones are.
#[utoipa::path(post, path = "/v1/webhooks/{id}/redeliver", tag = "webhooks",
    params(("id" = String, Path)), request_body = Redeliver,
    responses((status = 200, body = Redelivered), (status = 404, body = Problem)))]
pub async fn redeliver(
    State(state): State<AppState>,
    AsOperator(operator): AsOperator,
    Path(id): Path<WebhookId>,
    Body(Redeliver { sequence }): Body<Redeliver>,
) -> Result<Json<Redelivered>, ApiError> {
    let deliveries = state.store.redeliver(by(&operator), id.clone(), sequence).await?;
    state.events.announce("webhook", &id);
    Ok(Json(Redelivered { deliveries }))
}
