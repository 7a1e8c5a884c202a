//! The pages that people look at: static files, embedded, served with strict headers.
//! They hold no data of their own; the page asks the API with the viewer's token.
//! Start reading at [`router`], then `assets/main.js`.

mod assets;
#[cfg(test)]
mod tests;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use assets::Asset;

/// Nothing but the hub's own files may run, style or be asked; nothing is ever parsed as markup.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// Every path that the page's own router draws; each answers with the same document, so that a
/// link to a page can be opened, kept and sent.
const PAGES: &[&str] = &[
    "/",
    "/fleet",
    "/devices/{device}",
    "/releases",
    "/releases/{model}/{version}",
    "/rollouts",
    "/rollouts/{rollout}",
    "/channels",
    "/held",
    "/webhooks",
    "/audit",
];

/// The dashboard's routes. They need no state and no authentication: the files are public, the
/// data behind them is not.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let pages = PAGES.iter().fold(Router::new(), |router, path| router.route(path, get(document)));
    pages.route("/assets/{*path}", get(asset)).route("/favicon.ico", get(favicon))
}

async fn document(headers: HeaderMap) -> Response {
    answer(assets::document(), &headers)
}

async fn favicon(headers: HeaderMap) -> Response {
    match assets::find("logo.svg") {
        Some(asset) => answer(asset, &headers),
        None => missing(),
    }
}

async fn asset(Path(path): Path<String>, headers: HeaderMap) -> Response {
    match assets::find(&path) {
        Some(asset) => answer(asset, &headers),
        None => missing(),
    }
}

fn missing() -> Response {
    strict((StatusCode::NOT_FOUND, "no such file\n").into_response())
}

fn answer(asset: &'static Asset, headers: &HeaderMap) -> Response {
    let known = headers.get_all(header::IF_NONE_MATCH).iter().any(|value| {
        value.to_str().is_ok_and(|tags| {
            tags.split(',').map(str::trim).any(|tag| {
                // The comparison is weak for If-None-Match (RFC 9110, section 13.1.2).
                tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == asset.etag
            })
        })
    });
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, asset.media_type)], asset.bytes).into_response()
    };
    if let Ok(etag) = HeaderValue::from_str(&asset.etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    strict(response)
}

fn strict(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Kept, but asked about each time: a new hub never runs with an old page.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}
