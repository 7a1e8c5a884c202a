//! Tokens, publisher keys, the audit log and the hub's own health.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use slmops_api::audit::{AuditEntry, AuditVerdict, CreatedToken, Identity, NewToken, Token};
use slmops_api::device::PublisherKey;
use slmops_api::problem::Problem;
use slmops_api::{Page, TokenId};
use slmops_artifact::signing::PublicKey;

use super::input::{Body, PageQuery, Path, Query};
use super::{ApiError, AppState, by, new_id};
use crate::auth::{self, AsAdmin, AsViewer, Caller};
use crate::store::{CheckFrom, parse_cursor};

/// The longest name of a token or key, in bytes.
const MAX_LABEL_BYTES: usize = 100;
/// The longest validity of a token, in seconds: 10 years.
const MAX_TOKEN_S: u64 = 10 * 365 * 24 * 3600;

fn check_label(name: &str) -> Result<(), ApiError> {
    let good = (1..=MAX_LABEL_BYTES).contains(&name.len())
        && !name.chars().any(char::is_control)
        && name.trim() == name;
    if good {
        return Ok(());
    }
    let detail = "the name is empty, too long, or no plain text";
    Err(ApiError::bad_request(detail, format!("use 1 to {MAX_LABEL_BYTES} plain characters")))
}

/// Whose token this is, so that a program offers no more than its holder may do.
#[utoipa::path(get, path = "/v1/whoami", tag = "access",
    responses((status = 200, body = Identity)))]
pub async fn whoami(AsViewer(operator): AsViewer) -> Json<Identity> {
    Json(Identity { name: operator.name, role: operator.role })
}

/// Audit entries, newest first.
#[utoipa::path(get, path = "/v1/audit", tag = "audit",
    params(("cursor" = Option<String>, Query), ("limit" = Option<u32>, Query)),
    responses((status = 200, body = Page<AuditEntry>)))]
pub async fn audit(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<AuditEntry>>, ApiError> {
    Ok(Json(state.store.audit(query.into()).await?))
}

/// Where to begin checking the audit chain.
#[derive(Deserialize)]
pub struct VerifyQuery {
    #[serde(default)]
    full: bool,
    cursor: Option<String>,
}

/// Check the audit chain: what came since it was last checked, or all of it. At most 10,000 entries at
/// once; the answer's `cursor` goes on.
#[utoipa::path(get, path = "/v1/audit/verify", tag = "audit",
    params(("full" = Option<bool>, Query, description = "From the first entry on"),
        ("cursor" = Option<String>, Query, description = "Of the answer before")),
    responses((status = 200, body = AuditVerdict), (status = 400, body = Problem)))]
pub async fn verify_audit(
    State(state): State<AppState>,
    AsViewer(_): AsViewer,
    Query(VerifyQuery { full, cursor }): Query<VerifyQuery>,
) -> Result<Json<AuditVerdict>, ApiError> {
    let from = match cursor {
        Some(cursor) => parse_cursor(&cursor).ok_or_else(|| {
            let hint = "use the `cursor` of the answer before, unchanged";
            ApiError::bad_request("`cursor` is no cursor", hint)
        })?,
        None if full => CheckFrom::start(),
        None => CheckFrom::Checkpoint,
    };
    Ok(Json(state.store.verify_audit(from).await?))
}

/// All operator tokens, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "access",
    responses((status = 200, body = Page<Token>)))]
pub async fn tokens(
    State(state): State<AppState>,
    AsAdmin(_): AsAdmin,
) -> Result<Json<Page<Token>>, ApiError> {
    Ok(Json(Page { items: state.store.tokens().await?, cursor: None }))
}

/// Make an operator token; its secret is shown once.
#[utoipa::path(post, path = "/v1/tokens", tag = "access", request_body = NewToken,
    responses((status = 201, body = CreatedToken), (status = 400, body = Problem)))]
pub async fn create_token(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Body(wanted): Body<NewToken>,
) -> Result<(StatusCode, Json<CreatedToken>), ApiError> {
    check_label(&wanted.name)?;
    let by = by(&operator);
    let expires_at = match wanted.valid_s {
        Some(valid_s) if (1..=MAX_TOKEN_S).contains(&valid_s) => {
            by.at.checked_add(SignedDuration::from_secs(valid_s as i64)).ok()
        }
        Some(_) => {
            return Err(ApiError::bad_request(
                "valid_s is not within 1 s to 10 years",
                "leave it out for a token that does not expire",
            ));
        }
        None => None,
    };
    let secret = auth::new_operator_token();
    let token = Token {
        id: new_id("t"),
        name: wanted.name,
        role: wanted.role,
        created_at: by.at,
        expires_at,
    };
    state.store.add_token(by, token.clone(), secret.hash()).await?;
    state.events.announce("token", &token.id);
    let created = CreatedToken { token, secret: secret.expose().to_owned() };
    Ok((StatusCode::CREATED, Json(created)))
}

/// Remove an operator token; it stops working at once.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "access", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub async fn delete_token(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Path(id): Path<TokenId>,
) -> Result<StatusCode, ApiError> {
    state.store.delete_token(by(&operator), id.clone()).await?;
    state.events.announce("token", &id);
    Ok(StatusCode::NO_CONTENT)
}

/// The publisher keys whose signatures the fleet accepts. Devices may ask too.
#[utoipa::path(get, path = "/v1/keys", tag = "access",
    responses((status = 200, body = Page<PublisherKey>)))]
pub async fn keys(
    State(state): State<AppState>,
    _caller: Caller,
) -> Result<Json<Page<PublisherKey>>, ApiError> {
    Ok(Json(Page { items: state.store.keys().await?, cursor: None }))
}

/// Register a publisher key. Its id must be the key's own.
#[utoipa::path(post, path = "/v1/keys", tag = "access", request_body = PublisherKey,
    responses((status = 201, body = PublisherKey), (status = 400, body = Problem)))]
pub async fn add_key(
    State(state): State<AppState>,
    AsAdmin(operator): AsAdmin,
    Body(wanted): Body<PublisherKey>,
) -> Result<(StatusCode, Json<PublisherKey>), ApiError> {
    check_label(&wanted.name)?;
    let key = PublicKey::from_pem(&wanted.public_key).map_err(|error| {
        let text = error.to_string();
        let detail = text.split("\nhint: ").next().unwrap_or_default().to_owned();
        ApiError::bad_request(
            detail,
            "send a P-256 public key as SPKI PEM; `slm key create` makes one",
        )
    })?;
    if key.id() != wanted.id.as_str() {
        let detail = format!("the key's id is {}, not {}", key.id(), wanted.id);
        return Err(ApiError::bad_request(
            detail,
            "the id is the first 16 hex digits of the SHA-256 of the SPKI DER",
        ));
    }
    if wanted.is_expired(Timestamp::now()) {
        return Err(ApiError::bad_request(
            format!("key {} has expired already", wanted.name),
            "choose a later end, or none: `slm key create NAME --valid-days 365`",
        ));
    }
    if let Some(endorsement) = &wanted.endorsement {
        let keys = state.store.keys().await?;
        let by = keys.iter().find(|key| key.id == endorsement.by);
        if !by.is_some_and(|by| wanted.is_endorsed_by(by) && !by.is_expired(Timestamp::now())) {
            return Err(ApiError::bad_request(
                format!("key {} does not vouch for key {} as it is", endorsement.by, wanted.id),
                "the vouching key must be registered and in its time: `slm key list`",
            ));
        }
    }
    let stored = PublisherKey { public_key: key.to_pem().to_owned(), ..wanted };
    state.store.add_key(by(&operator), stored.clone()).await?;
    state.events.announce("key", &stored.id);
    Ok((StatusCode::CREATED, Json(stored)))
}

/// Whether the hub works: it can read its database.
#[utoipa::path(get, path = "/health", tag = "hub", security(()),
    responses((status = 200, content_type = "text/plain", body = String)))]
pub async fn health(State(state): State<AppState>) -> Result<&'static str, ApiError> {
    state.store.classes().await?;
    Ok("ok\n")
}
