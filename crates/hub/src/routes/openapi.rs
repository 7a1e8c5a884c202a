//! The OpenAPI document, derived from the handlers and their types.

use axum::Json;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{
    channels, devices, fleet, metrics, operators, orders, releases, rollouts, telemetry, webhooks,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "slmops hub",
        description = "The control plane of a fleet that runs small language models. Errors are \
                       RFC 9457 problem details. The registry under /v2/ follows the OCI \
                       distribution specification and is not described here.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        devices::enrol, devices::challenge, devices::token, devices::desired, devices::report,
        devices::sources,
        fleet::invite, fleet::invitations, fleet::withdraw_invitation,
        fleet::summary, telemetry::series, fleet::devices, fleet::device, fleet::change_device, fleet::revoke_device,
        fleet::explain, fleet::history,
        orders::pin, orders::unpin, orders::exclude, orders::include,
        orders::quarantine, orders::lift,
        fleet::classes, fleet::put_class, fleet::delete_class,
        fleet::blueprints, fleet::put_blueprint, fleet::delete_blueprint, fleet::events,
        releases::create, releases::list, releases::get, releases::deltas,
        channels::list, channels::put, channels::delete, channels::promote,
        channels::forecast,
        webhooks::create, webhooks::list, webhooks::remove, webhooks::rotate, webhooks::test, webhooks::deliveries,
        webhooks::redeliver,
        rollouts::create, rollouts::forecast, rollouts::list, rollouts::get, rollouts::devices,
        rollouts::foresee, rollouts::why, rollouts::transfers, rollouts::pause,
        rollouts::resume, rollouts::approve, rollouts::abort, rollouts::rollback,
        operators::whoami, operators::audit, operators::verify_audit, operators::tokens, operators::create_token,
        operators::delete_token, operators::keys, operators::add_key, operators::health,
        metrics::show, show,
    ),
    modifiers(&BearerToken),
    security(("bearer" = [])),
    tags(
        (name = "device", description = "What devices call"),
        (name = "fleet", description = "Invitations, devices, classes and blueprints"),
        (name = "releases", description = "Versions of models and their variants"),
        (name = "rollouts", description = "Releases on their way to devices"),
        (name = "webhooks", description = "The audit log, event by event, to other programs"),
        (name = "access", description = "Operator tokens and publisher keys"),
        (name = "audit", description = "Who did what"),
        (name = "hub", description = "The hub itself"),
    )
)]
struct Document;

struct BearerToken;

impl Modify for BearerToken {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("An operator token (slmt_…) or a device token (slmd_…)"))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

/// The document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "hub", security(()),
    responses((status = 200, content_type = "application/json", body = Object)))]
pub async fn show() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}
