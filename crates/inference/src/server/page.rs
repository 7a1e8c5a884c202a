//! `GET /`: a page for trying the model by hand. It is one file that asks this endpoint and nobody
//! else, holds no data of its own, and forgets everything with the tab.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use slmops_artifact::Digest;

const TEXT: &str = include_str!("page.html");

/// Nothing but the page's own script and style may run, and nothing but this endpoint be asked.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digest = |tag: &str| {
        let (_, rest) = TEXT.split_once(&format!("<{tag}>")).expect("the page has one");
        let (inside, _) = rest.split_once(&format!("</{tag}>")).expect("the page has one");
        STANDARD.encode(Digest::of(inside.as_bytes()).as_bytes())
    };
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
        digest("script"),
        digest("style"),
    )
});

pub(super) async fn show() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, TEXT).into_response()
}
